//! Windows of a text, read by a setting and by the dense model beside it.

use anyhow::Result;
use candle_sparse::{
    AttentionMode,
    decoder::{BatchScratch, Decoder, Input, Logits, Scratch, SparseStats, Step, Turn},
    kv_cache::{KvCache, KvConfig},
    sparse::FfnMode,
};
use candle_sparse_models::quality::Quality;

/// Tokens whose logits are held at once.
const PART: usize = 512;

/// A model and what it has read of a window.
pub(crate) struct Reader<'a> {
    decoder: &'a Decoder,
    pub(crate) cache: KvCache,
    scratch: Scratch,
    batch: BatchScratch,
    logits: Vec<f32>,
    /// Whether every token must be read as it is decoded.
    in_turns: bool,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(decoder: &'a Decoder, kv: KvConfig) -> Self {
        let sparse = decoder.sparse_config().is_some_and(|c| c.mode != FfnMode::Dense);
        let attention = decoder.attention_config().mode != AttentionMode::Dense;
        Self {
            decoder,
            cache: KvCache::new(decoder.config(), kv),
            scratch: Scratch::default(),
            batch: BatchScratch::default(),
            logits: Vec::new(),
            // A prompt's tokens compute all neurons, and see the pages of their own run before these cool.
            in_turns: sparse || attention || kv.is_tiered(),
        }
    }

    pub(crate) fn sparse_stats(&self) -> SparseStats {
        self.scratch.sparse_stats()
    }

    /// The logits after each of the next tokens, `[ids, vocab_size]`.
    fn read(&mut self, ids: &[u32]) -> Result<&[f32]> {
        let vocab_size = self.decoder.config().vocab_size;
        self.logits.resize(ids.len() * vocab_size, 0.0);
        if !self.in_turns {
            let step = Step { batch: 1, seq_len: ids.len(), index_pos: self.cache.len() };
            let (cache, scratch) = (&mut self.cache, &mut self.scratch);
            self.decoder.forward(Input::Ids(ids), step, cache, scratch, Logits::All, &mut self.logits)?;
            return Ok(&self.logits);
        }
        // Turns of several tokens have the bits of tokens that are decoded one by one.
        let (mut ids, mut logits) = (ids, self.logits.as_mut_slice());
        while !ids.is_empty() {
            let n = self.decoder.most_tokens(self.cache.len()).min(ids.len());
            let (now, now_logits);
            (now, ids) = ids.split_at(n);
            (now_logits, logits) = logits.split_at_mut(n * vocab_size);
            let turn = Turn { ids: now, cache: &mut self.cache, scratch: &mut self.scratch };
            self.decoder.decode_turns(&mut [turn], &mut self.batch, now_logits)?;
        }
        Ok(&self.logits)
    }
}

/// Reads a window with both, and adds the tokens `window[first..]` to `quality`.
pub(crate) fn measure(
    window: &[u32],
    first: usize,
    [setting, dense]: [&mut Reader<'_>; 2],
    quality: &mut Quality,
) -> Result<()> {
    let vocab_size = dense.decoder.config().vocab_size;
    setting.cache.clear();
    dense.cache.clear();
    for (i, part) in window.chunks(PART).enumerate() {
        let (start, logits, dense) = (i * PART, setting.read(part)?, dense.read(part)?);
        // Row r predicts token r + 1.
        let counted = start.max(first - 1)..(start + part.len()).min(window.len() - 1);
        if !counted.is_empty() {
            let rows = (counted.start - start) * vocab_size..(counted.end - start) * vocab_size;
            let tokens = &window[counted.start + 1..=counted.end];
            quality.add_rows(tokens, &logits[rows.clone()], &dense[rows])?;
        }
    }
    Ok(())
}
