//! Flags that say whether tokens are drafted.

use super::cli::output;
use anyhow::{Context, Result};
use candle_sparse::Format;
use candle_sparse_models::{
    llama::Llama,
    speculation::{Speculation, SpeculationStats},
};
use clap::{Args, ValueEnum};

/// Whether the next tokens are guessed and verified together. The text is the same either way.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Speed")]
pub(crate) struct SpeculateArgs {
    /// Guess the next tokens and verify several in one step, as long as that pays; the text stays the same, token by token
    #[arg(long, default_value = "auto")]
    speculate: Speculate,
    /// Guess so many tokens always, whether that pays or not: to measure
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u8).range(1..=15))]
    draft: Option<u8>,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Speculate {
    /// Guess nothing
    Off,
    /// From the text itself: what followed where its last tokens stood before
    Auto,
    /// Also by a copy of the weights in 4 bits, which takes memory: for models of 8 bits and more
    Copy,
}

impl SpeculateArgs {
    pub(crate) fn speculation(self, model: &Llama) -> Result<Speculation> {
        let tokens = self.draft.map(usize::from);
        if self.speculate == Speculate::Off {
            if tokens.is_some() {
                output::note("--draft without effect: --speculate off guesses nothing");
            }
            return Ok(Speculation::off());
        }
        let copy = if self.speculate == Speculate::Copy { self.copy(model)? } else { None };
        Ok(Speculation::auto().with_copy(copy).with_tokens(tokens))
    }

    fn copy(self, model: &Llama) -> Result<Option<Llama>> {
        let copy = model.in_format(Format::Q4_0).context("--speculate copy")?;
        let [all, few] = [model, &copy].map(|m| m.decoder().weight_bytes_per_token());
        if 4 * few > 3 * all {
            output::note("--speculate copy without effect: the weights have hardly more than 4 bits already");
            return Ok(None);
        }
        output::status(format_args!("the copy in 4 bits takes {:.1} MB", few as f64 / 1e6));
        Ok(Some(copy))
    }
}

/// What became of the drafts, for the line below a text; nothing where there were none.
pub(crate) fn remark(stats: SpeculationStats) -> String {
    match stats.drafted {
        0 => String::new(),
        drafted => format!("; {} of {drafted} drafted tokens accepted", stats.accepted),
    }
}
