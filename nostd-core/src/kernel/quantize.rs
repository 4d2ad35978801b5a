//! Activations to blocks, once per matvec.

use crate::format::{ActivationBlock, BLOCK_LEN};

/// Rounds `x` to blocks, `blocks[i]` holding elements `32·i .. 32·i + 32`.
///
/// # Panics
/// `x` has not exactly 32 elements per block.
pub fn quantize(x: &[f32], blocks: &mut [ActivationBlock]) {
    let (chunks, rest) = x.as_chunks::<BLOCK_LEN>();
    assert!(rest.is_empty() && chunks.len() == blocks.len(), "quantize: 32 elements per block");
    for (block, chunk) in blocks.iter_mut().zip(chunks) {
        *block = ActivationBlock::quantize(chunk);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockQ4_0, BlockQ8_0};

    #[test]
    fn error_is_at_most_half_a_step_and_zero_stays_zero() {
        let mut x = [0.0; 32];
        for (i, v) in x.iter_mut().enumerate() {
            *v = libm::sinf(i as f32) * 3.0;
        }
        let mut blocks = [ActivationBlock::quantize(&[0.0; 32])];
        assert_eq!((blocks[0].d, blocks[0].sum, blocks[0].qs), (0.0, 0, [0; 32]));
        quantize(&x, &mut blocks);
        let b = blocks[0];
        assert_eq!(b.sum, b.qs.iter().map(|&q| i32::from(q)).sum::<i32>());
        let mut q8 = [0.0; 32];
        BlockQ8_0::quantize(&x).dequantize(&mut q8);
        let mut q4 = [0.0; 32];
        BlockQ4_0::quantize(&x).dequantize(&mut q4);
        for (i, v) in x.iter().enumerate() {
            assert!((v - b.d * f32::from(b.qs[i])).abs() <= b.d * 0.5001);
            // The f16 scale adds 2⁻¹¹ of the value.
            assert!((v - q8[i]).abs() <= b.d * 0.5001 + v.abs() / 2048.0);
            assert!((v - q4[i]).abs() <= 3.0 / 8.0 * 1.001 + v.abs() / 2048.0);
        }
    }

    #[test]
    fn nan_and_infinity_poison_the_block() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1.0; 32];
            x[7] = bad;
            assert!(ActivationBlock::quantize(&x).d.is_nan());
            assert!(BlockQ8_0::quantize(&x).d.is_nan() && BlockQ4_0::quantize(&x).d.is_nan());
        }
    }

    #[test]
    fn subnormal_and_extreme_inputs_stay_finite() {
        for v in [f32::MIN_POSITIVE / 4.0, f32::MIN_POSITIVE, f32::MAX] {
            let b = ActivationBlock::quantize(&[v; 32]);
            assert!(b.d.is_finite() && b.qs.iter().all(|&q| q == 0 || q == 127), "{v}: {b:?}");
        }
    }
}
