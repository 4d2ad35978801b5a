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
//! 3. A lone token's own key and value need not be in the cache yet.

mod lone;

use crate::{
    core::{Columns, Config, KernelSet, Matrix, Rows},
    kernels::Kernels,
    kv_cache::{Kv, KvCache, PAGE_LEN},
    weight::{On, split_columns},
};
use arrayvec::ArrayVec;
pub use lone::{LoneScratch, Token, lone_token, room};

/// Positions scored at once; a multiple of the page length.
const PIECE: usize = 256;
/// Columns (query heads × tokens) that read a page together.
const COLUMNS: usize = 64;

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
    /// Key and value of the position behind them.
    fresh: Option<[&'a [f32]; 2]>,
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
/// past position, the reads shared by the query heads of a group.
///
/// # Panics
/// Shapes do not fit.
pub fn attention(
    on: On<'_>,
    config: &Config,
    cache: &KvCache,
    layer: usize,
    q: Queries<'_>,
    out: &mut [f32],
) {
    let (group, head_dim, kv_heads) = (config.group_size(), config.head_dim, config.num_key_value_heads);
    let stored = q.index_pos + q.seq_len;
    let batch = out.len() / config.q_dim() / q.seq_len;
    let tile = (COLUMNS / group).max(1);
    // The last tiles see the longest past: started first, they do not end last.
    let mut tasks = Vec::new();
    let by_head = split_columns(out, config.q_dim(), (0..kv_heads).map(|_| group * head_dim));
    for (kv_head, rows) in by_head.into_iter().enumerate() {
        let mut rows = rows.into_iter();
        for sequence in 0..batch {
            let head = Head { cache, sequence, layer, head: kv_head, head_dim, stored, fresh: None };
            for start in (0..q.seq_len).step_by(tile) {
                let n = tile.min(q.seq_len - start);
                tasks.push((head, start, rows.by_ref().take(n).collect::<Vec<_>>()));
            }
        }
    }
    tasks.sort_by_key(|t| std::cmp::Reverse(t.1));
    on.threads.for_each(tasks.into_iter(), |(head, start, mut out)| {
        tokens(on.kernels, head, q, group, start, &mut out);
    });
}

/// Tokens from `start` on of a sequence, for one key/value head.
fn tokens(
    kernels: &Kernels,
    head: Head<'_>,
    q: Queries<'_>,
    group: usize,
    start: usize,
    out: &mut [&mut [f32]],
) {
    let head_dim = head.head_dim;
    let columns = out.len() * group;
    let mut queries = Vec::with_capacity(columns * head_dim);
    for t in 0..out.len() {
        let at = (head.sequence * q.seq_len + start + t) * q.width + head.head * group * head_dim;
        queries.extend_from_slice(&q.rows[at..at + group * head_dim]);
    }
    let (mut scores, mut sums) = (vec![0.0; columns * PIECE], vec![0.0; columns * head_dim]);
    let mut stats = vec![Stats::EMPTY; columns];
    let visible = |column: usize| q.index_pos + start + column / group + 1;
    let positions = 0..visible(columns - 1);
    head.attend(kernels, &queries, visible, positions, &mut scores, &mut sums, &mut stats);
    for (t, out) in out.iter_mut().enumerate() {
        for (g, out) in out.chunks_exact_mut(head_dim).enumerate() {
            let c = t * group + g;
            let sums = &sums[c * head_dim..(c + 1) * head_dim];
            out.iter_mut().zip(sums).for_each(|(o, v)| *o = v / stats[c].denominator);
        }
    }
}

impl<'a> Head<'a> {
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
        for (at, keys) in self.rows(Kv::Key, piece) {
            let mut y: ArrayVec<&mut [f32], COLUMNS> =
                scores.chunks_exact_mut(PIECE).map(|s| &mut s[at..at + keys.rows()]).collect();
            kernels.matmul(keys, Columns::F32(queries), &mut y);
        }
    }

    /// `sums[c] += Σ_p scores[c][p] · value_p`.
    fn weigh(self, kernels: &Kernels, piece: std::ops::Range<usize>, scores: &[f32], sums: &mut [f32]) {
        for (at, values) in self.rows(Kv::Value, piece) {
            let a: ArrayVec<&[f32], COLUMNS> =
                scores.chunks_exact(PIECE).map(|s| &s[at..at + values.rows()]).collect();
            let mut y: ArrayVec<&mut [f32], COLUMNS> = sums.chunks_exact_mut(self.head_dim).collect();
            kernels.matmul_t(values, &a, &mut y);
        }
    }

    /// The keys or values of a piece that begins at a page, page by page, and where in the piece each begins.
    fn rows(self, kv: Kv, piece: std::ops::Range<usize>) -> impl Iterator<Item = (usize, Matrix<'a>)> {
        let end = piece.end.min(self.stored);
        let pages = (piece.start..end).step_by(PAGE_LEN).map(move |start| {
            let n = PAGE_LEN.min(end - start);
            let page = self.cache.page(self.sequence, self.layer, start / PAGE_LEN, kv, self.head, n);
            (start - piece.start, page)
        });
        let fresh = self.fresh.filter(|_| piece.end > self.stored).map(|fresh| {
            let row = Rows::F32(fresh[kv as usize]);
            (self.stored - piece.start, Matrix::new(1, self.head_dim, row).expect("one row of head_dim"))
        });
        pages.chain(fresh)
    }
}
