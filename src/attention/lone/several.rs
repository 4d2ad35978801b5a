//! The same for tokens of several sequences, and for several tokens of one, with the bits of a lone one.

use super::{Cut, PIECE, Pages, Recall, Room, Stats, Token, merge, share};
use crate::{kv_cache::PAGE_LEN, weight::Compute};
use candle_sparse_core::Config;
use candle_sparse_kernels::Kernels;
use std::ops::Range;

/// Working memory of [`lone_tokens`]: results of shares, and of each task what it computes them in.
#[derive(Debug, Default)]
pub(crate) struct TokensScratch {
    parts: Vec<f32>,
    tasks: Vec<TaskScratch>,
}

#[derive(Debug, Default)]
struct TaskScratch {
    queries: Vec<f32>,
    scores: Vec<f32>,
    stats: Vec<Stats>,
}

/// Tokens of one sequence that read the same pages together.
struct Group {
    tokens: Range<usize>,
    cut: Cut,
    /// `[kv_heads]`
    lists: Vec<List>,
}

/// The pages of a head: the plan's, or with those that its query chose.
enum List {
    Planned,
    Own { pages: Vec<u32>, drawn: usize, weight: f32 },
}

/// One share of a head's pages.
#[derive(Clone, Copy)]
struct Task {
    group: usize,
    head: usize,
    share: usize,
}

/// The tokens of some sequences, each with the bits of [`lone_token`](super::lone_token): `out` is `[tokens, q_dim]`. The caches
/// may hold later positions than a token's own, which it does not see.
///
/// Cost: that of a lone token for each; the reads are shared by tokens of a sequence that stand in one page.
pub(crate) fn lone_tokens(
    on: Compute<'_>,
    config: &Config,
    tokens: &[Token<'_>],
    scratch: &mut TokensScratch,
    out: &mut [f32],
) {
    let kv_heads = config.num_key_value_heads;
    let groups = groups(on.kernels, config, tokens);
    let mut tasks = Vec::new();
    for (i, group) in groups.iter().enumerate() {
        let of_head = |head| (0..group.cut.shares).map(move |share| Task { group: i, head, share });
        tasks.extend((0..kv_heads).flat_map(of_head));
    }
    let len = |task: &Task| groups[task.group].tokens.len() * groups[task.group].cut.part;
    scratch.parts.resize(tasks.iter().map(len).sum(), 0.0);
    scratch.tasks.resize_with(tasks.len().max(scratch.tasks.len()), TaskScratch::default);
    let mut rest = &mut *scratch.parts;
    let with_room = tasks.iter().zip(&mut scratch.tasks).map(|(task, own)| {
        let (part, behind) = std::mem::take(&mut rest).split_at_mut(len(task));
        rest = behind;
        (task, own, part)
    });
    on.threads.for_each(with_room, |(task, own, part)| {
        let group = &groups[task.group];
        own.compute(on.kernels, config, &tokens[group.tokens.clone()], *task, group, part);
    });
    add_up(config, tokens, &groups, &scratch.parts, out);
}

/// Tokens that follow each other in a page of one sequence, and the pages that they read.
fn groups(kernels: &Kernels, config: &Config, tokens: &[Token<'_>]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    let mut recall = Recall::default();
    for (i, token) in tokens.iter().enumerate() {
        if let Some(group) = groups.last_mut().filter(|g| token.reads_as(&tokens[g.tokens.start])) {
            group.tokens.end = i + 1;
            continue;
        }
        let lists: Vec<_> = (0..config.num_key_value_heads)
            .map(|head| token.list(kernels, config, head, &mut recall))
            .collect();
        let longest =
            lists.iter().enumerate().map(|(head, list)| list.pages(token, config, head).all.len()).max();
        groups.push(Group { tokens: i..i + 1, cut: Cut::new(config, longest.unwrap_or(0)), lists });
    }
    groups
}

impl List {
    fn pages<'a>(&'a self, token: &Token<'a>, config: &Config, head: usize) -> Pages<'a> {
        match self {
            Self::Planned => {
                let all = token.plan.of(token.layer * config.num_key_value_heads + head);
                Pages { all, drawn: 0, weight: 0.0 }
            }
            Self::Own { pages, drawn, weight } => Pages { all: pages, drawn: *drawn, weight: *weight },
        }
    }
}

impl Token<'_> {
    /// Whether it reads the pages that an earlier token reads, and may do so together with it.
    fn reads_as(&self, other: &Self) -> bool {
        let plain = self.select.recalls(self.cache, self.position / PAGE_LEN).is_empty();
        // The first token of a page does not read it. What is not a number would spoil those that do not see it.
        let same_page =
            !other.position.is_multiple_of(PAGE_LEN) && self.position / PAGE_LEN == other.position / PAGE_LEN;
        plain
            && same_page
            && std::ptr::eq(self.cache, other.cache)
            && self.values.iter().chain(other.values).all(|v| v.is_finite())
    }

    /// The pages of a head.
    fn list(&self, kernels: &Kernels, config: &Config, head: usize, recall: &mut Recall) -> List {
        let candidates = self.select.recalls(self.cache, self.position / PAGE_LEN);
        if candidates.is_empty() {
            return List::Planned;
        }
        let chosen = self.plan.of(self.layer * config.num_key_value_heads + head);
        let shape = [head, config.head_dim, config.group_size()];
        let own = self.own_pages(kernels, shape, &candidates, recall, chosen);
        let pages = chosen.iter().chain(own.recalled).chain(own.drawn).copied().collect();
        List::Own { pages, drawn: own.drawn.len(), weight: own.weight }
    }
}

impl TaskScratch {
    fn compute(
        &mut self,
        kernels: &Kernels,
        config: &Config,
        tokens: &[Token<'_>],
        task: Task,
        group: &Group,
        part: &mut [f32],
    ) {
        let (size, head_dim) = (config.group_size(), config.head_dim);
        let columns = tokens.len() * size;
        self.scores.resize(columns * PIECE, 0.0);
        self.stats.resize(columns, Stats::EMPTY);
        self.queries.clear();
        let own = task.head * size * head_dim..(task.head + 1) * size * head_dim;
        tokens.iter().for_each(|token| self.queries.extend_from_slice(&token.queries[own.clone()]));
        let (shape, cut) = ([task.head, head_dim, size], (group.cut, task.share));
        let list = group.lists[task.head].pages(&tokens[0], config, task.head);
        let room = Room { scores: &mut self.scores, stats: &mut self.stats };
        share(kernels, tokens, &self.queries, shape, cut, list, room, part);
    }
}

/// Merges the shares of every token's heads.
fn add_up(config: &Config, tokens: &[Token<'_>], groups: &[Group], parts: &[f32], out: &mut [f32]) {
    let (size, head_dim) = (config.group_size(), config.head_dim);
    let mut rest = parts;
    for group in groups {
        let (n, shares) = (group.tokens.len(), group.cut.shares);
        let width = tokens[group.tokens.start].cache.width();
        for head in 0..config.num_key_value_heads {
            let (of_head, behind) = rest.split_at(shares * n * group.cut.part);
            rest = behind;
            for (t, token) in group.tokens.clone().enumerate() {
                // Sums of all tokens, then maxima and denominators of all.
                let (sums, ends) = (t * size * width, n * size * width + t * size * 2);
                let parts = || {
                    let shares = of_head.chunks_exact(n * group.cut.part);
                    shares.map(|share| (&share[sums..sums + size * width], &share[ends..ends + size * 2]))
                };
                let out = &mut out[token * config.q_dim() + head * size * head_dim..][..size * head_dim];
                merge(parts, [width, head_dim], out);
            }
        }
    }
}
