//! Flags that say how several texts share one model.

use super::{model::ModelArgs, speculate::SpeculateArgs};
use anyhow::{Result, bail};
use candle_sparse_models::{
    engine::{Engine, EngineOptions},
    pretrained::Pretrained,
};
use clap::Args;
use std::{path::PathBuf, sync::Arc};
use tokenizers::Tokenizer;

/// How several texts share the model.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Engine")]
pub(crate) struct EngineArgs {
    /// Texts that are read and written at a time at most
    #[arg(long, default_value_t = 8, value_name = "N")]
    pub(crate) max_sequences: usize,
    /// Positions of a prompt that are read between two tokens of the others at most
    #[arg(long, default_value_t = 128, value_name = "N")]
    prompt_chunk: usize,
    /// Megabytes that keys and values of all texts and prefixes may take together [default: no limit]
    #[arg(long, value_name = "MB")]
    kv_mb: Option<f64>,
    /// Megabytes of keys and values that are kept for prompts that begin alike; 0: none
    #[arg(long, default_value_t = 256.0, value_name = "MB")]
    prefix_mb: f64,
    /// Keep them in this folder too, for the next run with the same model
    #[arg(long, value_name = "FOLDER")]
    prefix_folder: Option<PathBuf>,
    /// Megabytes that its files may take
    #[arg(long, default_value_t = 4096.0, value_name = "MB")]
    prefix_folder_mb: f64,
    /// Keep the keys and values of answers too: the next turn is read from where the answer ended. What is written then depends on
    /// what was kept, a little
    #[arg(long)]
    reuse_written: bool,
    #[command(flatten)]
    speculate: SpeculateArgs,
}

impl EngineArgs {
    /// An engine for a loaded model, with keys and values by the model's flags, where so many texts may wait.
    pub(crate) fn engine(
        &self,
        model: &ModelArgs,
        loaded: &Pretrained,
        tokenizer: Arc<Tokenizer>,
        max_queued: usize,
    ) -> Result<Engine> {
        let kv = model.memory.kv(loaded.default_kv_dtype())?;
        let kv_bytes = self.kv_mb.map(|mb| bytes("kv-mb", mb)).transpose()?;
        let options = EngineOptions::default()
            .with_kv(kv.with_max_bytes(kv_bytes))
            .with_max_sequences(self.max_sequences)
            .with_max_queued(max_queued)
            .with_prompt_chunk(self.prompt_chunk)
            .with_prefix_bytes(bytes("prefix-mb", self.prefix_mb)?)
            .with_prefix_folder(self.prefix_folder.clone())
            .with_prefix_folder_bytes(bytes("prefix-folder-mb", self.prefix_folder_mb)? as u64)
            .with_reuse_written(self.reuse_written)
            .with_speculation(self.speculate.speculation(&loaded.model)?);
        Ok(Engine::new(&loaded.model, Some(tokenizer), options)?)
    }
}

fn bytes(flag: &str, mb: f64) -> Result<usize> {
    match mb {
        mb if (0.0..=1e9).contains(&mb) => Ok((mb * 1e6) as usize),
        mb => bail!("--{flag} {mb} must be a number of megabytes"),
    }
}
