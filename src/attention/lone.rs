//! Attention of one token over its sequence's past, shared by a [team](crate::team).

use super::{Head, PIECE, Stats};
use crate::{
    core::Config,
    kernels::Kernels,
    kv_cache::{KvCache, PAGE_LEN},
    team::{Member, Outcome},
};

/// Ranges that a head's past is cut into at most, and the shortest of them.
const MOST_RANGES: usize = 16;
const MIN_RANGE: usize = 128;

/// A thread's working memory of [`lone_token`], kept between steps.
#[derive(Debug, Default)]
pub struct LoneScratch {
    scores: Vec<f32>,
    parts: Vec<f32>,
    stats: Vec<Stats>,
}

impl LoneScratch {
    /// Makes room for every length that a model can reach, so that no step allocates.
    pub fn resize(&mut self, config: &Config) {
        let group = config.group_size();
        self.parts.resize(room(config), 0.0);
        self.scores.resize(group * PIECE, 0.0);
        self.stats.resize(group, Stats::EMPTY);
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

/// How the past is cut: by its length alone, so that more threads do not change a bit.
#[derive(Clone, Copy)]
struct Cut {
    range: usize,
    ranges: usize,
    /// Elements of a part: for each query head of a group a sum `[head_dim]`, then its maximum and denominator.
    part: usize,
}

impl Cut {
    fn new(config: &Config, len: usize) -> Self {
        let range = len.div_ceil(MOST_RANGES).max(MIN_RANGE).next_multiple_of(PAGE_LEN);
        let part = config.group_size() * (config.head_dim + 2);
        Self { range, ranges: len.div_ceil(range), part }
    }
}

/// How many elements [`lone_token`] publishes at most.
#[must_use]
pub fn room(config: &Config) -> usize {
    let ranges = config.max_position_embeddings.div_ceil(MIN_RANGE).min(MOST_RANGES);
    config.num_key_value_heads * ranges * Cut::new(config, 1).part
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
    let len = token.position + 1;
    let cut = Cut::new(config, len);
    scratch.resize(config);
    let LoneScratch { scores, parts, stats } = scratch;
    let parts = &mut parts[..kv_heads * cut.ranges * cut.part];

    // Keys and values, taken as f32.
    let piece = member.piece(kv_heads * cut.ranges, kv_heads * len * head_dim * 8, 1);
    member.phase(parts, piece * cut.part, |i, out| {
        for (j, out) in out.chunks_exact_mut(cut.part).enumerate() {
            let (h, r) = ((i * piece + j) / cut.ranges, (i * piece + j) % cut.ranges);
            let queries = &token.queries[h * group * head_dim..(h + 1) * group * head_dim];
            let positions = r * cut.range..len.min((r + 1) * cut.range);
            let (sums, ends) = out.split_at_mut(group * head_dim);
            sums.fill(0.0);
            stats.fill(Stats::EMPTY);
            token.head(h, head_dim).attend(kernels, queries, |_| len, positions, scores, sums, stats);
            for (end, stats) in ends.as_chunks_mut().0.iter_mut().zip(&*stats) {
                *end = [stats.max, stats.denominator];
            }
        }
    })?;
    merge(parts, cut, group, head_dim, out);
    Ok(())
}

impl<'a> Token<'a> {
    fn head(self, head: usize, head_dim: usize) -> Head<'a> {
        let r = head * head_dim..(head + 1) * head_dim;
        let fresh = Some([&self.keys[r.clone()], &self.values[r]]);
        let Self { cache, layer, position, .. } = self;
        Head { cache, sequence: 0, layer, head, head_dim, stored: position, fresh }
    }
}

/// Adds up the ranges of every head.
fn merge(parts: &[f32], cut: Cut, group: usize, head_dim: usize, out: &mut [f32]) {
    let by_head = parts.chunks_exact(cut.ranges * cut.part);
    for (parts, out) in by_head.zip(out.chunks_exact_mut(group * head_dim)) {
        for (g, out) in out.chunks_exact_mut(head_dim).enumerate() {
            let ranges = || parts.chunks_exact(cut.part).map(|part| part.split_at(group * head_dim));
            let max = ranges().map(|(_, ends)| ends[2 * g]).fold(f32::NEG_INFINITY, f32::max);
            let scale = |ends: &[f32]| (ends[2 * g] - max).exp();
            let denominator: f32 = ranges().map(|(_, ends)| ends[2 * g + 1] * scale(ends)).sum();
            out.fill(0.0);
            for (sums, ends) in ranges() {
                let s = scale(ends) / denominator;
                let sums = &sums[g * head_dim..(g + 1) * head_dim];
                out.iter_mut().zip(sums).for_each(|(o, v)| *o += s * v);
            }
        }
    }
}

#[cfg(test)]
mod tests;
