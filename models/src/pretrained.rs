//! A model ready to generate: files found, tokenizer and config read, weights loaded.

use crate::{
    chat::ChatTemplate,
    decoder::LoadOptions,
    files::{ModelFiles, Weights},
    generation::GenerationConfig,
    gguf::{self, GgufFile},
    llama::{Config, Llama, LlamaConfig, LlamaEosToks},
};
use candle_core::{DType, Device, Error, Result, bail};
use candle_nn::VarBuilder;
use candle_sparse::loading;
use std::sync::Arc;
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
    /// How its files want tokens to be chosen.
    pub generation: GenerationConfig,
    /// A broken template is an error for those alone who chat.
    pub(crate) chat_template: Result<Option<ChatTemplate>>,
}

impl Pretrained {
    /// Loads the weights in `options.format`, or as they are stored, and the sparse profile of `options` or the one
    /// beside the model.
    ///
    /// # Errors
    /// A file that is missing, truncated or corrupt, a model that cannot be run, or a tokenizer with more tokens than
    /// the model; each names the file.
    pub fn load(files: &ModelFiles, mut options: LoadOptions) -> Result<Self> {
        let name = &files.name;
        if let (None, Some(profile)) = (&options.profile, &files.sparse_profile) {
            options.profile = Some(Arc::new(profile.load()?));
        }
        let opened = Opened::new(files)?;
        let mut config = opened.config(files)?;
        config.eos_token_id = eos(&config, files)?;
        let generation = opened.generation(files)?;
        let tokenizer = files.load_tokenizer()?;
        // Added tokens, such as padding, may lie past the embedding; using one is an error of its own.
        let tokens = tokenizer.get_vocab_size(false);
        if tokens > config.vocab_size {
            let vocab = config.vocab_size;
            return Err(Error::msg(format!(
                "{name}: the tokenizer has {tokens} tokens, the model only {vocab}: they do not belong together"
            )));
        }
        let (model, stored_dtype) =
            opened.load(&config, options).map_err(|e| Error::msg(format!("{name}: {}", first_line(&e))))?;
        let chat_template = opened.chat_template(files, &config, &tokenizer);
        Ok(Self { model, config, tokenizer, stored_dtype, generation, chat_template })
    }

    /// How the model reads conversations; `None` where its files do not say.
    ///
    /// # Errors
    /// The template, or the file it should be in, is broken.
    pub fn chat_template(&self) -> Result<Option<&ChatTemplate>> {
        self.chat_template.as_ref().map(Option::as_ref).map_err(|e| Error::Msg(first_line(e)))
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

    /// The dtype of a cache where none is asked for: that of the stored weights.
    #[must_use]
    pub fn default_kv_dtype(&self) -> DType {
        match self.stored_dtype {
            half @ (DType::F16 | DType::BF16) => half,
            _ => DType::F32,
        }
    }
}

/// The weights of a model as floats, read tensor by tensor, in `dtype` or as they are stored.
///
/// # Errors
/// A file that is missing, truncated or corrupt.
pub fn var_builder(files: &ModelFiles, dtype: Option<DType>) -> Result<VarBuilder<'static>> {
    let bytes = match &files.weights {
        Weights::Files(paths) => return loading::var_builder(paths, dtype, &Device::Cpu),
        Weights::Gguf(path) => return Ok(GgufFile::open(path)?.model()?.checkpoint.vb),
        Weights::Embedded(bytes) => bytes,
    };
    let dtype = match dtype {
        Some(dtype) => dtype,
        None => {
            let all = candle_core::safetensors::SliceSafetensors::new(bytes)?;
            all.load("model.embed_tokens.weight", &Device::Cpu)?.dtype()
        }
    };
    VarBuilder::from_slice_safetensors(bytes, dtype, &Device::Cpu)
}

/// The configuration of a model: `config.json` or a GGUF file's, with the end tokens of `generation_config.json`.
///
/// # Errors
/// A file that is missing or corrupt, or a model that cannot be run.
pub fn config(files: &ModelFiles) -> Result<Config> {
    let mut config = Opened::new(files)?.config(files)?;
    config.eos_token_id = eos(&config, files)?;
    Ok(config)
}

/// Weights whose headers are read.
enum Opened {
    Floats(VarBuilder<'static>),
    Gguf(GgufFile),
}

impl Opened {
    fn new(files: &ModelFiles) -> Result<Self> {
        Ok(match &files.weights {
            Weights::Gguf(path) => Self::Gguf(GgufFile::open(path)?),
            _ => Self::Floats(var_builder(files, None)?),
        })
    }

    fn config(&self, files: &ModelFiles) -> Result<Config> {
        let name = &files.name;
        match (&files.config, self) {
            (Some(json), _) => {
                let config: LlamaConfig = serde_json::from_slice(json)
                    .map_err(|e| Error::msg(format!("{name}: config.json: {e}")))?;
                Ok(config.into_config(false))
            }
            (None, Self::Gguf(file)) => {
                gguf::config(file.content()).map_err(|e| Error::msg(format!("{name}: {}", first_line(&e))))
            }
            (None, Self::Floats(_)) => bail!("{name}: config.json is missing"),
        }
    }

    fn load(&self, config: &Config, options: LoadOptions) -> Result<(Llama, DType)> {
        match self {
            Self::Floats(vb) => {
                let dtype = vb.dtype();
                Ok((Llama::load_with(vb.clone(), config, options)?, dtype))
            }
            // The cache of a quantised model: what its activations are worth.
            Self::Gguf(file) => Ok((Llama::from_gguf(file, options)?, DType::F16)),
        }
    }

    fn generation(&self, files: &ModelFiles) -> Result<GenerationConfig> {
        match self {
            Self::Gguf(file) => GenerationConfig::from_gguf(&file.content().metadata),
            Self::Floats(_) => GenerationConfig::of(files),
        }
    }

    /// How the model reads conversations.
    fn chat_template(
        &self,
        files: &ModelFiles,
        config: &Config,
        tokenizer: &Tokenizer,
    ) -> Result<Option<ChatTemplate>> {
        let Self::Gguf(file) = self else { return chat_template(files, config, tokenizer) };
        let metadata = &file.content().metadata;
        // One that was asked for stands before the file's own.
        let template = match &files.chat_template {
            Some(jinja) => ChatTemplate::with_tokens_of(metadata, &String::from_utf8_lossy(jinja)).map(Some),
            None => ChatTemplate::from_gguf(metadata),
        };
        template.map_err(|e| Error::Msg(format!("{}: {}", files.name, first_line(&e))))
    }
}

/// The chat template in the files of a model. Where a template comes without `tokenizer_config.json`, its tokens are those
/// of `config.json`.
fn chat_template(files: &ModelFiles, config: &Config, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>> {
    let named = |e| Error::Msg(format!("{}: {}", files.name, first_line(&e)));
    match (&files.tokenizer_config, &files.chat_template) {
        (Some(json), jinja) => ChatTemplate::from_tokenizer_config(json, jinja.as_deref()).map_err(named),
        (None, None) => Ok(None),
        (None, Some(jinja)) => {
            let eos = match &config.eos_token_id {
                Some(LlamaEosToks::Single(id)) => Some(*id),
                Some(LlamaEosToks::Multiple(ids)) => ids.first().copied(),
                None => None,
            };
            let text = |id: Option<u32>| id.and_then(|id| tokenizer.id_to_token(id)).unwrap_or_default();
            let source = String::from_utf8_lossy(jinja);
            ChatTemplate::new(&source, &text(config.bos_token_id), &text(eos)).map(Some).map_err(named)
        }
    }
}

/// The end tokens of `config.json` and `generation_config.json`; chat models name some only in the latter.
fn eos(config: &Config, files: &ModelFiles) -> Result<Option<LlamaEosToks>> {
    #[derive(serde::Deserialize)]
    struct Generation {
        eos_token_id: Option<LlamaEosToks>,
    }
    let Some(bytes) = &files.generation_config else { return Ok(config.eos_token_id.clone()) };
    let generation: Generation = serde_json::from_slice(bytes)
        .map_err(|e| Error::msg(format!("{}: generation_config.json: {e}", files.name)))?;
    let mut ids = Vec::new();
    for toks in [&config.eos_token_id, &generation.eos_token_id].into_iter().flatten() {
        match toks {
            LlamaEosToks::Single(id) => ids.push(*id),
            LlamaEosToks::Multiple(more) => ids.extend(more),
        }
    }
    ids.sort_unstable();
    ids.dedup();
    Ok((!ids.is_empty()).then_some(LlamaEosToks::Multiple(ids)))
}

/// An error without the backtrace that `RUST_BACKTRACE` appends to candle's messages.
#[must_use]
pub fn first_line(e: &Error) -> String {
    e.to_string().lines().next().unwrap_or_default().to_string()
}
