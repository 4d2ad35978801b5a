//! Keys and values as a file: a text that was read once is not read again by the next run.

use crate::{cli::output, generate::Past};
use anyhow::{Result, bail};
use candle_sparse_models::{causal_lm::LlamaSession, speculation::Speculative};
use clap::Args;
use std::path::PathBuf;

/// Where keys and values come from and go to.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Memory")]
pub(crate) struct CacheArgs {
    /// Begin with the keys and values of a file that --save-cache wrote with the same model: what the prompt has in common with
    /// its text is not read again
    #[arg(long, value_name = "FILE")]
    load_cache: Option<PathBuf>,
    /// Write keys and values, and the tokens that they are of, when the text or conversation has ended
    #[arg(long, value_name = "FILE")]
    save_cache: Option<PathBuf>,
}

impl CacheArgs {
    /// What can be said before anything is loaded.
    pub(crate) fn check(&self) -> Result<()> {
        match &self.save_cache {
            Some(path) => Ok(candle_sparse::save::check(path)?),
            None => Ok(()),
        }
    }

    /// Fills `past` from the file, if one is given.
    pub(crate) fn load(&self, past: &mut Past<Speculative<LlamaSession>>) -> Result<()> {
        let Some(path) = &self.load_cache else { return Ok(()) };
        let ids = past.model.model_mut().cache.load_tokens(path)?;
        if ids.is_empty() && !past.model.model().cache.is_empty() {
            bail!(
                "--load-cache {}: does not say which tokens it is of: write it with --save-cache",
                path.display()
            );
        }
        past.resume(ids);
        Ok(())
    }

    /// Says how much of a prompt of so many tokens was there already.
    pub(crate) fn note_held(&self, held: usize, prompt: usize) {
        let Some(path) = &self.load_cache else { return };
        let path = path.display();
        match held {
            0 => output::note(format_args!("--load-cache {path} without effect: its text begins otherwise")),
            _ => output::status(format_args!("{held} of {prompt} tokens were in {path}")),
        }
    }

    /// Writes the file, if one is wanted.
    pub(crate) fn save(&self, past: &Past<Speculative<LlamaSession>>) -> Result<()> {
        let Some(path) = &self.save_cache else { return Ok(()) };
        past.model.model().cache.save_tokens(path, past.held())?;
        output::status(format_args!(
            "keys and values of {} tokens written to {}",
            past.held().len(),
            path.display()
        ));
        Ok(())
    }
}
