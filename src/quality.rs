//! How far a setting is from the dense model on a text.
//!
//! ppl = e^(mean nll); kld = mean Σ p·(ln p − ln q) of the dense distribution p and the setting's q, nats per token; top-1
//! agreement = share of positions at which both find the same token most likely.
//!
//! Both means are of a sample of text. Their standard errors are those of independent tokens, as llama.cpp's
//! `llama-perplexity` states them: the change of perplexity is a mean of differences at the same tokens, so it is far
//! better known than either perplexity.

use crate::weight::with_cpu_storage;
use candle_core::{DType, Error, Result, Tensor, bail};
use candle_sparse_core::KernelSet;
use candle_sparse_kernels::Kernels;
use rayon::prelude::*;

/// How far a setting is from the dense model, as sums over the tokens that were counted.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_sparse::quality::Quality;
///
/// let dense = Tensor::new(&[[0.0_f32, 1.0], [1.0, 0.0]], &Device::Cpu)?;
/// let setting = Tensor::new(&[[0.0_f32, 0.5], [1.0, 0.0]], &Device::Cpu)?;
/// let mut quality = Quality::default();
/// // Two tokens; the second is predicted by the first row of logits.
/// quality.add(&[0, 1], 1, &setting, &dense)?;
/// assert_eq!((quality.tokens(), quality.top1_agreement()), (1, 1.0));
/// assert!(quality.ppl_change() > 0.0 && quality.kld() > 0.0);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Quality {
    tokens: usize,
    nll: f64,
    dense_nll: f64,
    kld: f64,
    agreed: f64,
    /// Sums of squares: of `nll − dense_nll` per token, and of the divergence.
    change_square: f64,
    kld_square: f64,
}

/// How many standard errors above a mean the true value lies at most, with a certainty of 95 %.
const ONE_SIDED_95: f64 = 1.645;

impl Quality {
    /// Adds the tokens `window[first..]`, each predicted from those before it; `logits` of the setting and of the `dense` model are
    /// `[window, vocab_size]`.
    ///
    /// # Errors
    /// The logits are not numbers, or no token of the window follows another from `first` on.
    pub fn add(&mut self, window: &[u32], first: usize, logits: &Tensor, dense: &Tensor) -> Result<()> {
        if first == 0 || first >= window.len() {
            bail!("quality: tokens {first} and on of {} are none that follow another", window.len());
        }
        let n = window.len() - first;
        let kernels = Kernels::get().map_err(Error::wrap)?;
        let ((_, vocab), (_, width)) = (dense.dims2()?, logits.dims2()?);
        if width != vocab {
            bail!(
                "quality: logits of {width} tokens are compared with those of {vocab}: give models of one vocabulary"
            );
        }
        if let Some(id) = window[first..].iter().find(|id| **id as usize >= vocab) {
            bail!("quality: token {id} is not below the vocabulary of {vocab}");
        }
        let compared = with_values(&logits.narrow(0, first - 1, n)?, |q| {
            with_values(&dense.narrow(0, first - 1, n)?, |p| {
                let rows = q.par_chunks_exact(vocab).zip(p.par_chunks_exact(vocab)).zip(&window[first..]);
                Ok(rows
                    .map(|((q, p), &next)| Token::compare(kernels, next as usize, q, p))
                    .collect::<Vec<_>>())
            })
        })?;
        if compared.iter().any(|t| !t.nll.is_finite()) {
            bail!("the logits are not numbers: the checkpoint holds NaN or infinity");
        }
        // In the order of the text: the sums do not depend on threads.
        for t in compared {
            self.nll += t.nll;
            self.dense_nll += t.dense_nll;
            self.change_square += (t.nll - t.dense_nll).powi(2);
            self.kld += t.kld;
            self.kld_square += t.kld.powi(2);
            self.agreed += f64::from(u8::from(t.agrees));
        }
        self.tokens += n;
        Ok(())
    }

    /// All sums, to be kept; see [`Self::of_sums`].
    #[cfg(feature = "calibrate")]
    pub(crate) fn sums(&self) -> [f64; 7] {
        let Self { tokens, nll, dense_nll, kld, agreed, change_square, kld_square } = *self;
        [tokens as f64, nll, dense_nll, kld, agreed, change_square, kld_square]
    }

    /// From [`Self::sums`].
    #[cfg(feature = "calibrate")]
    pub(crate) fn of_sums(
        [tokens, nll, dense_nll, kld, agreed, change_square, kld_square]: [f64; 7],
    ) -> Self {
        Self { tokens: tokens as usize, nll, dense_nll, kld, agreed, change_square, kld_square }
    }

    /// Number of tokens that were counted.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Mean negative log likelihood, nats per token.
    #[must_use]
    pub fn nll(&self) -> f64 {
        self.nll / self.tokens as f64
    }

    /// Mean negative log likelihood of the dense model, nats per token.
    #[must_use]
    pub fn dense_nll(&self) -> f64 {
        self.dense_nll / self.tokens as f64
    }

    /// Perplexity of the setting, `e^nll`.
    #[must_use]
    pub fn ppl(&self) -> f64 {
        self.nll().exp()
    }

    /// Perplexity over the dense model's, minus 1.
    #[must_use]
    pub fn ppl_change(&self) -> f64 {
        (self.nll() - self.dense_nll()).exp_m1()
    }

    /// Mean divergence from the dense model, nats per token.
    #[must_use]
    pub fn kld(&self) -> f64 {
        self.kld / self.tokens as f64
    }

    /// Share of positions at which both find the same token most likely.
    #[must_use]
    pub fn top1_agreement(&self) -> f64 {
        self.agreed / self.tokens as f64
    }

    /// The standard error of a mean from its sum and its sum of squares.
    fn error(&self, sum: f64, square: f64) -> f64 {
        let n = self.tokens as f64;
        ((square - sum * sum / n).max(0.0) / (n - 1.0).max(1.0) / n).sqrt()
    }

    /// Standard error of [`Self::ppl_change`].
    #[must_use]
    pub fn ppl_change_error(&self) -> f64 {
        (1.0 + self.ppl_change()) * self.error(self.nll - self.dense_nll, self.change_square)
    }

    /// Standard error of [`Self::kld`].
    #[must_use]
    pub fn kld_error(&self) -> f64 {
        self.error(self.kld, self.kld_square)
    }

    /// Upper ends of [`Self::ppl_change`] and [`Self::kld`]: on all text of this kind each is at most so large, with a certainty of
    /// 95 % (mean + 1.645 standard errors).
    #[must_use]
    pub fn at_most(&self) -> Loss {
        Loss {
            ppl: self.ppl_change() + ONE_SIDED_95 * self.ppl_change_error(),
            kld: self.kld() + ONE_SIDED_95 * self.kld_error(),
        }
    }

    /// The means of this text.
    #[must_use]
    pub fn loss(&self) -> Loss {
        Loss { ppl: self.ppl_change(), kld: self.kld() }
    }
}

/// Calls `f` with the elements of a tensor as f32: those in memory where they are, and lie in order.
fn with_values<T>(t: &Tensor, f: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    with_cpu_storage(&t.to_dtype(DType::F32)?, |storage, start| {
        f(&storage.as_slice::<f32>()?[start..start + t.elem_count()])
    })
}

/// How one token is predicted.
struct Token {
    nll: f64,
    dense_nll: f64,
    kld: f64,
    agrees: bool,
}

/// Logits whose exponentials are held at once: they stay in the first cache.
const PIECE: usize = 2048;
/// Sums and maxima that go on side by side, as the lanes of a register do.
const LANES: usize = 16;

impl Token {
    /// Token `next` under the logits `q` of a setting and `p` of the dense model.
    ///
    /// kld = Σ p·(ln p − ln q) = Σ eˣ·(x − y) / Σ eˣ − ln Σ eˣ + ln Σ eʸ, over logits x of the dense model and y of the setting.
    fn compare(kernels: &Kernels, next: usize, q: &[f32], p: &[f32]) -> Self {
        let (most_q, most_p) = (largest(q), largest(p));
        let mut room = [0.0; PIECE];
        let (mut sum_q, mut sum_p, mut apart) = (0.0, 0.0, 0.0);
        for (q, p) in q.chunks(PIECE).zip(p.chunks(PIECE)) {
            let e = &mut room[..q.len()];
            e.copy_from_slice(q);
            sum_q += f64::from(kernels.exp_sum(e, most_q).1);
            e.copy_from_slice(p);
            sum_p += f64::from(kernels.exp_sum(e, most_p).1);
            apart += weighted_difference(e, p, q);
        }
        let (log_q, log_p) = (f64::from(most_q) + sum_q.ln(), f64::from(most_p) + sum_p.ln());
        let first = |x: &[f32], most: f32| x.iter().position(|v| *v == most);
        Self {
            nll: log_q - f64::from(q[next]),
            dense_nll: log_p - f64::from(p[next]),
            kld: apart / sum_p + log_q - log_p,
            agrees: first(q, most_q) == first(p, most_p),
        }
    }
}

fn largest(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (rows, rest) = x.as_chunks::<LANES>();
    for row in rows {
        lanes.iter_mut().zip(row).for_each(|(m, v)| *m = if *v > *m { *v } else { *m });
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, v| m.max(*v))
}

/// `Σ e · (p − q)`
fn weighted_difference(e: &[f32], p: &[f32], q: &[f32]) -> f64 {
    let mut lanes = [0.0; LANES];
    let ((e, e_rest), (p, p_rest), (q, q_rest)) =
        (e.as_chunks::<LANES>(), p.as_chunks::<LANES>(), q.as_chunks::<LANES>());
    for ((e, p), q) in e.iter().zip(p).zip(q) {
        (0..LANES).for_each(|i| lanes[i] += e[i] * (p[i] - q[i]));
    }
    let rest = e_rest.iter().zip(p_rest).zip(q_rest).map(|((e, p), q)| e * (p - q));
    lanes.into_iter().chain(rest).map(f64::from).sum()
}

/// A loss of quality, or a limit to it.
///
/// ```
/// use candle_sparse::quality::Loss;
///
/// let limit = Loss { ppl: 0.01, kld: 0.02 };
/// assert!(Loss { ppl: 0.006, kld: 0.01 }.is_within(limit));
/// assert!(!Loss { ppl: 0.006, kld: 0.03 }.is_within(limit));
/// assert!(!Loss { ppl: f64::NAN, kld: 0.0 }.is_within(limit));
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Loss {
    /// Perplexity over the dense model's, minus 1: 0.01 is 1 %.
    pub ppl: f64,
    /// Mean divergence from the dense model, nats per token.
    pub kld: f64,
}

impl Loss {
    /// Whether neither number is larger than that of `limit`; a loss that is not a number is not within any.
    #[must_use]
    pub fn is_within(self, limit: Self) -> bool {
        self.ppl <= limit.ppl && self.kld <= limit.kld
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn errors_are_those_of_the_tokens() -> Result<()> {
        let mut q = Quality::default();
        let dense = Tensor::new(&[[0_f32, 1.0], [0.5, 0.0], [0.0, 0.0]], &Device::Cpu)?;
        let logits = Tensor::new(&[[0.3_f32, 1.0], [0.0, 0.0], [0.0, 0.0]], &Device::Cpu)?;
        q.add(&[0, 1, 0], 1, &logits, &dense)?;
        let log = |a: f64, b: f64| a - (a.exp() + b.exp()).ln();
        let changes = [log(1.0, 0.0) - log(1.0, 0.3), log(0.5, 0.0) - log(0.0, 0.0)];
        let mean = (changes[0] + changes[1]) / 2.0;
        let error = ((changes[0] - mean).powi(2) + (changes[1] - mean).powi(2)).sqrt() / 2_f64.sqrt();
        assert!((q.ppl_change() - mean.exp_m1()).abs() < 1e-6, "{q:?}");
        assert!((q.ppl_change_error() - mean.exp() * error).abs() < 1e-6, "{q:?}, expected {error}");
        assert!(q.at_most().ppl > q.loss().ppl && q.at_most().kld > q.loss().kld);
        assert!(!q.at_most().is_within(q.loss()) && q.loss().is_within(q.at_most()));
        Ok(())
    }

    /// More logits than are held at once, no whole number of lanes, and as far apart as a model's.
    #[test]
    fn many_logits_are_compared_as_few_are() -> Result<()> {
        let n = 2 * PIECE + LANES + 3;
        let value = |i: usize, seed: usize| ((i * 7919 + seed * 104_729) % 4001) as f32 / 160.0 - 12.0;
        let row = |seed: usize| (0..n).map(|i| value(i, seed)).collect::<Vec<f32>>();
        let (p, q) = (row(1), row(2));
        let log = |x: &[f32]| -> Vec<f64> {
            let sum: f64 = x.iter().map(|v| f64::from(*v).exp()).sum();
            x.iter().map(|v| f64::from(*v) - sum.ln()).collect()
        };
        let (log_p, log_q) = (log(&p), log(&q));
        let kld: f64 = log_p.iter().zip(&log_q).map(|(p, q)| p.exp() * (p - q)).sum();
        let tensor = |x: &[f32]| Tensor::from_slice(&[x, x].concat(), (2, n), &Device::Cpu);
        let mut quality = Quality::default();
        quality.add(&[0, n as u32 - 1], 1, &tensor(&q)?, &tensor(&p)?)?;
        assert!((quality.kld() - kld).abs() < 1e-5 * kld, "{} {kld}", quality.kld());
        assert!((quality.nll() + log_q[n - 1]).abs() < 1e-5, "{} {}", quality.nll(), -log_q[n - 1]);
        assert!((quality.dense_nll() + log_p[n - 1]).abs() < 1e-5, "{quality:?}");
        Ok(())
    }

    #[test]
    fn what_is_no_number_or_no_token_is_an_error() -> Result<()> {
        let good = Tensor::new(&[[0_f32, 1.0], [0.5, 0.0]], &Device::Cpu)?;
        for broken in [f32::NAN, f32::INFINITY] {
            let bad = Tensor::new(&[[0_f32, broken], [0.5, 0.0]], &Device::Cpu)?;
            assert!(Quality::default().add(&[0, 0], 1, &bad, &good).is_err(), "{broken}");
        }
        assert!(Quality::default().add(&[0, 2], 1, &good, &good).is_err());
        assert!(Quality::default().add(&[0, 1, 1, 1], 1, &good, &good).is_err());
        assert!(Quality::default().add(&[0, 1], 1, &good, &good.narrow(1, 0, 1)?).is_err());
        Ok(())
    }

    #[test]
    fn a_first_token_follows_none() {
        let t = Tensor::zeros((2, 2), DType::F32, &Device::Cpu).unwrap();
        for first in [0, 2, 3] {
            assert!(Quality::default().add(&[0, 1], first, &t, &t).is_err(), "{first}");
        }
    }
}
