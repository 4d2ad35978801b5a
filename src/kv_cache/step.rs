//! Room for what a step writes: asked for, checked, and given back when the step is over.

use super::{KvCache, Notes, PAGE_LEN, Tier};
use crate::Error;
use candle_core::{Result, bail};

impl KvCache {
    /// Makes room for `positions` positions of `batch` sequences, so that reaching them token by token allocates nothing, as far
    /// as a budget goes.
    ///
    /// ```
    /// use candle_sparse::{Error, KvCache, KvConfig};
    ///
    /// # use candle_sparse_models::llama::LlamaConfig;
    /// # let json = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu/config.json"));
    /// # let config: LlamaConfig = serde_json::from_slice(json).map_err(candle_core::Error::wrap)?;
    /// # let config = config.into_config(false).to_core()?;
    /// // A model of 4 layers, 2 key/value heads of 32 channels and a context of 1024 positions.
    /// let mut cache = KvCache::new(&config, KvConfig::tiered().with_max_bytes(Some(1 << 20)));
    /// cache.reserve(1, 100)?;
    /// assert!(cache.is_empty() && cache.bytes() > 0);
    /// let error = cache.reserve(8, 1024).unwrap_err();
    /// assert!(matches!(Error::of(&error), Some(Error::Full { .. })), "{error}");
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// More positions than the model's context, more bytes than the budget or than there is memory for, or another batch size
    /// than the cached one.
    pub fn reserve(&mut self, batch: usize, positions: usize) -> Result<()> {
        self.check_in_parts(batch, self.len, positions.saturating_sub(self.len), 1)?;
        self.grow(batch, self.len);
        // And the one that is kept to step back.
        let pages = positions.div_ceil(PAGE_LEN).min(self.most_pages() + 1);
        for layer in self.sequences.iter_mut().flatten() {
            if let Err(e) = layer.try_reserve(pages.saturating_sub(layer.len())) {
                bail!("kv cache: no room for {positions} positions: {e}");
            }
        }
        self.provide(batch, positions);
        Ok(())
    }

    /// Gives back the memory that waits for its next use, also what [`Self::reserve`] asked for.
    pub fn shrink_to_fit(&mut self) {
        self.pool.shrink();
        self.sequences.iter_mut().flatten().for_each(Vec::shrink_to_fit);
    }

    /// Pages that a layer can have before anything is allocated for it.
    pub(crate) fn pages_with_room(&self) -> usize {
        self.sequences.iter().flatten().map(Vec::capacity).max().unwrap_or(0).min(self.most_pages() + 1)
    }

    /// Checks whether [`Self::begin`] would succeed; changes nothing.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub fn check(&self, batch: usize, index_pos: usize, seq_len: usize) -> Result<()> {
        self.check_in_parts(batch, index_pos, seq_len, seq_len)
    }

    /// Whether a step succeeds that is cut into parts of `part` positions, of which one is old before the next begins; changes
    /// nothing.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub(crate) fn check_in_parts(
        &self,
        batch: usize,
        index_pos: usize,
        seq_len: usize,
        part: usize,
    ) -> Result<()> {
        if index_pos > self.len {
            bail!("index_pos {index_pos} leaves a gap: the cache holds {} positions", self.len);
        }
        if seq_len > self.limit || index_pos > self.limit - seq_len {
            let problem = format!(
                "{seq_len} tokens from position {index_pos} are past the model's context of {} positions",
                self.limit
            );
            return Err(Error::Full { problem }.into());
        }
        if index_pos > 0 && batch != self.sequences.len() {
            bail!(
                "the kv cache holds a batch of {}, this input has a batch of {batch}",
                self.sequences.len()
            );
        }
        self.check_window(index_pos)?;
        self.check_bytes(batch, index_pos, seq_len, part)
    }

    /// Cuts the cache back to `index_pos` and makes room for `seq_len` more positions of `batch` sequences.
    ///
    /// # Errors
    /// `index_pos` leaves a gap behind the cached positions or lies before what a sliding window has left, the end is past
    /// the model's context or needs more bytes than the budget ([`Error::Full`]), or the batch is not the cached one. The cache
    /// is unchanged then.
    pub fn begin(&mut self, batch: usize, index_pos: usize, seq_len: usize) -> Result<()> {
        self.check(batch, index_pos, seq_len)?;
        self.end_trial();
        self.truncate(index_pos);
        self.grow(batch, index_pos + seq_len);
        Ok(())
    }

    /// Makes room for `seq_len` more positions: a part of a longer step that was [checked](Self::check_in_parts) as a whole.
    pub(crate) fn extend(&mut self, batch: usize, seq_len: usize) {
        self.grow(batch, self.len + seq_len);
    }

    /// What the pool is to know of `batch` sequences, and of the pages that they have.
    pub(super) fn adopt(&mut self, batch: usize) {
        // Where all layers need a page at once they gave as many back before, one by one.
        let each = batch * self.shape.layers;
        let others = if self.window.is_some() { each } else { 1 };
        self.pool.keep([each, others, others]);
        self.pool.recount(self.sequences.iter().flatten().flatten());
    }

    fn grow(&mut self, batch: usize, positions: usize) {
        let layers = self.shape.layers;
        if batch != self.sequences.len() {
            self.pool.shrink();
            self.sequences.clear();
            self.notes.clear();
            self.adopt(batch);
        }
        self.sequences.resize_with(batch, || vec![Vec::new(); layers]);
        self.notes.resize_with(batch, || vec![Notes::default(); layers]);
        self.cooled.resize(layers, [0; 2]);
        self.thaw();
        let pages = positions.div_ceil(PAGE_LEN);
        for layer in self.sequences.iter_mut().flatten() {
            while self.first + layer.len() < pages {
                layer.push(self.pool.take(Tier::Hot));
            }
        }
    }

    /// Makes the next `seq_len` positions, which were written, part of the past.
    ///
    /// Pages that are old now go to their tiers, layer by layer as [`KvConfig`](super::KvConfig) says; those that no later token
    /// sees are given back.
    pub fn advance(&mut self, seq_len: usize) {
        self.len += seq_len;
        // First, so that their memory serves those that become colder.
        self.release();
        self.settle();
    }
}

#[cfg(test)]
mod tests;
