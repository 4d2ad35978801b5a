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
        let low = fields::<I, 4, 64>(isa, &w.ql, 0, G, V);
        let q = or(isa, low, fields::<I, 2, 32>(isa, &w.qh, 4, G, V));
        let scales = u64_at(&w.scales.map(i8::cast_unsigned), G);
        PerHalf::<I, 32> { q, scales: isa.half_scales(scales, V), d: isa.splat_f16(w.d) }
    }
}

impl Block<1> for BlockQ5K {
    #[inline(always)]
    fn vector<I: Isa, const G: usize, const V: usize>(isa: I, [w]: &[Self; 1]) -> impl Vector<I> {
        let low = fields::<I, 4, 32>(isa, &w.qs, 0, G, V);
        let q = or(isa, low, fields::<I, 1, 32>(isa, &w.qh, 4, G, V));
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
            q: fields::<I, 4, 32>(isa, &w.qs, 0, G, V),
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
        let low = fields::<I, 2, 32>(isa, &w.qs, 0, G, V);
        let q = or(isa, low, fields::<I, 1, 32>(isa, &w.hmask, 2, G, V));
        let scales = isa.half_scales(scales_q3(&w.scales, G), V);
        PerHalf::<I, 4> { q, scales, d: isa.splat_f16(w.d) }
    }
}

impl Block<1> for BlockQ2K {
    #[inline(always)]
    fn vector<I: Isa, const G: usize, const V: usize>(isa: I, [w]: &[Self; 1]) -> impl Vector<I> {
        let nibbles = u64_at(&w.scales, G);
        PerHalfAbove {
            q: fields::<I, 2, 32>(isa, &w.qs, 0, G, V),
            scales: isa.half_scales(nibbles & FOURS, V),
            mins: isa.half_scales((nibbles >> 4) & FOURS, V),
            d: isa.splat_f16(w.d),
            dmin: isa.splat(-f16_to_f32(w.dmin.to_bits())),
        }
    }
}

/// Both halves of vector `i` of a group from a plane of fields, see `planes.rs` of the core: byte `j` of each `STRIDE` bytes
/// has elements `j + k·STRIDE` in its bits `k·BITS..`. They come out shifted left by `shift`.
#[inline(always)]
fn fields<I: Isa, const BITS: usize, const STRIDE: usize>(
    isa: I,
    bytes: &[u8],
    shift: usize,
    group: usize,
    i: usize,
) -> [I::I; 2] {
    let mask = (u8::MAX >> (8 - BITS)) << shift;
    let (low, low_up) = quarters::<BITS, STRIDE>(bytes, shift, 128 * group);
    let (high, high_up) = quarters::<BITS, STRIDE>(bytes, shift, 128 * group + 16);
    [isa.fields(low, low_up, mask, i), isa.fields(high, high_up, mask, i)]
}

/// Where the elements `first..first + 16` of each of four blocks are, and how far up they have to move.
#[inline(always)]
fn quarters<const BITS: usize, const STRIDE: usize>(
    bytes: &[u8],
    shift: usize,
    first: usize,
) -> ([&[u8; 16]; 4], [i8; 4]) {
    let per_stride = STRIDE * 8 / BITS;
    let (quarters, _) = bytes.as_chunks::<16>();
    let place = |e: usize| (e / per_stride * STRIDE + e % STRIDE) / 16;
    let up = |e: usize| shift as i8 - (e % per_stride / STRIDE * BITS) as i8;
    let elements = [first, first + 32, first + 64, first + 96];
    (elements.map(|e| &quarters[place(e)]), elements.map(up))
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

/// Scales and minima of the blocks of a group, a byte each: `unpack_scales` of the core, four bytes at a time.
#[inline(always)]
fn scales_and_mins(bytes: &[u8; 12], group: usize) -> (u32, u32) {
    let [s, m, both] = [0, 4, 8].map(|i| u32::from_le_bytes(core::array::from_fn(|j| bytes[i + j])));
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
    let upper = u64::from(u32::from_le_bytes(core::array::from_fn(|j| bytes[8 + j]))) >> (4 * group);
    let six = low | (((upper | (upper >> 2) << 32) & TWOS) << 4);
    // Less 32: borrows stop at bit 7, which they are lent from.
    ((six | (SIXTH << 2)) - SIXTH) ^ (SIXTH << 2)
}
