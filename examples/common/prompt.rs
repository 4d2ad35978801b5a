//! Flags that say what is continued.

use super::cli::{self, input};
use anyhow::{Result, bail};
use candle_sparse_models::tokenizer::prompt_tokens;
use clap::Args;
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;

/// The text to continue.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Prompt")]
pub(crate) struct PromptArgs {
    /// Text to continue; - reads it from standard input [default: the beginning of a tale]
    #[arg(long, value_parser = cli::text())]
    pub(crate) prompt: Option<String>,
    /// File with the text to continue; - is standard input
    #[arg(long, short, conflicts_with = "prompt")]
    pub(crate) file: Option<PathBuf>,
}

impl PromptArgs {
    fn text(&self) -> Result<String> {
        match (&self.file, self.prompt.as_deref()) {
            (Some(path), _) => input::prompt(path),
            (None, Some("-")) => input::prompt(Path::new("-")),
            (None, Some(prompt)) => Ok(prompt.to_string()),
            (None, None) => Ok("Once upon a time there was a king who had ".to_string()),
        }
    }

    /// Its tokens.
    pub(crate) fn ids(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let ids = prompt_tokens(tokenizer, &self.text()?)?;
        if ids.is_empty() {
            bail!("the prompt is empty: give at least one character with --prompt or --file");
        }
        Ok(ids)
    }
}
