//! Keys and values of a batch of sequences in fixed pages: appending copies the new token and nothing else.
//!
//! Pages age: as positions move away from the end, whole pages go from the cache's dtype to `Q8_0` and on to `Q4_1`, as
//! [`KvConfig`] says. Attention reads each tier in place. Pages that a model's sliding window has passed are given back.

mod bounds;
mod dtype;
mod file;
mod origin;
mod page;
mod pool;
mod salience;
mod shared;
mod step;
mod tiers;
mod undo;
mod window;

use crate::gate::FastGrnnGate;
use bounds::Bounds;
pub use candle_sparse_core::kv_cache::PAGE_LEN;
use candle_sparse_core::{Config, Matrix};
use candle_sparse_kernels::Kernels;
pub use dtype::KvDType;
use half::{bf16, f16};
pub use origin::Origin;
pub use page::Tier;
use page::{Page, PageShape};
use pool::Pool;
use salience::Salience;
pub use shared::unique_bytes;
use std::sync::Arc;
pub use tiers::{KvConfig, TierStats};
use undo::Undo;
pub(crate) use window::most_pages;

/// Positions of a sequence, whatever a model's configuration says: numbers of pages are exact in f32.
const MOST_POSITIONS: usize = PAGE_LEN << 24;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    layers: usize,
    page: PageShape,
}

/// Keys and values of every layer for a batch of sequences of equal length. `Clone` is a snapshot: it shares the pages, and
/// whoever writes to a shared page writes to a copy of its own.
///
/// Memory: `2 · kv_heads · head_dim` elements per layer, position and sequence, in whole pages of [`PAGE_LEN`] positions.
///
/// ```
/// use candle_sparse::{KvCache, KvConfig, KvDType};
///
/// # use candle_sparse_models::llama::LlamaConfig;
/// # let json = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu/config.json"));
/// # let config: LlamaConfig = serde_json::from_slice(json).map_err(candle_core::Error::wrap)?;
/// # let config = config.into_config(false).to_core()?;
/// // A model of 4 layers, 2 key/value heads of 32 channels and a context of 1024 positions.
/// let mut cache = KvCache::new(&config, KvConfig::exact(KvDType::F16));
/// let (k, v) = ([0.5; 2 * 32], [1.0; 2 * 32]);
/// for position in 0..40 {
///     cache.begin(1, position, 1)?;
///     for layer in 0..4 {
///         cache.write(0, layer, position, &k, &v);
///     }
///     cache.advance(1);
/// }
/// // Two pages per layer, of 32 positions, keys and values in F16.
/// assert_eq!((cache.len(), cache.bytes()), (40, 4 * 2 * 32 * 2 * 64 * 2));
/// cache.truncate(32);
/// assert_eq!((cache.len(), cache.max_positions()), (32, 1024));
/// # Ok::<(), candle_core::Error>(())
/// ```
pub struct KvCache {
    shape: Shape,
    config: KvConfig,
    len: usize,
    limit: usize,
    /// Positions that a token sees; `None`: all.
    window: Option<usize>,
    /// Pages before it were given back.
    first: usize,
    /// `[sequence][layer][page − first]`
    sequences: Vec<Vec<Vec<Page>>>,
    /// `[layer]`: pages at the front that have been made warm and cold.
    cooled: Vec<[usize; 2]>,
    pool: Pool,
    /// Whose keys and values they are.
    origin: Option<Arc<Origin>>,
    /// `[sequence][layer]`
    notes: Vec<Vec<Notes>>,
    /// Grows whenever positions are cut off.
    generation: u64,
    /// What became colder in a step that may be taken back.
    undo: Option<Undo>,
}

/// What is known of the pages of a layer, for choosing among them.
#[derive(Clone, Debug, Default)]
struct Notes {
    bounds: Bounds,
    salience: Salience,
}

impl Clone for KvCache {
    /// Without pages that wait for their next use, and without the way back from a step that is under way.
    fn clone(&self) -> Self {
        let mut clone = Self {
            shape: self.shape,
            config: self.config,
            len: self.len,
            limit: self.limit,
            window: self.window,
            first: self.first,
            sequences: self.sequences.clone(),
            cooled: self.cooled.clone(),
            pool: Pool::new(self.shape.page, &self.config),
            origin: self.origin.clone(),
            notes: self.notes.clone(),
            generation: self.generation,
            undo: None,
        };
        clone.adopt(self.sequences.len());
        clone
    }
}

impl core::fmt::Debug for KvCache {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let (batch, bytes) = (self.batch_size(), self.bytes());
        let mut f = f.debug_struct("KvCache");
        f.field("shape", &self.shape).field("len", &self.len).field("batch", &batch).field("bytes", &bytes);
        f.finish_non_exhaustive()
    }
}

impl KvCache {
    /// An empty cache for a model of this shape; allocates nothing yet.
    #[must_use]
    pub fn new(config: &Config, kv: KvConfig) -> Self {
        let (heads, head_dim) = (config.num_key_value_heads, config.head_dim);
        let shape = Shape { layers: config.num_hidden_layers, page: PageShape { heads, head_dim } };
        Self::empty(shape, kv, config.max_position_embeddings, window::of(config))
    }

    fn empty(shape: Shape, config: KvConfig, limit: usize, window: Option<usize>) -> Self {
        Self {
            shape,
            config,
            len: 0,
            limit: limit.min(MOST_POSITIONS),
            window,
            first: 0,
            sequences: Vec::new(),
            cooled: Vec::new(),
            pool: Pool::new(shape.page, &config),
            origin: None,
            notes: Vec::new(),
            generation: 0,
            undo: None,
        }
    }

    /// How positions are kept.
    #[must_use]
    pub fn config(&self) -> &KvConfig {
        &self.config
    }

    /// Whether the cache was made for a model of this shape and sliding window.
    #[must_use]
    pub(crate) fn fits(&self, config: &Config) -> bool {
        let model = Self::new(config, self.config);
        let window = config.sliding_window.filter(|w| *w < self.limit);
        self.shape == model.shape && self.limit <= model.limit && self.window == window
    }

    /// Positions of each sequence; of a model with a sliding window only the last of them are held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Positions that a sequence can have.
    #[must_use]
    pub fn max_positions(&self) -> usize {
        self.limit
    }

    /// Whether no position is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Sequences held.
    #[must_use]
    pub fn batch_size(&self) -> usize {
        self.sequences.len()
    }

    /// Bytes of all pages, those waiting to be filled among them.
    #[must_use]
    pub fn bytes(&self) -> usize {
        Tier::ALL.map(|t| self.tier(t).bytes).iter().sum()
    }

    /// Forgets every position from `len` on and gives their pages back. A page that is then written again in the middle
    /// becomes hot again, with the values to which its tier had rounded it.
    ///
    /// The last 32 positions can always be forgotten, and all. Where a sliding window has dropped what a token at `len` would
    /// see, nothing can follow but position 0: [`Self::check`] and every step say so.
    pub fn truncate(&mut self, len: usize) {
        if len >= self.len {
            return;
        }
        self.warm_again(len);
        self.len = len;
        if len == 0 {
            self.first = 0;
        }
        self.generation += 1;
        self.drop_pages(len);
        for notes in self.notes.iter_mut().flatten() {
            notes.bounds.cut(len / PAGE_LEN);
            notes.salience.cut(len);
        }
    }

    /// Gives back the pages behind `len` positions.
    fn drop_pages(&mut self, len: usize) {
        let pages = len.div_ceil(PAGE_LEN).saturating_sub(self.first);
        for layer in self.sequences.iter_mut().flatten() {
            layer.drain(pages.min(layer.len())..).for_each(|page| self.pool.give(page));
        }
    }

    /// Forgets every position; of the pages one per layer stays for the next use, or as many as [`Self::reserve`] asked for.
    pub fn clear(&mut self) {
        self.truncate(0);
    }

    /// Rounds elements as storing does: `x` becomes what would be read.
    pub(crate) fn round(&self, x: &mut [f32]) {
        match self.config.dtype {
            KvDType::F32 => {}
            KvDType::F16 => x.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32()),
            KvDType::BF16 => x.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32()),
        }
    }

    /// Stores the keys `k` and values `v` of one token, `[heads · head_dim]` each; [`Self::advance`] makes them part of the past.
    ///
    /// # Panics
    /// There is no room at `position` (see [`Self::begin`]), or a length is wrong.
    pub fn write(&mut self, sequence: usize, layer: usize, position: usize, k: &[f32], v: &[f32]) {
        let PageShape { heads, head_dim } = self.shape.page;
        assert!(k.len() == heads * head_dim && v.len() == k.len(), "kv cache: wrong length");
        let page = &mut self.sequences[sequence][layer][position / PAGE_LEN - self.first];
        page.write(self.shape.page, position % PAGE_LEN, k, v);
    }

    /// The keys of a page for one head, `[head_dim, PAGE_LEN]`: a row is a channel.
    ///
    /// # Panics
    /// There is no such page.
    #[must_use]
    pub(crate) fn keys(&self, sequence: usize, layer: usize, page: usize, head: usize) -> Matrix<'_> {
        self.sequences[sequence][layer][page - self.first].keys(self.shape.page, head)
    }

    /// The values of the first `n` positions of a page for one head, `[n, head_dim]`; `[n, width]` with
    /// [`Self::width`] where the page is quantised.
    ///
    /// # Panics
    /// There is no such page.
    #[must_use]
    pub(crate) fn values(
        &self,
        sequence: usize,
        layer: usize,
        page: usize,
        head: usize,
        n: usize,
    ) -> Matrix<'_> {
        self.sequences[sequence][layer][page - self.first].values(self.shape.page, head, n)
    }

    /// Shows the gate of a layer its inputs `x` `[n, hidden_size]` of the positions from `position` on.
    ///
    /// What a page is worth is known when its last token was seen; positions that were left out count as wanted.
    pub fn observe(
        &mut self,
        sequence: usize,
        layer: usize,
        gate: &FastGrnnGate,
        kernels: &Kernels,
        position: usize,
        x: &[f32],
    ) {
        let salience = &mut self.notes[sequence][layer].salience;
        salience.observe(gate, kernels, position, x);
        salience.forget(gate, self.first);
    }

    /// The largest score that the gate gave to a token of a page; ∞ where it has not seen all.
    #[must_use]
    pub(crate) fn salience(&self, sequence: usize, layer: usize, page: usize, head: usize) -> f32 {
        self.notes[sequence][layer].salience.of(self.shape.page.heads, page, head)
    }

    /// Makes the bounds of those of a layer's first `full` pages that are held, which must be written whole; bounds that are
    /// known stay.
    ///
    /// `q · k ≤ q⁻ · min + q⁺ · max` for every key k of a page, with the least and the largest of each channel (Quest:
    /// Tang et al. 2024).
    pub(crate) fn update_bounds(&mut self, layer: usize, full: usize) {
        for (pages, notes) in self.sequences.iter().zip(&mut self.notes) {
            notes[layer].bounds.update(self.shape.page, &pages[layer], self.first, full);
        }
    }

    /// The bounds of pages `32 · group ..` for a head, `[2 · head_dim, 32]`: minima, then maxima.
    ///
    /// # Panics
    /// They were not [made](Self::update_bounds).
    #[must_use]
    pub(crate) fn bounds(&self, sequence: usize, layer: usize, group: usize, head: usize) -> Matrix<'_> {
        self.notes[sequence][layer].bounds.group(self.shape.page, group, head)
    }

    #[cfg(test)]
    pub(crate) fn bounds_bytes(&self) -> usize {
        self.notes.iter().flatten().map(|n| n.bounds.bytes()).sum()
    }

    /// A number that changes whenever positions are cut off.
    #[must_use]
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// Columns of [`Self::values`] at most: `head_dim` filled up to whole blocks of 32.
    #[must_use]
    pub(crate) fn width(&self) -> usize {
        self.shape.page.width()
    }
}

#[cfg(test)]
mod tests;
