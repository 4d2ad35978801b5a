//! Softmax, at once or piece by piece.

use super::{exp::exp, padded};
use crate::isa::{Isa, Kernel};

/// [`candle_sparse_core::KernelSet::softmax`].
pub(crate) struct Softmax<'a>(pub(crate) &'a mut [f32]);

impl Kernel for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (_, sum) = exp_sum(isa, self.0, f32::NEG_INFINITY);
        let scale = 1.0 / sum;
        let (blocks, rest) = self.0.as_chunks_mut::<32>();
        for block in blocks {
            for i in 0..32 / I::LANES {
                isa.store(isa.mul(isa.load(block, i), isa.splat(scale)), block, i);
            }
        }
        rest.iter_mut().for_each(|v| *v *= scale);
    }
}

/// [`candle_sparse_core::KernelSet::exp_sum`].
pub(crate) struct ExpSum<'a> {
    pub(crate) x: &'a mut [f32],
    pub(crate) max_before: f32,
}

impl Kernel for ExpSum<'_> {
    type Output = (f32, f32);

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> (f32, f32) {
        exp_sum(isa, self.x, self.max_before)
    }
}

#[inline(always)]
fn exp_sum<I: Isa>(isa: I, x: &mut [f32], max_before: f32) -> (f32, f32) {
    let (blocks, rest) = x.as_chunks_mut::<32>();
    // Filled up with −∞ the rest is a block like any other: its e^x adds 0.
    let mut tail = padded(rest, f32::NEG_INFINITY);
    let mut max = isa.splat(max_before);
    for block in blocks.iter().chain([&tail]) {
        for i in 0..32 / I::LANES {
            max = isa.max(isa.load(block, i), max);
        }
    }
    let max = isa.reduce_max(max);
    let mut sum = isa.splat(0.0);
    for block in blocks.iter_mut().chain([&mut tail]) {
        for i in 0..32 / I::LANES {
            let e = exp(isa, isa.sub(isa.load(block, i), isa.splat(max)));
            sum = isa.add(sum, e);
            isa.store(e, block, i);
        }
    }
    rest.copy_from_slice(&tail[..rest.len()]);
    (max, isa.reduce_add(sum))
}
