//! Llama from GGUF and GGML files, drop-in for `candle_transformers::models::quantized_llama`.
//!
//! The context and the factors of rotary frequencies (`rope_freqs`, Llama 3.1) are the file's; candle stops at 4096
//! positions and knows no factors.

use crate::{
    decoder::{Checkpoint, Extras, LoadOptions, Stored},
    gguf::{self, GgufFile, Model},
    llama::{Cache, Config, Llama},
    speculation::Decoding,
};
use candle_core::{
    DType, Device, Error, Result, Tensor, bail,
    quantized::{QTensor, ggml_file, gguf_file},
};
use candle_sparse::{
    AttentionConfig, FastGrnnGate, KvConfig, KvDType, SparseConfig, Weight, buffer::Buffer, profile::Profile,
    weight::Memory,
};
use candle_sparse_core::Activation;
use std::{
    io::{Read, Seek, SeekFrom},
    path::Path,
    sync::Arc,
    time::Duration,
};

/// The context, in positions, of files that do not say one.
///
/// ```
/// assert_eq!(candle_sparse_models::quantized_llama::MAX_SEQ_LEN, 4096);
/// ```
pub const MAX_SEQ_LEN: usize = 4096;

/// A quantised Llama with its cache. `Clone` shares the weights and takes a snapshot of the cache.
///
/// ```
/// use candle_core::{Device, Tensor, quantized::gguf_file::Content};
/// use candle_sparse_models::{KvConfig, quantized_llama::ModelWeights};
///
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// # let temporary = tempfile::tempdir()?;
/// # let path = temporary.path().join("tales.gguf");
/// # let files = candle_sparse_models::files::ModelFiles::from_folder(folder)?;
/// # let layout = candle_sparse_models::convert::Layout::default();
/// # candle_sparse_models::convert::GgufModel::from_files(&files, layout)?.save(&path)?;
/// // As with candle.
/// let mut file = std::fs::File::open(&path)?;
/// let content = Content::read(&mut file)?;
/// let mut model = ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?;
/// let prompt = Tensor::new(&[[0_u32, 5, 6]], &Device::Cpu)?;
/// assert_eq!(model.forward(&prompt, 0)?.dims(), [1, 2048]);
/// // Or by its path, with older keys and values quantised.
/// let mut tiered = ModelWeights::from_path(&path)?.with_kv(KvConfig::tiered())?;
/// tiered.forward(&prompt, 0)?;
/// assert_eq!(tiered.cache().len(), 3);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ModelWeights {
    llama: Llama,
    cache: Cache,
}

impl ModelWeights {
    /// Loads a file that candle's reader has opened. Each tensor is read once, straight into its place.
    ///
    /// # Errors
    /// See [`Self::from_gguf_with`].
    pub fn from_gguf<R: Seek + Read>(
        ct: gguf_file::Content,
        reader: &mut R,
        device: &Device,
    ) -> Result<Self> {
        Self::from_gguf_with(ct, reader, device, LoadOptions::default())
    }

    /// As [`Self::from_gguf`], quantised anew, sparse or limited in threads as `options` say; a profile in the file is used
    /// where they bring none.
    ///
    /// # Errors
    /// A model that cannot be run, a tensor that is missing or lies past the end, a device other than the CPU, and those of
    /// [`crate::decoder::Decoder::load`].
    pub fn from_gguf_with<R: Seek + Read>(
        ct: gguf_file::Content,
        reader: &mut R,
        device: &Device,
        mut options: LoadOptions,
    ) -> Result<Self> {
        on_cpu(device)?;
        let end = reader.seek(SeekFrom::End(0))?;
        let mut read = |start: u64, len: usize| -> Result<Buffer> {
            if start.checked_add(len as u64).is_none_or(|e| e > end) {
                bail!("{len} bytes from {start} are past the end of the file (truncated download?)");
            }
            let mut buffer = Buffer::zeroed(len)?;
            reader.seek(SeekFrom::Start(start))?;
            reader.read_exact(&mut buffer.bytes_mut()[..len])?;
            Ok(buffer)
        };
        if let Some(len) = gguf::profile_len(&ct)?.filter(|_| options.profile.is_none()) {
            let start = end.saturating_sub(len as u64);
            options.profile = Some(Arc::new(Profile::from_bytes(&read(start, len)?.bytes()[..len])?));
        }
        let model = gguf::model(&ct, Stored::new("GGUF"), |_, place| {
            let memory = Memory::Buffer(read(place.start, place.bytes())?);
            Ok(Weight::from_memory(place.rows, place.cols, place.format, memory)?.into())
        })?;
        Self::new(model, options)
    }

    /// Loads an open file, which may be mapped.
    ///
    /// # Errors
    /// See [`crate::decoder::Decoder::load`].
    pub fn from_gguf_file(file: &GgufFile, options: LoadOptions) -> Result<Self> {
        let llama = Llama::from_gguf(file, options)?;
        Self::with_llama(llama)
    }

    /// Opens a file and loads it into memory; [`GgufFile::map`] and [`Self::from_gguf_file`] use it where it lies instead.
    ///
    /// # Errors
    /// As [`GgufFile::open`] and [`Self::from_gguf_file`].
    pub fn from_path(path: impl AsRef<Path>) -> Result<Self> {
        Self::from_gguf_file(&GgufFile::open(path)?, LoadOptions::default())
    }

    /// Loads a file of the format before GGUF; `gqa` query heads share a key/value head. The tensors stay where they are.
    ///
    /// # Errors
    /// As [`Self::from_gguf`].
    pub fn from_ggml(ct: ggml_file::Content, gqa: usize) -> Result<Self> {
        on_cpu(&ct.device)?;
        Self::new(ggml_model(ct, gqa)?, LoadOptions::default())
    }

    fn new(model: Model, options: LoadOptions) -> Result<Self> {
        Self::with_llama(Llama::from_checkpoint(&model.checkpoint, model.config, model.extras, options)?)
    }

    fn with_llama(llama: Llama) -> Result<Self> {
        let cache = Cache::of(&llama, KvConfig::exact(KvDType::F32));
        Ok(Self { llama, cache })
    }

    /// This model with keys and values kept as `kv` says, such as [`KvConfig::tiered`]; with an empty cache and no time limit.
    ///
    /// # Errors
    /// None today; the `Result` leaves room for caches that cannot be made.
    pub fn with_kv(self, kv: KvConfig) -> Result<Self> {
        Ok(Self { cache: Cache::of(&self.llama, kv), ..self })
    }

    /// This model with other settings of the sparse FFN; the tokens that it has seen stay seen.
    ///
    /// # Errors
    /// See [`Llama::with_sparse`].
    pub fn with_sparse(self, config: SparseConfig) -> Result<Self> {
        Ok(Self { llama: self.llama.with_sparse(config)?, ..self })
    }

    /// This model with other settings of attention; the tokens that it has seen stay seen.
    ///
    /// # Errors
    /// See [`Llama::with_attention`].
    pub fn with_attention(self, config: AttentionConfig) -> Result<Self> {
        Ok(Self { llama: self.llama.with_attention(config)?, ..self })
    }

    /// This model with other gates of sparse attention; the tokens that it has seen stay seen.
    ///
    /// # Errors
    /// See [`Llama::with_gates`].
    pub fn with_gates(self, gates: Vec<FastGrnnGate>) -> Result<Self> {
        Ok(Self { llama: self.llama.with_gates(gates)?, ..self })
    }

    /// Sets how long a call may take, see [`Cache::set_time_limit`].
    pub fn set_time_limit(&mut self, limit: Option<Duration>) {
        self.cache.set_time_limit(limit);
    }

    /// Decodes one token and takes it back, so that the first real one is as fast as the others; see [`Llama::warm_up`].
    ///
    /// # Errors
    /// Those of [`Self::forward`].
    pub fn warm_up(&mut self) -> Result<()> {
        self.llama.warm_up(&mut self.cache)
    }

    /// Logits `[batch, vocab_size]` F32 of the last position of `x` `[batch, seq_len]` (token ids), which begins at
    /// `index_pos`.
    ///
    /// # Errors
    /// See [`crate::decoder::Decoder::forward`].
    pub fn forward(&mut self, x: &Tensor, index_pos: usize) -> Result<Tensor> {
        self.llama.forward(x, index_pos, &mut self.cache)
    }

    /// Forgets every position.
    pub fn clear_kv_cache(&mut self) {
        self.cache.clear();
    }

    /// The model without its cache, to decode many sequences from one set of weights.
    #[must_use]
    pub fn llama(&self) -> &Llama {
        &self.llama
    }

    /// The cache.
    #[must_use]
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// The cache, to change or replace it.
    pub fn cache_mut(&mut self) -> &mut Cache {
        &mut self.cache
    }

    pub(crate) fn decoding(&mut self) -> Option<Decoding<'_>> {
        self.cache.decoding(&self.llama, DType::F32)
    }
}

fn on_cpu(device: &Device) -> Result<()> {
    if !device.is_cpu() {
        bail!("quantized_llama runs on the CPU, not on {device:?}: candle_transformers' own serves there");
    }
    Ok(())
}

/// What candle assumes of files before GGUF.
const GGML_EPS: f32 = 1e-5;

fn ggml_model(mut ct: ggml_file::Content, gqa: usize) -> Result<Model> {
    let h = ct.hparams.clone();
    let (hidden, heads, layers) = (h.n_embd as usize, h.n_head as usize, h.n_layer as usize);
    let Some(kv_heads) = heads.checked_div(gqa) else { bail!("ggml: gqa is 0, give 1 or more") };
    let mut stored = Stored::new("GGML");
    let mut move_tensor = |from: &str, to: &str| -> Result<usize> {
        let (weight, dims) = held(ct.remove(from)?)?;
        stored.insert(to, weight, &dims);
        Ok(dims[0])
    };
    let vocab = move_tensor("tok_embeddings.weight", "model.embed_tokens.weight")?;
    move_tensor("norm.weight", "model.norm.weight")?;
    move_tensor("output.weight", "lm_head.weight")?;
    let mut inner = 0;
    for i in 0..layers {
        for (ggml, name) in GGML_NAMES {
            let rows = move_tensor(
                &format!("layers.{i}.{ggml}.weight"),
                &format!("model.layers.{i}.{name}.weight"),
            )?;
            if ggml == "feed_forward.w1" {
                inner = rows;
            }
        }
    }
    let config = Config {
        hidden_size: hidden,
        intermediate_size: inner,
        vocab_size: vocab,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        rms_norm_eps: f64::from(GGML_EPS),
        max_position_embeddings: MAX_SEQ_LEN,
        hidden_act: Activation::Silu,
        ..Config::config_7b_v2(false)
    };
    let mut config: candle_sparse_core::Config = config.to_core()?;
    config.rope.interleaved = true;
    let stored = Arc::new(stored);
    let checkpoint = Checkpoint { vb: stored.var_builder(), stored: Some(stored), rope_freqs: None };
    Ok(Model { checkpoint, config, extras: Extras::default() })
}

/// Parts of a layer in files before GGUF, and ours.
const GGML_NAMES: [(&str, &str); 9] = [
    ("attention_norm", "input_layernorm"),
    ("attention.wq", "self_attn.q_proj"),
    ("attention.wk", "self_attn.k_proj"),
    ("attention.wv", "self_attn.v_proj"),
    ("attention.wo", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("feed_forward.w1", "mlp.gate_proj"),
    ("feed_forward.w2", "mlp.down_proj"),
    ("feed_forward.w3", "mlp.up_proj"),
];

/// A tensor of candle's as a weight that shares its memory.
pub(crate) fn held(tensor: impl Into<Arc<QTensor>>) -> Result<(Weight, Vec<usize>)> {
    let tensor = tensor.into();
    let dims = tensor.shape().dims().to_vec();
    let (rows, cols) = match *dims {
        [n] => (1, n),
        [rows, cols] => (rows, cols),
        _ => bail!("a tensor of shape {dims:?}: a llama has vectors and matrices"),
    };
    let Some(format) = gguf::format(tensor.dtype()) else {
        return Err(Error::Msg(format!("a tensor of type {:?} is not supported", tensor.dtype())));
    };
    Ok((Weight::from_memory(rows, cols, format, Memory::Tensor(tensor))?, dims))
}
