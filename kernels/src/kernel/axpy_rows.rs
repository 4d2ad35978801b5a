//! Adding some rows of a matrix to a vector, each with its factor.
//!
//! ```text
//! for four rows at a time: for each unit of 32 columns: y += Σ factor · unit       (y stays in L1)
//! ```
//!
//! Each row is added with one multiply-add per element, in order: the cut into fours changes no bit. Rarer formats go
//! block by block through their values, one row at a time.

use super::{matmul::RowShape, matmul_t::Summand, padded};
use crate::isa::Isa;
use candle_sparse_core::{
    BLOCK_LEN, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K,
    BlockQ8_0, Matrix, Rows, kernel::sparse_ffn::check_axpy_rows,
};
use half::{bf16, f16};

/// Rows added in one pass over `y`.
const TOGETHER: usize = 4;

/// See [`candle_sparse_core::KernelSet::axpy_rows`].
#[inline(always)]
pub(crate) fn axpy_rows<I: Isa>(isa: I, w: Matrix<'_>, rows: &[u32], a: &[f32], y: &mut [f32]) {
    check_axpy_rows(&w, rows, a, y);
    let shape = RowShape { len: w.row_blocks(), stride: w.stride() };
    match w.data() {
        Rows::F32(w) => f32::add_rows(isa, w, shape, rows, a, y),
        Rows::F16(w) => f16::add_rows(isa, w, shape, rows, a, y),
        Rows::BF16(w) => bf16::add_rows(isa, w, shape, rows, a, y),
        Rows::Q8_0(w) => BlockQ8_0::add_rows(isa, w, shape, rows, a, y),
        Rows::Q6K(w) => BlockQ6K::add_rows(isa, w, shape, rows, a, y),
        Rows::Q5_1(w) => BlockQ5_1::add_rows(isa, w, shape, rows, a, y),
        Rows::Q5_0(w) => BlockQ5_0::add_rows(isa, w, shape, rows, a, y),
        Rows::Q5K(w) => BlockQ5K::add_rows(isa, w, shape, rows, a, y),
        Rows::Q4_1(w) => BlockQ4_1::add_rows(isa, w, shape, rows, a, y),
        Rows::Q4_0(w) => BlockQ4_0::add_rows(isa, w, shape, rows, a, y),
        Rows::Q4K(w) => BlockQ4K::add_rows(isa, w, shape, rows, a, y),
        Rows::Q3K(w) => BlockQ3K::add_rows(isa, w, shape, rows, a, y),
        Rows::Q2K(w) => BlockQ2K::add_rows(isa, w, shape, rows, a, y),
    }
}

/// An element type whose rows can be added up.
pub(super) trait Addend: Sized {
    /// `y += Σ_i a[i] · rows[i]`, in order; `shape` says where they lie.
    fn add_rows<I: Isa>(isa: I, w: &[Self], shape: RowShape, rows: &[u32], a: &[f32], y: &mut [f32]);
}

macro_rules! by_units {
    ($($t:ty)*) => {$(
        impl Addend for $t {
            #[inline(always)]
            fn add_rows<I: Isa>(isa: I, w: &[Self], shape: RowShape, rows: &[u32], a: &[f32], y: &mut [f32]) {
                by_units(isa, w, shape, rows, a, y);
            }
        }
    )*};
}

by_units!(f32 f16 bf16 BlockQ8_0 BlockQ4_0);

macro_rules! by_values {
    ($($t:ty)*) => {$(
        impl Addend for $t {
            #[inline(always)]
            fn add_rows<I: Isa>(isa: I, w: &[Self], shape: RowShape, rows: &[u32], a: &[f32], y: &mut [f32]) {
                by_values(isa, w, shape, rows, a, y, <$t>::dequantize);
            }
        }
    )*};
}

by_values!(BlockQ6K BlockQ5_1 BlockQ5_0 BlockQ5K BlockQ4_1 BlockQ4K BlockQ3K BlockQ2K);

#[inline(always)]
fn by_units<I: Isa, T: Summand>(isa: I, w: &[T], shape: RowShape, rows: &[u32], a: &[f32], y: &mut [f32]) {
    let at = |r: u32| shape.row(w, r as usize);
    let mut fours = rows.chunks_exact(TOGETHER).zip(a.chunks_exact(TOGETHER));
    for (r, a) in fours.by_ref() {
        let rows = [at(r[0]), at(r[1]), at(r[2]), at(r[3])];
        add_together(isa, rows, [a[0], a[1], a[2], a[3]], y);
    }
    let done = rows.len() / TOGETHER * TOGETHER;
    for (&r, &a) in rows[done..].iter().zip(&a[done..]) {
        add_together(isa, [at(r)], [a], y);
    }
}

#[inline(always)]
fn by_values<I: Isa, B, const N: usize>(
    isa: I,
    w: &[B],
    shape: RowShape,
    rows: &[u32],
    a: &[f32],
    y: &mut [f32],
    dequantize: impl Fn(&B, &mut [f32; N]),
) {
    let mut values = [0.0; N];
    for (&r, &a) in rows.iter().zip(a) {
        for (block, y) in shape.row(w, r as usize).iter().zip(y.as_chunks_mut::<N>().0) {
            dequantize(block, &mut values);
            for (v, y) in values.as_chunks().0.iter().zip(y.as_chunks_mut().0) {
                add_unit::<I, f32, 1>(isa, [v], [isa.splat(a)], y);
            }
        }
    }
}

/// `y += Σ_r a[r] · rows[r]`, row after row.
#[inline(always)]
fn add_together<I: Isa, T: Summand, const R: usize>(isa: I, rows: [&[T]; R], a: [f32; R], y: &mut [f32]) {
    let (mut alpha, mut units) = ([isa.splat(0.0); R], [T::units(rows[0]); R]);
    let (blocks, rest) = y.as_chunks_mut::<BLOCK_LEN>();
    // Loops, for the reason said in `matmul.rs`.
    for r in 0..R {
        (alpha[r], units[r]) = (isa.splat(a[r]), &T::units(rows[r])[..blocks.len()]);
    }
    for (k, block) in blocks.iter_mut().enumerate() {
        let mut unit = [&units[0][k]; R];
        for r in 1..R {
            unit[r] = &units[r][k];
        }
        add_unit::<I, T, R>(isa, unit, alpha, block);
    }
    if !rest.is_empty() {
        let mut block = padded(rest, 0.0);
        let units: [T::Unit; R] = core::array::from_fn(|r| T::last(rows[r]));
        add_unit::<I, T, R>(isa, core::array::from_fn(|r| &units[r]), alpha, &mut block);
        rest.copy_from_slice(&block[..rest.len()]);
    }
}

#[inline(always)]
fn add_unit<I: Isa, T: Summand, const R: usize>(
    isa: I,
    units: [&T::Unit; R],
    alpha: [I::V; R],
    y: &mut [f32; 32],
) {
    let mut scales = alpha;
    for r in 0..R {
        scales[r] = T::scale(isa, units[r], alpha[r]);
    }
    for i in 0..32 / I::LANES {
        let mut sum = isa.load(y, i);
        for r in 0..R {
            sum = isa.mul_add(T::vector(isa, units[r], i), scales[r], sum);
        }
        isa.store(sum, y, i);
    }
}
