//! Keys and values of one sequence in memory that the caller gives.

use crate::{config::Config, error::Error};
use core::ops::Range;

/// Keys and values of every layer, f32, laid out `[layer][key, value][head][position][head_dim]`, so that the past of a
/// head is one matrix `[len, head_dim]`.
#[derive(Debug)]
pub struct KvCache<'a> {
    data: &'a mut [f32],
    capacity: usize,
    len: usize,
    heads: usize,
    head_dim: usize,
}

impl<'a> KvCache<'a> {
    /// Elements of f32 that `positions` positions need: `2 · layers · positions · kv_dim` (`usize::MAX` where that overflows).
    #[must_use]
    pub fn elements(config: &Config, positions: usize) -> usize {
        [config.num_hidden_layers, config.num_key_value_heads, config.head_dim, positions]
            .into_iter()
            .fold(2, usize::saturating_mul)
    }

    /// An empty cache for `positions` positions.
    ///
    /// # Errors
    /// `data` has fewer than [`Self::elements`] elements.
    pub fn new(config: &Config, positions: usize, data: &'a mut [f32]) -> Result<Self, Error> {
        let expected = Self::elements(config, positions);
        if data.len() < expected {
            return Err(Error::Length { what: "kv cache", expected, got: data.len() });
        }
        Ok(Self {
            data,
            capacity: positions,
            len: 0,
            heads: config.num_key_value_heads,
            head_dim: config.head_dim,
        })
    }

    /// Positions held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no position is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Positions there is room for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets every position from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Makes the positions written so far part of the past.
    pub(crate) fn set_len(&mut self, len: usize) {
        self.len = len;
    }

    /// Stores the keys (`kv` 0) or values (`kv` 1) of all heads at a position.
    pub(crate) fn write(&mut self, layer: usize, kv: usize, position: usize, x: &[f32]) {
        for (head, x) in x.chunks_exact(self.head_dim).enumerate() {
            let start = self.offset(layer, kv, head) + position * self.head_dim;
            self.data[start..start + self.head_dim].copy_from_slice(x);
        }
    }

    /// Some positions of a head, `[positions, head_dim]`.
    pub(crate) fn head(&self, layer: usize, kv: usize, head: usize, positions: Range<usize>) -> &[f32] {
        let start = self.offset(layer, kv, head);
        &self.data[start + positions.start * self.head_dim..start + positions.end * self.head_dim]
    }

    fn offset(&self, layer: usize, kv: usize, head: usize) -> usize {
        ((layer * 2 + kv) * self.heads + head) * self.capacity * self.head_dim
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::tiny;

    #[test]
    fn sizes_that_overflow_are_the_largest() {
        for layers in [usize::MAX, usize::MAX / 2 + 1] {
            let config = Config { num_hidden_layers: layers, ..tiny() };
            assert_eq!(KvCache::elements(&config, 1), usize::MAX);
        }
        assert_eq!(KvCache::elements(&tiny(), usize::MAX), usize::MAX);
        assert_eq!(KvCache::elements(&tiny(), 3), 2 * 2 * 2 * 16 * 3);
        assert!(KvCache::new(&tiny(), usize::MAX, &mut [0.0; 8]).is_err());
    }
}
