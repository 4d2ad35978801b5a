//! Flags that say which model is used and how it is held.
#![allow(dead_code, reason = "not every program uses all of it")]

use crate::{cli::format, memory::MemoryArgs};
use anyhow::{Context, Result, bail};
use candle_core::Device;
use candle_sparse::{
    AttentionConfig, Threads,
    core::Format,
    profile::Profile,
    sparse::{FfnMode, Selection, SparseConfig},
};
use candle_sparse_models::{
    decoder::LoadOptions, files::ModelFiles, hub::HubSettings, llama::Cache, pretrained::Pretrained,
};
use clap::{Args, ValueEnum};
use std::{path::PathBuf, sync::Arc};

/// Which model, and how to hold it.
#[derive(Args, Clone, Debug)]
pub(crate) struct ModelArgs {
    /// Hub id (org/name), folder, .safetensors or .gguf file (also org/name/file.gguf), or name of an embedded model
    /// (tales-silu, tales-relu)
    #[arg(long, default_value = "tales-silu")]
    pub(crate) model: String,
    /// Branch, tag or commit of a Hub model
    #[arg(long)]
    pub(crate) revision: Option<String>,
    /// A tokenizer.json, instead of the model's own
    #[arg(long)]
    pub(crate) tokenizer: Option<PathBuf>,
    /// Format of the weights in memory: f32, f16, bf16, q8_0, q6_k, q5_1, q5_0, q5_k, q4_1, q4_0, q4_k, q3_k, q2_k; as stored where not given
    #[arg(long, value_parser = format)]
    pub(crate) dtype: Option<Format>,
    /// Copy the weights of a GGUF file into huge pages instead of mapping it: slower to load, decode may be faster. A mapped
    /// file must not be written to, or shortened, while the program runs
    #[arg(long)]
    pub(crate) no_mmap: bool,
    #[command(flatten)]
    pub(crate) memory: MemoryArgs,
    /// Threads, at most those of candle's pool (CANDLE_NUM_THREADS)
    #[arg(long)]
    pub(crate) threads: Option<usize>,
    /// Sparse profile, instead of the model's own sparse.safetensors; CANDLE_SPARSE=off runs without any
    #[arg(long)]
    pub(crate) profile: Option<PathBuf>,
    /// Which neurons are computed; what the profile found best where not given
    #[arg(long)]
    pub(crate) ffn: Option<Ffn>,
    /// Leave neurons out even where that is no faster here, or by a rule that misses its profile's target
    #[arg(long)]
    pub(crate) force_sparse: bool,
    /// Share of the neurons that are left out, instead of what calibration found
    #[arg(long)]
    pub(crate) sparsity: Option<f32>,
}

/// Names of [`FfnMode`].
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ffn {
    /// All neurons
    Dense,
    /// All gates; up and down where the gate says so
    Gate,
    /// What the prediction says
    LowRank,
    /// Gates of what the prediction says; up and down where the gate says so
    Cascade,
}

impl From<Ffn> for FfnMode {
    fn from(ffn: Ffn) -> Self {
        match ffn {
            Ffn::Dense => Self::Dense,
            Ffn::Gate => Self::Gate,
            Ffn::LowRank => Self::LowRank,
            Ffn::Cascade => Self::Cascade,
        }
    }
}

impl ModelArgs {
    /// Finds the files, fetching them where the model is on the Hub.
    pub(crate) fn files(&self) -> Result<ModelFiles> {
        let mut files = ModelFiles::resolve(&self.model, self.revision.as_deref(), &HubSettings::from_env())?;
        if let Some(path) = &self.tokenizer {
            let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            files.tokenizer = Some(bytes.into());
        }
        Ok(files)
    }

    /// The profile of the flag, else the one beside the model.
    pub(crate) fn profile(&self, files: &ModelFiles) -> Result<Option<Arc<Profile>>> {
        Ok(match (&self.profile, &files.sparse_profile) {
            (Some(path), _) => Some(Arc::new(Profile::load(path)?)),
            (None, Some(profile)) => Some(Arc::new(profile.load()?)),
            (None, None) => None,
        })
    }

    /// What the flags say about the FFN.
    pub(crate) fn sparse(&self) -> Result<SparseConfig> {
        let selection = match self.sparsity {
            None => Selection::Fitted,
            Some(s) if (0.0..1.0).contains(&s) => Selection::Share(1.0 - s),
            Some(s) => bail!("--sparsity {s} must be 0 or more and below 1"),
        };
        Ok(SparseConfig {
            mode: self.ffn.map_or_else(FfnMode::default, FfnMode::from),
            selection,
            guard: None,
            force: self.force_sparse,
        })
    }

    /// Loads the model; says on standard error what was done otherwise than asked.
    pub(crate) fn load(&self) -> Result<Pretrained> {
        self.load_files(&self.files()?)
    }

    /// As [`Self::load`] for files that were found already.
    pub(crate) fn load_files(&self, files: &ModelFiles) -> Result<Pretrained> {
        self.load_as(files, self.dtype, self.sparse()?, self.memory.attention())
    }

    /// The dense model in its stored dtype.
    pub(crate) fn as_stored(&self) -> Result<Pretrained> {
        self.load_as(
            &self.files()?,
            None,
            SparseConfig { mode: FfnMode::Dense, ..SparseConfig::default() },
            AttentionConfig::default(),
        )
    }

    /// How to hold and run the model.
    pub(crate) fn options(
        &self,
        files: &ModelFiles,
        format: Option<Format>,
        sparse: SparseConfig,
        attention: AttentionConfig,
    ) -> Result<LoadOptions> {
        let threads = self.threads.map(Threads::new).transpose()?;
        Ok(LoadOptions { format, threads, profile: self.profile(files)?, sparse, attention })
    }

    fn load_as(
        &self,
        files: &ModelFiles,
        format: Option<Format>,
        sparse: SparseConfig,
        attention: AttentionConfig,
    ) -> Result<Pretrained> {
        let options = self.options(files, format, sparse, attention)?;
        let mut files = files.clone();
        if !self.no_mmap {
            // SAFETY: these programs write to no model file in place, and --help asks the user not to do so meanwhile.
            unsafe { files.map() }?;
        }
        let loaded = Pretrained::load(&files, options)?;
        for notice in &loaded.notices {
            eprintln!("note: {notice}");
        }
        Ok(loaded)
    }

    /// An empty cache for the model.
    pub(crate) fn cache(&self, loaded: &Pretrained) -> Result<Cache> {
        let kv = self.memory.kv(loaded.default_kv_dtype())?;
        Ok(Cache::with_config(true, kv, &loaded.config, &Device::Cpu)?)
    }
}
