//! Causal attention over the pages of a [`KvCache`].
//!
//! ```text
//! for each sequence, key/value head and share of its pages:         (a task)
//!     for each piece of 8 pages:
//!         scores = queries of the group · keys;  mask the future
//!         online softmax: rescale what was summed so far, if the maximum rose
//!         sum += scores · values
//! merge the shares of a head
//! ```
//!
//! 1. All query heads of a group, and in prefill several tokens, read a page together: a key is converted once for all.
//! 2. A lone token splits its past over threads as well as heads; each share keeps maximum and sum, and shares merge
//!    exactly (Milakov and Gimelshein 2018; "flash-decoding").
//! 3. A lone token's own key and value need not be in the cache yet.
//! 4. A model's sliding window masks the beginning of the first page that the tokens of a page are given, by position.

mod lone;
mod plan;

use crate::tuning::{SCORED_COLUMNS, SCORED_PAGES};
use crate::{
    kv_cache::{KvCache, PAGE_LEN},
    weight::{Compute, split_columns},
};
use arrayvec::ArrayVec;
pub use candle_sparse_core::attention::{AttentionConfig, AttentionMode};
use candle_sparse_core::{Config, KernelSet, Matrix};
use candle_sparse_kernels::Kernels;
pub(crate) use lone::{LoneScratch, Token, TokensScratch, declare, lone_token, lone_tokens};
use plan::Recall;
pub(crate) use plan::{PagePlan, Selector};
use std::ops::Range;

/// Positions of a prompt's attention that are scored at once.
const PIECE: usize = SCORED_PAGES * PAGE_LEN;
// Of a list's first two pages every token sees a position.
const _: () = assert!(SCORED_PAGES >= 2);

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
    /// Positions in the cache.
    stored: usize,
}

/// Running results of some columns, side by side.
struct Sums<'a> {
    /// `[columns, PIECE]`, working memory.
    scores: &'a mut [f32],
    /// `[columns, KvCache::width]`
    values: &'a mut [f32],
    stats: &'a mut [Stats],
}

/// Rows of queries in the activations: `[batch · seq_len, width]`, the query heads first in each row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Queries<'a> {
    /// The rows, rotated and scaled by `1/√head_dim`.
    pub rows: &'a [f32],
    /// Elements per row.
    pub width: usize,
    /// Rows per sequence.
    pub seq_len: usize,
    /// Position of the first row of each sequence.
    pub index_pos: usize,
}

/// `out[t] = softmax(q_t · Kᵀ) · V` over the positions up to each token's own, which must be written already, in the pages
/// that `select` chooses, and in the sliding window of the model that the cache was made for.
///
/// `out` is `[batch · seq_len, q_dim]`. Cost: `2 · q_dim` multiply-adds and `2 · kv_dim` elements read per token and
/// chosen position, the reads shared by the query heads of a group.
///
/// # Panics
/// Shapes do not fit.
pub(crate) fn attention(
    on: Compute<'_>,
    config: &Config,
    cache: &KvCache,
    layer: usize,
    select: &Selector<'_>,
    q: Queries<'_>,
    out: &mut [f32],
) {
    let (group, head_dim, kv_heads) = (config.group_size(), config.head_dim, config.num_key_value_heads);
    if out.is_empty() {
        return;
    }
    let stored = q.index_pos + q.seq_len;
    let batch = out.len() / config.q_dim() / q.seq_len;
    let tile = (SCORED_COLUMNS / group).max(1);
    // The last tiles see the longest past: started first, they do not end last.
    let mut tasks = Vec::new();
    let by_head = split_columns(out, config.q_dim(), (0..kv_heads).map(|_| group * head_dim));
    for (kv_head, rows) in by_head.into_iter().enumerate() {
        let mut rows = rows.into_iter();
        for sequence in 0..batch {
            let head = Head { cache, sequence, layer, head: kv_head, head_dim, stored };
            let mut start = 0;
            while start < q.seq_len {
                // Tokens of one page see the same pages.
                let left = PAGE_LEN - (q.index_pos + start) % PAGE_LEN;
                let n = tile.min(q.seq_len - start).min(left);
                tasks.push((head, start, rows.by_ref().take(n).collect::<Vec<_>>()));
                start += n;
            }
        }
    }
    tasks.sort_by_key(|t| std::cmp::Reverse(t.1));
    on.threads.for_each(tasks.into_iter(), |(head, start, mut out)| {
        tokens(on.kernels, head, select, q, group, start, &mut out);
    });
}

/// Tokens from `start` on of a sequence, for one key/value head.
fn tokens(
    kernels: &Kernels,
    head: Head<'_>,
    select: &Selector<'_>,
    q: Queries<'_>,
    group: usize,
    start: usize,
    out: &mut [&mut [f32]],
) {
    let (head_dim, width) = (head.head_dim, head.cache.width());
    let columns = out.len() * group;
    let mut queries = Vec::with_capacity(columns * head_dim);
    for t in 0..out.len() {
        let at = (head.sequence * q.seq_len + start + t) * q.width + head.head * group * head_dim;
        queries.extend_from_slice(&q.rows[at..at + group * head_dim]);
    }
    let (mut scores, mut values) = (vec![0.0; columns * PIECE], vec![0.0; columns * width]);
    let mut stats = vec![Stats::EMPTY; columns];
    let first = q.index_pos + start;
    // Tokens of one page: none lies behind it.
    let page = first / PAGE_LEN;
    let mut pages = Vec::new();
    select.choose(head.cache, [head.sequence, head.layer, head.head], page, page + 1, &mut pages);
    let seen = |column: usize, page: u32| head.seen(first + column / group, page);
    let sums = Sums { scores: &mut scores, values: &mut values, stats: &mut stats };
    head.attend(kernels, &queries, seen, (&pages, 0.0), sums);
    let candidates = select.recalls(head.cache, page);
    let mut recall = Recall::default();
    if !candidates.is_empty() {
        recall.score(kernels, head, &queries, group, candidates.clone());
    }
    // Each token for itself: how another one's pages are cut into pieces must not change a bit.
    for t in (0..out.len()).filter(|_| !candidates.is_empty()) {
        let at = [first + t, head.layer, head.head];
        let own = recall.choose(select, t, at, head.visible(first + t, &candidates), &pages);
        let columns = t * group..(t + 1) * group;
        let queries = &queries[columns.start * head_dim..columns.end * head_dim];
        for pages in [(own.recalled, 0.0), (own.drawn, own.weight)] {
            let sums = Sums {
                scores: &mut scores,
                values: &mut values[columns.start * width..columns.end * width],
                stats: &mut stats[columns.clone()],
            };
            head.attend(kernels, queries, |_, page| head.seen(first + t, page), pages, sums);
        }
    }
    for (t, out) in out.iter_mut().enumerate() {
        for (g, out) in out.chunks_exact_mut(head_dim).enumerate() {
            let c = t * group + g;
            out.iter_mut().zip(&values[c * width..]).for_each(|(o, v)| *o = v / stats[c].denominator);
        }
    }
}

impl<'a> Head<'a> {
    /// Which positions of a page the token at `position` sees.
    fn seen(self, position: usize, page: u32) -> Range<usize> {
        let within = |p: usize| p.saturating_sub(page as usize * PAGE_LEN).min(PAGE_LEN);
        within(self.cache.first_visible(position))..within(position + 1)
    }

    /// Those of some pages of which the token at `position` sees anything.
    fn visible(self, position: usize, pages: &Range<usize>) -> Range<usize> {
        pages.start.max(self.cache.first_visible(position) / PAGE_LEN)..pages.end
    }

    /// Adds the positions of `pages`, their scores larger by `weight`, to the running softmax of every column of `queries`
    /// `[columns, head_dim]`.
    ///
    /// Column `c` sees the positions `seen(c, page)` of a page, which begin and end no earlier than those of the columns
    /// before it; every column sees one of the first or the second page, or has seen one, since a softmax over nothing is
    /// not a number.
    fn attend(
        self,
        kernels: &Kernels,
        queries: &[f32],
        seen: impl Fn(usize, u32) -> Range<usize>,
        (all, weight): (&[u32], f32),
        sums: Sums<'_>,
    ) {
        let width = self.cache.width();
        for (piece, pages) in all.chunks(SCORED_PAGES).enumerate() {
            for (c, queries) in queries.chunks(SCORED_COLUMNS * self.head_dim).enumerate() {
                let (first, n) = (c * SCORED_COLUMNS, queries.len() / self.head_dim);
                let scores = &mut sums.scores[first * PIECE..(first + n) * PIECE];
                let values = &mut sums.values[first * width..(first + n) * width];
                let stats = &mut sums.stats[first..first + n];
                let next = all.get((piece + 1) * SCORED_PAGES).copied();
                self.score(kernels, queries, pages, scores);
                mask(pages, scores, |c, page| seen(first + c, page));
                for ((scores, values), stats) in
                    scores.chunks_exact_mut(PIECE).zip(values.chunks_exact_mut(width)).zip(stats)
                {
                    let scores = &mut scores[..pages.len() * PAGE_LEN];
                    if weight != 0.0 {
                        scores.iter_mut().for_each(|score| *score += weight);
                    }
                    let (max, sum) = kernels.exp_sum(scores, stats.max);
                    let rescale = if stats.max == max { 1.0 } else { (stats.max - max).exp() };
                    *stats = Stats { max, denominator: stats.denominator * rescale + sum };
                    if rescale != 1.0 {
                        values.iter_mut().for_each(|v| *v *= rescale);
                    }
                }
                self.weigh(kernels, pages, next, scores, values);
            }
        }
    }

    /// `scores[c][p] = key_p · query_c` for the positions of some pages.
    fn score(self, kernels: &Kernels, queries: &[f32], pages: &[u32], scores: &mut [f32]) {
        let a: ArrayVec<&[f32], SCORED_COLUMNS> = queries.chunks_exact(self.head_dim).collect();
        for (i, &page) in pages.iter().enumerate() {
            let at = i * PAGE_LEN..(i + 1) * PAGE_LEN;
            let mut y: ArrayVec<&mut [f32], SCORED_COLUMNS> =
                scores.chunks_exact_mut(PIECE).map(|s| &mut s[at.clone()]).collect();
            y.iter_mut().for_each(|y| y.fill(0.0));
            // Pages are too short for the hardware to see them coming.
            let next = pages.get(i + 1).map_or_else(|| self.values(pages[0]), |next| self.keys(*next));
            kernels.matmul_t_before(self.keys(page), &a, &mut y, Some(next));
        }
    }

    /// `sums[c] += Σ_p scores[c][p] · value_p` over the positions of some pages; the keys of `next` are read then.
    fn weigh(self, kernels: &Kernels, pages: &[u32], next: Option<u32>, scores: &[f32], sums: &mut [f32]) {
        let width = self.cache.width();
        for (i, &page) in pages.iter().enumerate() {
            let (values, n) = (self.values(page), self.values(page).rows());
            let a: ArrayVec<&[f32], SCORED_COLUMNS> =
                scores.chunks_exact(PIECE).map(|s| &s[i * PAGE_LEN..i * PAGE_LEN + n]).collect();
            let mut y: ArrayVec<&mut [f32], SCORED_COLUMNS> =
                sums.chunks_exact_mut(width).map(|s| &mut s[..values.cols()]).collect();
            let next_values = pages.get(i + 1).map(|next| self.values(*next));
            let next = next_values.or_else(|| next.map(|next| self.keys(next)));
            kernels.matmul_t_before(values, &a, &mut y, next);
        }
    }

    /// The keys of a page, `[head_dim, PAGE_LEN]`.
    fn keys(self, page: u32) -> Matrix<'a> {
        self.cache.keys(self.sequence, self.layer, page as usize, self.head)
    }

    /// The values of a page, `[positions stored, head_dim]`.
    fn values(self, page: u32) -> Matrix<'a> {
        let n = PAGE_LEN.min(self.stored - page as usize * PAGE_LEN);
        self.cache.values(self.sequence, self.layer, page as usize, self.head, n)
    }
}

/// Scores of −∞ where a column does not see a position; `seen` as in [`Head::attend`].
fn mask(pages: &[u32], scores: &mut [f32], seen: impl Fn(usize, u32) -> Range<usize>) {
    let last = scores.len() / PIECE - 1;
    for (i, &page) in pages.iter().enumerate() {
        // All columns see the whole of most pages.
        if seen(0, page).end == PAGE_LEN && seen(last, page).start == 0 {
            continue;
        }
        for (c, scores) in scores.chunks_exact_mut(PIECE).enumerate() {
            let (scores, seen) = (&mut scores[i * PAGE_LEN..(i + 1) * PAGE_LEN], seen(c, page));
            scores[..seen.start].fill(f32::NEG_INFINITY);
            scores[seen.end..].fill(f32::NEG_INFINITY);
        }
    }
}

#[cfg(test)]
mod tests;
