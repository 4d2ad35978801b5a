//! Exact causal attention over the pages of a [`KvCache`].
//!
//! ```text
//! for each sequence, key/value head and range of positions:         (a task)
//!     for each piece of 256 positions:
//!         scores = keys · queries of the group;  mask the future
//!         online softmax: rescale what was summed so far, if the maximum rose
//!         sum += scores · values
//! merge the ranges of a head
//! ```
//!
//! 1. All query heads of a group, and in prefill several tokens, read a page together: a key is converted once for all.
//! 2. A lone token splits its past over threads as well as heads; each range keeps maximum and sum, and ranges merge
//!    exactly (Milakov and Gimelshein 2018; "flash-decoding").

use crate::{
    core::{Columns, Config, KernelSet},
    kernels::Kernels,
    kv_cache::{Kv, KvCache, PAGE_LEN},
    weight::{On, split_columns},
};
use arrayvec::ArrayVec;

/// Positions scored at once; a multiple of the page length.
const PIECE: usize = 256;
/// Ranges that a head's past is cut into at most, and the shortest of them.
const MAX_RANGES: usize = 16;
const MIN_RANGE: usize = 128;
/// Columns (query heads × tokens) that read a page together.
const COLUMNS: usize = 64;

/// Working memory of attention, kept between steps.
#[derive(Clone, Debug, Default)]
pub struct AttentionScratch {
    scores: Vec<f32>,
    sums: Vec<f32>,
    stats: Vec<Stats>,
}

/// Running maximum and denominator of one softmax.
#[derive(Clone, Copy, Debug)]
struct Stats {
    max: f32,
    denominator: f32,
}

impl Stats {
    const EMPTY: Self = Self { max: f32::NEG_INFINITY, denominator: 0.0 };
}

/// What a task reads: one key/value head of one layer of one sequence.
#[derive(Clone, Copy)]
struct Head<'a> {
    cache: &'a KvCache,
    sequence: usize,
    layer: usize,
    head: usize,
    head_dim: usize,
}

/// Rows of queries in the activations: `[batch · seq_len, width]`, the query heads first in each row.
#[derive(Clone, Copy, Debug)]
pub struct Queries<'a> {
    /// The rows, rotated and scaled by `1/√head_dim`.
    pub rows: &'a [f32],
    /// Elements per row.
    pub width: usize,
    /// Rows per sequence.
    pub seq_len: usize,
    /// Position of the first row of each sequence.
    pub index_pos: usize,
}

/// `out[t] = softmax(q_t · Kᵀ) · V` over the positions up to each token's own, which must be written already.
///
/// `out` is `[batch · seq_len, q_dim]`. Cost: `2 · q_dim` multiply-adds and `2 · kv_dim` elements read per token and
/// past position, the reads shared by the query heads of a group. One token per sequence allocates nothing after the
/// first call.
///
/// # Panics
/// Shapes do not fit.
pub fn attention(
    on: On<'_>,
    config: &Config,
    cache: &KvCache,
    layer: usize,
    q: Queries<'_>,
    scratch: &mut AttentionScratch,
    out: &mut [f32],
) {
    let head = |sequence, head| Head { cache, sequence, layer, head, head_dim: config.head_dim };
    if q.seq_len == 1 {
        decode(on, config, head, q, scratch, out);
    } else {
        prefill(on, config, head, q, out);
    }
}

fn decode<'a>(
    on: On<'_>,
    config: &Config,
    head: impl Fn(usize, usize) -> Head<'a> + Sync,
    q: Queries<'_>,
    scratch: &mut AttentionScratch,
    out: &mut [f32],
) {
    let (group, head_dim, kv_heads) = (config.group_size(), config.head_dim, config.num_key_value_heads);
    let heads = out.len() / config.q_dim() * kv_heads;
    let len = q.index_pos + 1;
    // The cut depends on the length alone: more threads may not change a bit of the result.
    let range = len.div_ceil(MAX_RANGES).max(MIN_RANGE).next_multiple_of(PAGE_LEN);
    let ranges = len.div_ceil(range);
    let parts = heads * ranges;
    // Keys and values, taken as f32.
    let tasks = on.threads.tasks(parts, heads * len * head_dim * 8);
    let per_task = parts.div_ceil(tasks);
    // Sized for the most there can be: later steps must not allocate.
    scratch.scores.resize(on.threads.most_tasks() * group * PIECE, 0.0);
    scratch.sums.resize(heads * MAX_RANGES * group * head_dim, 0.0);
    scratch.stats.resize(heads * MAX_RANGES * group, Stats::EMPTY);

    let work = scratch.sums[..parts * group * head_dim]
        .chunks_mut(per_task * group * head_dim)
        .zip(scratch.stats[..parts * group].chunks_mut(per_task * group))
        .zip(scratch.scores.chunks_exact_mut(group * PIECE))
        .enumerate();
    on.threads.for_each(work, |(task, ((sums, stats), scores))| {
        let each = sums.chunks_exact_mut(group * head_dim).zip(stats.chunks_exact_mut(group)).enumerate();
        for (i, (sums, stats)) in each {
            let (h, r) = ((task * per_task + i) / ranges, (task * per_task + i) % ranges);
            let (sequence, kv_head) = (h / kv_heads, h % kv_heads);
            let start = sequence * q.width + kv_head * group * head_dim;
            let queries = &q.rows[start..start + group * head_dim];
            sums.fill(0.0);
            stats.fill(Stats::EMPTY);
            let positions = r * range..len.min((r + 1) * range);
            head(sequence, kv_head).attend(on.kernels, queries, |_| len, positions, scores, sums, stats);
        }
    });
    merge(scratch, group, head_dim, ranges, out);
}

/// Adds up the ranges of every head.
fn merge(scratch: &AttentionScratch, group: usize, head_dim: usize, ranges: usize, out: &mut [f32]) {
    for (h, out) in out.chunks_exact_mut(head_dim).enumerate() {
        let part = |r: usize| (h / group * ranges + r) * group + h % group;
        let max = (0..ranges).map(|r| scratch.stats[part(r)].max).fold(f32::NEG_INFINITY, f32::max);
        let scale = |r: usize| (scratch.stats[part(r)].max - max).exp();
        let denominator: f32 = (0..ranges).map(|r| scratch.stats[part(r)].denominator * scale(r)).sum();
        out.fill(0.0);
        for r in 0..ranges {
            let s = scale(r) / denominator;
            let sums = &scratch.sums[part(r) * head_dim..(part(r) + 1) * head_dim];
            out.iter_mut().zip(sums).for_each(|(o, v)| *o += s * v);
        }
    }
}

fn prefill<'a>(
    on: On<'_>,
    config: &Config,
    head: impl Fn(usize, usize) -> Head<'a> + Sync,
    q: Queries<'_>,
    out: &mut [f32],
) {
    let (group, head_dim, kv_heads) = (config.group_size(), config.head_dim, config.num_key_value_heads);
    let batch = out.len() / config.q_dim() / q.seq_len;
    let tile = (COLUMNS / group).max(1);
    // The last tiles see the longest past: started first, they do not end last.
    let mut tasks = Vec::new();
    let by_head = split_columns(out, config.q_dim(), (0..kv_heads).map(|_| group * head_dim));
    for (kv_head, rows) in by_head.into_iter().enumerate() {
        let mut rows = rows.into_iter();
        for sequence in 0..batch {
            for start in (0..q.seq_len).step_by(tile) {
                let n = tile.min(q.seq_len - start);
                tasks.push((sequence, kv_head, start, rows.by_ref().take(n).collect::<Vec<_>>()));
            }
        }
    }
    tasks.sort_by_key(|t| std::cmp::Reverse(t.2));
    on.threads.for_each(tasks.into_iter(), |(sequence, kv_head, start, mut out)| {
        let columns = out.len() * group;
        let mut queries = Vec::with_capacity(columns * head_dim);
        for t in 0..out.len() {
            let at = (sequence * q.seq_len + start + t) * q.width + kv_head * group * head_dim;
            queries.extend_from_slice(&q.rows[at..at + group * head_dim]);
        }
        let (mut scores, mut sums) = (vec![0.0; columns * PIECE], vec![0.0; columns * head_dim]);
        let mut stats = vec![Stats::EMPTY; columns];
        let visible = |column: usize| q.index_pos + start + column / group + 1;
        let positions = 0..visible(columns - 1);
        let head = head(sequence, kv_head);
        head.attend(on.kernels, &queries, visible, positions, &mut scores, &mut sums, &mut stats);
        for (t, out) in out.iter_mut().enumerate() {
            for (g, out) in out.chunks_exact_mut(head_dim).enumerate() {
                let c = t * group + g;
                let sums = &sums[c * head_dim..(c + 1) * head_dim];
                out.iter_mut().zip(sums).for_each(|(o, v)| *o = v / stats[c].denominator);
            }
        }
    });
}

impl Head<'_> {
    /// Adds `positions` to the running softmax of every column of `queries` `[columns, head_dim]`.
    ///
    /// Column `c` sees positions below `visible(c)`; every column sees the first of `positions`.
    fn attend(
        self,
        kernels: &Kernels,
        queries: &[f32],
        visible: impl Fn(usize) -> usize,
        positions: std::ops::Range<usize>,
        scores: &mut [f32],
        sums: &mut [f32],
        stats: &mut [Stats],
    ) {
        for start in positions.clone().step_by(PIECE) {
            let piece = start..(start + PIECE).min(positions.end);
            for (c, queries) in queries.chunks(COLUMNS * self.head_dim).enumerate() {
                let (first, n) = (c * COLUMNS, queries.len() / self.head_dim);
                let scores = &mut scores[first * PIECE..(first + n) * PIECE];
                let sums = &mut sums[first * self.head_dim..(first + n) * self.head_dim];
                let stats = &mut stats[first..first + n];
                self.score(kernels, queries, piece.clone(), scores);
                for (c, ((scores, sums), stats)) in scores
                    .chunks_exact_mut(PIECE)
                    .zip(sums.chunks_exact_mut(self.head_dim))
                    .zip(stats)
                    .enumerate()
                {
                    let scores = &mut scores[..piece.len()];
                    let seen = visible(first + c).saturating_sub(piece.start).min(piece.len());
                    scores[seen..].fill(f32::NEG_INFINITY);
                    let (max, sum) = kernels.exp_sum(scores, stats.max);
                    let rescale = if stats.max == max { 1.0 } else { (stats.max - max).exp() };
                    *stats = Stats { max, denominator: stats.denominator * rescale + sum };
                    if rescale != 1.0 {
                        sums.iter_mut().for_each(|v| *v *= rescale);
                    }
                }
                self.weigh(kernels, piece.clone(), scores, sums);
            }
        }
    }

    /// `scores[c][p] = key_p · query_c` for a piece that begins at a page.
    fn score(self, kernels: &Kernels, queries: &[f32], piece: std::ops::Range<usize>, scores: &mut [f32]) {
        for start in piece.clone().step_by(PAGE_LEN) {
            let n = PAGE_LEN.min(piece.end - start);
            let keys = self.cache.page(self.sequence, self.layer, start / PAGE_LEN, Kv::Key, self.head, n);
            let at = start - piece.start;
            let mut y: ArrayVec<&mut [f32], COLUMNS> =
                scores.chunks_exact_mut(PIECE).map(|s| &mut s[at..at + n]).collect();
            kernels.matmul(keys, Columns::F32(queries), &mut y);
        }
    }

    /// `sums[c] += Σ_p scores[c][p] · value_p`.
    fn weigh(self, kernels: &Kernels, piece: std::ops::Range<usize>, scores: &[f32], sums: &mut [f32]) {
        for start in piece.clone().step_by(PAGE_LEN) {
            let n = PAGE_LEN.min(piece.end - start);
            let values =
                self.cache.page(self.sequence, self.layer, start / PAGE_LEN, Kv::Value, self.head, n);
            let at = start - piece.start;
            let a: ArrayVec<&[f32], COLUMNS> = scores.chunks_exact(PIECE).map(|s| &s[at..at + n]).collect();
            let mut y: ArrayVec<&mut [f32], COLUMNS> = sums.chunks_exact_mut(self.head_dim).collect();
            kernels.matmul_t(values, &a, &mut y);
        }
    }
}
