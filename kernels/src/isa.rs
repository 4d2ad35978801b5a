//! What a kernel body may ask of an instruction set: vectors of f32 inside blocks of 32 elements, and byte products.

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
    /// 32 signed bytes.
    type I: Copy;
    /// Numbers per vector; divides 32.
    const LANES: usize;
    /// Columns that a tile of four rows holds in registers (1 to 4).
    const COLUMNS: usize;
    /// Columns whose 32 sums stay in registers (1 to 4).
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
    /// `x` where `a < b`, else `y` (also where a or b is NaN).
    fn select_lt(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    fn reduce_add(self, v: Self::V) -> f32;
    fn reduce_max(self, v: Self::V) -> f32;

    fn load_i8(self, x: &[i8; 32]) -> Self::I;
    /// Low nibbles are elements 0..16, high nibbles elements 16..32; each 0..=15.
    fn load_u4(self, x: &[u8; 16]) -> Self::I;
    /// Partial sums of `w · x`, exact; `x` is free of −128, `w` is not.
    fn dot_i8(self, w: Self::I, x: Self::I) -> Self::V;
    /// Partial sums of `start + w · x`, exact; `w` is 0..=15, `x` any byte.
    fn dot_u4(self, w: Self::I, x: Self::I, start: i32) -> Self::V;
    /// Vector `i` of `x` as f32.
    fn widen_i8(self, x: &[i8; 32], i: usize) -> Self::V;
    /// Rounds `x · scale` (in −127..=127, halves to even) into `out` and returns the sum.
    fn round_to_i8(self, x: &[f32; 32], scale: f32, out: &mut [i8; 32]) -> i32;
}
