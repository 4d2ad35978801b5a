//! Thresholds for every share, and what skipping costs there.

use super::{block::Settings, course::Course, scores::Scores};
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
/// Scores that are sorted to find a quantile: a share is met within 0.001.
const QUANTILE_SCORES: usize = 1 << 18;
/// Tokens on which means and errors are taken.
const MEAN_TOKENS: usize = 4096;
const ERROR_TOKENS: usize = 384;
/// A neuron that is active so often stands in front and is always computed.
pub(super) const HOT: f32 = 0.9;

/// Neurons whose sums are taken together: all of them fit into the first cache.
const TOGETHER: usize = 64;

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

/// The scores by which a rule decides about each neuron at each token: both must reach their threshold. A rule that decides
/// by one has it twice, and a threshold of 0, which all reach.
#[derive(Clone, Copy)]
struct Decision<'a> {
    candidate: &'a [f32],
    keep: &'a [f32],
}

/// In the order of [`crate::profile::Rule`].
pub(super) fn tables(s: &Scores, down: &Tensor, settings: &Settings) -> Result<[Table; 3]> {
    let factor = settings.candidate_factor.unwrap_or(1.0);
    let all = vec![0.0; GRID.len()];
    let one = |scores| {
        let sorted = Sorted::new(scores, scores);
        (sorted.quantiles(1.0, &all), sorted)
    };
    let ((gate, _), (predicted, sorted)) = (one(&s.gate), one(&s.predicted));
    let candidate = sorted.quantiles(factor, &all);
    let keep = Sorted::new(&s.cascade, &s.predicted).quantiles(1.0, &candidate);
    let by = |candidate, keep| Decision { candidate, keep };
    Ok([
        Table::new(s, down, by(&s.gate, &s.gate), [all.clone(), gate])?,
        Table::new(s, down, by(&s.predicted, &s.predicted), [predicted, all])?,
        Table::new(s, down, by(&s.predicted, &s.cascade), [candidate, keep])?,
    ])
}

impl Table {
    fn new(s: &Scores, down: &Tensor, d: Decision<'_>, [candidate, keep]: [Vec<f32>; 2]) -> Result<Self> {
        let firsts: Vec<usize> = (0..s.inner).step_by(TOGETHER).collect();
        let skip = |&first: &usize| Skipped::new(s, d, first, [&candidate, &keep]);
        let groups: Vec<_> = firsts.par_iter().map(skip).collect();
        let per_token = 1.0 / s.tokens().min(MEAN_TOKENS) as f32;
        let at = |g: usize| groups.iter().map(move |group| &group[g]);
        let frequency = |g: usize| -> Vec<f32> {
            at(g).flat_map(|s| s.active).take(s.inner).map(|count| count as f32 * per_token).collect()
        };
        let mean = |g: usize| at(g).flat_map(|s| s.values).take(s.inner).map(|sum| sum * per_token);
        let frequency = (0..GRID.len()).map(frequency).collect();
        let mean: Vec<f32> = (0..GRID.len()).flat_map(mean).collect();
        let mean = Tensor::from_vec(mean, (GRID.len(), s.inner), &Device::Cpu)?;
        let bias = mean.matmul(&down.t()?)?.to_vec2()?;
        Ok(Self { candidate, keep, bias, frequency })
    }

    /// Keeps the table under a name.
    pub(super) fn keep(&self, name: &str, course: &mut Course<'_>) -> Result<()> {
        course.keep(&format!("{name}.candidate"), &self.candidate)?;
        course.keep(&format!("{name}.keep"), &self.keep)?;
        course.keep(&format!("{name}.bias"), &self.bias.concat())?;
        course.keep(&format!("{name}.frequency"), &self.frequency.concat())
    }

    /// What an earlier run has kept for a block of `[intermediate_size, hidden_size]`.
    pub(super) fn found(name: &str, course: &Course<'_>, [inner, hidden]: [usize; 2]) -> Result<Self> {
        let points = GRID.len();
        let get = |part: &str, len: usize| course.all::<f32>(&format!("{name}.{part}"), len);
        let rows = |v: Vec<f32>, width: usize| v.chunks_exact(width).map(<[f32]>::to_vec).collect();
        Ok(Self {
            candidate: get("candidate", points)?,
            keep: get("keep", points)?,
            bias: rows(get("bias", points * hidden)?, hidden),
            frequency: rows(get("frequency", points * inner)?, inner),
        })
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
        move |t, n| {
            let i = t * s.inner + n;
            s.predicted[i] >= candidate && s.cascade[i] >= keep
        }
    }
}

/// Of the neurons from `first` on, for each share of [`GRID`].
struct Skipped {
    /// Sums of the values of what is skipped.
    values: [f32; TOGETHER],
    /// How often it is not.
    active: [u32; TOGETHER],
}

impl Skipped {
    fn new(s: &Scores, d: Decision<'_>, first: usize, [candidate, keep]: [&[f32]; 2]) -> Vec<Self> {
        let none = || Self { values: [0.0; TOGETHER], active: [0; TOGETHER] };
        let mut all: Vec<Self> = GRID.iter().map(|_| none()).collect();
        let n = TOGETHER.min(s.inner - first);
        let mut rows = [[0.0; TOGETHER]; 3];
        for t in 0..s.tokens().min(MEAN_TOKENS) {
            let at = t * s.inner + first;
            for (row, all) in rows.iter_mut().zip([d.candidate, d.keep, &s.value]) {
                row[..n].copy_from_slice(&all[at..at + n]);
            }
            all.iter_mut().zip(candidate).zip(keep).for_each(|((of, c), k)| of.add(&rows, *c, *k));
        }
        all
    }

    /// One token. Without a branch, which would be foretold wrongly half of the time.
    #[inline(never)]
    fn add(&mut self, [c, k, value]: &[[f32; TOGETHER]; 3], candidate: f32, keep: f32) {
        let mut active = [0; TOGETHER];
        for i in 0..TOGETHER {
            active[i] = u32::from(c[i] >= candidate) & u32::from(k[i] >= keep);
        }
        for i in 0..TOGETHER {
            self.active[i] += active[i];
            // No bit of what is active.
            self.values[i] += f32::from_bits(value[i].to_bits() & active[i].wrapping_sub(1));
        }
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

/// Some of all scores, the largest first, each beside the one that makes it a candidate.
struct Sorted(Vec<(f32, f32)>);

impl Sorted {
    fn new(scores: &[f32], candidate: &[f32]) -> Self {
        // An odd step visits all neurons.
        let step = (scores.len() / QUANTILE_SCORES) | 1;
        let visited = scores.iter().copied().zip(candidate.iter().copied()).step_by(step);
        let mut sorted: Vec<_> = visited.collect();
        sorted.par_sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
        Self(sorted)
    }

    /// Per share of [`GRID`], times `factor`: what so many of all scores reach whose candidates reach a threshold.
    fn quantiles(&self, factor: f32, candidate: &[f32]) -> Vec<f32> {
        let quantile = |(share, candidate): (&f32, &f32)| {
            let share = share * factor;
            if share >= 1.0 {
                return 0.0;
            }
            let k = (share * self.0.len() as f32) as usize;
            if k == 0 {
                return f32::MAX;
            }
            let mut counted = self.0.iter().filter(|(_, c)| c >= candidate);
            counted.nth(k).map_or(LEAST, |(score, _)| score.max(LEAST))
        };
        GRID.par_iter().zip(candidate).map(quantile).collect()
    }
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
            let row = |&t: &usize| -> Vec<f32> {
                (0..s.inner).map(|n| if passes(t, n) { 0.0 } else { s.value[t * s.inner + n] }).collect()
            };
            let skipped: Vec<f32> = tokens.par_iter().flat_map_iter(row).collect();
            let skipped = Tensor::from_vec(skipped, (tokens.len(), s.inner), &Device::Cpu)?;
            let bias = Tensor::new(cascade.bias[g].as_slice(), &Device::Cpu)?;
            skipped.matmul(&down)?.broadcast_sub(&bias)?.sqr()?.mean_all()?.to_scalar::<f32>()
        })
        .collect()
}
