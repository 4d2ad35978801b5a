//! Weighted sums of rows: attention's values, and every neuron-major projection.
//!
//! ```text
//! for each unit of 32 columns of the matrix:
//!     for each group of results:                  (32 × results sums stay in registers)
//!         for each row: sums += weight · unit
//! ```
//!
//! Rows are added in order, each with one multiply-add, so a result does not depend on the others computed with it.

use super::{matmul::RowShape, padded};
use crate::isa::Isa;
use candle_sparse_core::{BLOCK_LEN, BlockQ4_0, BlockQ8_0, Matrix, Rows, kernel::matmul::check_matmul_t};
use half::{bf16, f16};

/// See [`candle_sparse_core::KernelSet::matmul_t`].
#[inline(always)]
pub(crate) fn matmul_t<I: Isa>(isa: I, w: Matrix<'_>, a: &[&[f32]], y: &mut [&mut [f32]]) {
    check_matmul_t(&w, a, y);
    let shape = RowShape { len: w.row_blocks(), stride: w.stride() };
    match w.data() {
        Rows::F32(d) => units::<I, f32>(isa, d, shape, w.cols(), a, y),
        Rows::F16(d) => units::<I, f16>(isa, d, shape, w.cols(), a, y),
        Rows::BF16(d) => units::<I, bf16>(isa, d, shape, w.cols(), a, y),
        Rows::Q8_0(d) => units::<I, BlockQ8_0>(isa, d, shape, w.cols(), a, y),
        Rows::Q4_0(d) => units::<I, BlockQ4_0>(isa, d, shape, w.cols(), a, y),
        _ => candle_sparse_core::kernel::matmul::matmul_t(w, a, y),
    }
}

/// An element type whose units can be read as f32 vectors.
pub(super) trait Summand: Copy {
    /// 32 elements.
    type Unit: Copy;

    /// The whole units of a row.
    fn units(row: &[Self]) -> &[Self::Unit];
    /// What follows them, filled up with zeros.
    fn last(row: &[Self]) -> Self::Unit;
    /// What [`Self::vector`] is still to be multiplied with, times `alpha`.
    fn scale<I: Isa>(isa: I, unit: &Self::Unit, alpha: I::V) -> I::V;
    fn vector<I: Isa>(isa: I, unit: &Self::Unit, i: usize) -> I::V;
}

macro_rules! float_summand {
    ($t:ty, $zero:expr, $load:ident) => {
        impl Summand for $t {
            type Unit = [$t; 32];

            #[inline(always)]
            fn units(row: &[Self]) -> &[Self::Unit] {
                row.as_chunks().0
            }

            #[inline(always)]
            fn last(row: &[Self]) -> Self::Unit {
                padded(row.as_chunks::<32>().1, $zero)
            }

            #[inline(always)]
            fn scale<I: Isa>(_: I, _: &Self::Unit, alpha: I::V) -> I::V {
                alpha
            }

            #[inline(always)]
            fn vector<I: Isa>(isa: I, unit: &Self::Unit, i: usize) -> I::V {
                isa.$load(unit, i)
            }
        }
    };
}

float_summand!(f32, 0.0, load);
float_summand!(f16, f16::ZERO, load_f16);
float_summand!(bf16, bf16::ZERO, load_bf16);

macro_rules! block_summand {
    ($t:ty, |$isa:ident, $unit:ident, $i:ident| $vector:expr) => {
        impl Summand for $t {
            type Unit = Self;

            #[inline(always)]
            fn units(row: &[Self]) -> &[Self] {
                row
            }

            #[inline(always)]
            fn last(row: &[Self]) -> Self {
                // Never asked for: a row is whole blocks.
                row[0]
            }

            #[inline(always)]
            fn scale<I: Isa>(isa: I, unit: &Self, alpha: I::V) -> I::V {
                isa.mul(isa.splat_f16(unit.d), alpha)
            }

            #[inline(always)]
            fn vector<I: Isa>($isa: I, $unit: &Self, $i: usize) -> I::V {
                $vector
            }
        }
    };
}

block_summand!(BlockQ8_0, |isa, unit, i| isa.widen_i8(&unit.qs, i));
block_summand!(BlockQ4_0, |isa, unit, i| isa.widen_q4_0(unit, i));

#[inline(always)]
fn units<I: Isa, T: Summand>(
    isa: I,
    w: &[T],
    shape: RowShape,
    cols: usize,
    a: &[&[f32]],
    y: &mut [&mut [f32]],
) {
    if w.is_empty() {
        return;
    }
    for k in (0..cols).step_by(BLOCK_LEN) {
        if k + BLOCK_LEN <= cols {
            unit_of_all::<I, T, true>(isa, w, shape, a, y, k);
        } else {
            unit_of_all::<I, T, false>(isa, w, shape, a, y, k);
        }
    }
}

#[inline(always)]
fn unit_of_all<I: Isa, T: Summand, const WHOLE: bool>(
    isa: I,
    w: &[T],
    shape: RowShape,
    a: &[&[f32]],
    y: &mut [&mut [f32]],
    k: usize,
) {
    let mut c = 0;
    while c < y.len() {
        let width = (y.len() - c).min(I::COLUMNS_T);
        let (a, y) = (&a[c..c + width], &mut y[c..c + width]);
        match width {
            1 => unit::<I, T, 1, WHOLE>(isa, w, shape, a, y, k),
            2 => unit::<I, T, 2, WHOLE>(isa, w, shape, a, y, k),
            3 => unit::<I, T, 3, WHOLE>(isa, w, shape, a, y, k),
            _ => unit::<I, T, 4, WHOLE>(isa, w, shape, a, y, k),
        }
        c += width;
    }
}

/// Columns `k .. k + 32` of `C` results.
#[inline(always)]
fn unit<I: Isa, T: Summand, const C: usize, const WHOLE: bool>(
    isa: I,
    w: &[T],
    shape: RowShape,
    a: &[&[f32]],
    y: &mut [&mut [f32]],
    k: usize,
) {
    let end = y[0].len().min(k + BLOCK_LEN);
    // The widest unit has eight vectors of four lanes; a level with wider vectors leaves the rest unused.
    let mut acc = [[isa.splat(0.0); 8]; C];
    for c in 0..C {
        let block = padded(&y[c][k..end], 0.0);
        for i in 0..32 / I::LANES {
            acc[c][i] = isa.load(&block, i);
        }
    }
    let weights: [&[f32]; C] = core::array::from_fn(|c| a[c]);
    for (r, row) in w.chunks(shape.stride).enumerate() {
        let row = &row[..shape.len];
        let last;
        let unit = if WHOLE {
            &T::units(row)[k / BLOCK_LEN]
        } else {
            last = T::last(row);
            &last
        };
        let mut alpha = [isa.splat(0.0); C];
        for c in 0..C {
            alpha[c] = T::scale(isa, unit, isa.splat(weights[c][r]));
        }
        for i in 0..32 / I::LANES {
            let v = T::vector(isa, unit, i);
            for c in 0..C {
                acc[c][i] = isa.mul_add(alpha[c], v, acc[c][i]);
            }
        }
    }
    for c in 0..C {
        let mut block = [0.0; BLOCK_LEN];
        for i in 0..32 / I::LANES {
            isa.store(acc[c][i], &mut block, i);
        }
        y[c][k..end].copy_from_slice(&block[..end - k]);
    }
}
