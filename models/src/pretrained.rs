//! A model ready to generate: files found, tokenizer and config read, weights loaded.

use crate::{
    decoder::LoadOptions,
    files::{ModelFiles, Weights},
    llama::{Config, Llama, LlamaConfig, LlamaEosToks},
};
use candle_core::{DType, Device, Error, Result};
use candle_nn::VarBuilder;
use candle_sparse::{loading, weight::format_of};
use tokenizers::Tokenizer;

/// A Llama with its tokenizer.
#[derive(Debug)]
pub struct Pretrained {
    /// The model.
    pub model: Llama,
    /// Its configuration.
    pub config: Config,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// The dtype its checkpoint is stored in.
    pub stored_dtype: DType,
}

impl Pretrained {
    /// Loads the weights in `options.format`, or as they are stored.
    ///
    /// # Errors
    /// A file that is missing, truncated or corrupt, a model that cannot be run, or a tokenizer with more tokens than
    /// the model; each names the file.
    pub fn load(files: &ModelFiles, options: LoadOptions) -> Result<Self> {
        let name = &files.name;
        let config: LlamaConfig = serde_json::from_slice(&files.config)
            .map_err(|e| Error::msg(format!("{name}: config.json: {e}")))?;
        let config = config.into_config(false);
        let tokenizer = files.load_tokenizer()?;
        let tokens = tokenizer.get_vocab_size(true);
        if tokens > config.vocab_size {
            let vocab = config.vocab_size;
            return Err(Error::msg(format!(
                "{name}: the tokenizer has {tokens} tokens, the model only {vocab}: they do not belong together"
            )));
        }
        let vb = Self::var_builder(files)?;
        let stored_dtype = vb.dtype();
        let model = Llama::load_with(vb, &config, options)
            .map_err(|e| Error::msg(format!("{name}: {}", first_line(&e))))?;
        Ok(Self { model, config, tokenizer, stored_dtype })
    }

    fn var_builder(files: &ModelFiles) -> Result<VarBuilder<'static>> {
        match &files.weights {
            Weights::Files(paths) => loading::var_builder(paths, None, &Device::Cpu),
            Weights::Embedded(bytes) => {
                let name = "model.embed_tokens.weight";
                let all = candle_core::safetensors::SliceSafetensors::new(bytes)?;
                let dtype = all.load(name, &Device::Cpu)?.dtype();
                VarBuilder::from_slice_safetensors(bytes, dtype, &Device::Cpu)
            }
        }
    }

    /// Whether a token ends the text: `eos_token_id`, or `</s>` where the configuration has none.
    #[must_use]
    pub fn is_eos(&self, token: u32) -> bool {
        match &self.config.eos_token_id {
            Some(LlamaEosToks::Single(id)) => token == *id,
            Some(LlamaEosToks::Multiple(ids)) => ids.contains(&token),
            None => self.tokenizer.token_to_id("</s>") == Some(token),
        }
    }

    /// The dtype in which a cache loses nothing that the weights have: F32 for F32 weights, else F16.
    #[must_use]
    pub fn default_kv_dtype(&self) -> DType {
        let full = format_of(self.stored_dtype).is_some_and(|f| f == candle_sparse::core::Format::F32);
        if full { DType::F32 } else { DType::F16 }
    }
}

/// An error without the backtrace that `RUST_BACKTRACE` appends to candle's messages.
#[must_use]
pub fn first_line(e: &Error) -> String {
    e.to_string().lines().next().unwrap_or_default().to_string()
}
