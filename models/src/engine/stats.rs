//! Numbers of an engine.

use crate::{
    decoder::SparseStats,
    kv_cache::{KvCache, Tier, TierStats},
};

/// What an [`Engine`](super::Engine) holds now and has done since it was made.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct EngineStats {
    /// Sequences that are read or written.
    pub running: usize,
    /// Sequences that have begun and stand still, since another client has its share of the places.
    pub paused: usize,
    /// Of the running ones, those whose prompt is not read yet.
    pub reading: usize,
    /// Requests that wait.
    pub queued: usize,
    /// Requests that ended, however.
    pub finished: u64,
    /// Of these, those that ended with an error.
    pub failed: u64,
    /// Tokens of prompts that were read.
    pub tokens_read: u64,
    /// Tokens that were written.
    pub tokens_written: u64,
    /// Prompts that began with a prefix that was held.
    pub prefix_hits: u64,
    /// Tokens that need not be read for it.
    pub prefix_tokens: u64,
    /// Prefixes held in memory, and their bytes, pages that they share counted once.
    pub prefixes: usize,
    /// See [`Self::prefixes`].
    pub prefix_bytes: usize,
    /// Tokens that were guessed.
    pub drafts_made: u64,
    /// Of these, those that came true.
    pub drafts_accepted: u64,
    /// Bytes of all keys and values, prefixes among them; shared pages count once.
    pub kv_bytes: usize,
    /// Pages and bytes of the running sequences that are hot, warm and cold; shared pages count for each that shares them.
    pub kv_tiers: [TierStats; 3],
    /// By layer, the mean share of neurons that tokens being written read; empty without a profile.
    pub active_share: Vec<f64>,
}

/// Of all tokens that were written: how many, and the sum of their shares of neurons, by layer.
#[derive(Clone, Debug, Default)]
pub(super) struct Shares(Vec<(u64, f64)>);

impl Shares {
    pub(super) fn add(&mut self, stats: &SparseStats) {
        self.0.resize(self.0.len().max(stats.layers.len()), (0, 0.0));
        for ((tokens, sum), layer) in self.0.iter_mut().zip(&stats.layers) {
            *tokens += layer.tokens;
            *sum += layer.tokens as f64 * layer.active_share;
        }
    }

    pub(super) fn means(&self) -> Vec<f64> {
        self.0.iter().map(|(tokens, sum)| sum / (*tokens).max(1) as f64).collect()
    }
}

/// Pages and bytes of some caches by tier.
pub(super) fn tiers<'a>(caches: impl Iterator<Item = &'a KvCache>) -> [TierStats; 3] {
    caches.fold([TierStats::default(); 3], |mut all, cache| {
        for (all, tier) in all.iter_mut().zip(Tier::ALL) {
            let more = cache.tier(tier);
            (all.pages, all.bytes) = (all.pages + more.pages, all.bytes + more.bytes);
        }
        all
    })
}
