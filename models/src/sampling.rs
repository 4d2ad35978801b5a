//! How the next token is chosen from logits.
//!
//! The same seed gives the tokens that candle's `LogitsProcessor` gives, whose crate an app need not compile for it.

mod draw;

use crate::generation::GenerationConfig;
use candle_core::{Result, bail};
use candle_sparse::Error;
use candle_sparse_core::with_methods;
use draw::{Among, Drawer, penalise};

/// How tokens are chosen.
///
/// ```
/// use candle_sparse_models::sampling::{Sampler, Sampling};
///
/// let logits = [0.5, 3.0, -1.0];
/// let mut greedy = Sampler::new(&Sampling::greedy())?;
/// assert_eq!(greedy.sample(&logits, &[])?, 1);
/// // Token 1 was written: 3 / 7 is less than 0.5.
/// let mut other = Sampler::new(&Sampling::greedy().with_repeat_penalty(7.0))?;
/// assert_eq!(other.sample(&logits, &[1])?, 0);
/// // The same seed, the same tokens.
/// let draw = |seed| Sampler::new(&Sampling::default().with_seed(seed))?.sample(&logits, &[]);
/// assert_eq!(draw(7)?, draw(7)?);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Sampling {
    /// Divides the logits; 0: the most likely token always, the first of equals.
    pub temperature: f64,
    /// Tokens to choose among: the k most likely ones; 0: all.
    pub top_k: usize,
    /// Of these, the smallest set with this total probability, above 0; 1: all.
    pub top_p: f64,
    /// What is less likely than this share, 0 to below 1, of the most likely token is left out.
    pub min_p: f64,
    /// Divides the logits of what was written lately, and multiplies those below 0; 1: no penalty.
    pub repeat_penalty: f32,
    /// How many of the tokens that were written count as lately.
    pub repeat_last_n: usize,
    /// Seed of the choice.
    pub seed: u64,
}

with_methods!(Sampling {
    with_temperature: temperature: f64,
    with_top_k: top_k: usize,
    with_top_p: top_p: f64,
    with_min_p: min_p: f64,
    with_repeat_penalty: repeat_penalty: f32,
    with_repeat_last_n: repeat_last_n: usize,
    with_seed: seed: u64,
});

impl Default for Sampling {
    /// Temperature 0.8, among the 40 most likely tokens, of these among 0.95 of the probability, none below 0.05 of the most likely one.
    fn default() -> Self {
        Self {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            seed: 299_792_458,
        }
    }
}

impl Sampling {
    /// The most likely token always.
    #[must_use]
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// As a model's files want it, and the [default](Self::default) where they say nothing.
    ///
    /// ```
    /// use candle_sparse_models::{generation::GenerationConfig, sampling::Sampling};
    ///
    /// let mut files = GenerationConfig::default();
    /// assert_eq!(Sampling::of(&files), Sampling::default());
    /// files.temperature = Some(0.2);
    /// assert_eq!(Sampling::of(&files).temperature, 0.2);
    /// files.do_sample = Some(false);
    /// assert_eq!(Sampling::of(&files).temperature, 0.0);
    /// ```
    #[must_use]
    pub fn of(files: &GenerationConfig) -> Self {
        let or = Self::default();
        let greedy = (files.do_sample == Some(false)).then_some(0.0);
        Self {
            temperature: greedy.or(files.temperature).unwrap_or(or.temperature),
            top_k: files.top_k.unwrap_or(or.top_k),
            // Files say 0 where they mean all.
            top_p: files.top_p.filter(|p| *p > 0.0).unwrap_or(if files.top_p.is_some() {
                1.0
            } else {
                or.top_p
            }),
            min_p: files.min_p.unwrap_or(or.min_p),
            repeat_penalty: files.repetition_penalty.unwrap_or(or.repeat_penalty),
            ..or
        }
    }

    /// Whether the most likely token is taken always: divided by less than a ten-millionth, logits would be infinite.
    #[must_use]
    pub fn is_greedy(&self) -> bool {
        self.temperature < 1e-7
    }

    /// Whether each setting is in its range.
    ///
    /// # Errors
    /// [`Error::Setting`]: one is not.
    pub fn check(&self) -> Result<()> {
        let Self { temperature, top_p, min_p, repeat_penalty, .. } = *self;
        let wrong = |name, problem| Err(Error::Setting { name, problem }.into());
        if !(temperature >= 0.0 && temperature.is_finite()) {
            return wrong("temperature", format!("{temperature} must be 0 or more"));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return wrong("top_p", format!("{top_p} must be above 0 and at most 1"));
        }
        if !(0.0..=1.0).contains(&min_p) {
            return wrong("min_p", format!("{min_p} must be 0 or more and at most 1"));
        }
        if !(repeat_penalty > 0.0 && repeat_penalty.is_finite()) {
            return wrong("repeat_penalty", format!("{repeat_penalty} must be above 0"));
        }
        Ok(())
    }
}

/// Chooses tokens, one after the other: holds the state of the random numbers. `Clone` draws the same ones again.
#[derive(Clone, Debug)]
pub struct Sampler {
    drawer: Drawer,
    penalty: f32,
    last_n: usize,
}

impl Sampler {
    /// A choice that begins with the seed of `sampling`.
    ///
    /// # Errors
    /// Those of [`Sampling::check`].
    pub fn new(sampling: &Sampling) -> Result<Self> {
        sampling.check()?;
        let among = Among {
            k: if sampling.top_k == 0 { usize::MAX } else { sampling.top_k },
            p: sampling.top_p as f32,
            min_p: sampling.min_p as f32,
        };
        let temperature = if sampling.is_greedy() { 0.0 } else { sampling.temperature };
        let drawer = Drawer::new(temperature, among, sampling.seed);
        Ok(Self { drawer, penalty: sampling.repeat_penalty, last_n: sampling.repeat_last_n })
    }

    /// The next token by `logits` `[vocab_size]`; `written` is what the model wrote before, which alone is penalised: a prompt's
    /// template is not to be varied.
    ///
    /// # Errors
    /// The logits are empty, or not all numbers.
    pub fn sample(&mut self, logits: &[f32], written: &[u32]) -> Result<u32> {
        if logits.is_empty() || !logits.iter().all(|l| l.is_finite()) {
            bail!("the logits are not numbers: the checkpoint holds NaN or infinity");
        }
        let recent = &written[written.len().saturating_sub(self.last_n)..];
        if self.penalty == 1.0 || recent.is_empty() {
            return self.drawer.draw(logits);
        }
        let mut logits = logits.to_vec();
        penalise(&mut logits, self.penalty, recent);
        self.drawer.draw(&logits)
    }
}

#[cfg(test)]
mod tests;
