//! One interface for our models and candle's, for apps that hold either.

use crate::{
    llama::{Cache, Llama},
    mistral,
    quantized_llama::ModelWeights,
    sampling::Sampler,
    speculation::Decoding,
};
use candle_core::{DType, Result, Tensor};
#[cfg(feature = "transformers")]
pub use candle_models::{CandleLlama, CandleMistral, CandleQuantizedLlama};
use candle_sparse::KvConfig;
use std::time::Duration;

#[cfg(feature = "transformers")]
mod candle_models;

/// A language model together with the tokens that it has seen: one interface for the models of this crate and candle's.
///
/// ```
/// use candle_core::{Device, Result, Tensor};
/// use candle_sparse_models::{KvConfig, KvDType, causal_lm::{CausalLm, LlamaSession}, llama::Cache};
///
/// /// The most likely token after a prompt, whatever model says it.
/// fn next(model: &mut dyn CausalLm, prompt: &[u32]) -> Result<u32> {
///     model.clear()?;
///     let logits = model.forward(&Tensor::new(prompt, &Device::Cpu)?.unsqueeze(0)?, 0)?;
///     logits.squeeze(0)?.argmax(0)?.to_scalar()
/// }
///
/// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::Pretrained};
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// let loaded = Pretrained::load(&ModelFiles::from_folder(folder)?, LoadOptions::default())?;
/// let cache = Cache::of(&loaded.model, KvConfig::exact(KvDType::F16));
/// let mut session = LlamaSession { model: loaded.model, cache };
/// assert!(next(&mut session, &[0, 5, 6])? < 2048);
/// assert_eq!(session.cached_len(), 3);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub trait CausalLm {
    /// Logits `[batch, vocab_size]` F32 after the tokens `ids` `[batch, seq_len]` at `index_pos`, which must not leave a gap.
    ///
    /// # Errors
    /// Those of the model.
    fn forward(&mut self, ids: &Tensor, index_pos: usize) -> Result<Tensor>;

    /// How many tokens it has seen.
    fn cached_len(&self) -> usize;

    /// Forgets the tokens from `len` on.
    ///
    /// # Errors
    /// The model cannot go back there: candle's models go back to 0 only, those with a sliding window to 0 and as far as
    /// the window has left what is needed.
    fn truncate(&mut self, len: usize) -> Result<()>;

    /// Sets how long a call may take, see [`Cache::set_time_limit`]; `false`: this model keeps no limit.
    fn set_time_limit(&mut self, limit: Option<Duration>) -> bool {
        limit.is_none()
    }

    /// Hears what the next tokens are drawn with, what was written before them, and how many will be asked for at most: a model that
    /// [drafts](crate::speculation) guesses better then.
    fn expect(&mut self, sampler: &Sampler, written: &[u32], left: usize) {
        let _ = (sampler, written, left);
    }

    /// What it runs on, of a model of this crate: several of its tokens can be verified in one step.
    fn decoding(&mut self) -> Option<Decoding<'_>> {
        None
    }

    /// Forgets everything.
    ///
    /// # Errors
    /// A new cache cannot be made.
    fn clear(&mut self) -> Result<()> {
        self.truncate(0)
    }
}

/// A Llama of this crate together with a cache.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_sparse_models::{KvConfig, causal_lm::{CausalLm, LlamaSession}, llama::Cache};
///
/// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::Pretrained};
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// let loaded = Pretrained::load(&ModelFiles::from_folder(folder)?, LoadOptions::default())?;
/// let cache = Cache::of(&loaded.model, KvConfig::tiered());
/// let mut session = LlamaSession { model: loaded.model, cache };
/// let ids = Tensor::new(&[[0_u32, 5, 6]], &Device::Cpu)?;
/// assert_eq!(session.forward(&ids, 0)?.dims(), [1, 2048]);
/// // Back by one token.
/// session.truncate(2)?;
/// assert_eq!(session.cached_len(), 2);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct LlamaSession {
    /// The model.
    pub model: Llama,
    /// What it has seen.
    pub cache: Cache,
}

impl LlamaSession {
    /// A model, whose weights are shared, with an empty cache.
    #[must_use]
    pub fn new(model: &Llama, kv: KvConfig) -> Self {
        Self { model: model.clone(), cache: Cache::of(model, kv) }
    }
}

impl CausalLm for LlamaSession {
    fn forward(&mut self, ids: &Tensor, index_pos: usize) -> Result<Tensor> {
        self.model.forward(ids, index_pos, &mut self.cache)
    }

    fn cached_len(&self) -> usize {
        self.cache.len()
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        cut(&mut self.cache, len)
    }

    fn set_time_limit(&mut self, limit: Option<Duration>) -> bool {
        self.cache.set_time_limit(limit);
        true
    }

    fn decoding(&mut self) -> Option<Decoding<'_>> {
        let Self { model, cache } = self;
        cache.decoding(model, DType::F32)
    }
}

impl CausalLm for ModelWeights {
    fn forward(&mut self, ids: &Tensor, index_pos: usize) -> Result<Tensor> {
        Self::forward(self, ids, index_pos)
    }

    fn cached_len(&self) -> usize {
        self.cache().len()
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        cut(self.cache_mut(), len)
    }

    fn set_time_limit(&mut self, limit: Option<Duration>) -> bool {
        self.cache_mut().set_time_limit(limit);
        true
    }

    fn decoding(&mut self) -> Option<Decoding<'_>> {
        Self::decoding(self)
    }
}

impl CausalLm for mistral::Model {
    fn forward(&mut self, ids: &Tensor, index_pos: usize) -> Result<Tensor> {
        Self::forward(self, ids, index_pos)?.squeeze(1)?.to_dtype(DType::F32)
    }

    fn cached_len(&self) -> usize {
        self.cache().len()
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        cut(self.cache_mut(), len)
    }

    fn set_time_limit(&mut self, limit: Option<Duration>) -> bool {
        self.cache_mut().set_time_limit(limit);
        true
    }

    fn decoding(&mut self) -> Option<Decoding<'_>> {
        Self::decoding(self)
    }
}

#[cfg(feature = "transformers")]
impl CausalLm for crate::quantized_mistral::Model {
    fn forward(&mut self, ids: &Tensor, index_pos: usize) -> Result<Tensor> {
        Self::forward(self, ids, index_pos)?.squeeze(1)
    }

    fn cached_len(&self) -> usize {
        self.cache().len()
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        cut(self.cache_mut(), len)
    }

    fn set_time_limit(&mut self, limit: Option<Duration>) -> bool {
        self.cache_mut().set_time_limit(limit);
        true
    }

    fn decoding(&mut self) -> Option<Decoding<'_>> {
        Self::decoding(self)
    }
}

/// `Cache::truncate` cuts anywhere, and only the next step would say that a sliding window has dropped what it needs.
fn cut(cache: &mut Cache, len: usize) -> Result<()> {
    if len < cache.len() {
        let kv = cache.kv();
        kv.check(kv.batch_size(), len, 0)?;
    }
    cache.truncate(len);
    Ok(())
}
