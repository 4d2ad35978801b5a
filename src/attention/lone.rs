//! Attention of one token over its sequence's past, shared by a [team](crate::team).

use super::{Head, PIECE, Stats, Sums};
use crate::{
    core::{Config, KernelSet},
    kernels::Kernels,
    kv_cache::{KvCache, PAGE_LEN},
    team::{Member, Outcome},
};

/// Shares that a head's pages are cut into at most, and the pages of the smallest.
const MOST_SHARES: usize = 16;
const MIN_SHARE: usize = 4;

/// A thread's working memory of [`lone_token`], kept between steps.
#[derive(Debug, Default)]
pub struct LoneScratch {
    scores: Vec<f32>,
    parts: Vec<f32>,
    stats: Vec<Stats>,
    /// The pages that are read.
    pages: Vec<u32>,
}

impl LoneScratch {
    /// Makes room for every length that a model can reach, so that no step allocates.
    pub fn resize(&mut self, config: &Config) {
        let group = config.group_size();
        self.parts.resize(room(config), 0.0);
        self.scores.resize(group * PIECE, 0.0);
        self.stats.resize(group, Stats::EMPTY);
        self.pages.reserve(config.max_position_embeddings.div_ceil(PAGE_LEN));
    }
}

/// A token of one layer, alone in its step.
#[derive(Clone, Copy, Debug)]
pub struct Token<'a> {
    /// Holds the positions before it.
    pub cache: &'a KvCache,
    /// Which layer.
    pub layer: usize,
    /// Where it stands.
    pub position: usize,
    /// Its queries `[q_dim]`, rotated and scaled by `1/√head_dim`.
    pub queries: &'a [f32],
    /// Its keys `[kv_dim]`, [rounded](KvCache::round) as the cache would.
    pub keys: &'a [f32],
    /// Its values `[kv_dim]`, rounded.
    pub values: &'a [f32],
}

/// How the pages are cut: by their number alone, so that more threads do not change a bit.
#[derive(Clone, Copy)]
struct Cut {
    /// Pages of a share.
    share: usize,
    shares: usize,
    /// Elements of a share's result: for each query head of a group a sum `[width]`, then its maximum and denominator.
    part: usize,
}

impl Cut {
    fn new(config: &Config, pages: usize) -> Self {
        let share = pages.div_ceil(MOST_SHARES).max(MIN_SHARE);
        let part = config.group_size() * (config.head_dim.next_multiple_of(PAGE_LEN) + 2);
        // The token itself is in the first share, which there is even without a past.
        Self { share, shares: pages.div_ceil(share).max(1), part }
    }
}

/// How many elements [`lone_token`] publishes at most.
#[must_use]
pub fn room(config: &Config) -> usize {
    let pages = config.max_position_embeddings.div_ceil(PAGE_LEN);
    config.num_key_value_heads * pages.div_ceil(MIN_SHARE).min(MOST_SHARES) * Cut::new(config, 1).part
}

/// `out = softmax(q · Kᵀ) · V` over the cached positions before a token and the token itself.
///
/// `out` is `[q_dim]`. Cost: `2 · q_dim` multiply-adds and `2 · kv_dim` elements read per position, shared by the
/// threads of the team. Allocates nothing after [`LoneScratch::resize`].
///
/// # Errors
/// The team's computation is over.
///
/// # Panics
/// Shapes do not fit.
pub fn lone_token(
    member: &mut Member<'_>,
    kernels: &Kernels,
    config: &Config,
    token: Token<'_>,
    scratch: &mut LoneScratch,
    out: &mut [f32],
) -> Outcome {
    let (group, head_dim, kv_heads) = (config.group_size(), config.head_dim, config.num_key_value_heads);
    let width = token.cache.width();
    scratch.resize(config);
    let LoneScratch { scores, parts, stats, pages } = scratch;
    pages.clear();
    pages.extend(0..token.position.div_ceil(PAGE_LEN) as u32);
    let cut = Cut::new(config, pages.len());
    let parts = &mut parts[..kv_heads * cut.shares * cut.part];

    // Keys and values, taken as f32.
    let piece = member.piece(kv_heads * cut.shares, kv_heads * token.position * head_dim * 8, 1);
    member.phase(parts, piece * cut.part, |i, out| {
        for (j, out) in out.chunks_exact_mut(cut.part).enumerate() {
            let (h, share) = ((i * piece + j) / cut.shares, (i * piece + j) % cut.shares);
            let queries = &token.queries[h * group * head_dim..(h + 1) * group * head_dim];
            let (values, ends) = out.split_at_mut(group * width);
            values.fill(0.0);
            stats.fill(Stats::EMPTY);
            if share == 0 {
                token.begin(kernels, h, queries, values, stats);
            }
            let pages = pages.chunks(cut.share).nth(share).unwrap_or_default();
            let sums = Sums { scores: &mut *scores, values, stats: &mut *stats };
            token.head(h, head_dim).attend(kernels, queries, |_| token.position, pages, sums);
            for (end, stats) in ends.as_chunks_mut().0.iter_mut().zip(&*stats) {
                *end = [stats.max, stats.denominator];
            }
        }
    })?;
    merge(parts, cut, group, width, head_dim, out);
    Ok(())
}

impl<'a> Token<'a> {
    fn head(self, head: usize, head_dim: usize) -> Head<'a> {
        let Self { cache, layer, position, .. } = self;
        Head { cache, sequence: 0, layer, head, head_dim, stored: position }
    }

    /// Starts the sums of a head with the token's own key and value.
    fn begin(self, kernels: &Kernels, head: usize, queries: &[f32], values: &mut [f32], stats: &mut [Stats]) {
        let (head_dim, width) = (queries.len() / stats.len(), self.cache.width());
        let own = head * head_dim..(head + 1) * head_dim;
        for (i, (stats, query)) in stats.iter_mut().zip(queries.chunks_exact(head_dim)).enumerate() {
            *stats = Stats { max: kernels.dot(query, &self.keys[own.clone()]), denominator: 1.0 };
            values[i * width..i * width + head_dim].copy_from_slice(&self.values[own.clone()]);
        }
    }
}

/// Adds up the shares of every head.
fn merge(parts: &[f32], cut: Cut, group: usize, width: usize, head_dim: usize, out: &mut [f32]) {
    let by_head = parts.chunks_exact(cut.shares * cut.part);
    for (parts, out) in by_head.zip(out.chunks_exact_mut(group * head_dim)) {
        for (g, out) in out.chunks_exact_mut(head_dim).enumerate() {
            let shares = || parts.chunks_exact(cut.part).map(|part| part.split_at(group * width));
            let max = shares().map(|(_, ends)| ends[2 * g]).fold(f32::NEG_INFINITY, f32::max);
            let scale = |ends: &[f32]| (ends[2 * g] - max).exp();
            let denominator: f32 = shares().map(|(_, ends)| ends[2 * g + 1] * scale(ends)).sum();
            out.fill(0.0);
            for (sums, ends) in shares() {
                let s = scale(ends) / denominator;
                out.iter_mut().zip(&sums[g * width..]).for_each(|(o, v)| *o += s * v);
            }
        }
    }
}

#[cfg(test)]
mod tests;
