//! A first look at a matrix by the upper halves of its elements, and rows made whole of both halves.
//!
//! A first look reads half the bytes, so it is bound by arithmetic unless it is short: whole lines, no copies, one conversion
//! for four scales, two multiply-adds per vector of sums.

use super::matmul::ask;
use crate::{
    arch::prefetch,
    isa::{Isa, Kernel},
};
use bytemuck::must_cast_ref;
use candle_sparse_core::{BlockQ8_0, Halves, Upper, UpperColumn};

/// Bytes before their use that nibbles are asked for: beside a second stream the hardware fetches too late.
const LOOK_AHEAD: usize = 4096;

/// [`candle_sparse_core::KernelSet::matvec_upper`].
pub(crate) struct MatvecUpper<'a> {
    pub(crate) w: Upper<'a>,
    pub(crate) x: &'a [UpperColumn],
    pub(crate) y: &'a mut [f32],
}

impl Kernel for MatvecUpper<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { w: Upper { row_groups: n, qs, d }, x, y } = self;
        for (y, (qs, d)) in y.iter_mut().zip(qs.chunks_exact(n).zip(d.chunks_exact(n))) {
            // One sum: what waits for it is the next row, which does not.
            let mut sum = isa.splat(0.0);
            for (g, (x, (nibbles, d))) in x.iter().zip(qs.iter().zip(d)).enumerate() {
                prefetch(qs, LOOK_AHEAD + 64 * g);
                for i in 0..16 / I::LANES {
                    let w = isa.nibbles(isa.load_bytes(must_cast_ref(nibbles), i));
                    let q = [isa.load_bytes(&x.qs[0], i), isa.load_bytes(&x.qs[1], i)];
                    let sums = isa.sums_to_f32(isa.dot_u6(isa.zero_sums(), w, q));
                    let scaled = isa.mul_add(sums, isa.load(&x.d, i), isa.load(&x.centre, i));
                    sum = isa.mul_add(isa.spread_four(d, i), scaled, sum);
                }
            }
            *y = isa.reduce_add(sum);
        }
    }
}

/// [`candle_sparse_core::KernelSet::join_rows`].
pub(crate) struct JoinRows<'a> {
    pub(crate) w: Halves<'a>,
    pub(crate) rows: &'a [u32],
    pub(crate) out: &'a mut [BlockQ8_0],
}

/// Rows before its use that a row is asked for: some kilobytes, as in other gathers.
const AHEAD: usize = 8;

impl Kernel for JoinRows<'_> {
    type Output = ();

    /// Plain loops, of which the compiler makes vectors of the instruction set.
    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        let Self { w: Halves { upper, row_blocks, lower }, rows, out } = self;
        let lower = |r: u32| &lower[r as usize * row_blocks..][..row_blocks];
        let ask_for = |r: u32| {
            let part = upper.slice_rows(r as usize..r as usize + 1);
            ask(part.qs, 0, size_of_val(part.qs));
            ask(part.d, 0, size_of_val(part.d));
            ask(lower(r), 0, size_of_val(lower(r)));
        };
        rows.iter().take(AHEAD).for_each(|&r| ask_for(r));
        for (i, (&r, out)) in rows.iter().zip(out.chunks_exact_mut(row_blocks)).enumerate() {
            if let Some(&next) = rows.get(i + AHEAD) {
                ask_for(next);
            }
            for (b, (out, lower)) in out.iter_mut().zip(lower(r)).enumerate() {
                *out = upper.block(r as usize, b).join(lower);
            }
        }
    }
}
