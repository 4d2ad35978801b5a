//! Causal attention of one token over the pages of a [`KvCache`].
//!
//! ```text
//! for each page that any head reads:
//!     scores = queries of a group · keys                      of each key/value head
//!     online softmax: rescale what was summed so far, if the maximum rose
//!     sums += scores · values                                 of all heads: a position's values are read once
//! ```

pub mod plan;

use crate::{
    config::Config,
    kernel::{KernelSet, rope},
    kv_cache::{KvCache, PAGE_LEN, bounds},
    matrix::Matrix,
    scratch::AttentionScratch,
};
use core::{array, ops::Range};
use plan::Wanted;
pub use plan::{AttentionConfig, AttentionMode};

/// Query heads that read a page together at most.
const TOGETHER: usize = 8;

/// One layer's past of a token.
#[derive(Clone, Copy)]
pub(crate) struct Past<'a> {
    pub(crate) config: &'a Config,
    pub(crate) attention: &'a AttentionConfig,
    /// `[kv_heads]`: from which salience on a page is wanted, where a gate has a say.
    pub(crate) thresholds: Option<&'a [f32]>,
    /// `[kv_heads]`: how many times the mean each head recalls; none where all recall as much.
    pub(crate) recall_shares: Option<&'a [f32]>,
    pub(crate) cache: &'a KvCache<'a>,
    pub(crate) layer: usize,
    pub(crate) position: usize,
}

/// Rotates the heads of `x`.
pub(crate) fn rotate(c: &Config, x: &mut [f32], cos: &[f32], sin: &[f32]) {
    x.chunks_exact_mut(c.head_dim).for_each(|head| rope::rope(head, cos, sin, c.rope.interleaved));
}

impl Past<'_> {
    /// `attended = softmax(q · Kᵀ / √head_dim) · V` for rotated queries, over the chosen pages of the past and the token's
    /// own `keys` and `values`, rounded as the cache does.
    ///
    /// Cost: `2 · q_dim` multiply-adds and `2 · kv_dim` elements read per position.
    pub(crate) fn attend<K: KernelSet>(
        self,
        kernels: &K,
        keys: &[f32],
        values: &[f32],
        s: &mut AttentionScratch<'_>,
    ) {
        let Config { head_dim, .. } = *self.config;
        let scale = 1.0 / libm::sqrtf(head_dim as f32);
        s.q.iter_mut().for_each(|q| *q *= scale);
        let heads = s.q.chunks_exact(head_dim).zip(s.attended.chunks_exact_mut(head_dim));
        for (head, ((q, y), stats)) in heads.zip(&mut *s.stats).enumerate() {
            let own = head / self.config.group_size() * head_dim;
            *stats = [kernels.dot(q, &keys[own..own + head_dim]), 1.0];
            y.copy_from_slice(&values[own..own + head_dim]);
        }
        let pages = self.cache.visible_pages(self.position);
        let dense = self.attention.mode == AttentionMode::Dense;
        let weight = if dense { 0.0 } else { self.choose(kernels, s) };
        let sinks = if self.position > 0 { 0..1 } else { 0..0 };
        sinks.chain(pages).for_each(|page| self.read(kernels, page, weight, s));
        for (y, [_, denominator]) in s.attended.chunks_exact_mut(head_dim).zip(&*s.stats) {
            let scale = 1.0 / denominator;
            y.iter_mut().for_each(|y| *y *= scale);
        }
    }

    /// Positions of a page that the token sees.
    fn seen(self, page: usize) -> Range<usize> {
        let within = |p: usize| p.saturating_sub(page * PAGE_LEN).min(PAGE_LEN);
        within(self.config.first_visible(self.position))..within(self.position)
    }

    /// Adds a page to the running softmax of every head that reads it.
    /// The scores of one that stands for others are `weight` larger.
    fn read<K: KernelSet>(self, kernels: &K, page: usize, weight: f32, s: &mut AttentionScratch<'_>) {
        let Config { head_dim, num_key_value_heads: kv_heads, .. } = *self.config;
        let (group, seen) = (self.config.group_size(), self.seen(page));
        let bits = s.chosen.len() / (2 * kv_heads);
        let dense = self.attention.mode == AttentionMode::Dense;
        let slot = self.cache.slot(page);
        let bit = |bits_of: &[u32], list: usize| bits_of[list * bits + slot / 32] >> (slot % 32) & 1 == 1;
        let chosen = |bits_of: &[u32], head: usize| dense || bit(bits_of, head);
        if seen.is_empty() || !(0..kv_heads).any(|head| chosen(s.chosen, head)) {
            return;
        }
        let (shape, elements) = (self.cache.shape(), self.cache.page(self.layer, page));
        for head in (0..kv_heads).filter(|head| chosen(s.chosen, *head)) {
            let heads = head * group..(head + 1) * group;
            let scores = &mut s.scores[heads.start * PAGE_LEN..heads.end * PAGE_LEN];
            scores.fill(0.0);
            let queries = &s.q[heads.start * head_dim..heads.end * head_dim];
            let keys = shape.keys(elements, head * head_dim..(head + 1) * head_dim);
            weighted_rows(kernels, keys, queries, scores);
            if !dense && bit(s.chosen, kv_heads + head) {
                scores.iter_mut().for_each(|score| *score += weight);
            }
            let sums = s.attended[heads.start * head_dim..heads.end * head_dim].chunks_exact_mut(head_dim);
            for ((scores, sums), stats) in
                scores.chunks_exact_mut(PAGE_LEN).zip(sums).zip(&mut s.stats[heads])
            {
                soften(kernels, &mut scores[seen.clone()], stats, sums);
            }
        }
        let values = shape.values(elements, 0, seen.end);
        let row = &mut s.row[..values.cols()];
        for position in seen {
            values.dequantize_row(position, row);
            for head in (0..kv_heads).filter(|head| chosen(s.chosen, *head)) {
                let value = &row[head * head_dim..(head + 1) * head_dim];
                for i in head * group..(head + 1) * group {
                    let sum = &mut s.attended[i * head_dim..(i + 1) * head_dim];
                    kernels.axpy(s.scores[i * PAGE_LEN + position], value, sum);
                }
            }
        }
    }

    /// The pages behind a model's sliding window and those that the ring still has are not among these.
    fn held(self) -> Range<usize> {
        let (page, ring) = (self.position / PAGE_LEN, self.cache.visible_pages(self.position).start);
        let first = self.config.first_visible(page * PAGE_LEN) / PAGE_LEN;
        let end = self.position.div_ceil(PAGE_LEN);
        // Page 0 is always held.
        let first = if ring > 1 { first.max(ring) } else { first };
        first.min(end)..end
    }

    /// Sets the bits of the pages that each head reads; returns the weight of those that stand for others, which is that of all
    /// heads.
    fn choose<K: KernelSet>(self, kernels: &K, s: &mut AttentionScratch<'_>) -> f32 {
        let (held, page, heads) = (self.held(), self.position / PAGE_LEN, self.config.num_key_value_heads);
        let bits = s.chosen.len() / (2 * heads);
        s.chosen.fill(0);
        let recalls = self.attention.recalls(held.start, page);
        let first = self.config.first_visible(self.position) / PAGE_LEN;
        let seen = recalls.start.max(first).min(recalls.end)..recalls.end;
        let mut weight = 0.0;
        for head in 0..heads {
            let salience = |page: usize| self.cache.salience(self.layer, page, head, self.position);
            let gate = self.thresholds.map(|t| Wanted { threshold: t[head], salience: &salience });
            let n = self.attention.choose(held.clone(), page, gate, s.pages);
            let m = if seen.is_empty() { 0 } else { self.recall(kernels, head, seen.clone(), n, s) };
            // Sinks are those that were dropped from the ring's front.
            let sinks = held.start > 1 && self.attention.sinks > 0;
            s.chosen[head * bits] |= u32::from(sinks);
            let mut set = |list: usize, page: u32| {
                let slot = self.cache.slot(page as usize);
                s.chosen[list * bits + slot / 32] |= 1 << (slot % 32);
            };
            s.pages[..n].iter().chain(&s.recalled[..m]).for_each(|page| set(head, *page));
            if self.attention.mode == AttentionMode::Sampled && !seen.is_empty() {
                let seed = plan::sample_seed(self.position, self.layer, head);
                let sample = self.attention.sample(seen.clone(), &s.recalled[..m], seed, s.pages);
                weight = sample.weight;
                for page in &s.pages[..sample.pages] {
                    set(head, *page);
                    set(heads + head, *page);
                }
            }
        }
        weight
    }

    /// Lists the pages that a head's queries recall, beside the first `n` of `s.pages`.
    fn recall<K: KernelSet>(
        self,
        kernels: &K,
        head: usize,
        pages: Range<usize>,
        n: usize,
        s: &mut AttentionScratch<'_>,
    ) -> usize {
        let (head_dim, group) = (self.config.head_dim, self.config.group_size());
        let queries = s.q[head * group * head_dim..(head + 1) * group * head_dim].chunks_exact(head_dim);
        queries.zip(s.parts.chunks_exact_mut(2 * head_dim)).for_each(|(q, p)| bounds::parts(q, p));
        let bounds = self.cache.bounds(self.layer, head);
        let scores = &mut s.bounds[..group * bounds.cols()];
        scores.fill(0.0);
        weighted_rows(kernels, bounds, s.parts, scores);
        let (best, others) = scores.split_at_mut(bounds.cols());
        best.iter_mut().for_each(|b| *b = b.max(f32::NEG_INFINITY));
        for others in others.chunks_exact(best.len()) {
            best.iter_mut().zip(others).for_each(|(b, s)| *b = s.max(*b));
        }
        let bound = |page: u32| best[self.cache.slot(page as usize)];
        let share = self.recall_shares.map_or(1.0, |shares| shares[head]);
        self.attention.recall(pages, &s.pages[..n], share, bound, s.recalled)
    }
}

/// `y[c] += a[c] · w` for columns that lie side by side.
fn weighted_rows<K: KernelSet>(kernels: &K, w: Matrix<'_>, a: &[f32], y: &mut [f32]) {
    let (rows, cols) = (w.rows(), w.cols());
    for (a, y) in a.chunks(TOGETHER * rows).zip(y.chunks_mut(TOGETHER * cols)) {
        let n = a.len() / rows;
        let (mut a, mut y) = (a.chunks_exact(rows), y.chunks_exact_mut(cols));
        let a: [&[f32]; TOGETHER] = array::from_fn(|_| a.next().unwrap_or_default());
        let mut y: [&mut [f32]; TOGETHER] = array::from_fn(|_| y.next().unwrap_or_default());
        kernels.matmul_t(w, &a[..n], &mut y[..n]);
    }
}

/// Makes weights of scores, and rescales what was summed so far where the maximum rose.
fn soften<K: KernelSet>(kernels: &K, scores: &mut [f32], stats: &mut [f32; 2], sums: &mut [f32]) {
    let [before, denominator] = *stats;
    let (max, sum) = kernels.exp_sum(scores, before);
    if max == before {
        stats[1] += sum;
        return;
    }
    let rescale = libm::expf(before - max);
    sums.iter_mut().for_each(|y| *y *= rescale);
    *stats = [max, denominator * rescale + sum];
}
