//! Activations to blocks; equal to the scalar definition bit for bit.

use crate::isa::Isa;
use candle_sparse_core::{ActivationBlock, BLOCK_LEN};

/// See [`candle_sparse_core::kernel::quantize::quantize`].
#[inline(always)]
pub(crate) fn quantize<I: Isa>(isa: I, x: &[f32], blocks: &mut [ActivationBlock]) {
    let (chunks, rest) = x.as_chunks::<BLOCK_LEN>();
    assert!(rest.is_empty() && chunks.len() == blocks.len(), "quantize: 32 elements per block");
    for (block, chunk) in blocks.iter_mut().zip(chunks) {
        let (mut max, mut poison) = (isa.splat(0.0), isa.splat(0.0));
        for i in 0..32 / I::LANES {
            let v = isa.load(chunk, i);
            max = isa.max(isa.abs(v), max);
            poison = isa.mul_add(v, isa.splat(0.0), poison);
        }
        // NaN where any element is not finite, else 0: garbage must not be rounded to plausible numbers.
        let poison = isa.reduce_add(poison);
        let d = isa.reduce_max(max) / 127.0 + poison;
        let scale = if d >= f32::MIN_POSITIVE { 1.0 / d } else { 0.0 };
        block.d = d;
        block.sum = isa.round_to_i8(chunk, scale, &mut block.qs);
        if poison.is_nan() {
            (block.sum, block.qs) = (0, [0; BLOCK_LEN]);
        }
    }
}
