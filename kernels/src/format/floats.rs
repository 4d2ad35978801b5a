//! F32, F16 and BF16, 32 elements at a time.
//!
//! ```text
//! acc[l] = Σ w[k] · x[k] over k = l (mod 32)    in order, one multiply-add each
//! y      = Σ_l acc[l]                           halves first
//! ```
//!
//! Where BF16s are multiplied in pairs (`paired.rs`), an element is two of them.

use super::{
    Element, RowsOf,
    operand::Operand,
    tile,
    units::{Summand, Units},
    words::{Factors, Words},
};
use crate::{
    isa::Isa,
    kernel::{
        axpy_rows::{self, Together},
        matmul::ask,
        matmul_t::{self, MatmulT},
        padded,
    },
};
use candle_sparse_core::{BLOCK_LEN, Columns};
use half::{bf16, f16};
use std::borrow::Cow;

macro_rules! float {
    ($t:ty, $zero:expr, $load:ident) => {
        float_operand!($t);
        words!($t, 32, $zero, |isa, unit, i| isa.$load(unit, i));

        impl Factors for $t {
            type Column = f32;
            type Prepared = f32;

            #[inline(always)]
            fn column(x: &[f32]) -> &[f32] {
                x
            }

            #[inline(always)]
            fn prepared<I: Isa>(_: I, x: &[f32]) -> Cow<'_, [f32]> {
                Cow::Borrowed(x)
            }

            #[inline(always)]
            fn add<I: Isa>(isa: I, w: I::V, x: I::V, acc: I::V) -> I::V {
                isa.mul_add(w, x, acc)
            }
        }

        float_units!($t, $zero, |isa, unit, i| isa.$load(unit, i));
    };
}

/// Multiplied with columns of f32.
macro_rules! float_operand {
    ($t:ty) => {
        impl Operand for $t {
            type Column = f32;

            #[inline(always)]
            fn columns(x: Columns<'_>) -> &[f32] {
                let Columns::F32(x) = x else { unreachable!("every operation checks its columns") };
                x
            }

            #[inline(always)]
            fn dot<I: Isa>(isa: I, row: &[Self], x: &[f32], ahead: &[Self]) -> f32 {
                $crate::format::floats::dot(isa, row, x, ahead)
            }

            #[inline(always)]
            fn matmul<I: Isa>(isa: I, rows: RowsOf<'_, Self>, x: &[f32], y: &mut [&mut [f32]]) {
                tile::matmul(isa, rows, x, y);
            }
        }
    };
}

/// As what f32s are made of: for sums of rows.
macro_rules! float_units {
    ($t:ty, $zero:expr, |$isa:ident, $unit:ident, $i:ident| $value:expr) => {
        impl Units for $t {
            type Vectors = [$t; 32];
            const RESTS: bool = true;
            const IN_HALVES: bool = false;

            #[inline(always)]
            fn vectors(row: &[Self]) -> &[[$t; 32]] {
                row.as_chunks().0
            }

            #[inline(always)]
            fn rest(row: &[Self]) -> [$t; 32] {
                padded(row.as_chunks::<32>().1, $zero)
            }

            #[inline(always)]
            fn value<I: Isa>($isa: I, $unit: &[$t; 32], $i: usize) -> I::V {
                $value
            }
        }

        impl Summand for $t {
            const STEP: f32 = 1.0;

            #[inline(always)]
            fn vector<I: Isa>($isa: I, $unit: &[$t; 32], $i: usize) -> I::V {
                $value
            }

            #[inline(always)]
            fn scale<I: Isa>(_: I, _: &[$t; 32], alpha: I::V) -> I::V {
                alpha
            }
        }

        impl Element for $t {
            #[inline(always)]
            fn write<I: Isa>(isa: I, row: &[Self], first: usize, out: &mut [[f32; BLOCK_LEN]]) {
                Self::write_units(isa, row, first, out);
            }

            #[inline(always)]
            fn add_rows<I: Isa>(isa: I, rows: Together<'_, Self>, y: &mut [f32]) {
                axpy_rows::by_units(isa, rows, y);
            }

            #[inline(always)]
            fn sum_rows<I: Isa>(isa: I, rows: RowsOf<'_, Self>, sums: MatmulT<'_, '_>) {
                matmul_t::by_units::<I, Self, true>(isa, rows, sums);
            }
        }
    };
}

/// One row times one column.
#[inline(always)]
pub(super) fn dot<I: Isa, T: Factors>(isa: I, w: &[T], x: &[f32], ahead: &[T]) -> f32 {
    let x = T::column(x);
    let mut acc = [isa.splat(0.0); 8];
    for (k, (w, x)) in T::units(w).iter().zip(T::Column::units(x)).enumerate() {
        ask(ahead, k * size_of_val(w), size_of_val(w));
        add_unit::<I, T>(isa, &mut acc, w, x);
    }
    if let (Some(w), Some(x)) = (T::rest(w), T::Column::rest(x)) {
        add_unit::<I, T>(isa, &mut acc, &w, &x);
    }
    isa.reduce_add(sum_lanes(isa, acc)) + 0.0
}

#[inline(always)]
fn add_unit<I: Isa, T: Factors>(isa: I, acc: &mut [I::V; 8], w: &T::Unit, x: &<T::Column as Words>::Unit) {
    for i in 0..32 / I::LANES {
        acc[i] = T::add(isa, T::word(isa, w, i), T::Column::word(isa, x, i), acc[i]);
    }
}

/// The first `32 / LANES` vectors added up, halves first.
#[inline(always)]
pub(super) fn sum_lanes<I: Isa>(isa: I, acc: [I::V; 8]) -> I::V {
    let mut acc = acc;
    let mut n = 32 / I::LANES;
    while n > 1 {
        n /= 2;
        for i in 0..n {
            acc[i] = isa.add(acc[i], acc[i + n]);
        }
    }
    acc[0]
}

float!(f32, 0.0, load);
float!(f16, f16::ZERO, load_f16);
float!(bf16, bf16::ZERO, load_bf16);
