//! Which positions are kept how, and what that takes.

use super::{KvCache, KvDType, PAGE_LEN, page::Tier};
use crate::Error;
use candle_core::Result;
use candle_sparse_core::kv_cache::tiers::Ageing;
use candle_sparse_core::with_methods;

/// How a cache keeps keys and values: hot, warm and cold by age, in pages of 32 positions.
///
/// A page of layer l of L goes to its next tier `32 · l / L` positions later than it could, so that no token waits for all
/// layers: of 32 layers one does so per token. Which tier a page is in depends on the number of positions alone.
///
/// ```
/// use candle_sparse::{KvCache, KvConfig, KvDType};
///
/// # use candle_sparse_models::llama::LlamaConfig;
/// # let json = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu/config.json"));
/// # let config: LlamaConfig = serde_json::from_slice(json).map_err(candle_core::Error::wrap)?;
/// # let config = config.into_config(false).to_core()?;
/// // A model of 4 layers, 2 key/value heads of 32 channels and a context of 1024 positions.
/// let exact = KvCache::new(&config, KvConfig::exact(KvDType::F16));
/// let tiered = KvCache::new(&config, KvConfig::tiered().with_hot(64).with_warm(128));
/// assert!(tiered.config().is_tiered());
/// // Most of the positions are cold then: 5 bits per element in place of 16.
/// let [exact, tiered] = [exact, tiered].map(|cache| cache.bytes_at(1, 1024));
/// assert!(2 * tiered < exact, "{tiered} and {exact} bytes");
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KvConfig {
    /// Dtype of hot pages, and of the first page, which holds the attention sinks.
    pub dtype: KvDType,
    /// At least so many of the last positions stay hot.
    pub hot: usize,
    /// At least so many of the last positions stay hot or warm (`Q8_0`); what is older is cold (`Q4_1`).
    pub warm: usize,
    /// The most bytes that pages may take at any time, the hot ones of a prompt that is being read and those that wait for
    /// their next use among them; a step that needs more is an error. What a step under a time limit keeps for the way back
    /// comes on top.
    pub max_bytes: Option<usize>,
}

with_methods!(KvConfig {
    with_dtype: dtype: KvDType,
    with_hot: hot: usize,
    with_warm: warm: usize,
    with_max_bytes: max_bytes: Option<usize>,
});

impl KvConfig {
    /// Every position in `dtype`, as candle keeps them.
    #[must_use]
    pub const fn exact(dtype: KvDType) -> Self {
        Self { dtype, hot: usize::MAX, warm: usize::MAX, max_bytes: None }
    }

    /// The last 256 positions in F16, up to 2048 in `Q8_0`, the rest in `Q4_1`.
    #[must_use]
    pub const fn tiered() -> Self {
        Self { hot: 256, warm: 2048, ..Self::exact(KvDType::F16) }
    }

    /// All but the last 32 positions in `Q8_0`.
    #[must_use]
    pub const fn q8() -> Self {
        Self { hot: PAGE_LEN, ..Self::exact(KvDType::F16) }
    }

    /// All but the last 32 positions in `Q4_1`.
    #[must_use]
    pub const fn q4() -> Self {
        Self { hot: PAGE_LEN, warm: 0, ..Self::exact(KvDType::F16) }
    }

    /// Whether pages are quantised when they are old.
    #[must_use]
    pub const fn is_tiered(&self) -> bool {
        self.hot != usize::MAX
    }

    /// Pages at the front of a layer that are at least as cold as warm and as cold, of a sequence of `len` positions.
    pub(super) fn cooled(&self, layer: (usize, usize), len: usize) -> [usize; 2] {
        self.ageing().cooled(layer, len)
    }

    /// Whether pages go from hot to cold without being warm.
    const fn skips_warm(&self) -> bool {
        self.ageing().skips_warm()
    }

    pub(crate) const fn ageing(&self) -> Ageing {
        Ageing { hot: self.hot, warm: self.warm }
    }
}

/// How many pages of a tier a cache has, and the bytes that they take.
///
/// ```
/// use candle_sparse::{KvCache, KvConfig, KvDType, kv_cache::Tier};
///
/// # use candle_sparse_models::llama::LlamaConfig;
/// # let json = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu/config.json"));
/// # let config: LlamaConfig = serde_json::from_slice(json).map_err(candle_core::Error::wrap)?;
/// # let config = config.into_config(false).to_core()?;
/// // A model of 4 layers, 2 key/value heads of 32 channels and a context of 1024 positions.
/// let mut cache = KvCache::new(&config, KvConfig::exact(KvDType::F32));
/// cache.begin(1, 0, 32)?;
/// let hot = cache.tier(Tier::Hot);
/// // One page per layer: 32 positions of two heads, keys and values.
/// assert_eq!((hot.pages, hot.bytes), (4, 4 * 32 * 2 * 64 * 4));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TierStats {
    /// Pages, over all layers and sequences; those waiting to be filled included.
    pub pages: usize,
    /// Bytes, scales included.
    pub bytes: usize,
}

impl KvCache {
    /// Pages and bytes of a tier.
    #[must_use]
    pub fn tier(&self, tier: Tier) -> TierStats {
        let held = self.sequences.iter().flatten().flatten().filter(|p| p.tier() == tier).count();
        let pages = held + self.pool.waiting(tier);
        TierStats { pages, bytes: pages * self.shape.page.bytes(tier, self.config.dtype) }
    }

    /// Moves pages that have become old to their tiers: whole pages, once each.
    pub(super) fn settle(&mut self) {
        (0..self.cooled.len()).for_each(|layer| self.settle_layer(layer, self.len));
    }

    /// Moves the pages of a layer to the tiers that they have in a sequence of `len` positions.
    pub(crate) fn settle_layer(&mut self, layer: usize, len: usize) {
        // The first page holds the sinks; those before the first one that is held are gone.
        let held = self.first.max(1);
        let [warm, cold] = self.config.cooled((layer, self.shape.layers), len);
        let [was_warm, was_cold] = self.cooled[layer];
        // Whether a prompt ends here or a token: what would be warm for a while is rounded twice, always.
        if !self.config.skips_warm() {
            (was_warm.max(held)..warm).for_each(|page| self.cool(layer, page, Tier::Warm, len));
        }
        (was_cold.max(held)..cold).for_each(|page| self.cool(layer, page, Tier::Cold, len));
        self.cooled[layer] = [was_warm.max(warm), was_cold.max(cold)];
    }

    /// Whether a token makes pages of a layer colder that is the `len`th of its sequence.
    #[must_use]
    pub(crate) fn settles_at(&self, layer: usize, len: usize) -> bool {
        let [warm, cold] = self.config.cooled((layer, self.shape.layers), len);
        let was = self.cooled[layer];
        warm > was[0] || cold > was[1]
    }

    fn cool(&mut self, layer: usize, page: usize, tier: Tier, len: usize) {
        let shape = self.shape.page;
        for (sequence, layers) in self.sequences.iter_mut().enumerate() {
            let mut to = self.pool.take(tier);
            let held = &mut layers[layer][page - self.first];
            held.fill(shape, &mut to);
            let was = std::mem::replace(held, to);
            match &mut self.undo {
                Some(undo) => undo.push(len, [sequence, layer, page], was),
                None => self.pool.give(was),
            }
        }
    }

    /// Makes the page hot that the next position is to be written to.
    pub(super) fn thaw(&mut self) {
        let (shape, page) = (self.shape.page, self.len / PAGE_LEN);
        for pages in self.sequences.iter_mut().flatten() {
            if let Some(page) = pages.get_mut(page.saturating_sub(self.first))
                && page.tier() != Tier::Hot
            {
                let mut hot = self.pool.take(Tier::Hot);
                page.fill(shape, &mut hot);
                self.pool.give(std::mem::replace(page, hot));
            }
        }
        self.cooled.iter_mut().for_each(|c| *c = c.map(|c| c.min(page)));
    }

    /// Puts aside the pages that are missing to reach `positions` positions.
    pub(super) fn provide(&mut self, batch: usize, positions: usize) {
        // Behind a sliding window each tier grows and shrinks, the same from page to page once the window is full; without one
        // the hot ones do.
        let lengths = match self.window {
            Some(window) => 0..=positions.min(window + 8 * PAGE_LEN),
            None => positions.saturating_sub(2 * PAGE_LEN)..=positions,
        };
        let most = lengths
            .map(|n| self.pages_at(n))
            .fold([0; 3], |most, pages| std::array::from_fn(|tier| most[tier].max(pages[tier])));
        let wanted = Tier::ALL.map(|tier| {
            // One more than settled, since a page is filled before the one that it replaces is free.
            let more = usize::from(tier != Tier::Cold || self.window.is_some()) * self.shape.layers;
            let needed = tier == Tier::Hot || self.config.is_tiered() && positions > PAGE_LEN;
            if needed { (most[tier as usize] + more) * batch } else { 0 }
        });
        self.pool.reserve(wanted);
    }

    /// An error if a step needs more than the budget at any time.
    pub(super) fn check_bytes(
        &self,
        batch: usize,
        index_pos: usize,
        seq_len: usize,
        part: usize,
    ) -> Result<()> {
        let Some(max) = self.config.max_bytes else { return Ok(()) };
        let starts = (index_pos..index_pos + seq_len).step_by(part.max(1));
        let most =
            |start: usize| self.bytes_of_part(batch, index_pos, start, part.min(index_pos + seq_len - start));
        let needed = starts.map(most).max().unwrap_or(0);
        if needed > max {
            let problem = format!(
                "kv cache: to read {seq_len} positions from {index_pos} on of {batch} sequence(s) takes {needed} bytes, the \
                 budget is {max}: shorten the text, give a prompt in smaller parts, or choose colder tiers"
            );
            return Err(Error::Full { problem }.into());
        }
        Ok(())
    }

    /// The most bytes held while a step that began at `index_pos` reads `n` positions from `start` on.
    fn bytes_of_part(&self, batch: usize, index_pos: usize, start: usize, n: usize) -> usize {
        let (layers, kept) = (self.shape.layers, index_pos / PAGE_LEN);
        let first = if index_pos == 0 { 0 } else { self.first }.max(self.first_kept(start));
        let end = (start + n).div_ceil(PAGE_LEN);
        let mut all = [0; 3];
        for layer in 0..layers {
            let was = self.cooled.get(layer).copied().unwrap_or_default().map(|c| c.min(kept));
            let settled = self.config.cooled((layer, layers), start);
            let tiers = tiers(first, end, [0, 1].map(|i| was[i].max(settled[i])));
            all.iter_mut().zip(tiers).for_each(|(all, n)| *all += n);
        }
        let [hot, warm, cold] = Tier::ALL.map(|t| self.shape.page.bytes(t, self.config.dtype));
        let one_more = match (self.config.is_tiered(), self.config.skips_warm()) {
            (false, _) => 0,
            (true, true) => cold,
            (true, false) => warm,
        };
        // Of heads of a few channels a quantised page can be the larger one.
        let sizes = [hot.max(one_more), warm, cold];
        let each =
            all.iter().zip(sizes).fold(0_usize, |sum, (n, size)| sum.saturating_add(n.saturating_mul(size)));
        // One that is filled while the one it replaces is still held.
        each.saturating_mul(batch).saturating_add(one_more)
    }

    /// The most bytes that are held at any time while `positions` positions of one sequence are read from the start, at most `part`
    /// at a time, whatever is held now.
    ///
    /// ```
    /// use candle_sparse::{KvCache, KvConfig};
    ///
    /// # use candle_sparse_models::llama::LlamaConfig;
    /// # let json = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu/config.json"));
    /// # let config: LlamaConfig = serde_json::from_slice(json).map_err(candle_core::Error::wrap)?;
    /// # let config = config.into_config(false).to_core()?;
    /// // Prompts are hot while they are read.
    /// let cache = KvCache::new(&config, KvConfig::q4());
    /// assert!(cache.bytes_to_read(1024, 512) > cache.bytes_to_read(1024, 32));
    /// assert!(cache.bytes_to_read(1024, 32) > cache.bytes_at(1, 1024));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    #[must_use]
    pub fn bytes_to_read(&self, positions: usize, part: usize) -> usize {
        let (empty, part) = (Self::empty(self.shape, self.config, self.limit, self.window), part.max(1));
        let most = |start: usize| empty.bytes_of_part(1, 0, start, part.min(positions - start));
        (0..positions).step_by(part).map(most).max().unwrap_or(0)
    }

    /// Sets how many bytes pages may take from now on, see [`KvConfig::max_bytes`].
    pub fn set_max_bytes(&mut self, max_bytes: Option<usize>) {
        self.config.max_bytes = max_bytes;
        self.pool.set_max_bytes(max_bytes);
    }

    /// Bytes of `positions` positions of `batch` sequences once they have settled; the step that reads them takes more for
    /// a while, see [`KvConfig::max_bytes`].
    #[must_use]
    pub fn bytes_at(&self, batch: usize, positions: usize) -> usize {
        let pages = Tier::ALL.into_iter().zip(self.pages_at(positions));
        let bytes = |(tier, pages): (Tier, usize)| {
            pages.saturating_mul(self.shape.page.bytes(tier, self.config.dtype))
        };
        pages.map(bytes).fold(0, usize::saturating_add).saturating_mul(batch)
    }

    /// Pages by tier of all layers of a sequence of `positions` positions that has settled.
    fn pages_at(&self, positions: usize) -> [usize; 3] {
        let (first, end, layers) =
            (self.first_kept(positions), positions.div_ceil(PAGE_LEN), self.shape.layers);
        let mut all = [0; 3];
        for layer in 0..layers {
            let tiers = tiers(first, end, self.config.cooled((layer, layers), positions));
            all.iter_mut().zip(tiers).for_each(|(all, n)| *all += n);
        }
        all
    }
}

/// Pages by tier of a layer's pages `first..end`.
fn tiers(first: usize, end: usize, [warm, cold]: [usize; 2]) -> [usize; 3] {
    // The first page of all stays hot.
    let quantised = |c: usize| c.min(end).saturating_sub(first.max(1));
    let [cooled, cold] = [quantised(warm), quantised(cold)];
    [end.saturating_sub(first) - cooled, cooled - cold, cold]
}
