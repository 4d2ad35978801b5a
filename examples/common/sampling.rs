//! Flags that say how tokens are chosen, and the choice.
#![allow(dead_code, reason = "not every program uses all of it")]

use super::cli::output;
use anyhow::{Result, bail};
use candle_sparse_models::{
    generation::GenerationConfig,
    sampling::{Sampler, Sampling},
};
use clap::Args;
use std::time::{Duration, Instant};

/// How tokens are chosen; what is not given is the model's, of its generation_config.json, or else ours.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// Divides the logits; 0 takes the most likely token always [default: the model's, else 0.8]
    #[arg(long)]
    temperature: Option<f64>,
    /// Choose among the k most likely tokens, 0 among all [default: the model's, else 40]
    #[arg(long)]
    top_k: Option<usize>,
    /// Of these, among the smallest set with this total probability; 1 among all [default: the model's, else 0.95]
    #[arg(long)]
    top_p: Option<f64>,
    /// Leave out what is less likely than this share of the most likely token [default: the model's, else 0.05]
    #[arg(long)]
    min_p: Option<f64>,
    /// Divides the logits of what the model wrote lately; 1 is no penalty [default: the model's, else 1]
    #[arg(long)]
    repeat_penalty: Option<f32>,
    /// How many of the tokens that the model wrote count as lately [default: 64]
    #[arg(long)]
    repeat_last_n: Option<usize>,
    /// Seed of the choice [default: 299792458]
    #[arg(long)]
    seed: Option<u64>,
    /// Tokens to write at most [default: 200; in a conversation as many as the context holds]
    #[arg(long, short = 'n')]
    pub(crate) sample_len: Option<usize>,
    /// End after so many seconds, those of reading the prompt included; a step under way is given up
    #[arg(long, value_name = "SECONDS")]
    time_limit: Option<f64>,
    /// End where this text is written, which is not shown; may be given several times
    #[arg(long, value_name = "TEXT", value_parser = super::cli::text())]
    pub(crate) stop: Vec<String>,
}

impl SamplingArgs {
    /// What the flags say alone, before a model is loaded.
    pub(crate) fn check(&self) -> Result<()> {
        if let Some(t) = self.temperature.filter(|t| !(*t >= 0.0 && t.is_finite())) {
            bail!("--temperature {t} must be 0 or more");
        }
        if let Some(p) = self.top_p.filter(|p| !(*p > 0.0 && *p <= 1.0)) {
            bail!("--top-p {p} must be above 0 and at most 1");
        }
        if let Some(p) = self.min_p.filter(|p| !(0.0..1.0).contains(p)) {
            bail!("--min-p {p} must be 0 or more and below 1");
        }
        if let Some(p) = self.repeat_penalty.filter(|p| !(*p > 0.0 && p.is_finite())) {
            bail!("--repeat-penalty {p} must be above 0");
        }
        if let Some(t) =
            self.time_limit.filter(|t| Duration::try_from_secs_f64(*t).map_or(true, |t| t.is_zero()))
        {
            bail!("--time-limit {t} must be a number of seconds above 0");
        }
        if self.stop.iter().any(String::is_empty) {
            bail!("--stop needs a text that is not empty");
        }
        Ok(())
    }

    /// When a text that begins now must have ended.
    pub(crate) fn until(&self) -> Option<Instant> {
        Instant::now().checked_add(Duration::from_secs_f64(self.time_limit?))
    }

    /// The settings of the choice, by the flags, or else by what the model's files say.
    pub(crate) fn sampling(&self, model: GenerationConfig) -> Result<Sampling> {
        self.check()?;
        let or = Sampling::of(&model);
        Ok(Sampling::default()
            .with_temperature(self.temperature.unwrap_or(or.temperature))
            .with_top_k(self.top_k.unwrap_or(or.top_k))
            .with_top_p(self.top_p.unwrap_or(or.top_p))
            .with_min_p(self.min_p.unwrap_or(or.min_p))
            .with_repeat_penalty(self.repeat_penalty.unwrap_or(or.repeat_penalty))
            .with_repeat_last_n(self.repeat_last_n.unwrap_or(or.repeat_last_n))
            .with_seed(self.seed.unwrap_or(or.seed)))
    }

    /// The choice by these settings.
    pub(crate) fn sampler(&self, model: GenerationConfig) -> Result<Sampler> {
        let sampling = self.sampling(model)?;
        self.note_unused(&sampling);
        Ok(Sampler::new(&sampling)?)
    }

    /// Whether a seed was given.
    pub(crate) fn has_seed(&self) -> bool {
        self.seed.is_some()
    }

    /// Says which flags change nothing.
    fn note_unused(&self, sampling: &Sampling) {
        let given = [
            ("--top-k", self.top_k.is_some()),
            ("--top-p", self.top_p.is_some()),
            ("--min-p", self.min_p.is_some()),
            ("--seed", self.seed.is_some()),
        ];
        let given: Vec<_> = given.into_iter().filter(|(_, given)| *given).map(|(name, _)| name).collect();
        if sampling.is_greedy() && !given.is_empty() {
            let why = match self.temperature {
                Some(_) => "with --temperature 0 the most likely token is taken always",
                None => {
                    "the model's own settings take the most likely token always (--temperature changes that)"
                }
            };
            output::note(format_args!("{} without effect: {why}", given.join(", ")));
        }
        if sampling.repeat_penalty == 1.0 && self.repeat_last_n.is_some() {
            output::note("--repeat-last-n without effect: --repeat-penalty is 1, which is none");
        }
    }
}
