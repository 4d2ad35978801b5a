//! K-quants: super-blocks of 256 elements, two groups each.
//!
//! Their quants are fields of bytes at strides of 32 or 64, so 16 neighbouring elements, half a block, are the same field
//! of 16 neighbouring bytes: a vector is put together from such quarters, each with its own shift. Scales are small
//! integers: f32 holds their product with a scale in f16, and with the sums of a block, exactly.

use super::{
    elements::{Grid, LONGEST, number},
    products::{Above, Block, PerHalf, PerHalfAbove, Planes, or},
};
use crate::isa::Isa;
use candle_sparse_core::{
    ActivationGroup, BLOCK_LEN, BlockQ2K, BlockQ3K, BlockQ4K, BlockQ5K, BlockQ6K, Columns,
};
use half::f16;

operand!(BlockQ6K: 1 blocks);
operand!(BlockQ5K: 1 blocks);
operand!(BlockQ4K: 1 blocks);
operand!(BlockQ3K: 1 blocks);
operand!(BlockQ2K: 1 blocks);

/// `Block` of one super-block: its quants, and the numbers of the blocks of four groups.
macro_rules! super_block {
    (
        $t:ty: $kind:ty, |$isa:ident, $w:ident, $v:ident, $group:ident| $quants:expr,
        |$blocks:ident, $g:ident, $q:ident| [$($plane:expr),*]
    ) => {
        impl Block<1> for $t {
            type Kind = $kind;
            const GROUPS: usize = 2;

            #[inline(always)]
            fn quants<I: Isa, const $group: usize, const V: usize>($isa: I, [$w]: &[Self; 1]) -> [I::B; 2] {
                let $v = V;
                $quants
            }

            #[inline(always)]
            fn planes<I: Isa>($isa: I, [[a], [b], [c], [d]]: [&[Self; 1]; 4], $g: [usize; 4], $q: usize) -> Planes<I> {
                let ($blocks, mut planes) = ([a, b, c, d], [$isa.splat(0.0); _]);
                let mut i = 0;
                $(
                    planes[i] = $plane;
                    i += 1;
                )*
                let _ = i;
                planes
            }
        }
    };
}

/// An expression of each of four blocks and their groups.
macro_rules! each {
    ($w:ident, |$b:ident| $e:expr) => {
        [
            {
                let $b = $w[0];
                $e
            },
            {
                let $b = $w[1];
                $e
            },
            {
                let $b = $w[2];
                $e
            },
            {
                let $b = $w[3];
                $e
            },
        ]
    };
    ($w:ident $g:ident, |$b:ident, $of:ident| $e:expr) => {
        [
            {
                let ($b, $of) = ($w[0], $g[0]);
                $e
            },
            {
                let ($b, $of) = ($w[1], $g[1]);
                $e
            },
            {
                let ($b, $of) = ($w[2], $g[2]);
                $e
            },
            {
                let ($b, $of) = ($w[3], $g[3]);
                $e
            },
        ]
    };
}

/// A plane of numbers of six bits times one of the block: scales (`d`, 0) or minima (`dmin`, 1).
macro_rules! six_bits {
    ($isa:ident, $w:ident, $g:ident, $q:ident, $d:ident, $which:tt) => {
        $isa.mul(
            $isa.splat_four(each!($w, |b| b.$d), $q),
            $isa.bytes_to_f32(each!($w $g, |b, g| scales_and_mins(&b.scales, g).$which.to_le_bytes()), $q),
        )
    };
}

super_block!(BlockQ6K: PerHalf<5>,
    |isa, w, v, G| or(isa, fields::<I, 4, 64, 0, G>(isa, &w.ql, v), fields::<I, 2, 32, 4, G>(isa, &w.qh, v)),
    |w, g, q| [
        isa.signed_to_f32(each!(w g, |b, g| half_of(signed_at(&b.scales, g), 0)), q),
        isa.signed_to_f32(each!(w g, |b, g| half_of(signed_at(&b.scales, g), 1)), q),
        isa.splat_four(each!(w, |b| b.d), q)
    ]
);
super_block!(BlockQ5K: Above,
    |isa, w, v, G| or(isa, fields::<I, 4, 32, 0, G>(isa, &w.qs, v), fields::<I, 1, 32, 4, G>(isa, &w.qh, v)),
    |w, g, q| [six_bits!(isa, w, g, q, d, 0), six_bits!(isa, w, g, q, dmin, 1)]
);
super_block!(BlockQ4K: Above,
    |isa, w, v, G| fields::<I, 4, 32, 0, G>(isa, &w.qs, v),
    |w, g, q| [six_bits!(isa, w, g, q, d, 0), six_bits!(isa, w, g, q, dmin, 1)]
);
super_block!(BlockQ3K: PerHalf<2>,
    |isa, w, v, G| or(isa, fields::<I, 2, 32, 0, G>(isa, &w.qs, v), fields::<I, 1, 32, 2, G>(isa, &w.hmask, v)),
    |w, g, q| [
        isa.signed_to_f32(each!(w g, |b, g| half_of(scales_q3(&b.scales, g), 0)), q),
        isa.signed_to_f32(each!(w g, |b, g| half_of(scales_q3(&b.scales, g), 1)), q),
        isa.splat_four(each!(w, |b| b.d), q)
    ]
);
super_block!(BlockQ2K: PerHalfAbove,
    |isa, w, v, G| fields::<I, 2, 32, 0, G>(isa, &w.qs, v),
    |w, g, q| [
        isa.bytes_to_f32(each!(w g, |b, g| half_of(u64_at(&b.scales, g) & FOURS, 0)), q),
        isa.bytes_to_f32(each!(w g, |b, g| half_of(u64_at(&b.scales, g) & FOURS, 1)), q),
        isa.splat_four(each!(w, |b| b.d), q),
        isa.bytes_to_f32(each!(w g, |b, g| half_of(u64_at(&b.scales, g) >> 4 & FOURS, 0)), q),
        isa.bytes_to_f32(each!(w g, |b, g| half_of(u64_at(&b.scales, g) >> 4 & FOURS, 1)), q),
        isa.splat_four(each!(w, |b| b.dmin), q)
    ]
);

/// Of bytes in pairs the first or the second ones.
#[inline(always)]
fn half_of(bytes: u64, half: usize) -> [u8; 4] {
    let b = bytes.to_le_bytes();
    [b[half], b[2 + half], b[4 + half], b[6 + half]]
}

/// Both halves of vector `i` of group `G` from a plane of fields, see `planes.rs` of the core: byte `j` of each `STRIDE` bytes
/// has elements `j + k·STRIDE` in its bits `k·BITS..`. They come out shifted left by `SHIFT`.
#[inline(always)]
fn fields<I: Isa, const BITS: usize, const STRIDE: usize, const SHIFT: usize, const G: usize>(
    isa: I,
    bytes: &[u8],
    i: usize,
) -> [I::B; 2] {
    let (low, high) = const { (quarters(BITS, STRIDE, SHIFT, G, 0), quarters(BITS, STRIDE, SHIFT, G, 1)) };
    let mask = (u8::MAX >> (8 - BITS)) << SHIFT;
    let (bytes, _) = bytes.as_chunks();
    let at = |q: [usize; 4]| [&bytes[q[0]], &bytes[q[1]], &bytes[q[2]], &bytes[q[3]]];
    [isa.fields(at(low.0), low.1, mask, i), isa.fields(at(high.0), high.1, mask, i)]
}

/// Which 16 bytes hold a half of each of a group's four blocks, and how far up their bits have to move.
const fn quarters(
    bits: usize,
    stride: usize,
    shift: usize,
    group: usize,
    half: usize,
) -> ([usize; 4], [i8; 4]) {
    let per_stride = stride * 8 / bits;
    let (mut place, mut up) = ([0; 4], [0; 4]);
    let mut b = 0;
    while b < 4 {
        let element = 128 * group + 32 * b + 16 * half;
        place[b] = (element / per_stride * stride + element % stride) / 16;
        up[b] = shift as i8 - (element % per_stride / stride * bits) as i8;
        b += 1;
    }
    (place, up)
}

/// The lower two bits of each byte, the lower four, and the sixth.
const TWOS: u64 = 0x0303_0303_0303_0303;
const FOURS: u64 = 0x0f0f_0f0f_0f0f_0f0f;
const SIXTH: u64 = 0x2020_2020_2020_2020;

/// Bytes `8·i..8·i + 8`.
#[inline(always)]
fn u64_at(bytes: &[u8], i: usize) -> u64 {
    u64::from_le_bytes(bytes.as_chunks().0[i])
}

/// Bytes `4·i..4·i + 4`.
#[inline(always)]
fn u32_at(bytes: &[u8], i: usize) -> u32 {
    u32::from_le_bytes(bytes.as_chunks().0[i])
}

/// Bytes `8·i..8·i + 8`, which the compiler makes one load again.
#[inline(always)]
fn signed_at(bytes: &[i8; 16], i: usize) -> u64 {
    let mut out = 0;
    for j in 0..8 {
        out |= u64::from(bytes[8 * i + j].cast_unsigned()) << (8 * j);
    }
    out
}

/// Scales and minima of the blocks of a group, a byte each: `unpack_scales` of the core, four bytes at a time.
#[inline(always)]
fn scales_and_mins(bytes: &[u8; 12], group: usize) -> (u32, u32) {
    let (s, m, both) = (u32_at(bytes, 0), u32_at(bytes, 1), u32_at(bytes, 2));
    let (six, four) = (0x3f3f_3f3f, FOURS as u32);
    if group == 0 {
        return (s & six, m & six);
    }
    let upper = |v: u32| (v >> 2) & (six ^ four);
    (both & four | upper(s), (both >> 4) & four | upper(m))
}

/// Scales of the halves of the blocks of a group, signed bytes: `BlockQ3K::unpack_scales`, eight bytes at a time.
#[inline(always)]
fn scales_q3(bytes: &[u8; 12], group: usize) -> u64 {
    let low = (u64_at(bytes, 0) >> (4 * group)) & FOURS;
    let upper = u64::from(u32_at(bytes, 2)) >> (4 * group);
    let six = low | (((upper | (upper >> 2) << 32) & TWOS) << 4);
    // Less 32: borrows stop at bit 7, which they are lent from.
    ((six | (SIXTH << 2)) - SIXTH) ^ (SIXTH << 2)
}

unpack!(BlockQ6K: LONGEST, |block| signed(block.d, &block.scales));
unpack!(BlockQ5K: LONGEST, |block| per_block(block.d, block.dmin, block.unpack_scales()));
unpack!(BlockQ4K: LONGEST, |block| per_block(block.d, block.dmin, block.unpack_scales()));
unpack!(BlockQ3K: LONGEST, |block| signed(block.d, &block.unpack_scales()));
unpack!(BlockQ2K: LONGEST, |block| per_half(block.d, block.dmin, &block.scales));

#[inline(always)]
fn signed(d: f16, scales: &[i8; 16]) -> Grid {
    let mut grid = [(0.0, 0.0); 16];
    for j in 0..16 {
        grid[j].0 = number(d) * f32::from(scales[j]);
    }
    grid
}

#[inline(always)]
fn per_block(d: f16, dmin: f16, (scales, mins): ([u8; 8], [u8; 8])) -> Grid {
    let mut grid = [(0.0, 0.0); 16];
    for j in 0..16 {
        grid[j] = (number(d) * f32::from(scales[j / 2]), -(number(dmin) * f32::from(mins[j / 2])));
    }
    grid
}

#[inline(always)]
fn per_half(d: f16, dmin: f16, scales: &[u8; 16]) -> Grid {
    let mut grid = [(0.0, 0.0); 16];
    for j in 0..16 {
        let (scale, min) = (scales[j] & 0x0f, scales[j] >> 4);
        grid[j] = (number(d) * f32::from(scale), -(number(dmin) * f32::from(min)));
    }
    grid
}
