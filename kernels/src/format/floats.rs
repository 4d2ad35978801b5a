//! F32, F16 and BF16, 32 elements at a time.
//!
//! ```text
//! acc[l] = Σ w[k] · x[k] over k = l (mod 32)    in order, one multiply-add each
//! y      = Σ_l acc[l]                           halves first
//! ```

use super::{
    Element, RowsOf,
    operand::Operand,
    tile,
    units::{Summand, Units},
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

macro_rules! float {
    ($t:ty, $zero:expr, $load:ident) => {
        impl Operand for $t {
            type Column = f32;

            #[inline(always)]
            fn columns(x: Columns<'_>) -> &[f32] {
                let Columns::F32(x) = x else { unreachable!("every operation checks its columns") };
                x
            }

            #[inline(always)]
            fn dot<I: Isa>(isa: I, row: &[Self], x: &[f32], ahead: &[Self]) -> f32 {
                dot::<I, $t>(isa, row, x, ahead)
            }

            #[inline(always)]
            fn matmul<I: Isa>(isa: I, rows: RowsOf<'_, Self>, x: &[f32], y: &mut [&mut [f32]]) {
                tile::matmul(isa, rows, x, y);
            }
        }

        impl Units for $t {
            type Vectors = [$t; 32];
            const RESTS: bool = true;

            #[inline(always)]
            fn vectors(row: &[Self]) -> &[[$t; 32]] {
                row.as_chunks().0
            }

            #[inline(always)]
            fn rest(row: &[Self]) -> [$t; 32] {
                padded(row.as_chunks::<32>().1, $zero)
            }

            #[inline(always)]
            fn value<I: Isa>(isa: I, unit: &[$t; 32], i: usize) -> I::V {
                isa.$load(unit, i)
            }
        }

        impl Summand for $t {
            const STEP: f32 = 1.0;

            #[inline(always)]
            fn vector<I: Isa>(isa: I, unit: &[$t; 32], i: usize) -> I::V {
                isa.$load(unit, i)
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
fn dot<I: Isa, T: Units>(isa: I, w: &[T], x: &[f32], ahead: &[T]) -> f32 {
    let mut acc = [isa.splat(0.0); 8];
    let (ws, (xs, x_rest)) = (T::vectors(w), x.as_chunks::<32>());
    for (k, (w, x)) in ws.iter().zip(xs).enumerate() {
        ask(ahead, k * size_of_val(w), size_of_val(w));
        add_unit::<I, T>(isa, &mut acc, w, x);
    }
    if !x_rest.is_empty() {
        add_unit::<I, T>(isa, &mut acc, &T::rest(w), &padded(x_rest, 0.0));
    }
    isa.reduce_add(sum_lanes(isa, acc)) + 0.0
}

#[inline(always)]
fn add_unit<I: Isa, T: Units>(isa: I, acc: &mut [I::V; 8], w: &T::Vectors, x: &[f32; 32]) {
    for i in 0..32 / I::LANES {
        acc[i] = isa.mul_add(T::value(isa, w, i), isa.load(x, i), acc[i]);
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
