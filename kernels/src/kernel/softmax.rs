//! Softmax, at once or piece by piece.

use super::{exp::exp, padded};
use crate::isa::Isa;

/// See [`candle_sparse_core::kernel::softmax::softmax`].
#[inline(always)]
pub(crate) fn softmax<I: Isa>(isa: I, x: &mut [f32]) {
    let (_, sum) = exp_sum(isa, x, f32::NEG_INFINITY);
    let scale = 1.0 / sum;
    let (blocks, rest) = x.as_chunks_mut();
    for block in blocks {
        for i in 0..32 / I::LANES {
            isa.store(isa.mul(isa.load(block, i), isa.splat(scale)), block, i);
        }
    }
    rest.iter_mut().for_each(|v| *v *= scale);
}

/// See [`candle_sparse_core::kernel::softmax::exp_sum`].
#[inline(always)]
pub(crate) fn exp_sum<I: Isa>(isa: I, x: &mut [f32], max_before: f32) -> (f32, f32) {
    let (blocks, rest) = x.as_chunks_mut();
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
