//! GGUF files: weights in place, shape and tokenizer from the metadata.
//!
//! | GGUF | here |
//! |---|---|
//! | `token_embd`, `output_norm`, `output` | `model.embed_tokens`, `model.norm`, `lm_head` (the embedding where there is none) |
//! | `blk.N.attn_norm`, `blk.N.ffn_norm` | `model.layers.N.input_layernorm`, `….post_attention_layernorm` |
//! | `blk.N.attn_q`, `attn_k`, `attn_v`, `attn_output` | `….self_attn.q_proj`, `k_proj`, `v_proj`, `o_proj` |
//! | `blk.N.ffn_gate`, `ffn_up`, `ffn_down` | `….mlp.gate_proj`, `up_proj`, `down_proj` |
//! | `rope_freqs` | [`Checkpoint::rope_freqs`](crate::decoder::Checkpoint) |
//!
//! Rows of `attn_q` and `attn_k` are ordered for rotary pairs of neighbours, not of halves as on the Hub.

mod header;
mod part;
mod shape;
pub mod tokenizer;
mod types;

use crate::message::first_line;
use crate::{
    decoder::{Checkpoint, Extras, Held, LoadOptions, Stored},
    llama::Llama,
};
use candle_core::{
    Error, Result, bail,
    quantized::gguf_file::{Content, TensorInfo, VersionedMagic},
};
use candle_sparse::{error::plain, profile::Profile};
use candle_sparse_core::Config;
use part::{Bytes, Split, failed};
pub(crate) use part::{Place, part_names};
pub use shape::config;
pub(crate) use shape::notices as config_notices;
pub(crate) use shape::{ARCEE, LAYER_NAMES, LLAMA, OWN};
use std::{collections::HashMap, path::Path, sync::Arc};
pub(crate) use types::format;
pub use types::ggml_type;

/// So many last bytes of a file, behind its tensors, are a profile.
pub(crate) const PROFILE: &str = "candle_sparse.profile.length";

/// A model in a GGUF file, or in several that belong together; `Clone` shares what is open.
///
/// ```
/// use candle_sparse_models::{gguf::GgufFile, llama::{Llama, LoadOptions}};
///
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// # let temporary = tempfile::tempdir()?;
/// # let path = temporary.path().join("tales.gguf");
/// # let files = candle_sparse_models::files::ModelFiles::from_folder(folder)?;
/// # let layout = candle_sparse_models::convert::Layout::default();
/// # candle_sparse_models::convert::GgufModel::from_files(&files, layout)?.save(&path)?;
/// let file = GgufFile::open(&path)?;
/// assert!(file.content().tensor_infos.contains_key("blk.0.ffn_gate.weight"));
/// assert!(file.profile()?.is_none());
/// let llama = Llama::from_gguf(&file, LoadOptions::default())?;
/// assert_eq!(llama.decoder().config().num_hidden_layers, 4);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct GgufFile {
    content: Arc<Content>,
    parts: Arc<[Part]>,
    /// In which part a tensor lies, where that is not the first.
    later: Arc<HashMap<String, usize>>,
}

/// One of the files.
#[derive(Clone, Debug)]
struct Part {
    bytes: Bytes,
    /// Where its tensors' data begin.
    data: u64,
    /// Where they end.
    end: u64,
}

/// What [`crate::decoder::Decoder::load`] needs.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) checkpoint: Checkpoint<'static>,
    pub(crate) config: Config,
    pub(crate) extras: Extras,
}

impl GgufFile {
    /// Opens a file and reads its header. Weights are read when the model is loaded, into memory of their own, in huge pages
    /// where the system has them.
    ///
    /// Any part of a split model opens all of them, which must lie beside it.
    ///
    /// # Errors
    /// [`candle_sparse::Error::File`]: a file cannot be read, is truncated, corrupt or something else, a part is missing, or a
    /// tensor has a type that is not supported; named.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::with(path.as_ref(), Bytes::open)
    }

    /// As [`Self::open`], mapped: weights are used where they lie, their pages come from the disk when they are first touched,
    /// and processes share them.
    ///
    /// ```
    /// use candle_sparse_models::{gguf::GgufFile, llama::{Llama, LoadOptions}};
    ///
    /// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
    /// # let temporary = tempfile::tempdir()?;
    /// # let path = temporary.path().join("tales.gguf");
    /// # let files = candle_sparse_models::files::ModelFiles::from_folder(folder)?;
    /// # let layout = candle_sparse_models::convert::Layout::default();
    /// # candle_sparse_models::convert::GgufModel::from_files(&files, layout)?.save(&path)?;
    /// // SAFETY: the file is in a folder that only this program knows, and nothing writes to it any more.
    /// let file = unsafe { GgufFile::map(&path)? };
    /// let llama = Llama::from_gguf(&file, LoadOptions::default())?;
    /// assert!(llama.decoder().weight_bytes() > 4 << 20);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Self::open`]; also another program that holds a lock on the file to write it.
    ///
    /// # Safety
    /// As long as the value, or a model that was made of it, exists, nobody may write to the file, or the parts beside it, or
    /// shorten them. Replacing them by renaming is no harm.
    pub unsafe fn map(path: impl AsRef<Path>) -> Result<Self> {
        // SAFETY: the caller promises what `Bytes::map` asks for, of all parts.
        Self::with(path.as_ref(), |path| unsafe { Bytes::map(path) })
    }

    fn with(path: &Path, open: impl Fn(&Path) -> Result<Bytes>) -> Result<Self> {
        let (part, content) = Part::new(open(path)?)?;
        let split = Split::of(&content).map_err(|e| failed(path, e))?;
        let Some(split) = split else {
            return Ok(Self { content: content.into(), parts: [part].into(), later: Arc::default() });
        };
        let mut all = Content {
            magic: VersionedMagic::GgufV3,
            metadata: HashMap::new(),
            tensor_infos: HashMap::new(),
            tensor_data_offset: 0,
        };
        let (mut parts, mut later) = (Vec::new(), HashMap::new());
        for (i, file) in split.files(path)?.iter().enumerate() {
            let (part, content) = Part::new(open(file)?)?;
            let found = Split::of(&content).map_err(|e| failed(file, e))?;
            if found.is_none_or(|found| (found.no, found.count) != (i, split.count)) {
                return Err(failed(
                    file,
                    format!("is not part {} of {} of a split model, as its name says", i + 1, split.count),
                ));
            }
            for (name, info) in content.tensor_infos {
                if i > 0 {
                    later.insert(name.clone(), i);
                }
                if all.tensor_infos.insert(name.clone(), info).is_some() {
                    return Err(failed(file, format!("tensor {name} stands in another part too")));
                }
            }
            if i == 0 {
                (all.magic, all.metadata) = (content.magic, content.metadata);
                all.tensor_data_offset = content.tensor_data_offset;
            }
            parts.push(part);
        }
        let tensors = all.tensor_infos.len();
        if let Some(n) = split.tensors.filter(|n| *n != tensors) {
            return Err(failed(
                path,
                format!("its parts hold {tensors} tensors, {n} are announced (of another model?)"),
            ));
        }
        Ok(Self { content: all.into(), parts: parts.into(), later: later.into() })
    }

    /// The path of the file; of several, that of the first.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.parts[0].bytes.path()
    }

    /// The header in candle's form. Of a split model it has the metadata of the first part and the tensors of all, each
    /// placed in its own part.
    #[must_use]
    pub fn content(&self) -> &Content {
        &self.content
    }

    /// The sparse profile in the file; `None`: it holds none.
    ///
    /// # Errors
    /// It is damaged, or missing though the metadata speak of it.
    pub fn profile(&self) -> Result<Option<Profile>> {
        let Some(len) = profile_len(&self.content)? else { return Ok(None) };
        let Part { bytes, end, .. } = &self.parts[0];
        if bytes.len().checked_sub(len as u64).is_none_or(|start| start < *end) {
            return Err(failed(
                self.path(),
                "the profile is missing that should stand behind the tensors: a truncated download, or a copy by a program \
                 that takes the tensors alone. Give a profile, or convert the model anew",
            ));
        }
        let profile = Profile::from_bytes(&bytes.tail(len)?);
        profile
            .map(Some)
            .map_err(|e| failed(self.path(), format!("profile: {} (truncated download?)", first_line(&e))))
    }

    pub(crate) fn model(&self) -> Result<Model> {
        let mapped = matches!(self.parts[0].bytes, Bytes::Mapped(_));
        let stored = Stored::new(self.path().display().to_string()).with_mapped(mapped);
        model(&self.content, stored, |name, mut place| {
            let part = &self.parts[self.later.get(name).copied().unwrap_or(0)];
            place.start = place.start - self.content.tensor_data_offset + part.data;
            match part.bytes {
                Bytes::Mapped(_) => part.bytes.weight(&place).map(Held::Here),
                Bytes::Read(_) => {
                    let bytes = part.bytes.clone();
                    Ok(Held::elsewhere(place.format, move || bytes.weight(&place)))
                }
            }
        })
    }
}

impl Part {
    fn new(bytes: Bytes) -> Result<(Self, Content)> {
        let content = bytes.header()?;
        let data = content.tensor_data_offset;
        let end = |info: &TensorInfo| {
            let elements: u64 = info.shape.dims().iter().map(|n| *n as u64).product();
            // Inside the file, as the header was checked to say.
            data + info.offset
                + elements / info.ggml_dtype.block_size() as u64 * info.ggml_dtype.type_size() as u64
        };
        let end = content.tensor_infos.values().map(end).max().unwrap_or(data);
        Ok((Self { bytes, data, end }, content))
    }
}

/// Bytes of the profile in a file.
pub(crate) fn profile_len(content: &Content) -> Result<Option<usize>> {
    let Some(value) = content.metadata.get(PROFILE) else { return Ok(None) };
    match tokenizer::metadata::integer(value).and_then(|n| usize::try_from(n).ok()) {
        Some(n) => Ok(Some(n)),
        None => bail!("metadata {PROFILE} is no length"),
    }
}

/// The model in a file; `hold` gives tensors by name and place in it, which are `stored`.
pub(crate) fn model(
    content: &Content,
    mut stored: Stored,
    mut hold: impl FnMut(&str, Place) -> Result<Held>,
) -> Result<Model> {
    let origin = stored.origin().to_string();
    let named = |e: Error| Error::Msg(format!("{origin}: {}", first_line(&e)));
    let wrong = |problem: String| Err(Error::Msg(format!("{origin}: {}", plain(&problem))));
    let config = config(content).map_err(named)?;
    let mut rope_freqs = None;
    for (name, info) in &content.tensor_infos {
        let dims = info.shape.dims();
        let Some(format) = format(info.ggml_dtype) else {
            return wrong(format!("tensor {name} has type {:?}, which is not supported", info.ggml_dtype));
        };
        let (rows, cols) = match *dims {
            [n] => (1, n),
            [rows, cols] => (rows, cols),
            _ => {
                return wrong(format!("tensor {name} has shape {dims:?}, a llama has vectors and matrices"));
            }
        };
        let start = content.tensor_data_offset.saturating_add(info.offset);
        let held = hold(name, Place { rows, cols, format, start })?;
        match shape::hugging_face_name(name, config.num_hidden_layers) {
            Some(other) if stored.contains(&other) => {
                return wrong(format!("tensor {name} is there under another name too"));
            }
            Some(name) => stored.insert(name, held, dims),
            None if name == "rope_freqs.weight" => {
                rope_freqs = Some(held.weight()?.dequantize()?.flatten_all()?.to_vec1()?);
            }
            None => {
                return wrong(format!(
                    "tensor {name} is not part of a llama: this model would run wrongly here"
                ));
            }
        }
    }
    // Biases are used where there are any: a file does not say which it must have.
    let tie_word_embeddings = !stored.contains("lm_head.weight");
    let extras = Extras::default().with_tie_word_embeddings(tie_word_embeddings);
    let stored = Arc::new(stored);
    let checkpoint = Checkpoint { vb: stored.var_builder(), stored: Some(stored), rope_freqs };
    let mut config = config.to_core().map_err(named)?;
    config.rope.interleaved = true;
    Ok(Model { checkpoint, config, extras })
}

impl Llama {
    /// Loads a GGUF file, whose weights are used where they lie unless `options` ask for another format.
    ///
    /// A profile in the file is used where `options` bring none.
    ///
    /// # Errors
    /// See [`Decoder::load`](crate::decoder::Decoder::load).
    pub fn from_gguf(file: &GgufFile, mut options: LoadOptions) -> Result<Self> {
        if options.profile.is_none() {
            options.profile = file.profile()?.map(Arc::new);
        }
        let Model { checkpoint, config, extras } = file.model()?;
        Self::from_checkpoint(&checkpoint, config, extras, options)
    }
}
