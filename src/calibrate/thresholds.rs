//! Thresholds for every share, and what skipping costs there.

use super::{block::Settings, scores::Scores};
use crate::profile::LayerRule;
use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

/// The shares at which a block is fitted; between them is interpolated.
pub(super) const GRID: [f32; 25] = {
    let mut grid = [1.0; 25];
    let mut i = 0;
    while i < 24 {
        grid[i] = 0.04 * (i + 1) as f32;
        i += 1;
    }
    grid
};
/// Above 0, so that exact zeros are never active.
const LEAST: f32 = 1e-12;
/// Scores that are sorted to find a quantile.
const QUANTILE_SCORES: usize = 1 << 20;
/// Tokens on which means and errors are taken.
const MEAN_TOKENS: usize = 4096;
const ERROR_TOKENS: usize = 384;
/// A neuron that is active so often stands in front and is always computed.
pub(super) const HOT: f32 = 0.9;

/// Thresholds of one rule at every share of [`GRID`].
#[derive(Clone, Debug)]
pub(super) struct Table {
    candidate: Vec<f32>,
    keep: Vec<f32>,
    /// `[grid, hidden_size]`: mean of what is skipped.
    bias: Vec<Vec<f32>>,
    /// `[grid, intermediate_size]`: how often a neuron is active.
    frequency: Vec<Vec<f32>>,
}

/// The decision of a rule about each neuron at each token.
struct Decision<'a> {
    candidate: Option<&'a [f32]>,
    keep: Option<&'a [f32]>,
}

impl Decision<'_> {
    fn active(&self, i: usize, candidate: f32, keep: f32) -> bool {
        self.candidate.is_none_or(|s| s[i] >= candidate) && self.keep.is_none_or(|s| s[i] >= keep)
    }
}

/// In the order of [`crate::profile::Rule`].
pub(super) fn tables(s: &Scores, down: &Tensor, settings: &Settings) -> Result<[Table; 3]> {
    let (predicted, gate, cascade) = (Some(&*s.predicted), Some(&*s.gate), Some(&*s.cascade));
    let table = |candidate, keep| Table::new(s, down, &Decision { candidate, keep }, settings);
    Ok([table(None, gate)?, table(predicted, None)?, table(predicted, cascade)?])
}

impl Table {
    fn new(s: &Scores, down: &Tensor, d: &Decision<'_>, settings: &Settings) -> Result<Self> {
        let factor = settings.candidate_factor.unwrap_or(1.0);
        let both = d.candidate.is_some() && d.keep.is_some();
        let (candidate, keep): (Vec<f32>, Vec<f32>) = GRID
            .par_iter()
            .map(|&share| {
                let candidates = if both { (share * factor).min(1.0) } else { share };
                let candidate = d.candidate.map_or(0.0, |c| quantile(c, |_| true, candidates));
                let keep = d
                    .keep
                    .map_or(0.0, |k| quantile(k, |i| d.candidate.is_none_or(|c| c[i] >= candidate), share));
                (candidate, keep)
            })
            .unzip();
        let mut table = Self { candidate, keep, bias: Vec::new(), frequency: Vec::new() };
        let means = GRID.par_iter().enumerate().map(|(g, _)| table.skipped(s, d, g)).collect::<Vec<_>>();
        let means: (Vec<_>, Vec<_>) = means.into_iter().unzip();
        table.frequency = means.1;
        let mean = Tensor::from_vec(means.0.concat(), (GRID.len(), s.inner), &Device::Cpu)?;
        table.bias = mean.matmul(&down.t()?)?.to_vec2()?;
        Ok(table)
    }

    /// Per neuron: the mean value of what is skipped, and how often it is not.
    fn skipped(&self, s: &Scores, d: &Decision<'_>, g: usize) -> (Vec<f32>, Vec<f32>) {
        let tokens = s.tokens().min(MEAN_TOKENS);
        let (mut sum, mut count) = (vec![0.0_f32; s.inner], vec![0_u32; s.inner]);
        for t in 0..tokens {
            for n in 0..s.inner {
                let i = t * s.inner + n;
                let active = d.active(i, self.candidate[g], self.keep[g]);
                sum[n] += if active { 0.0 } else { s.value[i] };
                count[n] += u32::from(active);
            }
        }
        let per_token = 1.0 / tokens as f32;
        let frequency = count.iter().map(|&c| c as f32 * per_token).collect();
        (sum.iter().map(|s| s * per_token).collect(), frequency)
    }

    /// Thresholds and means at `shares` of this block.
    pub(super) fn at(&self, shares: &[f32]) -> LayerRule {
        let mut rule = LayerRule::with_points(shares.len());
        for &share in shares {
            let (g, part) = place(share);
            let next = (g + 1).min(GRID.len() - 1);
            let mix = |v: &[f32]| between(v[g], v[next], part);
            rule.candidate.push(mix(&self.candidate));
            rule.keep.push(mix(&self.keep));
            rule.share.push(self.active(g) + (self.active(next) - self.active(g)) * part);
            let pairs = self.bias[g].iter().zip(&self.bias[next]);
            rule.bias.extend(pairs.map(|(a, b)| a + (b - a) * part));
        }
        rule
    }

    /// The share that is active where `GRID[g]` was asked for: less where fewer gates are open.
    fn active(&self, g: usize) -> f32 {
        self.frequency[g].iter().sum::<f32>() / self.frequency[g].len() as f32
    }

    /// How many neurons at the front of `order` are nearly always active at a share.
    pub(super) fn hot(&self, share: f32, order: &[u32]) -> u32 {
        let (g, _) = place(share);
        order.iter().take_while(|&&n| self.frequency[g][n as usize] >= HOT).count() as u32
    }

    /// Whether each neuron passes at a share, for one token after the other.
    pub(super) fn passes<'a>(
        &'a self,
        s: &'a Scores,
        share: f32,
    ) -> impl Fn(usize, usize) -> bool + Sync + 'a {
        let rule = self.at(&[share]);
        let (candidate, keep) = (rule.candidate[0], rule.keep[0]);
        let d = Decision { candidate: Some(&s.predicted), keep: Some(&s.cascade) };
        move |t, n| d.active(t * s.inner + n, candidate, keep)
    }
}

/// The grid point at or below `share`, and how far `share` is on the way to the next.
pub(super) fn place(share: f32) -> (usize, f32) {
    let g = GRID.partition_point(|&s| s <= share).saturating_sub(1);
    let next = GRID.get(g + 1).copied().unwrap_or(2.0);
    (g, ((share - GRID[g]) / (next - GRID[g])).clamp(0.0, 1.0))
}

/// Thresholds span decades; the last one is 0.
fn between(a: f32, b: f32, part: f32) -> f32 {
    if a > 0.0 && b > 0.0 { a * (b / a).powf(part) } else { a + (b - a) * part }
}

/// What a share of all scores reaches that `counts` says count.
fn quantile(scores: &[f32], counts: impl Fn(usize) -> bool, share: f32) -> f32 {
    if share >= 1.0 {
        return 0.0;
    }
    // An odd step visits all neurons.
    let step = (scores.len() / QUANTILE_SCORES) | 1;
    let visited = scores.len().div_ceil(step);
    let mut some: Vec<f32> =
        (0..scores.len()).step_by(step).filter(|&i| counts(i)).map(|i| scores[i]).collect();
    let k = (share * visited as f32) as usize;
    if k == 0 || k >= some.len() {
        return if k == 0 { f32::MAX } else { LEAST };
    }
    let (_, at, _) = some.select_nth_unstable_by(k, |a, b| b.total_cmp(a));
    at.max(LEAST)
}

/// Mean over tokens and elements of the square of what a cascade's output misses, at every share.
pub(super) fn errors(s: &Scores, down: &Tensor, cascade: &Table) -> Result<Vec<f32>> {
    let step = s.tokens().div_ceil(ERROR_TOKENS);
    let tokens: Vec<usize> = (0..s.tokens()).step_by(step).collect();
    let down = down.t()?.contiguous()?;
    GRID.iter()
        .enumerate()
        .map(|(g, &share)| {
            let passes = cascade.passes(s, share);
            let skipped: Vec<f32> = tokens
                .iter()
                .flat_map(|&t| (0..s.inner).map(move |n| (t, n)))
                .map(|(t, n)| if passes(t, n) { 0.0 } else { s.value[t * s.inner + n] })
                .collect();
            let skipped = Tensor::from_vec(skipped, (tokens.len(), s.inner), &Device::Cpu)?;
            let bias = Tensor::new(cascade.bias[g].as_slice(), &Device::Cpu)?;
            skipped.matmul(&down)?.broadcast_sub(&bias)?.sqr()?.mean_all()?.to_scalar::<f32>()
        })
        .collect()
}
