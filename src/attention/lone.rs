//! Attention of one token over its sequence's past, shared by a [team](crate::team).

mod several;

use super::{
    Head, PIECE, Stats, Sums,
    plan::{ByToken, PagePlan, Recall, Selector, reserve},
};
use crate::tuning::{ATTENTION_SHARES, HEAD_SHARES, MIN_SHARE_PAGES};
use crate::{
    kv_cache::{KvCache, PAGE_LEN, most_pages},
    team::{Member, Outcome, Outputs},
};
use candle_sparse_core::{Config, KernelSet, attention::plan::Sample};
use candle_sparse_kernels::Kernels;
pub(crate) use several::{TokensScratch, lone_tokens};
use std::ops::Range;

/// A thread's working memory of [`lone_token`], kept between steps.
#[derive(Debug, Default)]
pub(crate) struct LoneScratch {
    scores: Vec<f32>,
    parts: Vec<f32>,
    stats: Vec<Stats>,
    recall: Recall,
    /// The pages that each head recalls and draws, as numbers; those not needed are negative.
    recalled: Vec<f32>,
    /// The pages of each head, where they are not the plan's.
    pages: Vec<u32>,
    ends: Vec<usize>,
    /// How many pages at the end of each list stand for others, and what is added to their scores.
    drawn: (usize, f32),
}

impl LoneScratch {
    /// Makes room for what the cache has room for, so that no step within that allocates.
    pub(crate) fn resize(&mut self, config: &Config, cache: &KvCache) {
        let group = config.group_size();
        self.parts.resize(shares_room(config), 0.0);
        self.scores.resize(group * PIECE, 0.0);
        self.stats.resize(group, Stats::EMPTY);
        let pages = cache.pages_with_room();
        self.recall.reserve(group, config.head_dim, pages);
        // A thread that was late so far takes part for the first time in any step.
        reserve(&mut self.recalled, config.num_key_value_heads * pages);
        reserve(&mut self.pages, config.num_key_value_heads * pages);
        reserve(&mut self.ends, config.num_key_value_heads);
    }
}

/// A token of one layer, alone in its step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Token<'a> {
    /// Holds the positions before it.
    pub cache: &'a KvCache,
    /// Chose the pages, and recalls others.
    pub select: Selector<'a>,
    /// The pages that were chosen.
    pub plan: &'a PagePlan,
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
        let share = pages.div_ceil(most_shares(config)).max(MIN_SHARE_PAGES);
        let part = config.group_size() * (config.head_dim.next_multiple_of(PAGE_LEN) + 2);
        // The token itself is in the first share, which there is even without a past.
        Self { share, shares: pages.div_ceil(share).max(1), part }
    }
}

/// What the phases of [`lone_token`] put out at most in a layer.
pub(crate) fn declare(
    config: &Config,
    select: &Selector<'_>,
    layer: usize,
    cache: &KvCache,
    outputs: &mut Outputs,
) {
    outputs.add(config.num_key_value_heads * own_pages(select, layer, cache).iter().sum::<usize>());
    outputs.add(shares_room(config));
}

/// Pages that a head recalls at most, and draws: whatever is asked for, no more than there are.
fn own_pages(select: &Selector<'_>, layer: usize, cache: &KvCache) -> [usize; 2] {
    let most = [select.most_recalled(layer), select.config().sampled_pages()];
    most.map(|pages| pages.min(cache.pages_with_room()))
}

fn shares_room(config: &Config) -> usize {
    let pages = most_pages(config);
    config.num_key_value_heads
        * pages.div_ceil(MIN_SHARE_PAGES).min(most_shares(config))
        * Cut::new(config, 1).part
}

fn most_shares(config: &Config) -> usize {
    (ATTENTION_SHARES / config.num_key_value_heads).clamp(2, HEAD_SHARES)
}

/// `out = softmax(q · Kᵀ) · V` over the chosen pages of the positions before a token and the token itself, in the sliding
/// window of the model that the cache was made for.
///
/// `out` is `[q_dim]`. Cost: `2 · q_dim` multiply-adds and `2 · kv_dim` elements read per position, shared by the
/// threads of the team. Allocates nothing after [`LoneScratch::resize`].
///
/// # Errors
/// The team's computation is over.
///
/// # Panics
/// Shapes do not fit.
pub(crate) fn lone_token(
    member: &mut Member<'_>,
    kernels: &Kernels,
    config: &Config,
    token: Token<'_>,
    scratch: &mut LoneScratch,
    out: &mut [f32],
) -> Outcome {
    let (group, head_dim, kv_heads) = (config.group_size(), config.head_dim, config.num_key_value_heads);
    let width = token.cache.width();
    scratch.resize(config, token.cache);
    let candidates = token.select.recalls(token.cache, token.position / PAGE_LEN);
    let recalls = !candidates.is_empty();
    if recalls {
        token.recall(member, kernels, config, candidates, scratch)?;
    }
    let LoneScratch { scores, parts, stats, pages, ends, drawn, .. } = scratch;
    let (drawn, weight) = if recalls { *drawn } else { (0, 0.0) };
    let pages_of = |head: usize| match head.checked_sub(1) {
        _ if !recalls => token.plan.of(token.layer * kv_heads + head),
        None => &pages[..ends[0]],
        Some(before) => &pages[ends[before]..ends[head]],
    };
    let counts = (0..kv_heads).map(|head| pages_of(head).len());
    let (most, all) = counts.fold((0, 0), |(most, all), n| (n.max(most), all + n));
    let cut = Cut::new(config, most);
    let parts = &mut parts[..kv_heads * cut.shares * cut.part];

    // Keys and values, taken as f32.
    let piece = member.piece(kv_heads * cut.shares, all * PAGE_LEN * head_dim * 8, 1);
    member.phase(parts, piece * cut.part, |i, out| {
        for (j, out) in out.chunks_exact_mut(cut.part).enumerate() {
            let (head, share) = ((i * piece + j) / cut.shares, (i * piece + j) % cut.shares);
            let pages = Pages { all: pages_of(head), drawn, weight };
            token.share(kernels, [head, head_dim], (cut, share), pages, scores, stats, out);
        }
    })?;
    let by_head = parts.chunks_exact(cut.shares * cut.part);
    for (parts, out) in by_head.zip(out.chunks_exact_mut(group * head_dim)) {
        let shares = || parts.chunks_exact(cut.part).map(|part| part.split_at(group * width));
        merge(shares, [width, head_dim], out);
    }
    Ok(())
}

/// The pages of a head, the last `drawn` of which stand for others too: `weight` is added to their scores.
#[derive(Clone, Copy)]
struct Pages<'a> {
    all: &'a [u32],
    drawn: usize,
    weight: f32,
}

/// Working memory of [`share`]: scores `[columns, PIECE]`, and what is known of each column's softmax.
struct Room<'a> {
    scores: &'a mut [f32],
    stats: &'a mut [Stats],
}

/// The sums, maxima and denominators of a share of a head's pages, for tokens of one sequence whose lists of pages are the same:
/// `queries` `[tokens · group, head_dim]`, `out` a part for each.
fn share(
    kernels: &Kernels,
    tokens: &[Token<'_>],
    queries: &[f32],
    [head, head_dim, group]: [usize; 3],
    (cut, share): (Cut, usize),
    list: Pages<'_>,
    room: Room<'_>,
    out: &mut [f32],
) {
    let (width, last) = (tokens[0].cache.width(), tokens[tokens.len() - 1]);
    let Room { scores, stats } = room;
    let (values, ends) = out.split_at_mut(tokens.len() * group * width);
    values.fill(0.0);
    stats.fill(Stats::EMPTY);
    if share == 0 {
        let of_tokens = queries.chunks_exact(group * head_dim).zip(values.chunks_exact_mut(group * width));
        for ((token, (queries, values)), stats) in
            tokens.iter().zip(of_tokens).zip(stats.chunks_exact_mut(group))
        {
            token.begin(kernels, head, queries, values, stats);
        }
    }
    let Pages { all, drawn, weight } = list;
    let exact = all.len() - drawn;
    let end = ((share + 1) * cut.share).min(all.len());
    let start = (share * cut.share).min(end);
    let head = last.head(head, head_dim);
    // Its own position is not in the cache; the first page of all, of which it may see nothing, is in the first share.
    let seen = |column: usize, page: u32| {
        let position = tokens[column / group].position;
        let seen = head.seen(position, page);
        seen.start..seen.end.min(position - page as usize * PAGE_LEN)
    };
    for pages in
        [(&all[start.min(exact)..end.min(exact)], 0.0), (&all[start.max(exact)..end.max(exact)], weight)]
    {
        let sums = Sums { scores: &mut *scores, values: &mut *values, stats: &mut *stats };
        head.attend(kernels, queries, seen, pages, sums);
    }
    for (end, stats) in ends.as_chunks_mut().0.iter_mut().zip(&*stats) {
        *end = [stats.max, stats.denominator];
    }
}

impl<'a> Token<'a> {
    fn head(self, head: usize, head_dim: usize) -> Head<'a> {
        let Self { cache, layer, position, .. } = self;
        Head { cache, sequence: 0, layer, head, head_dim, stored: position }
    }

    /// The sums, maxima and denominators of a share of a head's pages.
    fn share(
        self,
        kernels: &Kernels,
        head: [usize; 2],
        cut: (Cut, usize),
        list: Pages<'_>,
        scores: &mut [f32],
        stats: &mut [Stats],
        out: &mut [f32],
    ) {
        let [head, head_dim] = head;
        let group = stats.len();
        let queries = &self.queries[head * group * head_dim..(head + 1) * group * head_dim];
        share(kernels, &[self], queries, [head, head_dim, group], cut, list, Room { scores, stats }, out);
    }

    /// The pages that a head's queries recall and draw, beside those `chosen`.
    fn own_pages<'r>(
        self,
        kernels: &Kernels,
        [head, head_dim, group]: [usize; 3],
        candidates: &Range<usize>,
        recall: &'r mut Recall,
        chosen: &[u32],
    ) -> ByToken<'r> {
        let queries = &self.queries[head * group * head_dim..(head + 1) * group * head_dim];
        let cached = self.head(head, head_dim);
        recall.score(kernels, cached, queries, group, candidates.clone());
        let visible = cached.visible(self.position, candidates);
        recall.choose(&self.select, 0, [self.position, self.layer, head], visible, chosen)
    }

    /// Lists the pages of each head with those that its queries recall, and behind them those that it draws.
    fn recall(
        self,
        member: &mut Member<'_>,
        kernels: &Kernels,
        config: &Config,
        candidates: Range<usize>,
        scratch: &mut LoneScratch,
    ) -> Outcome {
        let (group, head_dim, kv_heads) = (config.group_size(), config.head_dim, config.num_key_value_heads);
        let [most, draws] = own_pages(&self.select, self.layer, self.cache);
        let count = most + draws;
        let LoneScratch { recall, recalled, pages, ends, drawn, .. } = scratch;
        recalled.resize(kv_heads * count, 0.0);
        let chosen = |head: usize| self.plan.of(self.layer * kv_heads + head);
        let piece = member.piece(kv_heads, kv_heads * candidates.len() * 2 * head_dim * 4, 1);
        member.phase(recalled, piece * count, |i, out| {
            for (j, out) in out.chunks_exact_mut(count).enumerate() {
                let head = i * piece + j;
                let own = self.own_pages(kernels, [head, head_dim, group], &candidates, recall, chosen(head));
                out.fill(-1.0);
                let (best, sample) = out.split_at_mut(most);
                best.iter_mut().zip(own.recalled).for_each(|(o, &page)| *o = page as f32);
                sample.iter_mut().zip(own.drawn).for_each(|(o, &page)| *o = page as f32);
            }
        })?;
        // As many for every head: where pages are drawn, every head recalls as many.
        let n = self.head(0, head_dim).visible(self.position, &candidates).len();
        let config = self.select.config();
        let Sample { pages: m, weight } = config.sample_of(n - config.recalled_pages().min(n));
        *drawn = (m, weight);
        pages.clear();
        ends.clear();
        for (head, recalled) in recalled.chunks_exact(count).enumerate() {
            pages.extend_from_slice(chosen(head));
            pages.extend(recalled.iter().filter(|p| **p >= 0.0).map(|p| *p as u32));
            ends.push(pages.len());
        }
        Ok(())
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

/// Adds up the shares of a head: of each the sums `[group, width]`, and maximum and denominator of each column.
fn merge<'a, I: Iterator<Item = (&'a [f32], &'a [f32])>>(
    shares: impl Fn() -> I,
    [width, head_dim]: [usize; 2],
    out: &mut [f32],
) {
    for (g, out) in out.chunks_exact_mut(head_dim).enumerate() {
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

#[cfg(test)]
mod tests;
