//! What a kernel body may ask of an instruction set: vectors of f32 inside blocks of 32 elements, and byte products over
//! groups of four blocks (see `ActivationGroup` for their lanes).

use candle_sparse_core::BlockQ4_0;
use candle_sparse_core::BlockQ8_0;
use half::{bf16, f16};

/// A vector instruction set. Block arguments are array references, so bodies need no unsafe code.
///
/// `i` is the index of a vector inside a block of 32: elements `i · LANES .. (i + 1) · LANES`.
///
/// # Safety
/// A value of the type may exist only where the CPU has the instructions; the methods rely on it.
pub(crate) unsafe trait Isa: Copy {
    /// `LANES` numbers.
    type V: Copy;
    /// `4 · LANES` bytes: four of each lane.
    type I: Copy;
    /// `LANES` sums of byte products.
    type S: Copy;
    /// Numbers per vector; divides 32.
    const LANES: usize;
    /// Columns that a tile of four rows holds in registers (1 to 4).
    const COLUMNS: usize;
    /// Columns whose 32 sums stay in registers (1 to 4, or 8).
    const COLUMNS_T: usize;

    fn splat(self, x: f32) -> Self::V;
    fn splat_f16(self, x: f16) -> Self::V;
    fn load(self, x: &[f32; 32], i: usize) -> Self::V;
    fn load_f16(self, x: &[f16; 32], i: usize) -> Self::V;
    fn load_bf16(self, x: &[bf16; 32], i: usize) -> Self::V;
    fn store(self, v: Self::V, x: &mut [f32; 32], i: usize);

    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a · b + c`, rounded once.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; a NaN in `b` stays NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller; a NaN in `b` stays NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    fn abs(self, v: Self::V) -> Self::V;
    /// To the nearest integer, halves to even.
    fn round(self, v: Self::V) -> Self::V;
    /// `2^v` for integral `v` in −126..=127.
    fn exp2i(self, v: Self::V) -> Self::V;
    /// `x · 2^n` for integral `n` in −252..=254, rounded once where `x` is near 1.
    #[inline(always)]
    fn scale2(self, x: Self::V, n: Self::V) -> Self::V {
        // In halves, so that neither factor leaves the range of normal numbers.
        let half = self.round(self.mul(n, self.splat(0.5)));
        self.mul(self.mul(x, self.exp2i(half)), self.exp2i(self.sub(n, half)))
    }
    /// `x` where `a < b`, else `y` (also where a or b is NaN).
    fn select_lt(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    fn reduce_add(self, v: Self::V) -> f32;
    fn reduce_max(self, v: Self::V) -> f32;

    /// Vector `i` of scales or other numbers per lane of a group.
    fn load_lanes(self, x: &[f32; 16], i: usize) -> Self::V;
    /// Vector `i` of one half of a group of activations.
    fn load_quants(self, x: &[i8; 64], i: usize) -> Self::I;
    /// Vector `i` of one number per block.
    fn scales(self, d: [f16; 4], i: usize) -> Self::V;
    /// Vector `i` of the scales of four blocks.
    #[inline(always)]
    fn scales_q4_0(self, [a, b, c, d]: &[BlockQ4_0; 4], i: usize) -> Self::V {
        self.scales([a.d, b.d, c.d, d.d], i)
    }
    /// Both halves of vector `i` of four blocks, as this instruction set wants them for [`Self::dot_i8`].
    fn q8_0(self, w: &[BlockQ8_0; 4], i: usize) -> [Self::I; 2];
    /// Vector `i` of four times 16 bytes: a field of each byte, moved up by `up` bits (down if negative) to where `mask`
    /// has ones.
    fn fields(self, bytes: [&[u8; 16]; 4], up: [i8; 4], mask: u8, i: usize) -> Self::I;
    /// Vector `i` of four times 16 bytes: `1 << 4` where a word has a one.
    fn fifth_bits(self, words: [u16; 4], i: usize) -> Self::I;
    fn or(self, a: Self::I, b: Self::I) -> Self::I;
    /// Every byte 1.
    fn ones(self) -> Self::I;

    fn zero_sums(self) -> Self::S;
    /// What the sums of [`Self::dot_i8`] begin with, given `neg_sums` of the activations.
    fn start_i8(self, neg_sums: &[i32; 16], i: usize) -> Self::S;
    /// `neg_sums · 2^SHIFT`: what sums begin with if all weights are `2^SHIFT` too large.
    fn start_shifted<const SHIFT: u32>(self, neg_sums: &[i32; 16], i: usize) -> Self::S;
    /// `sums + w · x` over both halves, exact; `w` from [`Self::q8_0`], `x` free of −128.
    fn dot_i8(self, sums: Self::S, w: [Self::I; 2], x: [Self::I; 2]) -> Self::S;
    /// `sums + w · x` over both halves, exact; `w` is 0..=63, `x` any byte.
    fn dot_u6(self, sums: Self::S, w: [Self::I; 2], x: [Self::I; 2]) -> Self::S;

    /// Vector `i` of one factor per block, bytes 0..=63, as this instruction set wants them.
    fn block_scales(self, scales: u32, i: usize) -> Self::S;
    /// Vector `i` of one factor per half of a block, signed bytes, those of a block side by side.
    fn half_scales(self, scales: u64, i: usize) -> [Self::S; 2];
    /// `w · x` times the factors of blocks, exact; `w` is 0..=31.
    fn dot_by_block(self, w: [Self::I; 2], x: [Self::I; 2], scales: Self::S) -> Self::S;
    /// `(w − OFFSET) · x` times the factors of halves, exact; `w` is 0..=63, and less than 33 away from `OFFSET`.
    fn dot_by_half<const OFFSET: i8>(self, w: [Self::I; 2], x: [Self::I; 2], scales: [Self::S; 2])
    -> Self::S;
    /// `neg_sums` times the factors of blocks, exact.
    fn scale_neg_sums(self, neg_sums: &[i32; 16], scales: Self::S, i: usize) -> Self::S;
    fn sums_to_f32(self, sums: Self::S) -> Self::V;
    /// Writes `−Σ` of each lane's eight bytes as vector `i` of `out`.
    fn neg_sums(self, x: [Self::I; 2], out: &mut [i32; 16], i: usize);
    /// Asks for the cache line with a byte of `row`, or of what follows it.
    fn prefetch<T>(self, row: &[T], byte: usize);
    /// Vector `i` of `x` as f32.
    fn widen_i8(self, x: &[i8; 32], i: usize) -> Self::V;
    /// Vector `i` of `16 · (q − 8)` for the nibbles q of `qs`: the low one of byte `j` is element `j`, the high one `j + 16`.
    fn widen_nibbles(self, qs: &[u8; 16], i: usize) -> Self::V;
    /// Rounds `x · scale` (in −127..=127, halves to even) into `out`.
    fn round_to_i8(self, x: &[f32; 32], scale: f32, out: &mut [i8; 32]);
}
