//! What a Llama has seen: keys and values, and the working memory of a step.

use super::{Config, Llama, SparseStats, on_cpu};
use crate::{decoder::Scratch, speculation::Decoding};
use candle_core::{DType, Device, Result};
use candle_sparse::kv_cache::{KvCache, KvConfig, KvDType};
use std::{path::Path, time::Duration};

/// Keys and values of the tokens seen so far, and the working memory of a step. `Clone` is a snapshot, which
/// shares pages until one of both writes to them.
///
/// ```
/// use candle_sparse_models::{KvConfig, llama::Cache};
///
/// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::Pretrained};
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// let loaded = Pretrained::load(&ModelFiles::from_folder(folder)?, LoadOptions::default())?;
/// // Older keys and values take 8.5 and then 5.5 bits per element; never more than 4 MB in all.
/// let mut cache = Cache::of(&loaded.model, KvConfig::tiered().with_max_bytes(Some(4 << 20)));
/// let mut logits = vec![0.0; 2048];
/// for (position, token) in [0, 5, 6].into_iter().enumerate() {
///     loaded.model.decode(token, position, &mut cache, &mut logits)?;
/// }
/// assert_eq!(cache.len(), 3);
/// cache.truncate(1);
/// assert_eq!(cache.len(), 1);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Cache {
    /// Whether a call continues the calls before it; without, each call starts from an empty past.
    pub use_kv_cache: bool,
    pub(super) kv: KvCache,
    pub(super) scratch: Scratch,
}

impl Cache {
    /// An empty cache that stores keys and values in `dtype` (F32, F16 or BF16).
    ///
    /// # Errors
    /// Another dtype, a bad `config`, or a device other than the CPU.
    pub fn new(use_kv_cache: bool, dtype: DType, config: &Config, device: &Device) -> Result<Self> {
        Self::with_config(use_kv_cache, KvConfig::exact(KvDType::try_from(dtype)?), config, device)
    }

    /// An empty cache that keeps keys and values as `kv` says, such as [`KvConfig::tiered`].
    ///
    /// # Errors
    /// A bad `config`, or a device other than the CPU.
    pub fn with_config(use_kv_cache: bool, kv: KvConfig, config: &Config, device: &Device) -> Result<Self> {
        on_cpu("llama::Cache", device)?;
        let kv = KvCache::new(&config.to_core()?, kv);
        Ok(Self { use_kv_cache, kv, scratch: Scratch::default() })
    }

    /// An empty cache for a loaded model.
    #[must_use]
    pub fn of(model: &Llama, kv: KvConfig) -> Self {
        let mut kv = KvCache::new(model.decoder.config(), kv);
        kv.set_origin(model.decoder.origin());
        Self { use_kv_cache: true, kv, scratch: Scratch::default() }
    }

    /// What `model` runs on with this cache.
    pub(crate) fn decoding<'a>(&'a mut self, model: &'a Llama, logits_dtype: DType) -> Option<Decoding<'a>> {
        let (alone, decoder) = (self.use_kv_cache && self.kv.batch_size() <= 1, model.decoder());
        alone.then_some(Decoding { decoder, cache: &mut self.kv, scratch: &mut self.scratch, logits_dtype })
    }

    /// Number of positions held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.kv.len()
    }

    /// Whether no position is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.kv.is_empty()
    }

    /// Bytes of the stored keys and values.
    #[must_use]
    pub fn kv_bytes(&self) -> usize {
        self.kv.bytes()
    }

    /// The pages that hold keys and values: bytes per tier, settings.
    #[must_use]
    pub fn kv(&self) -> &KvCache {
        &self.kv
    }

    /// The pages that hold keys and values, for code that fills them by itself.
    pub fn kv_mut(&mut self) -> &mut KvCache {
        &mut self.kv
    }

    /// Sets how long a call may take; `None`: as long as it takes.
    ///
    /// A call that takes longer ends with [`DeadlineExceeded`](candle_sparse::DeadlineExceeded), at most a layer late, and
    /// leaves the positions as they were. A prompt under a limit keeps a copy of the pages that it changes.
    pub fn set_time_limit(&mut self, limit: Option<Duration>) {
        self.scratch.set_time_limit(limit);
    }

    /// Writes keys and values to a file, see [`KvCache::save`].
    ///
    /// # Errors
    /// See [`KvCache::save`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.kv.save(path)
    }

    /// As [`Self::save`], with the tokens that were read, see [`KvCache::save_tokens`].
    ///
    /// # Errors
    /// See [`KvCache::save_tokens`].
    pub fn save_tokens(&self, path: impl AsRef<Path>, token_ids: &[u32]) -> Result<()> {
        self.kv.save_tokens(path, token_ids)
    }

    /// As [`Self::load`]; returns the tokens that [`Self::save_tokens`] was given, so that a prompt can be compared with them.
    ///
    /// ```
    /// use candle_sparse_models::{KvConfig, KvDType, llama::Cache};
    ///
    /// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::Pretrained};
    /// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
    /// let loaded = Pretrained::load(&ModelFiles::from_folder(folder)?, LoadOptions::default())?;
    /// # let temporary = tempfile::tempdir()?;
    /// # let path = temporary.path().join("prefix.safetensors");
    /// let mut cache = Cache::of(&loaded.model, KvConfig::exact(KvDType::F16));
    /// let mut logits = vec![0.0; 2048];
    /// loaded.model.decode(7, 0, &mut cache, &mut logits)?;
    /// cache.save_tokens(&path, &[7])?;
    /// let mut later = Cache::of(&loaded.model, KvConfig::exact(KvDType::F16));
    /// assert_eq!(later.load_tokens(&path)?, [7]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`Self::load`].
    pub fn load_tokens(&mut self, path: impl AsRef<Path>) -> Result<Vec<u32>> {
        self.kv.load_tokens(path)
    }

    /// Continues where a saved cache of the same model ended, see [`KvCache::load`]; a cache that [`Self::of`] has made knows its
    /// model already, others hear from the next call whether the file is that model's.
    ///
    /// ```
    /// use candle_sparse_models::{KvConfig, KvDType, llama::Cache};
    ///
    /// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::Pretrained};
    /// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
    /// let loaded = Pretrained::load(&ModelFiles::from_folder(folder)?, LoadOptions::default())?;
    /// # let temporary = tempfile::tempdir()?;
    /// # let path = temporary.path().join("chat.safetensors");
    /// let mut cache = Cache::of(&loaded.model, KvConfig::exact(KvDType::F16));
    /// let mut logits = vec![0.0; 2048];
    /// loaded.model.decode(0, 0, &mut cache, &mut logits)?;
    /// cache.save(&path)?;
    /// // Later, perhaps in another process.
    /// let mut later = Cache::of(&loaded.model, KvConfig::exact(KvDType::F16));
    /// later.load(&path)?;
    /// loaded.model.decode(5, later.len(), &mut later, &mut logits)?;
    /// assert_eq!(later.len(), 2);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`KvCache::load`]; this cache is unchanged then.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        self.kv.load(path)
    }

    /// Forgets every position from `len` on; with a sliding window see [`KvCache::truncate`].
    pub fn truncate(&mut self, len: usize) {
        self.kv.truncate(len);
    }

    /// Forgets every position.
    pub fn clear(&mut self) {
        self.kv.clear();
    }

    /// Gives back memory that waits for its next use, see [`KvCache::shrink_to_fit`].
    pub fn shrink_to_fit(&mut self) {
        self.kv.shrink_to_fit();
    }

    /// Makes room for `positions` positions of `batch` sequences, so that reaching them token by token allocates nothing.
    ///
    /// # Errors
    /// More positions than the context, more bytes than the budget, or another batch than the cached one.
    pub fn reserve(&mut self, batch: usize, positions: usize) -> Result<()> {
        self.kv.reserve(batch, positions)
    }

    /// What the sparse FFNs did in the decode steps with this cache, since the model's settings last changed.
    #[must_use]
    pub fn sparse_stats(&self) -> SparseStats {
        self.scratch.sparse_stats()
    }

    /// Begins to count anew; what the guard has learned stays.
    pub fn reset_sparse_stats(&mut self) {
        self.scratch.reset_sparse_stats();
    }
}
