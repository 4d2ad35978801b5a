//! How far a setting is from the dense model on a text.
//!
//! ppl = e^(mean nll); kld = mean Σ p·(ln p − ln q) of the dense distribution p and the setting's q, nats per token; top-1
//! agreement = share of positions at which both find the same token most likely.
//!
//! Both means are of a sample of text. Their standard errors are those of independent tokens, as llama.cpp's
//! `llama-perplexity` states them: the change of perplexity is a mean of differences at the same tokens, so it is far
//! better known than either perplexity.

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
    /// The logits are not numbers, their shapes differ, or no token of the window follows another from `first` on.
    pub fn add(&mut self, window: &[u32], first: usize, logits: &Tensor, dense: &Tensor) -> Result<()> {
        if first == 0 || first >= window.len() {
            bail!("quality: tokens {first} and on of {} are none that follow another", window.len());
        }
        let rows = |t: &Tensor| -> Result<Vec<f32>> {
            t.narrow(0, first - 1, window.len() - first)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
        };
        self.add_rows(&window[first..], &rows(logits)?, &rows(dense)?)
    }

    /// Adds tokens, of which each was predicted by its row of the setting's `logits` and of the `dense` model's, `[tokens, vocab_size]`.
    ///
    /// Cost: two exponentials per logit, on all threads of rayon's pool.
    ///
    /// ```
    /// use candle_sparse::quality::Quality;
    ///
    /// let mut quality = Quality::default();
    /// quality.add_rows(&[1, 0], &[0.0, 1.0, 0.5, 0.0], &[0.0, 1.0, 1.0, 0.0])?;
    /// assert_eq!((quality.tokens(), quality.top1_agreement()), (2, 1.0));
    /// assert!(quality.add_rows(&[2], &[0.0, 1.0], &[0.0, 1.0]).is_err(), "there is no token 2");
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// The logits are not numbers or not of so many tokens, or a token is not in the vocabulary.
    pub fn add_rows(&mut self, tokens: &[u32], logits: &[f32], dense: &[f32]) -> Result<()> {
        let vocab_size = logits.len() / tokens.len().max(1);
        let fit = logits.len() == dense.len() && vocab_size * tokens.len() == logits.len();
        if !fit || tokens.iter().any(|&t| t as usize >= vocab_size) {
            bail!(
                "quality: {} and {} logits are not those of {} tokens, or a token is past the vocabulary",
                logits.len(),
                dense.len(),
                tokens.len()
            );
        }
        if tokens.is_empty() {
            return Ok(());
        }
        let kernels = Kernels::get().map_err(Error::wrap)?;
        let rows = logits.par_chunks(vocab_size).zip(dense.par_chunks(vocab_size)).zip(tokens);
        let rows: Vec<Row> = rows
            .map_init(Default::default, |rooms, ((q, p), &token)| {
                Row::of(kernels, q, p, token as usize, rooms)
            })
            .collect();
        if !rows.iter().all(|row| row.nll.is_finite() && row.dense_nll.is_finite()) {
            bail!("the logits are not numbers: the checkpoint holds NaN or infinity");
        }
        for row in rows {
            self.nll += row.nll;
            self.dense_nll += row.dense_nll;
            self.change_square += (row.nll - row.dense_nll).powi(2);
            self.kld += row.kld;
            self.kld_square += row.kld.powi(2);
            self.agreed += f64::from(u8::from(row.agreed));
        }
        self.tokens += tokens.len();
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

/// What one token adds.
struct Row {
    nll: f64,
    dense_nll: f64,
    kld: f64,
    agreed: bool,
}

impl Row {
    /// From the logits `q` of the setting and `p` of the dense model, with `rooms` for both.
    fn of(kernels: &Kernels, q: &[f32], p: &[f32], token: usize, rooms: &mut [Vec<f32>; 2]) -> Self {
        let [q_max, p_max] = [q, p].map(|x| x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        for (room, x) in rooms.iter_mut().zip([q, p]) {
            room.clear();
            room.extend_from_slice(x);
            kernels.exp_sum(room, f32::NEG_INFINITY);
        }
        let sum = |x: &[f32]| x.chunks(64).map(|x| f64::from(x.iter().sum::<f32>())).sum::<f64>();
        let (q_sum, p_sum) = (sum(&rooms[0]), sum(&rooms[1]));
        let (q_log, p_log) = (f64::from(q_max) + q_sum.ln(), f64::from(p_max) + p_sum.ln());
        // Σ p (ln p − ln q): the logarithms of the sums stand for every element.
        let apart = rooms[1].iter().zip(q.iter().zip(p)).map(|(e, (q, p))| f64::from(e * (p - q)));
        let kld = apart.sum::<f64>() / p_sum - p_log + q_log;
        let first = |x: &[f32], max: f32| x.iter().position(|x| *x == max);
        Self {
            nll: q_log - f64::from(q[token]),
            dense_nll: p_log - f64::from(p[token]),
            kld,
            agreed: first(q, q_max) == first(p, p_max),
        }
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

    #[test]
    fn divergence_and_agreement_are_those_of_the_definition() -> Result<()> {
        let noise = |i: usize, seed: f64| ((i as f64 * 1.7 + seed).sin() * 6.0) as f32;
        let (vocab_size, tokens) = (97, [3_u32, 96, 40]);
        let logits = |seed: f64| -> Vec<f32> { (0..3 * vocab_size).map(|i| noise(i, seed)).collect() };
        let (setting, dense) = (logits(0.1), logits(0.0));
        let mut quality = Quality::default();
        quality.add_rows(&tokens, &setting, &dense)?;
        let (mut kld, mut nll, mut agreed) = (0.0, 0.0, 0.0);
        for (row, &token) in tokens.iter().enumerate() {
            let log = |x: &[f32]| -> Vec<f64> {
                let x = &x[row * vocab_size..(row + 1) * vocab_size];
                let sum: f64 = x.iter().map(|x| f64::from(*x).exp()).sum();
                x.iter().map(|x| f64::from(*x) - sum.ln()).collect()
            };
            let best = |x: &[f64]| (0..x.len()).max_by(|&a, &b| x[a].total_cmp(&x[b]));
            let (q, p) = (log(&setting), log(&dense));
            kld += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>() / 3.0;
            nll -= q[token as usize] / 3.0;
            agreed += f64::from(u8::from(best(&q) == best(&p))) / 3.0;
        }
        assert!(kld > 1e-4 && (quality.kld() - kld).abs() < 1e-6, "{quality:?} {kld}");
        assert!(
            (quality.nll() - nll).abs() < 1e-6 && quality.top1_agreement() == agreed,
            "{quality:?} {nll}"
        );
        assert!(quality.add_rows(&tokens, &setting, &dense[1..]).is_err());
        assert!(quality.add_rows(&[0], &[f32::NAN, 0.0], &[0.0, 0.0]).is_err());
        Ok(())
    }

    /// As many logits as a model's, as far apart, and no whole number of lanes.
    #[test]
    fn many_logits_are_compared_as_few_are() -> Result<()> {
        let n = 9011;
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
