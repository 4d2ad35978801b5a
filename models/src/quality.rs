//! How far a setting is from the dense model on a text.
//!
//! ppl = e^(mean nll); kld = mean Σ p·(ln p − ln q) of the dense distribution p and the setting's q, nats per token; top-1
//! agreement = share of positions at which both find the same token most likely.

use candle_core::{D, DType, Device, Result, Tensor, bail};
use candle_nn::ops::log_softmax;

/// Sums over counted tokens.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quality {
    tokens: usize,
    nll: f64,
    dense_nll: f64,
    kld: f64,
    agreed: f64,
}

impl Quality {
    /// Adds the tokens `window[first..]`, each predicted from those before it: `logits` and `dense` are
    /// `[window, vocab_size]`.
    ///
    /// # Errors
    /// The logits are not numbers.
    pub fn add(&mut self, window: &[u32], first: usize, logits: &Tensor, dense: &Tensor) -> Result<()> {
        let n = window.len() - first;
        let targets = Tensor::new(&window[first..], &Device::Cpu)?.unsqueeze(1)?;
        let log = |t: &Tensor| log_softmax(&t.narrow(0, first - 1, n)?, D::Minus1);
        let (q, p) = (log(logits)?, log(dense)?);
        let sum = |t: &Tensor| -> Result<f64> { t.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>() };
        let nll = -sum(&q.gather(&targets, 1)?)?;
        if !nll.is_finite() {
            bail!("the logits are not numbers: the checkpoint holds NaN or infinity");
        }
        self.nll += nll;
        self.dense_nll -= sum(&p.gather(&targets, 1)?)?;
        self.kld += sum(&(p.exp()? * (&p - &q)?)?)?;
        self.agreed += sum(&p.argmax(1)?.eq(&q.argmax(1)?)?)?;
        self.tokens += n;
        Ok(())
    }

    /// Tokens counted.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Mean negative log likelihood, nats per token.
    #[must_use]
    pub fn nll(&self) -> f64 {
        self.nll / self.tokens as f64
    }

    /// The same of the dense model.
    #[must_use]
    pub fn dense_nll(&self) -> f64 {
        self.dense_nll / self.tokens as f64
    }

    /// Perplexity.
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
}
