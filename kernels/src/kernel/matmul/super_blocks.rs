//! K-quants: super-blocks of 256 elements, two groups each.
//!
//! Their quants are fields of bytes at strides of 32 or 64, so 16 neighbouring elements, half a block, are the same field
//! of 16 neighbouring bytes: a vector is put together from such quarters, each with its own shift. Scales are small
//! integers, so a product with them is still exact, and there is one conversion to f32 per vector.

use super::blocks::{Block, Vector, or, quants};
use crate::isa::Isa;
use candle_sparse_core::{
    ActivationGroup, BlockQ2K, BlockQ3K, BlockQ4K, BlockQ5K, BlockQ6K, format::f16_to_f32,
};

/// `d · scale · q − dmin · min`, scales and minima per block.
struct PerBlock<I: Isa> {
    q: [I::I; 2],
    scales: I::S,
    mins: I::S,
    d: I::V,
    dmin: I::V,
}

impl<I: Isa> Vector<I> for PerBlock<I> {
    #[inline(always)]
    fn times(&self, isa: I, x: &ActivationGroup, i: usize) -> I::V {
        let sums = isa.dot_by_block(self.q, quants(isa, x, i), self.scales);
        let neg_mins = isa.scale_neg_sums(&x.neg_sums, self.mins, i);
        isa.mul_add(self.d, isa.sums_to_f32(sums), isa.mul(self.dmin, isa.sums_to_f32(neg_mins)))
    }
}

/// `d · scale · (q − OFFSET)`, scales per half of a block.
struct PerHalf<I: Isa, const OFFSET: i8> {
    q: [I::I; 2],
    scales: [I::S; 2],
    d: I::V,
}

impl<I: Isa, const OFFSET: i8> Vector<I> for PerHalf<I, OFFSET> {
    #[inline(always)]
    fn times(&self, isa: I, x: &ActivationGroup, i: usize) -> I::V {
        let sums = isa.dot_by_half::<OFFSET>(self.q, quants(isa, x, i), self.scales);
        isa.mul(self.d, isa.sums_to_f32(sums))
    }
}

/// `d · scale · q + dmin · min`, scales and minima per half of a block.
struct PerHalfAbove<I: Isa> {
    q: [I::I; 2],
    scales: [I::S; 2],
    mins: [I::S; 2],
    d: I::V,
    dmin: I::V,
}

impl<I: Isa> Vector<I> for PerHalfAbove<I> {
    #[inline(always)]
    fn times(&self, isa: I, x: &ActivationGroup, i: usize) -> I::V {
        let x = quants(isa, x, i);
        let sums = isa.dot_by_half::<0>(self.q, x, self.scales);
        let mins = isa.dot_by_half::<0>([isa.ones(); 2], x, self.mins);
        isa.mul_add(self.d, isa.sums_to_f32(sums), isa.mul(self.dmin, isa.sums_to_f32(mins)))
    }
}

impl Block<1> for BlockQ6K {
    #[inline(always)]
    fn vector<I: Isa, const G: usize, const V: usize>(isa: I, [w]: &[Self; 1]) -> impl Vector<I> {
        let low = fields::<I, 4, 64, 0, G>(isa, &w.ql, V);
        let q = or(isa, low, fields::<I, 2, 32, 4, G>(isa, &w.qh, V));
        let scales = signed_at(&w.scales, G);
        PerHalf::<I, 32> { q, scales: isa.half_scales(scales, V), d: isa.splat_f16(w.d) }
    }
}

impl Block<1> for BlockQ5K {
    #[inline(always)]
    fn vector<I: Isa, const G: usize, const V: usize>(isa: I, [w]: &[Self; 1]) -> impl Vector<I> {
        let low = fields::<I, 4, 32, 0, G>(isa, &w.qs, V);
        let q = or(isa, low, fields::<I, 1, 32, 4, G>(isa, &w.qh, V));
        let (scales, mins) = scales_and_mins(&w.scales, G);
        PerBlock {
            q,
            scales: isa.block_scales(scales, V),
            mins: isa.block_scales(mins, V),
            d: isa.splat_f16(w.d),
            dmin: isa.splat_f16(w.dmin),
        }
    }
}

impl Block<1> for BlockQ4K {
    #[inline(always)]
    fn vector<I: Isa, const G: usize, const V: usize>(isa: I, [w]: &[Self; 1]) -> impl Vector<I> {
        let (scales, mins) = scales_and_mins(&w.scales, G);
        PerBlock {
            q: fields::<I, 4, 32, 0, G>(isa, &w.qs, V),
            scales: isa.block_scales(scales, V),
            mins: isa.block_scales(mins, V),
            d: isa.splat_f16(w.d),
            dmin: isa.splat_f16(w.dmin),
        }
    }
}

impl Block<1> for BlockQ3K {
    #[inline(always)]
    fn vector<I: Isa, const G: usize, const V: usize>(isa: I, [w]: &[Self; 1]) -> impl Vector<I> {
        let low = fields::<I, 2, 32, 0, G>(isa, &w.qs, V);
        let q = or(isa, low, fields::<I, 1, 32, 2, G>(isa, &w.hmask, V));
        let scales = isa.half_scales(scales_q3(&w.scales, G), V);
        PerHalf::<I, 4> { q, scales, d: isa.splat_f16(w.d) }
    }
}

impl Block<1> for BlockQ2K {
    #[inline(always)]
    fn vector<I: Isa, const G: usize, const V: usize>(isa: I, [w]: &[Self; 1]) -> impl Vector<I> {
        let nibbles = u64_at(&w.scales, G);
        PerHalfAbove {
            q: fields::<I, 2, 32, 0, G>(isa, &w.qs, V),
            scales: isa.half_scales(nibbles & FOURS, V),
            mins: isa.half_scales((nibbles >> 4) & FOURS, V),
            d: isa.splat_f16(w.d),
            dmin: isa.splat(-f16_to_f32(w.dmin.to_bits())),
        }
    }
}

/// Both halves of vector `i` of group `G` from a plane of fields, see `planes.rs` of the core: byte `j` of each `STRIDE` bytes
/// has elements `j + k·STRIDE` in its bits `k·BITS..`. They come out shifted left by `SHIFT`.
#[inline(always)]
fn fields<I: Isa, const BITS: usize, const STRIDE: usize, const SHIFT: usize, const G: usize>(
    isa: I,
    bytes: &[u8],
    i: usize,
) -> [I::I; 2] {
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
