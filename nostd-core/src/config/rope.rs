//! Rotary position embedding: its base, and how frequencies are stretched.

use crate::error::Error;

/// How rotary frequencies are stretched for contexts longer than the trained one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Positions divided by `factor`.
    Linear {
        /// Divisor of the position.
        factor: f32,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a smooth change between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f32,
        /// Wavelengths above `original / low_freq_factor` are stretched.
        low_freq_factor: f32,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f32,
        /// Context length of the original training.
        original_max_position_embeddings: usize,
    },
    /// `YaRN` (<https://arxiv.org/abs/2309.00071>): frequencies that turn less than `beta_slow` times in the original context
    /// divided by `factor`, those that turn more than `beta_fast` times kept, a line between; cosine and sine times
    /// `attention_factor`.
    Yarn {
        /// Divisor of the low frequencies.
        factor: f32,
        /// Turns in the original context above which a frequency is kept.
        beta_fast: f32,
        /// Turns in the original context below which a frequency is divided.
        beta_slow: f32,
        /// Context length of the original training.
        original_max_position_embeddings: usize,
        /// What cosine and sine are multiplied with.
        attention_factor: f32,
        /// The line begins and ends at a whole pair.
        truncate: bool,
    },
}

/// Rotary position embedding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies, `rope_theta`.
    pub theta: f32,
    /// Stretching.
    pub scaling: RopeScaling,
    /// Pairs are neighbours (GGUF) instead of the two halves of a head (Hugging Face).
    pub interleaved: bool,
}

impl Rope {
    /// Angle per position of pair `i`, `theta^(−2i/head_dim)`, stretched as [`RopeScaling`] says.
    ///
    /// Source: `_compute_llama3_parameters` and `_compute_yarn_parameters` in transformers' `modeling_rope_utils.py`.
    #[must_use]
    pub fn inv_freq(&self, i: usize, head_dim: usize) -> f32 {
        let freq = 1.0 / libm::powf(self.theta, (2 * i) as f32 / head_dim as f32);
        match self.scaling {
            RopeScaling::None => freq,
            RopeScaling::Linear { factor } => freq / factor,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let original = original_max_position_embeddings as f32;
                let wavelen = 2.0 * core::f32::consts::PI / freq;
                if wavelen < original / high_freq_factor {
                    freq
                } else if wavelen > original / low_freq_factor {
                    freq / factor
                } else {
                    let smooth =
                        (original / wavelen - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * freq / factor + smooth * freq
                }
            }
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                original_max_position_embeddings,
                truncate,
                ..
            } => {
                let original = original_max_position_embeddings as f64;
                let stretched = self.ramp([beta_fast, beta_slow], original, truncate, i, head_dim);
                freq / factor * stretched + freq * (1.0 - stretched)
            }
        }
    }

    /// How far pair `i` is on `YaRN`'s line, from 0, kept, to 1, stretched.
    fn ramp(&self, [fast, slow]: [f32; 2], original: f64, truncate: bool, i: usize, head_dim: usize) -> f32 {
        let dim = head_dim as f64;
        // The pair that turns so often in the original context.
        let pair = |turns: f32| {
            let turn = 2.0 * core::f64::consts::PI * f64::from(turns);
            dim * libm::log(original / turn) / (2.0 * libm::log(f64::from(self.theta)))
        };
        let (mut low, mut high) = (pair(fast), pair(slow));
        if truncate {
            (low, high) = (libm::floor(low), libm::ceil(high));
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        ((i as f64 - low) / (high - low)).clamp(0.0, 1.0) as f32
    }

    /// What cosine and sine are multiplied with: 1 but for [`RopeScaling::Yarn`].
    #[must_use]
    pub fn attention_factor(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }

    pub(super) fn validate(&self) -> Result<(), Error> {
        if !(self.theta.is_finite() && self.theta > 0.0) {
            return Err(Error::OutOfRange("rope_theta"));
        }
        let positive = |v: f32| v.is_finite() && v > 0.0;
        if let RopeScaling::Llama3 { original_max_position_embeddings: 0, .. }
        | RopeScaling::Yarn { original_max_position_embeddings: 0, .. } = self.scaling
        {
            return Err(Error::Zero("rope_scaling original_max_position_embeddings"));
        }
        match self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } if positive(factor) => Ok(()),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, .. }
                if positive(factor)
                    && positive(low_freq_factor)
                    && positive(high_freq_factor)
                    && high_freq_factor > low_freq_factor =>
            {
                Ok(())
            }
            RopeScaling::Yarn { factor, beta_fast, beta_slow, attention_factor, .. }
                if positive(factor)
                    && positive(beta_slow)
                    && positive(beta_fast)
                    && beta_fast >= beta_slow
                    && positive(attention_factor)
                    && self.theta > 1.0 =>
            {
                Ok(())
            }
            _ => Err(Error::OutOfRange("rope_scaling")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn yarn(theta: f32, factor: f32, truncate: bool) -> Rope {
        let scaling = RopeScaling::Yarn {
            factor,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_max_position_embeddings: 4096,
            attention_factor: 0.1 * libm::logf(factor) + 1.0,
            truncate,
        };
        Rope { theta, scaling, interleaved: false }
    }

    /// What `_compute_yarn_parameters` of transformers 5.24 gives for AFM-4.5B, and for a line that is not cut to whole pairs.
    #[test]
    fn yarn_is_that_of_transformers() {
        let afm = yarn(1e4, 20.0, true);
        for (i, expected) in [
            (0, 1.0),
            (20, 0.056_234_13),
            (21, 0.046_917_446),
            (30, 0.008_462_732),
            (33, 0.004_546_312_6),
            (40, 8.513_824_4e-4),
            (46, 6.667_607e-5),
            (63, 5.773_909_4e-6),
        ] {
            let got = afm.inv_freq(i, 128);
            assert!((got - expected).abs() <= 3e-7 * expected, "pair {i}: {got} {expected}");
        }
        let uncut = yarn(1.5e5, 32.0, false);
        for (i, expected) in [
            (0, 1.0),
            (8, 0.050_813_273),
            (9, 0.031_705_696),
            (12, 0.006_794_959_3),
            (15, 0.001_052_602_2),
            (18, 3.830_881_2e-5),
            (31, 3.023_511_4e-7),
        ] {
            let got = uncut.inv_freq(i, 64);
            assert!((got - expected).abs() <= 3e-6 * expected, "pair {i}: {got} {expected}");
        }
        assert!((afm.attention_factor() - 1.299_573_2).abs() < 1e-6);
        assert_eq!(Rope { scaling: RopeScaling::None, ..afm }.attention_factor(), 1.0);
    }

    #[test]
    fn yarn_without_a_line_is_refused() {
        let bad = |theta: f32, factor: f32| yarn(theta, factor, true).validate();
        assert_eq!(bad(1e4, 4.0), Ok(()));
        let refused = Err(Error::OutOfRange("rope_scaling"));
        assert_eq!([bad(1.0, 4.0), bad(1e4, 0.0), bad(1e4, f32::NAN)], [refused; 3]);
    }
}
