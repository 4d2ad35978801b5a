//! Mistral, drop-in for `candle_transformers::models::mistral`: same names, shapes, dtypes; the cache is inside the model.
//!
//! What differs from candle:
//! 1. The sliding window is applied as the model was trained, in decode and in prompts that come in parts: the token at p sees
//!    positions j with `p − w < j ≤ p`, and the cache holds no more than that and a page or two. candle masks one position
//!    less, inside the prompt of a call only, and keeps everything. Up to the window the logits are candle's.
//! 2. `seqlen_offset` is authoritative: the cache is cut back to it, as far as the window has left what is needed; a gap is an
//!    error. [`Model`]'s `Clone` is a snapshot.
//! 3. [`Model::forward_embeds`] without a mask is causal.

mod config;

use crate::{
    llama::{Cache, Llama, LoadOptions},
    speculation::Decoding,
};
use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::{Embedding, VarBuilder};
use candle_sparse::{AttentionConfig, FastGrnnGate, KvConfig, KvDType, SparseConfig};
pub use config::Config;
use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

/// Elements of a mask from here down mask: −∞, or the least number of F16 or a wider dtype.
const MASKED: f32 = -65_504.0;

/// A Mistral and the tokens it has seen. `Clone` shares the weights and copies what was seen.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::VarBuilder;
/// use candle_sparse_models::mistral::{Config, Model};
///
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// # let mut tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu)?;
/// # tensors.insert("lm_head.weight".into(), tensors["model.embed_tokens.weight"].clone());
/// # let json = std::fs::read_to_string(folder.join("config.json"))?.replace("\"llama\"", "\"mistral\"");
/// let config: Config = serde_json::from_str(&json).expect("a Mistral's config.json");
/// let mut model = Model::new(&config, VarBuilder::from_tensors(tensors, DType::F16, &Device::Cpu))?;
/// let prompt = Tensor::new(&[[0_u32, 5, 6]], &Device::Cpu)?;
/// let logits = model.forward(&prompt, 0)?;
/// assert_eq!((logits.dims(), logits.dtype()), (&[1, 1, 2048][..], DType::F16));
/// model.forward(&Tensor::new(&[[7_u32]], &Device::Cpu)?, 3)?;
/// assert_eq!(model.cache().len(), 4);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Model {
    llama: Llama,
    cache: Cache,
    embed_tokens: Arc<OnceLock<Embedding>>,
    dtype: DType,
}

impl Model {
    /// Loads a checkpoint in the dtype of `vb`, which is kept: F16 stays F16 in memory, and so do keys and values.
    ///
    /// # Errors
    /// See [`Self::load_with`].
    pub fn new(cfg: &Config, vb: VarBuilder<'_>) -> Result<Self> {
        Self::load_with(cfg, vb, LoadOptions::default())
    }

    /// Loads a checkpoint, quantised, sparse or limited in threads as `options` say.
    ///
    /// # Errors
    /// A configuration that cannot be run, a checkpoint without `lm_head.weight`, a device other than the CPU, and those of
    /// [`Llama::load_with`].
    pub fn load_with(cfg: &Config, vb: VarBuilder<'_>, options: LoadOptions) -> Result<Self> {
        if !vb.device().is_cpu() {
            bail!(
                "mistral::Model runs on the CPU, not on {:?}: candle_transformers::models::mistral serves there",
                vb.device()
            );
        }
        if !vb.contains_tensor("lm_head.weight") {
            bail!(
                "mistral: there is no lm_head.weight: a checkpoint whose head is its embedding is loaded as a llama"
            );
        }
        let (config, dtype) = (cfg.to_llama()?, vb.dtype());
        let kv = KvConfig::exact(KvDType::try_from(dtype)?);
        let llama = Llama::load_with(vb, &config, options)?;
        let cache = Cache::of(&llama, kv);
        Ok(Self { llama, cache, embed_tokens: Arc::default(), dtype })
    }

    /// Logits `[batch, 1, vocab_size]`, in the dtype the model was loaded from, after the tokens `input_ids`
    /// `[batch, seq_len]` at `seqlen_offset`.
    ///
    /// # Errors
    /// See [`Decoder::forward`](crate::decoder::Decoder::forward); `seqlen_offset` may lie up to 32 positions before the
    /// last one, further back only as far as the sliding window has left what is needed, or at 0.
    pub fn forward(&mut self, input_ids: &Tensor, seqlen_offset: usize) -> Result<Tensor> {
        let logits = self.llama.forward(input_ids, seqlen_offset, &mut self.cache)?;
        self.shaped(&logits)
    }

    /// As [`Self::forward`] for embeddings `xs` `[batch, seq_len, hidden_size]`.
    ///
    /// Without a mask attention is causal, in the sliding window; candle's lets the tokens of a prompt see later ones then,
    /// which no Mistral was trained for. A mask `[.., seq_len, seqlen_offset + seq_len]` that is added to the scores is
    /// accepted where it says the same: 0 for what a token sees, −∞ or the least number of the dtype for the rest.
    ///
    /// # Errors
    /// Those of [`Self::forward`]; also another width than `hidden_size`, or a mask that says something else.
    pub fn forward_embeds(
        &mut self,
        xs: &Tensor,
        attn_mask: Option<&Tensor>,
        seqlen_offset: usize,
    ) -> Result<Tensor> {
        if let Some(mask) = attn_mask {
            self.check_mask(mask, xs.dim(1)?, seqlen_offset)?;
        }
        let logits = self.llama.forward_input_embed(xs, seqlen_offset, &mut self.cache)?;
        self.shaped(&logits)
    }

    /// The embedding, as candle's module; made when first asked for.
    ///
    /// Cost: a second copy of the table, `vocab_size · hidden_size` elements in the dtype the model was loaded from, that stays
    /// as long as the model and its clones. [`Llama::embed`] needs none.
    ///
    /// # Panics
    /// Never: a table of the model's own shape is a tensor.
    #[must_use]
    pub fn embed_tokens(&self) -> &Embedding {
        self.embed_tokens.get_or_init(|| {
            let c = self.llama.decoder().config();
            let table =
                Tensor::arange(0, c.vocab_size as u32, &Device::Cpu).and_then(|ids| self.llama.embed(&ids));
            Embedding::new(table.expect("every row of the table is a token"), c.hidden_size)
        })
    }

    /// Forgets every token.
    pub fn clear_kv_cache(&mut self) {
        self.cache.clear();
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

    /// Decodes one token and takes it back, so that the first real one is as fast as the others; see [`Llama::warm_up`].
    ///
    /// # Errors
    /// Those of [`Self::forward`].
    pub fn warm_up(&mut self) -> Result<()> {
        self.llama.warm_up(&mut self.cache)
    }

    /// Sets how long a call may take, see [`Cache::set_time_limit`].
    pub fn set_time_limit(&mut self, limit: Option<Duration>) {
        self.cache.set_time_limit(limit);
    }

    /// The cache: keys and values of the tokens that were seen, and what the sparse FFNs did.
    #[must_use]
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// The cache, to save, load, cut back or reserve.
    pub fn cache_mut(&mut self) -> &mut Cache {
        &mut self.cache
    }

    pub(crate) fn decoding(&mut self) -> Option<Decoding<'_>> {
        self.cache.decoding(&self.llama, self.dtype)
    }

    /// The model underneath, which takes a cache with each call: many sequences, logits of all positions, steps without a
    /// `Tensor`.
    #[must_use]
    pub fn llama(&self) -> &Llama {
        &self.llama
    }

    /// Logits `[batch, vocab_size]` as candle's model returns them.
    fn shaped(&self, logits: &Tensor) -> Result<Tensor> {
        logits.unsqueeze(1)?.to_dtype(self.dtype)
    }

    /// An error unless `mask` is the one that attention applies anyway.
    fn check_mask(&self, mask: &Tensor, seq_len: usize, offset: usize) -> Result<()> {
        let (c, len) = (self.llama.decoder().config(), offset + seq_len);
        let says = mask.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let same = |(i, v): (usize, &f32)| {
            let (position, key) = (offset + i / len % seq_len, i % len);
            let seen = (c.first_visible(position)..=position).contains(&key);
            if seen { *v == 0.0 } else { *v <= MASKED }
        };
        if !mask.dims().ends_with(&[seq_len, len]) || !says.iter().enumerate().all(same) {
            bail!(
                "forward_embeds: attn_mask {:?} is not the causal mask [.., {seq_len}, {len}] with the model's sliding window \
                 ({:?}): give None, which stands for it",
                mask.dims(),
                c.sliding_window
            );
        }
        Ok(())
    }
}
