//! BF16 in pairs: two multiply-adds of a lane at once, with columns that are rounded to BF16 as they are read.
//!
//! ```text
//! acc[l] = Σ w[2k] · x[2k] + w[2k + 1] · x[2k + 1] over k = l (mod 32)    in order
//! y      = Σ_l acc[l]                                                     halves first
//! ```

use super::{
    Element, RowsOf,
    operand::Operand,
    tile,
    units::{Summand, Units},
    words::{Factors, Words},
};
use crate::{
    isa::{Isa, Kernel},
    kernel::{
        axpy_rows::{self, Together},
        matmul_t::{self, MatmulT},
        padded,
    },
};
use bytemuck::{Pod, Zeroable, must_cast, must_cast_ref, must_cast_slice};
use candle_sparse_core::{BLOCK_LEN, Columns};
use half::bf16;
use std::borrow::Cow;

/// A BF16 of a matrix, multiplied together with its neighbour.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(transparent)]
pub(crate) struct Paired(bf16);

impl<'a> RowsOf<'a, bf16> {
    /// The same rows, multiplied in pairs.
    pub(super) fn paired(self) -> RowsOf<'a, Paired> {
        RowsOf { elements: must_cast_slice(self.elements), len: self.len, stride: self.stride }
    }
}

/// A number of a column, rounded together with its neighbour.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(transparent)]
pub(super) struct Rounded(f32);

float_operand!(Paired);
words!(Paired, 64, Self(bf16::ZERO), |isa, unit, i| isa.load_pairs(must_cast_ref(unit), i));
words!(Rounded, 64, Self(0.0), |isa, unit, i| {
    let x = must_cast_ref::<_, [f32; 64]>(unit);
    isa.round_pairs(isa.load(x, 2 * i), isa.load(x, 2 * i + 1))
});

impl Factors for Paired {
    type Column = Rounded;
    type Prepared = Self;

    #[inline(always)]
    fn column(x: &[f32]) -> &[Rounded] {
        must_cast_slice(x)
    }

    #[inline(always)]
    fn prepared<I: Isa>(isa: I, x: &[f32]) -> Cow<'_, [Self]> {
        let mut rounded = vec![Self(bf16::ZERO); x.len()];
        isa.leaf(Round { x: Self::column(x), rounded: &mut rounded });
        Cow::Owned(rounded)
    }

    #[inline(always)]
    fn add<I: Isa>(isa: I, w: I::V, x: I::V, acc: I::V) -> I::V {
        isa.add_pairs(w, x, acc)
    }
}

/// Numbers rounded to BF16.
struct Round<'a> {
    x: &'a [Rounded],
    rounded: &'a mut [Paired],
}

impl Kernel for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        for (x, rounded) in self.x.chunks(64).zip(self.rounded.chunks_mut(64)) {
            let mut unit = [Rounded(0.0); 64];
            unit[..x.len()].copy_from_slice(x);
            let mut words = [0.0_f32; 32];
            for i in 0..32 / I::LANES {
                isa.store(Rounded::word(isa, &unit, i), &mut words, i);
            }
            rounded.copy_from_slice(&must_cast::<_, [Paired; 64]>(words)[..x.len()]);
        }
    }
}

float_units!(Paired, Paired(bf16::ZERO), |isa, unit, i| isa.load_bf16(must_cast_ref(unit), i));
