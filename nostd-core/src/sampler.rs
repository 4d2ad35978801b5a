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
    /// By chance, from the smallest set of most likely tokens whose probabilities reach `top_p` together (Holtzman et al.
    /// 2020, nucleus sampling).
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
