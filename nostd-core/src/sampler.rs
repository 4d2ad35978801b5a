//! Which token comes next.

use crate::error::Error;

/// How a token is chosen from logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sampler {
    /// The most likely one; of equal ones the first.
    Greedy,
    /// By chance, from `softmax(logits / temperature)`.
    Temperature {
        /// Above 0; 1 is the model's own distribution.
        temperature: f32,
    },
    /// By chance, from the smallest set of most likely tokens whose probabilities reach `top_p` together, with all that are as
    /// likely as the last of them (Holtzman et al. 2020, nucleus sampling).
    TopP {
        /// Above 0; 1 is the model's own distribution.
        temperature: f32,
        /// Above 0; 1 is every token.
        top_p: f32,
    },
}

impl Sampler {
    /// Chooses a token; `logits` are lost. `random` gives 32 random bits and is called at most once.
    ///
    /// Cost: for `TopP` about 32 additions per token of the vocabulary, since nothing is sorted and no memory is taken.
    ///
    /// # Errors
    /// Settings out of their ranges, no logits, or a logit that is NaN or infinite (−∞ rules a token out and is none).
    pub fn sample(self, logits: &mut [f32], random: impl FnOnce() -> u32) -> Result<usize, Error> {
        let (temperature, top_p) = match self {
            Self::Greedy => return greedy(logits),
            Self::Temperature { temperature } => (temperature, 1.0),
            Self::TopP { temperature, top_p } => (temperature, top_p),
        };
        if !(temperature.is_finite() && temperature > 0.0) {
            return Err(Error::OutOfRange("temperature"));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::OutOfRange("top_p"));
        }
        let most = logits[greedy(logits)?];
        if most == f32::NEG_INFINITY {
            return Err(Error::OutOfRange("logits"));
        }
        let mut sum = 0.0;
        for l in logits.iter_mut() {
            *l = libm::expf((*l - most) / temperature);
            sum += *l;
        }
        let (least, wanted) = if top_p < 1.0 { nucleus(logits, top_p * sum) } else { (0, sum) };
        // 24 bits, as many as f32 has: 0 ≤ u < 1.
        let u = (random() >> 8) as f32 / (1 << 24) as f32;
        Ok(draw(logits, least, wanted, u))
    }
}

fn greedy(logits: &[f32]) -> Result<usize, Error> {
    if logits.is_empty() {
        return Err(Error::Zero("logits"));
    }
    let mut best = 0;
    for (i, l) in logits.iter().enumerate() {
        if l.is_nan() || *l == f32::INFINITY {
            return Err(Error::OutOfRange("logits"));
        }
        if *l > logits[best] {
            best = i;
        }
    }
    Ok(best)
}

/// The bits of the largest weight w such that all weights of at least w reach `wanted` together, and their sum.
///
/// Weights are not negative, so their bits have their order: a search over 31 bits finds it.
fn nucleus(weights: &[f32], wanted: f32) -> (u32, f32) {
    let sum = |least: u32| weights.iter().filter(|w| w.to_bits() >= least).sum::<f32>();
    let mut least = 0;
    for bit in (0..31).rev() {
        if sum(least | 1 << bit) >= wanted {
            least |= 1 << bit;
        }
    }
    (least, sum(least))
}

/// The token at which the running sum of the weights that are not below `least` passes `u · sum`.
fn draw(weights: &[f32], least: u32, sum: f32, u: f32) -> usize {
    let (mut passed, mut last) = (0.0, 0);
    for (i, w) in weights.iter().enumerate() {
        if w.to_bits() < least || *w == 0.0 {
            continue;
        }
        passed += w;
        last = i;
        if passed > u * sum {
            break;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::f32::consts::LN_2;

    /// The logarithms of 1/2, 1/4, 1/8 and 1/8.
    const LN: [f32; 4] = [-LN_2, -2.0 * LN_2, -3.0 * LN_2, -3.0 * LN_2];

    /// How often each of four tokens is drawn, over all 24-bit numbers in steps.
    fn shares(sampler: Sampler, logits: [f32; 4]) -> [f32; 4] {
        let mut counts = [0.0; 4];
        let n = 4096_u32;
        for i in 0..n {
            let mut logits = logits;
            counts[sampler.sample(&mut logits, || i << 20).unwrap()] += 1.0;
        }
        counts.map(|c| c / n as f32)
    }

    fn near(got: [f32; 4], want: [f32; 4]) -> bool {
        got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-3)
    }

    #[test]
    fn chances_are_those_of_the_softmax() {
        // 1/2, 1/4, 1/8, 1/8
        let got = shares(Sampler::Temperature { temperature: 1.0 }, LN);
        assert!(near(got, [0.5, 0.25, 0.125, 0.125]), "{got:?}");
        let got = shares(Sampler::Temperature { temperature: 0.5 }, LN);
        let sum = 0.25 + 0.0625 + 2.0 * 0.015_625;
        assert!(near(got, [0.25 / sum, 0.0625 / sum, 0.015_625 / sum, 0.015_625 / sum]), "{got:?}");
    }

    #[test]
    fn a_nucleus_is_the_fewest_tokens_that_reach_top_p() {
        let top_p = |top_p| shares(Sampler::TopP { temperature: 1.0, top_p }, LN);
        assert_eq!(top_p(0.3), [1.0, 0.0, 0.0, 0.0]);
        assert!(near(top_p(0.6), [2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0]), "{:?}", top_p(0.6));
        // Equally likely tokens at the edge are all in it.
        assert!(near(top_p(0.8), [0.5, 0.25, 0.125, 0.125]), "{:?}", top_p(0.8));
        assert!(near(top_p(1.0), [0.5, 0.25, 0.125, 0.125]));
    }

    #[test]
    fn greedy_takes_the_first_of_the_most_likely() {
        let sample = |l: &[f32]| Sampler::Greedy.sample(&mut l.to_vec(), || unreachable!());
        assert_eq!(sample(&[1.0, 3.0, 3.0, f32::NEG_INFINITY]), Ok(1));
        assert_eq!(sample(&[]), Err(Error::Zero("logits")));
        for bad in [f32::NAN, f32::INFINITY] {
            assert_eq!(sample(&[0.0, bad]), Err(Error::OutOfRange("logits")));
        }
    }

    #[test]
    fn settings_out_of_range_are_errors() {
        let bad = [
            Sampler::Temperature { temperature: 0.0 },
            Sampler::Temperature { temperature: f32::NAN },
            Sampler::TopP { temperature: 1.0, top_p: 0.0 },
            Sampler::TopP { temperature: 1.0, top_p: 1.1 },
        ];
        assert!(bad.into_iter().all(|s| s.sample(&mut [0.0, 1.0], || 0).is_err()));
        let none = Sampler::Temperature { temperature: 1.0 };
        assert!(none.sample(&mut [f32::NEG_INFINITY; 2], || 0).is_err());
        // A token that is ruled out is never drawn.
        let mut logits = [f32::NEG_INFINITY, 0.0];
        assert_eq!(none.sample(&mut logits, || u32::MAX), Ok(1));
    }
}
