//! Elements of a row in units of 32, as f32 vectors.

use super::padded;
use crate::isa::Isa;
use candle_sparse_core::{BlockQ4_0, BlockQ4_1, BlockQ8_0, format::f16_to_f32};
use half::{bf16, f16};

/// Units whose factors are computed together.
pub(super) const RUN: usize = 32;
/// Factors of as many units, each four times because that is how [`Isa::scales`] makes them.
pub(super) type Factors = [[f32; 32]; RUN / 8];

/// An element type whose units can be read as f32 vectors.
pub(super) trait Units: Copy {
    /// 32 elements.
    type Unit: Copy;
    /// Whether a row may end with less than a unit.
    const RESTS: bool;

    /// The whole units of a row.
    fn units(row: &[Self]) -> &[Self::Unit];
    /// What follows them, filled up with zeros.
    fn last(row: &[Self]) -> Self::Unit;
    /// Vector `i` of the elements.
    fn value<I: Isa>(isa: I, unit: &Self::Unit, i: usize) -> I::V;
}

/// Units of which each is one factor times something, so that the factor can be multiplied with that of the row.
pub(super) trait Summand: Units {
    /// Vectors are in units of this, a power of two.
    const STEP: f32;

    fn vector<I: Isa>(isa: I, unit: &Self::Unit, i: usize) -> I::V;
    /// What [`Self::vector`] is still to be multiplied with, times `alpha`, which has [`Self::STEP`] in it.
    fn scale<I: Isa>(isa: I, unit: &Self::Unit, alpha: I::V) -> I::V;
    /// [`Self::scale`] of at most [`RUN`] units, to be read by [`Self::factor`].
    #[inline(always)]
    fn factors<I: Isa>(_: I, _: &[Self::Unit], _: f32, _: &mut Factors) {}
    #[inline(always)]
    fn factor<I: Isa>(isa: I, unit: &Self::Unit, alpha: I::V, _: &Factors, _: usize) -> I::V {
        Self::scale(isa, unit, alpha)
    }
}

macro_rules! float_units {
    ($t:ty, $zero:expr, $load:ident) => {
        impl Units for $t {
            type Unit = [$t; 32];
            const RESTS: bool = true;

            #[inline(always)]
            fn units(row: &[Self]) -> &[Self::Unit] {
                row.as_chunks().0
            }

            #[inline(always)]
            fn last(row: &[Self]) -> Self::Unit {
                padded(row.as_chunks::<32>().1, $zero)
            }

            #[inline(always)]
            fn value<I: Isa>(isa: I, unit: &Self::Unit, i: usize) -> I::V {
                isa.$load(unit, i)
            }
        }

        impl Summand for $t {
            const STEP: f32 = 1.0;

            #[inline(always)]
            fn vector<I: Isa>(isa: I, unit: &Self::Unit, i: usize) -> I::V {
                isa.$load(unit, i)
            }

            #[inline(always)]
            fn scale<I: Isa>(_: I, _: &Self::Unit, alpha: I::V) -> I::V {
                alpha
            }
        }
    };
}

float_units!(f32, 0.0, load);
float_units!(f16, f16::ZERO, load_f16);
float_units!(bf16, bf16::ZERO, load_bf16);

macro_rules! block_units {
    ($t:ty, |$isa:ident, $unit:ident, $i:ident| $value:expr) => {
        impl Units for $t {
            type Unit = Self;
            const RESTS: bool = false;

            #[inline(always)]
            fn units(row: &[Self]) -> &[Self] {
                row
            }

            #[inline(always)]
            fn last(row: &[Self]) -> Self {
                // Never asked for: a row is whole blocks.
                row[0]
            }

            /// The elements themselves: quants and scales are short, their product is exact.
            #[inline(always)]
            fn value<I: Isa>($isa: I, $unit: &Self, $i: usize) -> I::V {
                $value
            }
        }
    };
}

block_units!(BlockQ8_0, |isa, unit, i| isa.mul(isa.widen_i8(&unit.qs, i), isa.splat_f16(unit.d)));
block_units!(BlockQ4_0, |isa, unit, i| {
    isa.mul(isa.widen_nibbles(&unit.qs, i), isa.mul(isa.splat_f16(unit.d), isa.splat(1.0 / 16.0)))
});
block_units!(BlockQ4_1, |isa, unit, i| {
    // Of d · q + m, with 16 · (q − 8) for q.
    let d = isa.splat_f16(unit.d);
    let start = isa.mul_add(d, isa.splat(8.0), isa.splat_f16(unit.m));
    isa.mul_add(isa.widen_nibbles(&unit.qs, i), isa.mul(d, isa.splat(1.0 / 16.0)), start)
});

impl Summand for BlockQ8_0 {
    const STEP: f32 = 1.0;

    #[inline(always)]
    fn scale<I: Isa>(isa: I, unit: &Self, alpha: I::V) -> I::V {
        isa.mul(isa.splat_f16(unit.d), alpha)
    }

    #[inline(always)]
    fn vector<I: Isa>(isa: I, unit: &Self, i: usize) -> I::V {
        isa.widen_i8(&unit.qs, i)
    }
}

impl Summand for BlockQ4_0 {
    const STEP: f32 = 1.0 / 16.0;

    #[inline(always)]
    fn scale<I: Isa>(isa: I, unit: &Self, alpha: I::V) -> I::V {
        isa.mul(isa.splat_f16(unit.d), alpha)
    }

    #[inline(always)]
    fn vector<I: Isa>(isa: I, unit: &Self, i: usize) -> I::V {
        isa.widen_nibbles(&unit.qs, i)
    }

    #[inline(always)]
    fn factors<I: Isa>(isa: I, units: &[Self], alpha: f32, out: &mut Factors) {
        let (fours, few) = units.as_chunks();
        for (g, four) in fours.iter().enumerate() {
            for i in 0..16 / I::LANES {
                let factors = isa.mul(isa.scales_q4_0(four, i), isa.splat(alpha));
                isa.store(factors, &mut out[g / 2], g % 2 * (16 / I::LANES) + i);
            }
        }
        for (unit, out) in few.iter().zip(out.as_flattened_mut()[16 * fours.len()..].as_chunks_mut().0) {
            *out = [f16_to_f32(unit.d.to_bits()) * alpha; 4];
        }
    }

    #[inline(always)]
    fn factor<I: Isa>(isa: I, _: &Self, _: I::V, factors: &Factors, k: usize) -> I::V {
        isa.splat(factors.as_flattened()[4 * k])
    }
}
