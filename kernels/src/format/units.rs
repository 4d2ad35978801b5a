//! Units of 32 elements that can be read as f32 vectors.

use crate::isa::Isa;
use candle_sparse_core::BLOCK_LEN;

/// Units whose factors are computed together.
pub(crate) const RUN: usize = 32;
/// Factors of as many units, each four times because that is how [`Isa::splat_four`] makes them.
pub(crate) type Factors = [[f32; 32]; RUN / 8];

/// An element type whose units can be read as f32 vectors.
pub(crate) trait Units: Copy {
    /// 32 elements.
    type Vectors: Copy;
    /// Whether a row may end with less than a unit.
    const RESTS: bool;
    /// Whether a vector takes several registers to be made.
    const IN_HALVES: bool;

    /// The whole units of a row.
    fn vectors(row: &[Self]) -> &[Self::Vectors];
    /// What follows them, filled up with zeros; asked for only if [`Self::RESTS`].
    fn rest(row: &[Self]) -> Self::Vectors;
    /// Vector `i` of the elements.
    fn value<I: Isa>(isa: I, unit: &Self::Vectors, i: usize) -> I::V;

    /// Writes units of a row, from unit `first` on.
    #[inline(always)]
    fn write_units<I: Isa>(isa: I, row: &[Self], first: usize, out: &mut [[f32; BLOCK_LEN]]) {
        for (unit, out) in Self::vectors(row)[first..].iter().zip(out) {
            for i in 0..32 / I::LANES {
                isa.store(Self::value(isa, unit, i), out, i);
            }
        }
    }
}

/// Units of which each is one factor times something, so that the factor can be multiplied with that of the row.
pub(crate) trait Summand: Units {
    /// Vectors are in units of this, a power of two.
    const STEP: f32;

    fn vector<I: Isa>(isa: I, unit: &Self::Vectors, i: usize) -> I::V;
    /// What [`Self::vector`] is still to be multiplied with, times `alpha`, which has [`Self::STEP`] in it.
    fn scale<I: Isa>(isa: I, unit: &Self::Vectors, alpha: I::V) -> I::V;
    /// [`Self::scale`] of at most [`RUN`] units, to be read by [`Self::factor`].
    #[inline(always)]
    fn factors<I: Isa>(_: I, _: &[Self::Vectors], _: f32, _: &mut Factors) {}
    #[inline(always)]
    fn factor<I: Isa>(isa: I, unit: &Self::Vectors, alpha: I::V, _: &Factors, _: usize) -> I::V {
        Self::scale(isa, unit, alpha)
    }
}
