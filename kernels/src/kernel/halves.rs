//! A first look at a matrix by the upper halves of its elements, and rows made whole of both halves.

use super::matmul::{ask, stream};
use crate::isa::{Isa, Kernel};
use candle_sparse_core::{ActivationGroup, BlockQ8_0, Halves, Upper};

/// [`candle_sparse_core::KernelSet::matvec_upper`].
pub(crate) struct MatvecUpper<'a> {
    pub(crate) w: Upper<'a>,
    pub(crate) x: &'a [ActivationGroup],
    pub(crate) y: &'a mut [f32],
}

impl Kernel for MatvecUpper<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        for (y, row) in self.y.iter_mut().zip(self.w.blocks.chunks_exact(self.w.row_blocks)) {
            *y = stream::<I, _, false>(isa, row, self.x, row);
        }
    }
}

/// [`candle_sparse_core::KernelSet::join_rows`].
pub(crate) struct JoinRows<'a> {
    pub(crate) w: Halves<'a>,
    pub(crate) rows: &'a [u32],
    pub(crate) out: &'a mut [BlockQ8_0],
}

/// Rows whose memory is asked for before they are needed: some kilobytes, as in other gathers.
const AHEAD: usize = 8;

impl Kernel for JoinRows<'_> {
    type Output = ();

    /// Plain loops, which the compiler makes vectors of the instruction set of.
    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let Self { w: Halves { upper, row_blocks, lower }, rows, out } = self;
        let upper = |r: u32| &upper.blocks[r as usize * upper.row_blocks..][..row_blocks];
        let lower = |r: u32| &lower[r as usize * row_blocks..][..row_blocks];
        let ask_for = |r: u32| {
            ask(upper(r), 0, size_of_val(upper(r)));
            ask(lower(r), 0, size_of_val(lower(r)));
        };
        rows.iter().take(AHEAD).for_each(|&r| ask_for(r));
        for (i, (&r, out)) in rows.iter().zip(out.chunks_exact_mut(row_blocks)).enumerate() {
            if let Some(&next) = rows.get(i + AHEAD) {
                ask_for(next);
            }
            for ((out, upper), lower) in out.iter_mut().zip(upper(r)).zip(lower(r)) {
                *out = upper.join(lower);
            }
        }
    }
}
