//! F32, F16 and BF16, 32 elements at a time.

use super::{
    Element, RowsOf,
    operand::Operand,
    units::{Summand, Units},
};
use crate::{
    isa::Isa,
    kernel::{
        axpy_rows::{self, Together},
        matmul_t::{self, MatmulT},
        padded,
    },
};
use candle_sparse_core::{BLOCK_LEN, Columns};
use half::{bf16, f16};

macro_rules! float {
    ($t:ty, $zero:expr, $load:ident) => {
        impl Operand for $t {
            type Unit = [$t; 32];
            type Column = f32;
            type ColumnUnit = [f32; 32];

            #[inline(always)]
            fn columns(x: Columns<'_>) -> &[f32] {
                let Columns::F32(x) = x else { unreachable!("every operation checks its columns") };
                x
            }

            #[inline(always)]
            fn units(row: &[Self]) -> &[Self::Unit] {
                row.as_chunks().0
            }

            #[inline(always)]
            fn column_units(x: &[f32]) -> &[[f32; 32]] {
                x.as_chunks().0
            }

            #[inline(always)]
            fn last<'a>(row: &'a [Self], room: &'a mut Option<Self::Unit>) -> Option<&'a Self::Unit> {
                let rest = row.as_chunks::<32>().1;
                (!rest.is_empty()).then(|| &*room.insert(padded(rest, $zero)))
            }

            #[inline(always)]
            fn last_of_column<'a>(x: &'a [f32], room: &'a mut Option<[f32; 32]>) -> &'a [f32; 32] {
                room.insert(padded(x.as_chunks::<32>().1, 0.0))
            }

            #[inline(always)]
            fn add<I: Isa, const R: usize, const C: usize>(
                isa: I,
                acc: &mut [[I::V; C]; R],
                w: [&Self::Unit; R],
                x: [&[f32; 32]; C],
            ) {
                for i in 0..32 / I::LANES {
                    let mut xs = [isa.splat(0.0); C];
                    for c in 0..C {
                        xs[c] = isa.load(x[c], i);
                    }
                    for r in 0..R {
                        let w = isa.$load(w[r], i);
                        for c in 0..C {
                            acc[r][c] = isa.mul_add(w, xs[c], acc[r][c]);
                        }
                    }
                }
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

float!(f32, 0.0, load);
float!(f16, f16::ZERO, load_f16);
float!(bf16, bf16::ZERO, load_bf16);
