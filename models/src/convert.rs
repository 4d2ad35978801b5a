//! Writing a model as a GGUF file.
//!
//! An ordinary file opens in llama.cpp and candle too; a profile stands behind the tensors, where others do not look. A
//! neuron-major file holds `ffn_up` and `ffn_down` as one tensor `ffn_up_down` `[2 · intermediate_size, hidden_size]`: up
//! row, then down column, neuron by neuron in the order of its profile, so that sparse decode uses the file in place. Others
//! cannot run it, and neither can they run activations that `llama` does not name, so such files have an architecture of
//! their own that others refuse.

mod check;
mod files;
mod metadata;
mod source;
mod tokenizer;

use crate::{
    decoder::Checkpoint,
    files::ModelFiles,
    gguf::{
        self, GgufFile, LLAMA, OWN, PROFILE,
        tokenizer::{from_metadata, own::KEY as OWN_KEY},
    },
    llama::Config,
    message::first_line,
    pretrained::end_tokens,
};
use candle_core::{
    Device, Error, Result, Tensor, bail,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{self, Value},
    },
};
use candle_nn::VarBuilder;
use candle_sparse::{
    Format, Profile,
    save::{save, save_checked},
};
use metadata::put;
use source::Source;
use std::{
    collections::HashMap,
    io::{BufWriter, Seek, SeekFrom, Write},
    path::Path,
};
use tokenizers::Tokenizer;

/// A model in the form of a GGUF file, in memory: matrices in ggml types, norms in F32.
///
/// ```
/// use candle_sparse_models::{Format, convert::{GgufModel, Layout}, files::ModelFiles, gguf::GgufFile};
///
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// # let temporary = tempfile::tempdir()?;
/// # let path = temporary.path().join("tales-q8.gguf");
/// let files = ModelFiles::from_folder(folder)?;
/// let model = GgufModel::from_files(&files, Layout::default().with_format(Some(Format::Q8_0)))?;
/// assert!(model.is_ordinary());
/// model.save_checked(&path)?;
/// let file = GgufFile::open(&path)?;
/// assert!(file.content().metadata.contains_key("tokenizer.ggml.tokens"));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct GgufModel {
    metadata: Vec<(String, Value)>,
    tensors: Vec<(String, QTensor)>,
    /// As `safetensors`.
    profile: Option<Vec<u8>>,
    /// What a profile must have been made for.
    fingerprint: Vec<f32>,
    shape: candle_sparse_core::Config,
    /// What the file's tokenizer must read as.
    tokenizer: Option<Tokenizer>,
    /// The tokens that must end an answer, where they are known.
    ends: Option<Vec<u32>>,
    notices: Vec<String>,
}

/// How the weights of a GGUF file are written: their format, and whether neuron by neuron.
///
/// ```
/// use candle_sparse_models::{Format, Profile, convert::{GgufModel, Layout}, files::ModelFiles};
///
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// let files = ModelFiles::from_folder(folder)?;
/// let profile = Profile::load(folder.join("sparse.safetensors"))?;
/// // Sparse decode uses such a file in place; other programs refuse it.
/// let layout = Layout::default().with_format(Some(Format::Q8_0)).with_neuron_major(Some(&profile));
/// assert!(!GgufModel::from_files(&files, layout)?.is_ordinary());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct Layout<'a> {
    /// Format of the matrices; `None`: the one that they have.
    pub format: Option<Format>,
    /// Neuron-major in the order of this profile, which is part of the file then.
    pub neuron_major: Option<&'a Profile>,
    /// Neuron-major in the order of the checkpoint, without a profile: for activations that give exact zeros.
    pub own_order: bool,
}

impl<'a> Layout<'a> {
    /// The same with another [`format`](Self::format).
    #[must_use]
    pub fn with_format(self, format: Option<Format>) -> Self {
        Self { format, ..self }
    }

    /// The same with another [`neuron_major`](Self::neuron_major).
    #[must_use]
    pub fn with_neuron_major(self, neuron_major: Option<&'a Profile>) -> Self {
        Self { neuron_major, ..self }
    }

    /// The same with another [`own_order`](Self::own_order).
    #[must_use]
    pub fn with_own_order(self, own_order: bool) -> Self {
        Self { own_order, ..self }
    }

    fn is_neuron_major(&self) -> bool {
        self.own_order || self.neuron_major.is_some()
    }
}

impl GgufModel {
    /// A checkpoint with Hugging Face names. Tensors are taken one at a time, so that no more than one is held as floats.
    ///
    /// # Errors
    /// A tensor that is missing, a model that GGUF has no words for, or a profile that was made for another one.
    pub fn new(vb: &VarBuilder<'_>, config: &Config, layout: Layout<'_>, name: &str) -> Result<Self> {
        let from = Checkpoint::from(vb.clone());
        let source =
            Source { from: &from, config, layout, interleaved: false, conversions: Default::default() };
        let mut file = source.model(HashMap::from([("general.name".into(), Value::String(name.into()))]))?;
        if let Some(factors) = metadata::rope_freqs(config)? {
            let n = factors.len();
            let t = QTensor::quantize(&Tensor::from_vec(factors, n, &Device::Cpu)?, GgmlDType::F32)?;
            file.tensors.push(("rope_freqs.weight".into(), t));
        }
        Ok(file)
    }

    /// The model of another file with its metadata, tokenizer included. Matrices that keep their format keep their bytes.
    ///
    /// # Errors
    /// As [`Self::new`]; also a file that is neuron-major already.
    pub fn from_gguf(file: &GgufFile, layout: Layout<'_>) -> Result<Self> {
        let config = gguf::config(file.content())?;
        let from = file.model()?.checkpoint;
        let there = |name: &str| from.vb.contains_tensor(&format!("model.layers.0.mlp.{name}.weight"));
        if there("up_down_proj") || there("down_rows") {
            bail!("the file is neuron-major already: convert the one that it was made from");
        }
        let source = Source {
            from: &from,
            config: &config,
            layout,
            interleaved: true,
            conversions: Default::default(),
        };
        let mut kept = file.content().metadata.clone();
        // What is said of the old file's bytes does not hold for the new one's.
        kept.retain(|key, _| {
            let general = key.starts_with("general.") && !OF_THE_BYTES.contains(&key.as_str());
            general || key.starts_with("tokenizer.") || key == OWN_KEY
        });
        let holds_one = kept.get("tokenizer.ggml.model").and_then(|v| v.to_string().ok());
        let holds_one = holds_one.is_some_and(|kind| kind != NO_TOKENIZER);
        // One that is not read here may serve others.
        let tokenizer = from_metadata(&kept);
        let mut model = source.model(kept)?;
        match tokenizer {
            Ok((tokenizer, _)) => model.tokenizer = Some(tokenizer),
            Err(e) if holds_one => {
                model.notices.push(format!("the tokenizer is copied unread: {}", first_line(&e)));
            }
            Err(_) => (),
        }
        if let Some(factors) = &from.rope_freqs {
            let t = Tensor::new(factors.as_slice(), &Device::Cpu)?;
            model.tensors.push(("rope_freqs.weight".into(), QTensor::quantize(&t, GgmlDType::F32)?));
        }
        Ok(model)
    }

    /// With the tokenizer in the metadata. The first of the end tokens in `config` is the file's `eos_token_id`.
    ///
    /// # Errors
    /// A tokenizer that GGUF has no words for, or that would read a text otherwise when it comes back from the file.
    pub fn with_tokenizer(mut self, tokenizer: &Tokenizer, config: &Config) -> Result<Self> {
        let words = tokenizer::metadata(tokenizer, config)?;
        for (key, value) in words.metadata {
            put(&mut self.metadata, key, value);
        }
        self.notices.extend(words.notices);
        self.tokenizer = Some(tokenizer.clone());
        let written: HashMap<_, _> = self.metadata.iter().cloned().collect();
        self.check_tokenizer(&from_metadata(&written)?.0)?;
        Ok(self)
    }

    /// What the file cannot hold as it was wanted, or as the model has it: for the user to read.
    #[must_use]
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// Adds a value to the metadata, such as a chat template.
    #[must_use]
    pub fn with_value(mut self, key: &str, value: Value) -> Self {
        put(&mut self.metadata, key, value);
        self
    }

    /// With a sparse profile in the file; one that is neuron-major has its own.
    ///
    /// # Errors
    /// The profile was made for another model, or cannot be written.
    pub fn with_profile(mut self, profile: &Profile) -> Result<Self> {
        if self.profile.is_none() {
            self.check(profile)?;
            self.set_profile(profile)?;
        }
        Ok(self)
    }

    /// What loading would refuse is not written.
    fn check(&self, profile: &Profile) -> Result<()> {
        profile.check_model(&self.shape)?;
        profile.belongs_to(&self.fingerprint)
    }

    fn set_profile(&mut self, profile: &Profile) -> Result<()> {
        let bytes = profile.to_bytes()?;
        put(&mut self.metadata, PROFILE, Value::U64(bytes.len() as u64));
        self.profile = Some(bytes);
        Ok(())
    }

    /// Opens a file that was written and reads it as any other: its tokenizer must give the tokens of the model's own.
    ///
    /// # Errors
    /// The file cannot be opened, or one text has other tokens in it.
    pub fn check_file(&self, path: &Path) -> Result<()> {
        let file = GgufFile::open(path)?;
        gguf::config(file.content())?;
        file.profile()?;
        if self.tokenizer.is_none() {
            return Ok(());
        }
        let (tokenizer, _) = from_metadata(&file.content().metadata)?;
        self.check_tokenizer(&tokenizer)?;
        let ends = end_tokens(&ModelFiles::from_gguf(path)?, &tokenizer)?;
        match &self.ends {
            Some(expected) if *expected != ends => Err(Error::Msg(format!(
                "the tokens {expected:?} end an answer of the model, in its GGUF file {ends:?} would"
            ))),
            _ => Ok(()),
        }
    }

    fn check_tokenizer(&self, written: &Tokenizer) -> Result<()> {
        match &self.tokenizer {
            Some(tokenizer) => check::same_tokens(tokenizer, written, self.shape.vocab_size),
            None => Ok(()),
        }
    }

    /// Whether llama.cpp opens the file; candle too where it [is a llama](Self::is_llama).
    #[must_use]
    pub fn is_ordinary(&self) -> bool {
        self.architecture() != Some(OWN)
    }

    /// Whether `general.architecture` is `llama`.
    #[must_use]
    pub fn is_llama(&self) -> bool {
        self.architecture() == Some(LLAMA)
    }

    fn architecture(&self) -> Option<&str> {
        let value = self.metadata.iter().find(|(key, _)| key == "general.architecture");
        value.and_then(|(_, v)| v.to_string().ok()).map(String::as_str)
    }

    /// The matrices with their names in the file.
    pub fn matrices(&self) -> impl Iterator<Item = (&str, &QTensor)> {
        self.tensors.iter().filter(|(_, t)| t.rank() == 2).map(|(name, t)| (name.as_str(), t))
    }

    /// Writes the file.
    ///
    /// # Errors
    /// Writing fails.
    pub fn write(&self, out: impl Write + Seek) -> Result<()> {
        let metadata: Vec<_> = self.metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let tensors: Vec<_> = self.tensors.iter().map(|(k, t)| (k.as_str(), t)).collect();
        let mut out = BufWriter::new(out);
        gguf_file::write(&mut out, &metadata, &tensors)?;
        if let Some(profile) = &self.profile {
            out.seek(SeekFrom::End(0))?;
            out.write_all(profile)?;
        }
        Ok(out.flush()?)
    }

    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    /// Those of [`save`](save()).
    pub fn save(&self, path: &Path) -> Result<()> {
        save(path, |file| self.write(file))
    }

    /// As [`Self::save`], but only if [`Self::check_file`] finds nothing wrong with the file.
    ///
    /// # Errors
    /// Those of [`save_checked`].
    pub fn save_checked(&self, path: &Path) -> Result<()> {
        save_checked(path, |file| self.write(file), |part| self.check_file(part))
    }
}

/// What llama.cpp calls a model that is given token ids alone.
const NO_TOKENIZER: &str = "no_vocab";

/// Keys that say how the bytes of a file lie.
const OF_THE_BYTES: [&str; 3] = ["general.alignment", "general.quantization_version", "general.file_type"];
