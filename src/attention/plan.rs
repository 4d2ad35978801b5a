//! Which pages a token reads: sinks, window, and what the gate or the query itself brings in between.
//!
//! The rule is [`candle_sparse_core::attention::plan`]'s; here its lists are made for a whole batch, and kept while they stay the same.

use super::Head;
use crate::tuning::SCORED_COLUMNS;
use crate::{
    Error,
    gate::FastGrnnGate,
    kv_cache::{KvCache, PAGE_LEN},
};
use arrayvec::ArrayVec;
use candle_core::Result;
use candle_sparse_core::{
    attention::{
        AttentionConfig, AttentionMode,
        plan::{Sample, Wanted, sample_seed},
    },
    kv_cache::bounds,
};
use candle_sparse_kernels::Kernels;
use std::ops::Range;

/// Chooses pages: the settings, and of all layers the gates and how much each head recalls, where there are any.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Selector<'a> {
    config: AttentionConfig,
    gates: &'a [FastGrnnGate],
    /// `[layers][kv_heads]`: how many times the mean.
    recall_shares: &'a [Vec<f32>],
}

impl<'a> Selector<'a> {
    /// Everything.
    #[cfg(test)]
    pub(crate) const DENSE: Selector<'static> =
        Selector { config: AttentionConfig::new(AttentionMode::Dense), gates: &[], recall_shares: &[] };

    /// With the gates of all layers, `layers` of them, or none.
    ///
    /// # Errors
    /// [`AttentionMode::Gated`] without gates.
    pub(crate) fn new(config: AttentionConfig, gates: &'a [FastGrnnGate], layers: usize) -> Result<Self> {
        if config.mode == AttentionMode::Gated && gates.len() != layers {
            let problem = format!(
                "gated attention: the model has {layers} layers and gates for {}: fit them with `calibrate`, or choose \
                 recall, which needs none",
                gates.len()
            );
            return Err(Error::Setting { name: "attention", problem }.into());
        }
        Ok(Self { config, gates, recall_shares: &[] })
    }

    /// With how many times the mean each head of all layers recalls; none: all recall as much.
    #[must_use]
    pub(crate) fn with_recall_shares(self, recall_shares: &'a [Vec<f32>]) -> Self {
        Self { recall_shares, ..self }
    }

    /// The settings.
    #[must_use]
    pub(crate) fn config(&self) -> &AttentionConfig {
        &self.config
    }

    /// The most pages that a head of a layer recalls; at least one where any head of the model recalls some.
    #[must_use]
    pub(super) fn most_recalled(&self, layer: usize) -> usize {
        let shares = self.recall_shares.get(layer).into_iter().flatten().copied();
        let most = self.config.recalled_pages_of(shares.reduce(f32::max).unwrap_or(1.0));
        most.max(self.config.recalled_pages().min(1))
    }

    /// The gate of a layer, where it has a say.
    #[must_use]
    pub(crate) fn gate(&self, layer: usize) -> Option<&'a FastGrnnGate> {
        if self.config.mode == AttentionMode::Gated { self.gates.get(layer) } else { None }
    }

    /// Appends the pages before page `end` that tokens of page `page` read, in order, recalled ones not among them.
    pub(super) fn choose(
        &self,
        cache: &KvCache,
        [sequence, layer, head]: [usize; 3],
        page: usize,
        end: usize,
        out: &mut Vec<u32>,
    ) {
        let (held, start) = (cache.first_page(page)..end, out.len());
        let salience = |page: usize| cache.salience(sequence, layer, page, head);
        let gate = self.gate(layer).map(|g| Wanted { threshold: g.threshold[head], salience: &salience });
        out.resize(start + held.len(), 0);
        let n = self.config.choose(held, page, gate, &mut out[start..]);
        out.truncate(start + n);
    }

    /// The pages among which a token of page `page` recalls; empty where it recalls nothing.
    pub(super) fn recalls(&self, cache: &KvCache, page: usize) -> Range<usize> {
        self.config.recalls(cache.first_page(page), page)
    }
}

/// Makes room for `n` elements in all, where `Vec::reserve` would make room for `n` more.
pub(super) fn reserve<T>(v: &mut Vec<T>, n: usize) {
    v.reserve(n.saturating_sub(v.len()));
}

/// Working memory of a recall.
#[derive(Clone, Debug, Default)]
pub(super) struct Recall {
    /// Negative and positive parts of queries, `[columns, 2 · head_dim]`.
    parts: Vec<f32>,
    /// `[columns, 32]`
    scores: Vec<f32>,
    /// `[tokens, pages]`
    bounds: Vec<f32>,
    /// Page of the first of a token's bounds, and how many it has.
    start: usize,
    stride: usize,
    order: Vec<u32>,
    drawn: Vec<u32>,
}

/// The pages that a token chose by itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct ByToken<'a> {
    /// Those that its query recalls, in order.
    pub(super) recalled: &'a [u32],
    /// Those that stand for all others, in order.
    pub(super) drawn: &'a [u32],
    /// Added to the scores of these.
    pub(super) weight: f32,
}

impl Recall {
    /// Makes room for lone tokens.
    pub(super) fn reserve(&mut self, group: usize, head_dim: usize, pages: usize) {
        reserve(&mut self.parts, 2 * group * head_dim);
        reserve(&mut self.scores, group * PAGE_LEN);
        // They begin and end with whole groups.
        reserve(&mut self.bounds, pages.next_multiple_of(PAGE_LEN) + PAGE_LEN);
        reserve(&mut self.order, pages);
        reserve(&mut self.drawn, pages);
    }

    /// Bounds of some pages for `queries` `[tokens · group, head_dim]`.
    pub(super) fn score(
        &mut self,
        kernels: &Kernels,
        head: Head<'_>,
        queries: &[f32],
        group: usize,
        pages: Range<usize>,
    ) {
        let (head_dim, columns) = (head.head_dim, queries.len() / head.head_dim);
        let tokens = columns / group;
        self.start = pages.start / PAGE_LEN * PAGE_LEN;
        self.stride = (pages.end - self.start).next_multiple_of(PAGE_LEN);
        self.parts.clear();
        self.parts.resize(2 * queries.len(), 0.0);
        let columns_of = queries.chunks_exact(head_dim).zip(self.parts.chunks_exact_mut(2 * head_dim));
        columns_of.for_each(|(query, parts)| bounds::parts(query, parts));
        self.bounds.clear();
        self.bounds.resize(tokens * self.stride, f32::NEG_INFINITY);
        for first in (self.start..pages.end).step_by(PAGE_LEN) {
            let group_of = |first| head.cache.bounds(head.sequence, head.layer, first / PAGE_LEN, head.head);
            let (bounds, next) = (group_of(first), Some(first + PAGE_LEN).filter(|n| *n < pages.end));
            self.scores.clear();
            self.scores.resize(columns * PAGE_LEN, 0.0);
            let all = self.parts.chunks(2 * head_dim * SCORED_COLUMNS);
            for (parts, scores) in all.zip(self.scores.chunks_mut(PAGE_LEN * SCORED_COLUMNS)) {
                let a: ArrayVec<&[f32], SCORED_COLUMNS> = parts.chunks_exact(2 * head_dim).collect();
                let mut y: ArrayVec<&mut [f32], SCORED_COLUMNS> = scores.chunks_exact_mut(PAGE_LEN).collect();
                kernels.matmul_t_before(bounds, &a, &mut y, next.map(group_of));
            }
            for (token, scores) in self.scores.chunks_exact(group * PAGE_LEN).enumerate() {
                let at = token * self.stride + first - self.start;
                let bounds = &mut self.bounds[at..at + PAGE_LEN];
                for scores in scores.chunks_exact(PAGE_LEN) {
                    bounds.iter_mut().zip(scores).for_each(|(b, s)| *b = s.max(*b));
                }
            }
        }
    }

    /// The pages that the `token`th token, at `position` in a layer and for a head, chooses of `pages`, some of those that were
    /// scored, without those that `chosen`, increasing, has.
    pub(super) fn choose(
        &mut self,
        select: &Selector<'_>,
        token: usize,
        [position, layer, head]: [usize; 3],
        pages: Range<usize>,
        chosen: &[u32],
    ) -> ByToken<'_> {
        let bound = |page: u32| self.bounds[token * self.stride + page as usize - self.start];
        self.order.resize(pages.len(), 0);
        let share = select.recall_shares.get(layer).map_or(1.0, |shares| shares[head]);
        let n = select.config.recall(pages.clone(), chosen, share, bound, &mut self.order);
        self.order.truncate(n);
        let mut sample = Sample { pages: 0, weight: 0.0 };
        if select.config.sampled_pages() > 0 {
            self.drawn.resize(pages.len(), 0);
            let seed = sample_seed(position, layer, head);
            sample = select.config.sample(pages, &self.order, seed, &mut self.drawn);
        }
        ByToken { recalled: &self.order, drawn: &self.drawn[..sample.pages], weight: sample.weight }
    }
}

/// The pages of every layer and head for a lone token, kept while they stay the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct PagePlan {
    /// What it was made for: generation of the cache, position's page, pages stored, settings.
    made_for: Option<(u64, usize, usize, AttentionConfig)>,
    pages: Vec<u32>,
    /// Where each head's list ends, `[layer, head]`; one for all where attention is dense.
    ends: Vec<usize>,
}

impl PagePlan {
    /// Chooses the pages for a token at `position`, unless that was done.
    pub(crate) fn update(
        &mut self,
        select: &Selector<'_>,
        cache: &KvCache,
        [layers, heads]: [usize; 2],
        position: usize,
    ) {
        let (page, end) = (position / PAGE_LEN, position.div_ceil(PAGE_LEN));
        let wanted = Some((cache.generation(), page, end, select.config));
        if self.made_for == wanted {
            return;
        }
        let lists = if select.config.mode == AttentionMode::Dense { 1 } else { layers * heads };
        // A list is made among all pages before it is cut.
        let all = cache.pages_with_room();
        reserve(&mut self.pages, lists * all.min(select.config.most_pages()) + all);
        reserve(&mut self.ends, layers * heads);
        self.made_for = wanted;
        self.pages.clear();
        self.ends.clear();
        if select.config.mode == AttentionMode::Dense {
            self.pages.extend(cache.first_page(page) as u32..end as u32);
            return;
        }
        for layer in 0..layers {
            for head in 0..heads {
                select.choose(cache, [0, layer, head], page, end, &mut self.pages);
                self.ends.push(self.pages.len());
            }
        }
    }

    /// The pages of head `i` of all layers' heads.
    pub(super) fn of(&self, i: usize) -> &[u32] {
        let start = if i == 0 { Some(0) } else { self.ends.get(i - 1).copied() };
        match (start, self.ends.get(i)) {
            (Some(start), Some(&end)) => &self.pages[start..end],
            _ => &self.pages,
        }
    }
}
