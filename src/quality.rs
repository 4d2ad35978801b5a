//! How far a setting is from the dense model on a text.
//!
//! ppl = e^(mean nll); kld = mean Σ p·(ln p − ln q) of the dense distribution p and the setting's q, nats per token; top-1
//! agreement = share of positions at which both find the same token most likely.
//!
//! Both means are of a sample of text. Their standard errors are those of independent tokens, as llama.cpp's
//! `llama-perplexity` states them: the change of perplexity is a mean of differences at the same tokens, so it is far
//! better known than either perplexity.

use candle_core::{D, DType, Device, Result, Tensor, bail};
use candle_nn::ops::log_softmax;

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
        let targets = Tensor::new(&window[first..], &Device::Cpu)?.unsqueeze(1)?;
        let log = |t: &Tensor| log_softmax(&t.narrow(0, first - 1, n)?, D::Minus1);
        let (q, p) = (log(logits)?, log(dense)?);
        let sum = |t: &Tensor| -> Result<f64> { t.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>() };
        let (of_q, of_p) = (q.gather(&targets, 1)?, p.gather(&targets, 1)?);
        let nll = -sum(&of_q)?;
        if !nll.is_finite() {
            bail!("the logits are not numbers: the checkpoint holds NaN or infinity");
        }
        let kld = (p.exp()? * (&p - &q)?)?.sum(1)?;
        self.nll += nll;
        self.dense_nll -= sum(&of_p)?;
        self.change_square += sum(&(of_p - of_q)?.sqr()?)?;
        self.kld += sum(&kld)?;
        self.kld_square += sum(&kld.sqr()?)?;
        self.agreed += sum(&p.argmax(1)?.eq(&q.argmax(1)?)?)?;
        self.tokens += n;
        Ok(())
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

    #[test]
    fn a_first_token_follows_none() {
        let t = Tensor::zeros((2, 2), DType::F32, &Device::Cpu).unwrap();
        for first in [0, 2, 3] {
            assert!(Quality::default().add(&[0, 1], first, &t, &t).is_err(), "{first}");
        }
    }
}
