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
mod shape;
pub mod tokenizer;
pub mod write;

use crate::decoder::{Checkpoint, Extras, Stored};
use candle_core::{
    Error, Result, bail,
    quantized::{GgmlDType, gguf_file},
};
use candle_sparse::{
    Weight,
    core::{Config, Format},
    mapped_file::MappedFile,
    profile::Profile,
    weight::Memory,
};
pub use shape::config;
pub(crate) use shape::notices as config_notices;
use std::{io::Cursor, path::Path, sync::Arc};

/// So many last bytes of a file, behind its tensors, are a profile.
pub(crate) const PROFILE: &str = "candle_sparse.profile.length";

/// A GGUF file, mapped: its weights are read where they lie.
#[derive(Debug)]
pub struct GgufFile {
    file: Arc<MappedFile>,
    content: gguf_file::Content,
}

/// What [`crate::decoder::Decoder::load`] needs.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) checkpoint: Checkpoint<'static>,
    pub(crate) config: Config,
    pub(crate) extras: Extras,
}

impl GgufFile {
    /// Maps a file and reads its header; weights are not touched.
    ///
    /// # Errors
    /// The file cannot be read, is truncated or corrupt, or holds a tensor of a type that is not supported, which is named.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = MappedFile::open(path)?;
        header::check(file.bytes()).map_err(|e| Error::Msg(format!("{}: {e}", path.display())))?;
        let content = gguf_file::Content::read(&mut Cursor::new(file.bytes()))?;
        Ok(Self { file: Arc::new(file), content })
    }

    /// The header as candle reads it.
    #[must_use]
    pub fn content(&self) -> &gguf_file::Content {
        &self.content
    }

    /// The sparse profile in the file; `None`: it holds none.
    ///
    /// # Errors
    /// It is damaged.
    pub fn profile(&self) -> Result<Option<Profile>> {
        let Some(len) = profile_len(&self.content)? else { return Ok(None) };
        let (bytes, name) = (self.file.bytes(), self.file.path().display());
        let Some(start) = bytes.len().checked_sub(len) else {
            bail!("{name}: the profile is said to be longer than the file")
        };
        let profile = Profile::from_bytes(&bytes[start..]);
        profile.map(Some).map_err(|e| Error::Msg(format!("{name}: profile: {e} (truncated download?)")))
    }

    pub(crate) fn model(&self) -> Result<Model> {
        let origin = self.file.path().display().to_string();
        model(&self.content, &origin, |start, len| {
            Ok(Memory::File(Arc::clone(&self.file), start..start.saturating_add(len)))
        })
    }
}

/// Bytes of the profile in a file.
pub(crate) fn profile_len(content: &gguf_file::Content) -> Result<Option<usize>> {
    content.metadata.get(PROFILE).map(|n| n.to_u64().map(|n| n as usize)).transpose()
}

/// The model in a file; `memory` gives bytes by their place in it and their number.
pub(crate) fn model(
    content: &gguf_file::Content,
    origin: &str,
    mut memory: impl FnMut(usize, usize) -> Result<Memory>,
) -> Result<Model> {
    let named = |e: Error| Error::Msg(format!("{origin}: {}", crate::pretrained::first_line(&e)));
    let config = config(content).map_err(named)?;
    let mut stored = Stored::new(origin);
    let mut rope_freqs = None;
    for (name, info) in &content.tensor_infos {
        let dims = info.shape.dims();
        let Some(format) = format(info.ggml_dtype) else {
            bail!("{origin}: tensor {name} has type {:?}, which is not supported", info.ggml_dtype);
        };
        let (rows, cols) = match *dims {
            [n] => (1, n),
            [rows, cols] => (rows, cols),
            _ => bail!("{origin}: tensor {name} has shape {dims:?}, a llama has vectors and matrices"),
        };
        let start = content.tensor_data_offset.saturating_add(info.offset);
        let len = rows.saturating_mul(format.row_bytes(cols));
        let weight = Weight::from_memory(rows, cols, format, memory(start as usize, len)?)?;
        match shape::hugging_face_name(name, config.num_hidden_layers) {
            Some(name) => stored.insert(name, weight, dims),
            None if name == "rope_freqs.weight" => {
                rope_freqs = Some(weight.dequantize()?.flatten_all()?.to_vec1()?);
            }
            None => {
                bail!("{origin}: tensor {name} is not part of a llama: this model would run wrongly here")
            }
        }
    }
    let extras = Extras {
        attention_bias: stored.contains("model.layers.0.self_attn.q_proj.bias"),
        mlp_bias: stored.contains("model.layers.0.mlp.gate_proj.bias"),
        tie_word_embeddings: !stored.contains("lm_head.weight"),
    };
    let stored = Arc::new(stored);
    let checkpoint = Checkpoint { vb: stored.var_builder(), stored: Some(stored), rope_freqs };
    let mut config = config.to_core().map_err(named)?;
    config.rope.interleaved = true;
    Ok(Model { checkpoint, config, extras })
}

/// Our name of candle's name of a ggml type.
pub(crate) fn format(dtype: GgmlDType) -> Option<Format> {
    Format::ALL.into_iter().find(|f| write::ggml_type(*f) == dtype)
}
