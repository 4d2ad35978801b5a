//! How the active share is divided among the blocks.

use super::thresholds::{GRID, place};

/// A block gets at least and at most so many times the mean share.
const LEAST: f32 = 0.5;
const MOST: f32 = 1.6;
/// Steps of the shares that are tried.
const STEPS: usize = 250;

/// The share of each block whose mean is `mean`, such that `Σ sensitivity · error(share)` is smallest.
///
/// `errors` holds each block's error at every share of [`GRID`], `sensitivities` what one unit of it costs. Near the
/// ends, where blocks must be skipped or kept whole, the mean is still met within a step of 0.004.
#[must_use]
pub(super) fn budgets(errors: &[&[f32]], sensitivities: &[f32], mean: f32) -> Vec<f32> {
    let cost = |l: usize, share: f32| {
        let (g, part) = place(share);
        let next = (g + 1).min(GRID.len() - 1);
        let e = errors[l];
        sensitivities[l] * (e[g] + (e[next] - e[g]) * part)
    };
    let (low, high) = ((mean * LEAST).max(GRID[0]), (mean * MOST).min(1.0));
    let shares = |price: f32| -> Vec<f32> {
        let best = |l: usize| {
            let steps = (0..=STEPS).map(|i| low + (high - low) * i as f32 / STEPS as f32);
            let cost = |s: f32| cost(l, s) + price * s;
            steps.min_by(|&a, &b| cost(a).total_cmp(&cost(b))).unwrap_or(mean)
        };
        (0..errors.len()).map(best).collect()
    };
    let average = |s: &[f32]| s.iter().sum::<f32>() / s.len() as f32;
    // The share falls as its price rises.
    let (mut cheap, mut dear) = (-60.0_f32, 60.0_f32);
    for _ in 0..60 {
        let middle = (cheap + dear) / 2.0;
        if average(&shares(middle.exp2())) > mean { cheap = middle } else { dear = middle }
    }
    let mut best = shares(dear.exp2());
    // Curves that are not convex jump over the mean: what is missing is divided evenly.
    for _ in 0..4 {
        let missing = mean - average(&best);
        best.iter_mut().for_each(|s| *s = (*s + missing).clamp(low, high));
    }
    best
}
