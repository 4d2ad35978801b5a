//! Llama, drop-in for `candle_transformers::models::llama`: same names, shapes, dtypes and errors.
//!
//! `index_pos` is authoritative: the cache is cut back to it, a gap is an error. [`Cache`]'s `Clone` is a snapshot.

mod cache;
mod config;

use crate::decoder::{Checkpoint, Decoder, Extras, Input, Logits, Step};
pub use crate::decoder::{LayerStats, LayerTap, LoadOptions, SparseStats};
pub use cache::Cache;
use candle_core::{DType, Device, Error, Result, Tensor, bail};
use candle_nn::VarBuilder;
use candle_sparse::{AttentionConfig, FastGrnnGate, Format, SparseConfig};
pub use config::{
    Config, DEFAULT_MAX_SEQ_LEN, Llama3RopeConfig, Llama3RopeType, LlamaConfig, LlamaEosToks, YarnRope,
};
pub(crate) use config::{activation, activation_name, refuse_quantized};
use std::sync::Arc;

/// A Llama. `Clone` shares the weights; many threads may decode at once, each with its own [`Cache`].
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_sparse_models::llama::{Cache, Llama, LlamaConfig};
///
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// let vb = candle_sparse::loading::var_builder(&[folder.join("model.safetensors")], None, &Device::Cpu)?;
/// let config = std::fs::read(folder.join("config.json"))?;
/// let config = serde_json::from_slice::<LlamaConfig>(&config).expect("a config.json").into_config(false);
/// let llama = Llama::load(vb, &config)?;
/// let mut cache = Cache::new(true, DType::F16, &config, &Device::Cpu)?;
/// let prompt = Tensor::new(&[[0_u32, 5, 6]], &Device::Cpu)?;
/// let logits = llama.forward(&prompt, 0, &mut cache)?;
/// let next = logits.squeeze(0)?.argmax(0)?.to_scalar::<u32>()?;
/// // One token at a time, without a `Tensor`.
/// let mut logits = vec![0.0; config.vocab_size];
/// llama.decode(next, 3, &mut cache, &mut logits)?;
/// assert_eq!(cache.len(), 4);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Llama {
    decoder: Arc<Decoder>,
    dtype: DType,
}

impl Llama {
    /// Loads a checkpoint in the dtype of `vb`, which is kept: F16 stays F16 in memory.
    ///
    /// # Errors
    /// See [`Decoder::load`].
    pub fn load(vb: VarBuilder<'_>, cfg: &Config) -> Result<Self> {
        Self::load_with(vb, cfg, LoadOptions::default())
    }

    /// Loads a checkpoint, quantised or limited in threads as `options` say.
    ///
    /// # Errors
    /// See [`Decoder::load`].
    pub fn load_with(vb: VarBuilder<'_>, cfg: &Config, options: LoadOptions) -> Result<Self> {
        on_cpu("llama::Llama", vb.device())?;
        let extras = Extras::default()
            .with_attention_bias(cfg.attention_bias)
            .with_mlp_bias(cfg.mlp_bias)
            .with_tie_word_embeddings(cfg.tie_word_embeddings);
        Self::from_checkpoint(&vb.into(), cfg.to_core()?, extras, options)
    }

    pub(crate) fn from_checkpoint(
        from: &Checkpoint<'_>,
        config: candle_sparse_core::Config,
        extras: Extras,
        options: LoadOptions,
    ) -> Result<Self> {
        let decoder = Decoder::load(from, config, extras, options)?;
        Ok(Self { decoder: Arc::new(decoder), dtype: from.vb.dtype() })
    }

    /// This model with other settings of the sparse FFN; the weights are shared.
    ///
    /// ```
    /// use candle_sparse_models::{FfnMode, Guard, Selection, SparseConfig};
    /// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::Pretrained};
    ///
    /// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
    /// // Loaded so that neurons can be left out, also where this machine gains nothing by it.
    /// let sparse = SparseConfig::default().with_force(true);
    /// let loaded = Pretrained::load(&ModelFiles::from_folder(folder)?, LoadOptions::default().with_sparse(sparse))?;
    /// let setting = sparse.with_mode(FfnMode::Gate).with_selection(Selection::Share(0.5));
    /// let gated = loaded.model.with_sparse(setting.with_guard(Some(Guard::new(64, 0.3))))?;
    /// assert_eq!(gated.decoder().sparse_config().map(|c| c.mode), Some(FfnMode::Gate));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// See [`Decoder::with_sparse`].
    pub fn with_sparse(&self, config: SparseConfig) -> Result<Self> {
        Ok(Self { decoder: Arc::new(self.decoder.with_sparse(config)?), dtype: self.dtype })
    }

    /// This model with its matrices in another format; see [`Decoder::in_format`].
    ///
    /// # Errors
    /// See [`Decoder::in_format`].
    pub fn in_format(&self, format: Format) -> Result<Self> {
        Ok(Self { decoder: Arc::new(self.decoder.in_format(format)?), dtype: self.dtype })
    }

    /// This model with other settings of attention; the weights are shared.
    ///
    /// ```
    /// use candle_sparse_models::{AttentionConfig, AttentionMode};
    ///
    /// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::Pretrained};
    /// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
    /// let loaded = Pretrained::load(&ModelFiles::from_folder(folder)?, LoadOptions::default())?;
    /// let recall = loaded.model.with_attention(AttentionConfig::new(AttentionMode::Recall).with_budget(256))?;
    /// assert_eq!(recall.decoder().attention_config().budget, 256);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// See [`Decoder::with_attention`].
    pub fn with_attention(&self, config: AttentionConfig) -> Result<Self> {
        Ok(Self { decoder: Arc::new(self.decoder.with_attention(config)?), dtype: self.dtype })
    }

    /// This model with other gates of sparse attention; the weights are shared.
    ///
    /// # Errors
    /// See [`Decoder::with_gates`].
    pub fn with_gates(&self, gates: Vec<FastGrnnGate>) -> Result<Self> {
        Ok(Self { decoder: Arc::new(self.decoder.with_gates(gates)?), dtype: self.dtype })
    }

    /// Logits `[batch, vocab_size]` F32 of the last position of `x` `[batch, seq_len]` (token ids), which begins at `index_pos`.
    ///
    /// Cost: see [`Decoder::forward`].
    ///
    /// # Errors
    /// See [`Decoder::forward`].
    pub fn forward(&self, x: &Tensor, index_pos: usize, cache: &mut Cache) -> Result<Tensor> {
        let ((batch, seq_len), ids) = (x.dims2()?, ids(x)?);
        let step = Step { batch, seq_len, index_pos };
        self.run(Input::Ids(&ids), step, cache, Logits::Last, None)
    }

    /// Logits `[batch, seq_len, vocab_size]` F32 of every position of `x` `[batch, seq_len]` (token ids), for perplexity and the like.
    ///
    /// Cost: see [`Decoder::forward`]; the head alone costs `hidden_size · vocab_size` multiply-adds per position.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_sparse_models::{KvConfig, KvDType, llama::Cache, quality::Quality};
    ///
    /// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::Pretrained};
    /// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
    /// let loaded = Pretrained::load(&ModelFiles::from_folder(folder)?, LoadOptions::default())?;
    /// let tokens = loaded.tokenizer.encode("Once upon a time there was a little girl", false).expect("a text");
    /// let ids = Tensor::new(tokens.get_ids(), &Device::Cpu)?.unsqueeze(0)?;
    /// let mut cache = Cache::of(&loaded.model, KvConfig::exact(KvDType::F16));
    /// let logits = loaded.model.forward_all(&ids, 0, &mut cache)?.squeeze(0)?;
    /// let mut quality = Quality::default();
    /// quality.add(tokens.get_ids(), 1, &logits, &logits)?;
    /// // Perplexity: far better than any of 2048 tokens at random.
    /// assert!(quality.ppl() < 200.0, "{}", quality.ppl());
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// See [`Decoder::forward`].
    pub fn forward_all(&self, x: &Tensor, index_pos: usize, cache: &mut Cache) -> Result<Tensor> {
        let ((batch, seq_len), ids) = (x.dims2()?, ids(x)?);
        let step = Step { batch, seq_len, index_pos };
        self.run(Input::Ids(&ids), step, cache, Logits::All, None)
    }

    /// As [`Self::forward_all`]; `tap` sees the values inside every block, and may change the activations of its FFN.
    ///
    /// # Errors
    /// See [`Decoder::forward`].
    pub fn forward_tapped(
        &self,
        x: &Tensor,
        index_pos: usize,
        cache: &mut Cache,
        tap: &mut dyn LayerTap,
    ) -> Result<Tensor> {
        let ((batch, seq_len), ids) = (x.dims2()?, ids(x)?);
        let step = Step { batch, seq_len, index_pos };
        self.run(Input::Ids(&ids), step, cache, Logits::All, Some(tap))
    }

    /// Embeddings `[batch, seq_len, hidden_size]`, in the dtype the model was loaded from, of token ids `[batch, seq_len]`.
    ///
    /// # Errors
    /// A token is not below `vocab_size`.
    pub fn embed(&self, x: &Tensor) -> Result<Tensor> {
        let ids = ids(x)?;
        let hidden = self.decoder.config().hidden_size;
        let mut out = vec![0.0; ids.len() * hidden];
        self.decoder.embed(&ids, &mut out)?;
        let mut dims = x.dims().to_vec();
        dims.push(hidden);
        Tensor::from_vec(out, dims, &Device::Cpu)?.to_dtype(self.dtype)
    }

    /// As [`Self::forward`] for embeddings `input_embed` `[batch, seq_len, hidden_size]` in place of token ids.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_sparse_models::{KvConfig, KvDType, llama::Cache};
    ///
    /// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::Pretrained};
    /// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
    /// let loaded = Pretrained::load(&ModelFiles::from_folder(folder)?, LoadOptions::default())?;
    /// let ids = Tensor::new(&[[0_u32, 5, 6]], &Device::Cpu)?;
    /// let embeddings = loaded.model.embed(&ids)?;
    /// assert_eq!(embeddings.dims(), [1, 3, 256]);
    /// let mut cache = Cache::of(&loaded.model, KvConfig::exact(KvDType::F16));
    /// let logits = loaded.model.forward_input_embed(&embeddings, 0, &mut cache)?;
    /// assert_eq!((logits.dims(), cache.len()), (&[1, 2048][..], 3));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// See [`Decoder::forward`]; also another last dimension than `hidden_size`.
    pub fn forward_input_embed(
        &self,
        input_embed: &Tensor,
        index_pos: usize,
        cache: &mut Cache,
    ) -> Result<Tensor> {
        let (batch, seq_len, width) = input_embed.dims3()?;
        let hidden = self.decoder.config().hidden_size;
        if width != hidden {
            bail!(
                "forward_input_embed: input is {:?}, the model needs [.., .., {hidden}]",
                input_embed.dims()
            );
        }
        on_cpu("forward_input_embed", input_embed.device())?;
        let x = input_embed.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        self.run(Input::Embeddings(&x), Step { batch, seq_len, index_pos }, cache, Logits::Last, None)
    }

    /// Decodes one token without a `Tensor`: `logits` `[vocab_size]` become those after `token` at `index_pos`.
    ///
    /// Cost: [`Decoder::weight_bytes_per_token`] bytes of weights are read, fewer with a profile, and the positions that attention
    /// chooses. Nothing is allocated once the cache has room (see [`Cache::reserve`]) and a first step was made.
    ///
    /// ```
    /// use candle_sparse_models::{KvConfig, KvDType, llama::Cache};
    ///
    /// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::Pretrained};
    /// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
    /// let loaded = Pretrained::load(&ModelFiles::from_folder(folder)?, LoadOptions::default())?;
    /// let mut cache = Cache::of(&loaded.model, KvConfig::exact(KvDType::F16));
    /// cache.reserve(1, 64)?;
    /// let mut logits = vec![0.0; loaded.config.vocab_size];
    /// let mut token = 0;
    /// for position in 0..4 {
    ///     loaded.model.decode(token, position, &mut cache, &mut logits)?;
    ///     // The most likely one.
    ///     token = (0..2048).max_by(|a, b| logits[*a as usize].total_cmp(&logits[*b as usize])).expect("there are tokens");
    /// }
    /// // A gap is an error, and changes nothing.
    /// assert!(loaded.model.decode(token, 9, &mut cache, &mut logits).is_err());
    /// assert_eq!(cache.len(), 4);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// See [`Decoder::forward`]; also `logits` of another length than `vocab_size`.
    pub fn decode(&self, token: u32, index_pos: usize, cache: &mut Cache, logits: &mut [f32]) -> Result<()> {
        let vocab_size = self.decoder.config().vocab_size;
        if logits.len() != vocab_size {
            bail!("decode: logits have {} elements, vocab_size is {vocab_size}", logits.len());
        }
        let step = Step { batch: 1, seq_len: 1, index_pos };
        if !cache.use_kv_cache && index_pos > 0 {
            bail!(
                "decode at {index_pos} needs the positions before it: make the cache with use_kv_cache true"
            );
        }
        let Cache { kv, scratch, .. } = cache;
        self.decoder.forward(Input::Ids(&[token]), step, kv, scratch, Logits::Last, logits)
    }

    /// Decodes one token and takes it back, so that the first real one is as fast as the others; see [`Decoder::warm_up`].
    ///
    /// # Errors
    /// See [`Decoder::forward`].
    pub fn warm_up(&self, cache: &mut Cache) -> Result<()> {
        self.decoder.warm_up(&mut cache.kv, &mut cache.scratch)
    }

    /// The decoder underneath: shape, level, threads, bytes, notices.
    #[must_use]
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    fn run(
        &self,
        input: Input<'_>,
        step: Step,
        cache: &mut Cache,
        wanted: Logits,
        tap: Option<&mut dyn LayerTap>,
    ) -> Result<Tensor> {
        let vocab = self.decoder.config().vocab_size;
        let Step { batch, seq_len, .. } = step;
        if !cache.use_kv_cache && step.index_pos > 0 {
            bail!("index_pos {} without a kv cache: give the whole text from position 0", step.index_pos);
        }
        // Before the logits are allocated: their size is the caller's wish, not yet a checked one.
        self.decoder.check(input, step, &cache.kv)?;
        let rows = if wanted == Logits::All { batch * seq_len } else { batch };
        let mut logits = vec![0.0; rows * vocab];
        let Cache { kv, scratch, .. } = cache;
        match tap {
            Some(tap) => self.decoder.forward_tapped(input, step, kv, scratch, tap, wanted, &mut logits)?,
            None => self.decoder.forward(input, step, kv, scratch, wanted, &mut logits)?,
        }
        match wanted {
            Logits::Last => Tensor::from_vec(logits, (batch, vocab), &Device::Cpu),
            Logits::All => Tensor::from_vec(logits, (batch, seq_len, vocab), &Device::Cpu),
        }
    }
}

fn ids(x: &Tensor) -> Result<Vec<u32>> {
    on_cpu("llama", x.device())?;
    match x.dtype() {
        DType::U32 | DType::U8 => x.to_dtype(DType::U32)?.flatten_all()?.to_vec1(),
        DType::I64 => {
            let id =
                |id: i64| u32::try_from(id).map_err(|_| Error::msg(format!("token id {id} is no token")));
            x.flatten_all()?.to_vec1::<i64>()?.into_iter().map(id).collect()
        }
        other => bail!("token ids must be U32, U8 or I64, not {other:?}"),
    }
}

fn on_cpu(what: &str, device: &Device) -> Result<()> {
    if !device.is_cpu() {
        bail!("{what} runs on the CPU, not on {device:?}: candle_transformers::models::llama serves there");
    }
    Ok(())
}
