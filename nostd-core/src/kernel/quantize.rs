//! Activations to bytes, once per matvec.

use crate::format::{ActivationGroup, BLOCK_LEN, GROUP_LEN};

/// Rounds `x`, `groups[i]` holding elements `128·i .. 128·i + 128`; a last group of fewer blocks
/// begins with zeros.
///
/// # Panics
/// As [`check_quantize`].
pub fn quantize(x: &[f32], groups: &mut [ActivationGroup]) {
    check_quantize(x, groups);
    for (group, chunk) in groups.iter_mut().zip(x.as_chunks().0.chunks(GROUP_LEN / BLOCK_LEN)) {
        *group = ActivationGroup::quantize(chunk);
    }
}

/// Panics unless the operands of [`quantize`] fit together.
///
/// # Panics
/// `x` is no whole number of blocks of 32, or `groups` has another length than [`ActivationGroup::count`] says.
pub fn check_quantize(x: &[f32], groups: &[ActivationGroup]) {
    assert!(x.len().is_multiple_of(BLOCK_LEN), "quantize: {} elements are no blocks of 32", x.len());
    assert_eq!(groups.len(), ActivationGroup::count(x.len()), "quantize: wrong number of groups");
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
        let mut groups = [ActivationGroup::quantize(&[[0.0; 32]; 4])];
        assert_eq!(groups[0], ActivationGroup::ZERO);
        quantize(&x, &mut groups);
        let (d, sum, qs) = groups[0].block(3);
        assert_eq!(sum, qs.iter().map(|&q| i32::from(q)).sum::<i32>());
        assert_eq!(groups[0].block(2), (0.0, 0, [0; 32]));
        let mut q8 = [0.0; 32];
        BlockQ8_0::quantize(&x).dequantize(&mut q8);
        let mut q4 = [0.0; 32];
        BlockQ4_0::quantize(&x).dequantize(&mut q4);
        for (i, v) in x.iter().enumerate() {
            assert!((v - d * f32::from(qs[i])).abs() <= d * 0.5001);
            // The f16 scale adds 2⁻¹¹ of the value.
            assert!((v - q8[i]).abs() <= d * 0.5001 + v.abs() / 2048.0);
            assert!((v - q4[i]).abs() <= 3.0 / 8.0 * 1.001 + v.abs() / 2048.0);
        }
    }

    #[test]
    fn nan_and_infinity_poison_the_block() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1.0; 32];
            x[7] = bad;
            assert!(ActivationGroup::quantize(&[x]).d[3].is_nan());
            assert!(BlockQ8_0::quantize(&x).d.is_nan() && BlockQ4_0::quantize(&x).d.is_nan());
        }
    }

    #[test]
    fn subnormal_and_extreme_inputs_stay_finite() {
        for v in [f32::MIN_POSITIVE / 4.0, f32::MIN_POSITIVE, f32::MAX] {
            let (d, _, qs) = ActivationGroup::quantize(&[[v; 32]]).block(3);
            assert!(d.is_finite() && qs.iter().all(|&q| q == 0 || q == 127), "{v}: {d} {qs:?}");
        }
    }
}
