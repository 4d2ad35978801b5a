//! A model ready to generate: files found, tokenizer and config read, weights loaded.

pub use crate::message::first_line;
use crate::{
    chat::{ChatTemplate, stop_tokens},
    decoder::{LoadOptions, check_names, has_mlp_bias},
    files::{ModelFiles, Weights},
    generation::GenerationConfig,
    gguf::{self, GgufFile},
    llama::{Config, Llama, LlamaConfig, LlamaEosToks},
    tokenizer::{TokenizerConfig, end_tokens_by_text},
};
use candle_core::{DType, Device, Error, Result, bail};
use candle_nn::VarBuilder;
use candle_sparse::{error::plain, loading::SafetensorsFiles};
use std::{collections::HashSet, sync::Arc};
use tokenizers::Tokenizer;

/// A Llama with its configuration and tokenizer, and what its files say of how it is used.
///
/// ```
/// use candle_sparse_models::{KvConfig, KvDType, llama::Cache, tokenizer::{TextStream, prompt_tokens}};
///
/// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::Pretrained};
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// let loaded = Pretrained::load(&ModelFiles::from_folder(folder)?, LoadOptions::default())?;
/// let mut cache = Cache::of(&loaded.model, KvConfig::exact(KvDType::F16));
/// let mut logits = vec![0.0; loaded.config.vocab_size];
/// let mut tokens = prompt_tokens(&loaded.tokenizer, "Once upon a time")?;
/// let mut stream = TextStream::new(&loaded.tokenizer);
/// let mut text = String::new();
/// let mut position = 0;
/// while cache.len() < 24 {
///     loaded.model.decode(tokens[position], position, &mut cache, &mut logits)?;
///     position += 1;
///     if position == tokens.len() {
///         let next = (0..2048).max_by(|a, b| logits[*a as usize].total_cmp(&logits[*b as usize])).unwrap();
///         if loaded.is_eos(next) {
///             break;
///         }
///         text += &stream.push(next);
///         tokens.push(next);
///     }
/// }
/// text += &stream.finish();
/// assert!(text.split_whitespace().count() > 5, "{text}");
/// # Ok::<(), candle_core::Error>(())
/// ```
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
    /// What was assumed where the files do not say, and what was done otherwise than asked: for the user to read.
    pub notices: Vec<String>,
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
        let (tokenizer, mut notices) = files.load_tokenizer_and_notices()?;
        let generation = opened.generation(files)?;
        // Added tokens, such as padding, may lie past the embedding; using one is an error of its own.
        let tokens = tokenizer.get_vocab_size(false);
        if tokens > config.vocab_size {
            let vocab = config.vocab_size;
            return Err(candle_sparse::Error::WrongModel {
                what: "the tokenizer",
                problem: format!(
                    "{name}: the tokenizer has {tokens} tokens, the model only {vocab}: they do not belong together"
                ),
            }
            .into());
        }
        let chat_template = opened.chat_template(files, &config, &tokenizer);
        let template = chat_template.as_ref().ok().and_then(Option::as_ref);
        let ends = all_ends(files, &config, &tokenizer, template)?;
        config.eos_token_id = (!ends.is_empty()).then_some(LlamaEosToks::Multiple(ends));
        notices.extend(opened.notices());
        let (model, stored_dtype) = opened.load(&config, options).map_err(|e| named(name, e))?;
        notices.extend_from_slice(model.decoder().notices());
        // They quote files.
        notices.iter_mut().for_each(|notice| *notice = plain(notice));
        Ok(Self { model, config, tokenizer, stored_dtype, notices, generation, chat_template })
    }

    /// How the model reads conversations; `None` where its files do not say.
    ///
    /// # Errors
    /// The template, or the file it should be in, is broken.
    pub fn chat_template(&self) -> Result<Option<&ChatTemplate>> {
        self.chat_template.as_ref().map(Option::as_ref).map_err(|e| Error::Msg(first_line(e)))
    }

    /// Whether a token ends an answer; [`end_tokens`] says which tokens do.
    #[must_use]
    pub fn is_eos(&self, token: u32) -> bool {
        match &self.config.eos_token_id {
            Some(LlamaEosToks::Single(id)) => token == *id,
            Some(LlamaEosToks::Multiple(ids)) => ids.contains(&token),
            None => false,
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
/// ```
/// use candle_core::DType;
/// use candle_sparse_models::{files::ModelFiles, pretrained};
///
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// let vb = pretrained::var_builder(&ModelFiles::from_folder(folder)?, Some(DType::F32))?;
/// assert_eq!(vb.get((2048, 256), "model.embed_tokens.weight")?.dtype(), DType::F32);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// A file that is missing, truncated or corrupt, or holds tensors that have no place in the model, which are named.
pub fn var_builder(files: &ModelFiles, dtype: Option<DType>) -> Result<VarBuilder<'static>> {
    let bytes = match &files.weights {
        Weights::Files(paths) => {
            let opened = SafetensorsFiles::open(paths)?;
            if let Some(layers) = num_hidden_layers(files) {
                check_names(opened.names(), layers).map_err(|e| named(&files.name, e))?;
            }
            return Ok(opened.var_builder(dtype, &Device::Cpu));
        }
        Weights::Gguf(path) => return Ok(GgufFile::open(path)?.model()?.checkpoint.vb),
        Weights::Opened(file) => return Ok(file.model()?.checkpoint.vb),
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

/// What `config.json` says, if it says it: what is wrong with it is for others to find.
fn num_hidden_layers(files: &ModelFiles) -> Option<usize> {
    let config: serde_json::Value = serde_json::from_slice(files.config.as_deref()?).ok()?;
    config["num_hidden_layers"].as_u64()?.try_into().ok()
}

/// The configuration of a model: `config.json` or a GGUF file's, with the end tokens of `generation_config.json`.
///
/// ```
/// use candle_sparse_models::{files::ModelFiles, llama::LlamaEosToks, pretrained};
///
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// let config = pretrained::config(&ModelFiles::from_folder(folder)?)?;
/// assert_eq!((config.num_hidden_layers, config.eos_token_id), (4, Some(LlamaEosToks::Multiple(vec![1]))));
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// A file that is missing or corrupt, or a model that cannot be run.
pub fn config(files: &ModelFiles) -> Result<Config> {
    let mut config = Opened::new(files)?.config(files)?;
    let ends = named_ends(&config, files)?;
    config.eos_token_id = (!ends.is_empty()).then_some(LlamaEosToks::Multiple(ends));
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
            Weights::Opened(file) => Self::Gguf(file.clone()),
            Weights::Files(_) | Weights::Embedded(_) => Self::Floats(var_builder(files, None)?),
        })
    }

    fn config(&self, files: &ModelFiles) -> Result<Config> {
        let name = &files.name;
        match (&files.config, self) {
            (Some(json), _) => {
                let config: LlamaConfig =
                    serde_json::from_slice(json).map_err(|e| damaged(name, "config.json", &e))?;
                let mut config = config.into_config(false);
                if let Self::Floats(vb) = self {
                    // Biases that are there are used, whatever `config.json` says.
                    config.mlp_bias |= has_mlp_bias(vb, config.num_hidden_layers);
                }
                Ok(config)
            }
            (None, Self::Gguf(file)) => gguf::config(file.content()).map_err(|e| named(name, e)),
            (None, Self::Floats(_)) => bail!("{name}: config.json is missing"),
        }
    }

    fn notices(&self) -> Vec<String> {
        match self {
            Self::Floats(_) => Vec::new(),
            Self::Gguf(file) => gguf::config_notices(file.content()),
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
        let template = match files.chat_template.as_deref().map(std::str::from_utf8) {
            Some(Ok(jinja)) => ChatTemplate::with_tokens_of(metadata, jinja).map(Some),
            Some(Err(e)) => Err(Error::msg(format!("the chat template is not UTF-8: {e}"))),
            None => ChatTemplate::from_gguf(metadata),
        };
        template.map_err(|e| Error::Msg(format!("{}: {}", files.name, first_line(&e))))
    }
}

/// The chat template in the files of a model. Where `tokenizer_config.json` does not name the tokens that a template begins
/// and ends texts with, they are those of `config.json`.
pub(crate) fn chat_template(
    files: &ModelFiles,
    config: &Config,
    tokenizer: &Tokenizer,
) -> Result<Option<ChatTemplate>> {
    let named_error = |e| Error::Msg(format!("{}: {}", files.name, first_line(&e)));
    let (json, jinja) = (files.tokenizer_config.as_deref().unwrap_or(b"{}"), files.chat_template.as_deref());
    let Some(template) = ChatTemplate::from_tokenizer_config(json, jinja).map_err(named_error)? else {
        return Ok(None);
    };
    let eos = match &config.eos_token_id {
        Some(LlamaEosToks::Single(id)) => Some(*id),
        Some(LlamaEosToks::Multiple(ids)) => ids.first().copied(),
        None => None,
    };
    let named = TokenizerConfig::from_json(json).map_err(named_error)?;
    let token = |name: &str, id: Option<u32>| {
        let named = named.token(name).map(str::to_string);
        named.or_else(|| tokenizer.id_to_token(id?)).unwrap_or_default()
    };
    let (bos, eos) = (token("bos_token", config.bos_token_id), token("eos_token", eos));
    ChatTemplate::new(template.source(), &bos, &eos).map(Some).map_err(named_error)
}

/// The tokens that end an answer of a model: those that `config.json` or the keys of a GGUF file, `generation_config.json`
/// and `tokenizer_config.json` name, the one that the chat template writes behind an answer, and control tokens whose text
/// says so ([`end_tokens_by_text`]).
///
/// ```
/// use candle_sparse_models::{files::ModelFiles, pretrained};
///
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// let files = ModelFiles::from_folder(folder)?;
/// assert_eq!(pretrained::end_tokens(&files, &files.load_tokenizer()?)?, [1]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// A file that is missing or corrupt.
pub fn end_tokens(files: &ModelFiles, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let opened = Opened::new(files)?;
    let config = opened.config(files)?;
    let template = opened.chat_template(files, &config, tokenizer);
    all_ends(files, &config, tokenizer, template.as_ref().ok().and_then(Option::as_ref))
}

fn all_ends(
    files: &ModelFiles,
    config: &Config,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
) -> Result<Vec<u32>> {
    let mut ids = named_ends(config, files)?;
    let tokenizer_config = files.tokenizer_config.as_deref().map(TokenizerConfig::from_json);
    // One that cannot be read is told of where the tokenizer is loaded.
    let config_end =
        tokenizer_config.and_then(Result::ok).and_then(|c| tokenizer.token_to_id(c.token("eos_token")?));
    ids.extend(config_end);
    ids.extend(template.map(|template| stop_tokens(tokenizer, template)).unwrap_or_default());
    ids.extend(end_tokens_by_text(tokenizer));
    if ids.is_empty() {
        // Tokenizers that do not mark their special tokens.
        ids.extend(tokenizer.token_to_id("</s>"));
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// The end tokens of `config.json` and `generation_config.json`, in this order; chat models name some only in the latter.
fn named_ends(config: &Config, files: &ModelFiles) -> Result<Vec<u32>> {
    #[derive(serde::Deserialize)]
    struct Generation {
        eos_token_id: Option<LlamaEosToks>,
    }
    let mut ids = Vec::new();
    let mut add = |tokens: &Option<LlamaEosToks>| match tokens {
        Some(LlamaEosToks::Single(id)) => ids.push(*id),
        Some(LlamaEosToks::Multiple(more)) => ids.extend(more),
        None => (),
    };
    add(&config.eos_token_id);
    if let Some(bytes) = &files.generation_config {
        let generation: Generation =
            serde_json::from_slice(bytes).map_err(|e| damaged(&files.name, "generation_config.json", &e))?;
        add(&generation.eos_token_id);
    }
    let mut seen = HashSet::new();
    ids.retain(|id| seen.insert(*id));
    Ok(ids)
}

/// What is wrong with a JSON file of the model `name`: `serde_json` quotes of the file what it likes.
fn damaged(name: &str, file: &str, e: &serde_json::Error) -> Error {
    Error::Msg(format!("{name}: {file}: {}", plain(&e.to_string())))
}

/// An error of the model `name`; one that can be told apart keeps its kind, and names the file itself.
fn named(name: &str, e: Error) -> Error {
    if candle_sparse::Error::of(&e).is_some() { e } else { Error::Msg(format!("{name}: {}", first_line(&e))) }
}
