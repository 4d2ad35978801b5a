//! What the output of a head loses where it recalls so many pages: `Σ_t ‖W_O·(read_t − all_t)‖²`, as a share of `Σ_t ‖W_O·all_t‖²` of all
//! heads of its block, for the residual stream grows from block to block.

use super::super::seen::{Grams, Seen};
use crate::kv_cache::PAGE_LEN;
use candle_core::{Error, Result};
use candle_sparse_core::{
    Config, KernelSet,
    attention::{AttentionConfig, AttentionMode},
};
use candle_sparse_kernels::Kernels;
use rayon::prelude::*;

pub(super) const PAGE: usize = PAGE_LEN;
/// Positions from one token that is looked at to the next: no multiple of a page, so that tokens stand anywhere in theirs.
const STEP: usize = 13;

/// What heads lose at some numbers of recalled pages.
#[derive(Clone, Debug)]
pub(super) struct Losses {
    /// Numbers of pages, increasing.
    points: Vec<usize>,
    /// `[heads][points]`: shares of the squares of their blocks, summed over windows.
    sums: Vec<Vec<f64>>,
    /// Windows that were added, of one block, and blocks.
    windows: usize,
    blocks: usize,
}

/// What one head reads.
struct Head<'a> {
    /// `[group][rows, head_dim]`: queries of the tokens that are looked at.
    q: Vec<Vec<f32>>,
    /// `[group][rows, n]`
    scores: Vec<Vec<f32>>,
    /// `[group][head_dim, head_dim]`
    grams: Vec<Vec<f32>>,
    /// `[n, head_dim]`
    v: Vec<f32>,
    /// `[pages][2, head_dim]`: the smallest and largest of each channel.
    bounds: Vec<[Vec<f32>; 2]>,
    n: usize,
    config: &'a Config,
    points: &'a [usize],
}

impl Losses {
    /// Of so many blocks, each of so many heads, for windows of `context` tokens.
    pub(super) fn new([blocks, heads]: [usize; 2], context: usize) -> Self {
        let pages = context.div_ceil(PAGE);
        let powers = std::iter::successors(Some(1), |p| Some(2 * p)).take_while(|p| *p < pages);
        let points: Vec<usize> = [0].into_iter().chain(powers).chain([pages]).collect();
        Self { sums: vec![vec![0.0; points.len()]; blocks * heads], points, windows: 0, blocks }
    }

    /// Adds a window of a block, `qkv` as [`Seen::new`] takes them; the second half of its tokens is looked at, where they see
    /// more than sinks and the last `window` positions.
    pub(super) fn add(
        &mut self,
        c: &Config,
        grams: &Grams,
        layer: usize,
        qkv: &[f32],
        window: usize,
    ) -> Result<()> {
        let (seen, kernels) = (Seen::new(qkv, c)?, Kernels::get().map_err(Error::wrap)?);
        let rows: Vec<usize> = (seen.n / 2..seen.n).step_by(STEP).collect();
        let heads = c.num_key_value_heads;
        let found = (0..heads)
            .into_par_iter()
            .map(|head| Head::new(&seen, grams, c, head, &rows, &self.points)?.losses(kernels, &rows, window))
            .collect::<Result<Vec<_>>>()?;
        let whole: f64 = found.iter().map(|(_, whole)| whole).sum();
        for (sums, (found, _)) in self.sums[layer * heads..(layer + 1) * heads].iter_mut().zip(found) {
            sums.iter_mut().zip(found).for_each(|(sum, found)| *sum += found / whole.max(f64::MIN_POSITIVE));
        }
        self.windows += usize::from(layer == 0);
        Ok(())
    }

    /// Pages of each head, `mean` of them in the mean, such that the sum of all losses is small: from no page on, the next
    /// go where each saves most, along the lower hull of what was measured.
    pub(super) fn share_out(&self, mean: f32) -> Vec<f32> {
        let mut steps: Vec<(f64, f32, usize)> = Vec::new();
        for (head, sums) in self.sums.iter().enumerate() {
            let mut at = 0;
            while at + 1 < self.points.len() {
                let saved = |to: usize| (sums[at] - sums[to]) / (self.points[to] - self.points[at]) as f64;
                let Some(to) = (at + 1..self.points.len()).max_by(|a, b| saved(*a).total_cmp(&saved(*b)))
                else {
                    break;
                };
                steps.push((saved(to), (self.points[to] - self.points[at]) as f32, head));
                at = to;
            }
        }
        // Stable: the steps of one head stay in their order.
        steps.sort_by(|a, b| b.0.total_cmp(&a.0));
        let (mut pages, mut left) = (vec![0.0; self.sums.len()], mean * self.sums.len() as f32);
        for (_, step, head) in steps {
            let step = step.min(left);
            pages[head] += step;
            left -= step;
        }
        pages
    }

    /// The share of the blocks' squares that is lost in the mean where heads recall these numbers of pages; between two points along
    /// a line.
    pub(super) fn at(&self, pages: &[f32]) -> f64 {
        let of_head = |(sums, &pages): (&Vec<f64>, &f32)| {
            let next = self.points.iter().position(|p| *p as f32 >= pages).unwrap_or(self.points.len() - 1);
            let Some(before) = next.checked_sub(1) else { return sums[0] };
            let [from, to] = [before, next].map(|i| self.points[i] as f32);
            let part = f64::from(((pages - from) / (to - from)).min(1.0));
            sums[before] + (sums[next] - sums[before]) * part
        };
        self.sums.iter().zip(pages).map(of_head).sum::<f64>() / (self.windows * self.blocks).max(1) as f64
    }
}

impl<'a> Head<'a> {
    fn new(
        seen: &Seen,
        grams: &Grams,
        c: &'a Config,
        head: usize,
        rows: &[usize],
        points: &'a [usize],
    ) -> Result<Self> {
        let (group, head_dim, n) = (c.group_size(), c.head_dim, seen.n);
        let k = seen.k.get(head)?;
        let queries = head * group..(head + 1) * group;
        let numbers = |t: candle_core::Tensor| t.flatten_all()?.to_vec1::<f32>();
        let (first, end) = (rows.first().copied().unwrap_or(0), rows.last().map_or(0, |r| r + 1));
        let (mut q, mut scores) = (Vec::new(), Vec::new());
        for h in queries.clone() {
            let all = numbers(seen.q.get(h)?.narrow(0, first, end - first)?)?;
            let own: Vec<f32> =
                rows.iter().flat_map(|r| &all[(r - first) * head_dim..][..head_dim]).copied().collect();
            let t = candle_core::Tensor::from_slice(&own, (rows.len(), head_dim), k.device())?;
            scores.push(numbers(t.matmul(&k)?)?);
            q.push(own);
        }
        let keys = numbers(k)?;
        let bounds = (0..n / PAGE).map(|page| {
            let of = |fold: fn(f32, f32) -> f32| -> Vec<f32> {
                let channel = |d: usize| &keys[d * n + page * PAGE..][..PAGE];
                (0..head_dim).map(|d| channel(d).iter().copied().reduce(fold).unwrap_or(0.0)).collect()
            };
            [of(f32::min), of(f32::max)]
        });
        Ok(Self {
            bounds: bounds.collect(),
            grams: grams.0[queries].iter().map(|g| numbers(g.clone())).collect::<Result<_>>()?,
            v: numbers(seen.v.get(head)?)?,
            q,
            scores,
            n,
            config: c,
            points,
        })
    }

    /// The sums over tokens and query heads: of what is missing at each point, and of all.
    fn losses(&self, kernels: &Kernels, rows: &[usize], window: usize) -> Result<(Vec<f64>, f64)> {
        let (mut losses, mut whole) = (vec![0.0; self.points.len()], 0.0);
        let recall = AttentionConfig::new(AttentionMode::Recall).with_window(window);
        for (i, &position) in rows.iter().enumerate() {
            let first = self.config.first_visible(position) / PAGE;
            let between = recall.between(first, position / PAGE);
            let mut order: Vec<usize> = between.clone().collect();
            let bounds: Vec<f32> = (0..between.end).map(|page| self.bound(i, page)).collect();
            order.sort_by(|a, b| bounds[*b].total_cmp(&bounds[*a]).then(b.cmp(a)));
            for g in 0..self.q.len() {
                let sums = self.sums(kernels, g, i, position);
                whole += self.add_losses(g, &sums, &between, &order, &mut losses);
            }
        }
        Ok((losses, whole))
    }

    /// The most that a query of the `i`th token can score on a page.
    fn bound(&self, i: usize, page: usize) -> f32 {
        let [min, max] = &self.bounds[page];
        let of = |q: &Vec<f32>| -> f32 {
            let ends = min.iter().zip(max);
            q[i * self.config.head_dim..].iter().zip(ends).map(|(q, (a, b))| (q * a).max(q * b)).sum()
        };
        self.q.iter().map(of).fold(f32::NEG_INFINITY, f32::max)
    }

    /// Of each page up to a token's position the sum of its weights, and behind it that of its weighted values.
    fn sums(&self, kernels: &Kernels, g: usize, i: usize, position: usize) -> Vec<Vec<f32>> {
        let mut weights = self.scores[g][i * self.n..][..=position].to_vec();
        weights[..self.config.first_visible(position)].fill(f32::NEG_INFINITY);
        kernels.exp_sum(&mut weights, f32::NEG_INFINITY);
        let of_page = |(page, weights): (usize, &[f32])| {
            let mut sums = vec![0.0; self.config.head_dim + 1];
            for (j, &w) in weights.iter().enumerate() {
                let value = &self.v[(page * PAGE + j) * self.config.head_dim..][..self.config.head_dim];
                kernels.axpy(w, value, &mut sums[1..]);
                sums[0] += w;
            }
            sums
        };
        weights.chunks(PAGE).enumerate().map(of_page).collect()
    }

    /// Adds at each point ‖`W_O`·(what is read − all)‖² of one query head, pages recalled in `order` of those `between`; returns
    /// ‖`W_O`·all‖².
    fn add_losses(
        &self,
        g: usize,
        sums: &[Vec<f32>],
        between: &std::ops::Range<usize>,
        order: &[usize],
        losses: &mut [f64],
    ) -> f64 {
        let mut read = vec![0.0; self.config.head_dim + 1];
        let add = |read: &mut [f32], page: usize| read.iter_mut().zip(&sums[page]).for_each(|(r, s)| *r += s);
        (0..sums.len()).filter(|page| !between.contains(page)).for_each(|page| add(&mut read, page));
        let mut all = read.clone();
        between.clone().for_each(|page| add(&mut all, page));
        let whole: Vec<f32> = all[1..].iter().map(|a| a / all[0]).collect();
        let mut recalled = order.iter();
        let mut n = 0;
        for (loss, &point) in losses.iter_mut().zip(self.points) {
            recalled.by_ref().take(point - n).for_each(|&page| add(&mut read, page));
            n = point;
            if n >= order.len() {
                break;
            }
            let missing: Vec<f32> =
                read[1..].iter().zip(&whole).map(|(r, w)| r / read[0].max(f32::MIN_POSITIVE) - w).collect();
            *loss += self.square(g, &missing);
        }
        self.square(g, &whole)
    }

    /// ‖`W_O`·x‖² of one query head's part.
    fn square(&self, g: usize, x: &[f32]) -> f64 {
        let dot = |row: &[f32]| row.iter().zip(x).map(|(w, x)| w * x).sum::<f32>();
        let rows = self.grams[g].chunks_exact(x.len()).zip(x);
        f64::from(rows.map(|(row, x)| x * dot(row)).sum::<f32>())
    }
}
