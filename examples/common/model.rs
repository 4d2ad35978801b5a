//! Flags that say which model is used and how it is held.

use crate::cli::format;
use anyhow::Result;
use candle_core::DType;
use candle_sparse::{Threads, core::Format, kv_cache::KvDType};
use candle_sparse_models::{
    decoder::LoadOptions, files::ModelFiles, hub::HubSettings, pretrained::Pretrained,
};
use clap::Args;

/// Which model, and how to hold it.
#[derive(Args, Clone, Debug)]
pub(crate) struct ModelArgs {
    /// Hub id (org/name), folder, .safetensors file, or name of an embedded model (tales-silu, tales-relu)
    #[arg(long, default_value = "tales-silu")]
    pub(crate) model: String,
    /// Branch, tag or commit of a Hub model
    #[arg(long)]
    pub(crate) revision: Option<String>,
    /// Format of the weights in memory: f32, f16, bf16, q8_0, q6_k, q5_1, q5_0, q5_k, q4_1, q4_0, q4_k, q3_k, q2_k; as stored where not given
    #[arg(long, value_parser = format)]
    pub(crate) dtype: Option<Format>,
    /// How keys and values are stored: f32, f16, bf16; as exact as the stored weights where not given
    #[arg(long, value_parser = kv)]
    pub(crate) kv: Option<DType>,
    /// Threads, at most those of candle's pool (CANDLE_NUM_THREADS)
    #[arg(long)]
    pub(crate) threads: Option<usize>,
}

fn kv(name: &str) -> Result<DType, String> {
    let dtype = format(name).ok().and_then(candle_sparse::weight::dtype_of);
    let dtype = dtype.filter(|d| KvDType::try_from(*d).is_ok());
    dtype.ok_or_else(|| format!("'{name}' is none of f32, f16, bf16"))
}

impl ModelArgs {
    /// Finds the files, fetching them where the model is on the Hub.
    pub(crate) fn files(&self) -> Result<ModelFiles> {
        Ok(ModelFiles::resolve(&self.model, self.revision.as_deref(), &HubSettings::from_env())?)
    }

    /// Loads the model; says on standard error what was done otherwise than asked.
    pub(crate) fn load(&self) -> Result<Pretrained> {
        let files = self.files()?;
        let threads = self.threads.map(Threads::new).transpose()?;
        let loaded =
            Pretrained::load(&files, LoadOptions { format: self.dtype, threads, ..LoadOptions::default() })?;
        for notice in loaded.model.decoder().notices() {
            eprintln!("note: {notice}");
        }
        Ok(loaded)
    }

    /// The dtype of a cache for the model.
    pub(crate) fn kv_dtype(&self, loaded: &Pretrained) -> DType {
        self.kv.unwrap_or(loaded.default_kv_dtype())
    }
}
