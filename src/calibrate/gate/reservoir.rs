//! Cells with fixed weights, of which only the reading of the state is fitted.
//!
//! Near zero, with a small input and an almost constant z, a unit of FastGRNN is a moving sum `h ← (1 − z)·w·x + z·h` of one
//! direction w of the input. Two kinds of W are tried: random directions (an echo state network, Jaeger 2001), and those in
//! which a moving sum of the inputs, seen linearly, best predicts what the ridge misses.

use super::{GateSettings, Part, mean, sum};
use crate::{
    calibrate::regression::{Linear, Regression, r2},
    gate::CellWeight,
};
use candle_core::{Device, Error, Result, Tensor, bail};
use candle_sparse_core::kernel::fast_grnn::Cell;
use faer::{Mat, Side};
use rayon::prelude::*;

/// Penalty of the ridge that reads a state.
const READ_PENALTY: f64 = 1e-3;
/// Penalty of the ridge that finds directions.
const FIND_PENALTY: f64 = 1.0;
/// What a unit keeps of its state per token, of units that read found directions.
const DECAYS: [f64; 4] = [0.5, 0.8, 0.93, 0.98];
/// Spectral norm of U.
const U_NORM: f32 = 0.3;
/// ζ and ν, and the standard deviation of W·x.
const SHAPES: [(f32, f32, f32); 3] = [(1.0, 0.0, 0.1), (1.0, 0.0, 0.5), (0.9, 0.1, 0.5)];

/// A cell and how its states are computed for whole windows.
pub(super) struct Reservoir {
    pub(super) cell: Cell<CellWeight, Vec<f32>>,
}

/// The cell that helps most on the windows to choose by, and the reading of its state that adds to what `ridge` says.
pub(super) fn best(
    fit: &Part<'_>,
    choose: &Part<'_>,
    ridge: &Linear,
    s: &GateSettings,
) -> Result<(Reservoir, Linear)> {
    let missed = fit.residual(ridge)?;
    let base = choose.predictions(ridge)?;
    let mut best: Option<(f32, Reservoir, Linear)> = None;
    for directions in [Directions::random(fit, s)?, Directions::found(fit, &missed, s)?] {
        for shape in SHAPES {
            let reservoir = directions.cell(shape, s);
            let mut moments = Regression::new(s.cell_hidden, fit.kv_heads);
            moments.add(&reservoir.states(fit)?, &missed)?;
            let readout = moments.solve(READ_PENALTY)?;
            let scores = sum(&base, &readout.apply(&reservoir.states(choose)?, s.cell_hidden)?);
            let r = mean(&r2(&scores, &choose.y, choose.kv_heads));
            if best.as_ref().is_none_or(|b| r > b.0) {
                best = Some((r, reservoir, readout));
            }
        }
    }
    best.map_or_else(|| bail!("calibrate: no cell"), |(_, cell, readout)| Ok((cell, readout)))
}

impl Reservoir {
    /// States after the labelled tokens, `[labelled, hidden]`.
    pub(super) fn states(&self, part: &Part<'_>) -> Result<Vec<f32>> {
        let hidden = self.cell.state_len();
        let Some(w2) = self.cell.inputs().next() else { bail!("calibrate: a cell without input") };
        let projections = part.products(&w2.values)?;
        let run = |projections: &Vec<f32>| -> Vec<f32> {
            let (mut state, mut scratch) = (vec![0.0; hidden], vec![0.0; self.cell.scratch_len()]);
            let step = |p: &[f32]| {
                self.cell.advance(p, &mut state, &mut scratch);
                state.clone()
            };
            projections.chunks_exact(w2.rows).flat_map(step).collect()
        };
        let states: Vec<Vec<f32>> = projections.par_iter().map(run).collect();
        Ok(part.labelled(&states, hidden))
    }
}

impl Part<'_> {
    /// `w·x` `[n, rows]` for all tokens of each window and rows `w` `[rows, hidden]`.
    fn products(&self, w: &[f32]) -> Result<Vec<Vec<f32>>> {
        let w = Tensor::from_slice(w, (w.len() / self.hidden, self.hidden), &Device::Cpu)?.t()?;
        let product = |x: &[f32]| -> Result<Vec<f32>> {
            let x = Tensor::from_slice(x, (x.len() / self.hidden, self.hidden), &Device::Cpu)?;
            x.matmul(&w)?.flatten_all()?.to_vec1()
        };
        self.windows.iter().map(|w| product(&w.x)).collect()
    }

    /// Moving means `m ← (1 − decay)·x + decay·m` after the labelled tokens, `[labelled, hidden]`.
    fn moving_means(&self, decay: f32) -> Vec<f32> {
        let run = |x: &[f32]| -> Vec<f32> {
            let mut m = vec![0.0; self.hidden];
            let step = |x: &[f32]| {
                m.iter_mut().zip(x).for_each(|(m, x)| *m = decay * *m + (1.0 - decay) * x);
                m.clone()
            };
            x.chunks_exact(self.hidden).flat_map(step).collect()
        };
        let means: Vec<Vec<f32>> = self.windows.par_iter().map(|w| run(&w.x)).collect();
        self.labelled(&means, self.hidden)
    }
}

/// Rows of W₂ whose products with the inputs have mean `means` and standard deviation 1, and how slow the units that read
/// them are.
struct Directions {
    /// `[rank, input]`
    w2: CellWeight,
    means: Vec<f32>,
    /// `[hidden, rank]`, each row of norm 1.
    w1: CellWeight,
    /// `[hidden]`
    decays: Vec<f64>,
}

impl Directions {
    fn random(fit: &Part<'_>, s: &GateSettings) -> Result<Self> {
        let w2 = noise(s.rank * fit.hidden, s.seed);
        let mut w1 = noise(s.cell_hidden * s.rank, s.seed.wrapping_add(1));
        for row in w1.chunks_exact_mut(s.rank) {
            let norm = row.iter().map(|v| v * v).sum::<f32>().sqrt();
            row.iter_mut().for_each(|v| *v /= norm);
        }
        let slow = |i: usize| 1.0 - 0.7 * 0.02_f64.powf(i as f64 / s.cell_hidden as f64);
        Self::scaled(fit, w2, w1, (0..s.cell_hidden).map(slow).collect())
    }

    /// Those that predict `missed` `[labelled, kv_heads]` best from moving means of each decay.
    fn found(fit: &Part<'_>, missed: &[f32], s: &GateSettings) -> Result<Self> {
        let rank = s.rank.min(s.cell_hidden);
        let each = (rank / DECAYS.len()).clamp(1, fit.kv_heads);
        let (mut w2, mut decays) = (Vec::new(), Vec::new());
        for decay in DECAYS.into_iter().take(rank) {
            let mut moments = Regression::new(fit.hidden, fit.kv_heads);
            moments.add(&fit.moving_means(decay as f32), missed)?;
            let weights = moments.solve(FIND_PENALTY)?.weights;
            for direction in principal(&weights, fit.hidden, each)? {
                w2.extend(direction);
                decays.push(decay);
            }
        }
        let found = decays.len();
        // Units beyond read the same directions with other decays.
        let mut w1 = vec![0.0; s.cell_hidden * found];
        for unit in 0..s.cell_hidden {
            w1[unit * found + unit % found] = 1.0;
        }
        let decays = (0..s.cell_hidden).map(|u| decays[(u + u / found) % found]).collect();
        Self::scaled(fit, w2, w1, decays)
    }

    fn scaled(fit: &Part<'_>, mut w2: Vec<f32>, w1: Vec<f32>, decays: Vec<f64>) -> Result<Self> {
        let rank = w2.len() / fit.hidden;
        let products = fit.products(&w2)?;
        let n = products.iter().map(Vec::len).sum::<usize>() / rank;
        let mut means = Vec::with_capacity(rank);
        for (r, row) in w2.chunks_exact_mut(fit.hidden).enumerate() {
            let column =
                || products.iter().flat_map(|p| p.iter().skip(r).step_by(rank)).map(|&v| f64::from(v));
            let mean = column().sum::<f64>() / n as f64;
            let deviation = (column().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64).sqrt();
            let scale = 1.0 / deviation.max(f64::MIN_POSITIVE);
            row.iter_mut().for_each(|v| *v = (f64::from(*v) * scale) as f32);
            means.push((mean * scale) as f32);
        }
        let (w2, w1) = (CellWeight { rows: rank, values: w2 }, CellWeight { rows: decays.len(), values: w1 });
        Ok(Self { w2, means, w1, decays })
    }

    fn cell(&self, (zeta, nu, size): (f32, f32, f32), s: &GateSettings) -> Reservoir {
        let (n, rank) = (self.decays.len(), s.rank.min(self.decays.len()));
        let w1: Vec<f32> = self.w1.values.iter().map(|v| v * size).collect();
        let centre = |row: &[f32]| -row.iter().zip(&self.means).map(|(w, m)| w * m).sum::<f32>();
        let b_h: Vec<f32> = w1.chunks_exact(self.w2.rows).map(centre).collect();
        let b_z = b_h.iter().zip(&self.decays).map(|(b, d)| b + (d / (1.0 - d)).ln() as f32).collect();
        let u1 = orthonormal(n, rank, s.seed.wrapping_add(2)).iter().map(|v| v * U_NORM).collect();
        let u2 = orthonormal(n, rank, s.seed.wrapping_add(3));
        let u2 = (0..rank * n).map(|i| u2[i % n * rank + i / n]).collect();
        let cell = Cell::FastGrnn {
            w1: CellWeight { rows: n, values: w1 },
            w2: self.w2.clone(),
            u1: CellWeight { rows: n, values: u1 },
            u2: CellWeight { rows: rank, values: u2 },
            b_z,
            b_h,
            zeta,
            nu,
        };
        Reservoir { cell }
    }
}

/// The `count` directions in the space of rows `w` `[heads, hidden]` that hold most of their squares, longest first.
fn principal(w: &[f32], hidden: usize, count: usize) -> Result<Vec<Vec<f32>>> {
    let rows: Vec<&[f32]> = w.chunks_exact(hidden).collect();
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
    let gram = Mat::from_fn(rows.len(), rows.len(), |i, j| dot(rows[i], rows[j]));
    let eigen = gram
        .self_adjoint_eigen(Side::Lower)
        .map_err(|e| Error::msg(format!("calibrate: no directions for a cell: {e:?}")))?;
    let direction = |d: usize| -> Vec<f32> {
        let column = rows.len() - 1 - d;
        let weight = |i: usize| eigen.U()[(i, column)] as f32;
        (0..hidden).map(|k| (0..rows.len()).map(|i| weight(i) * rows[i][k]).sum()).collect()
    };
    Ok((0..count).map(direction).collect())
}

/// `[n, rank]` with orthonormal columns.
fn orthonormal(n: usize, rank: usize, seed: u64) -> Vec<f32> {
    let noise = noise(n * rank, seed);
    let q = Mat::from_fn(n, rank, |i, j| f64::from(noise[i * rank + j])).qr().compute_thin_Q();
    (0..n * rank).map(|i| q[(i / rank, i % rank)] as f32).collect()
}

/// Numbers of standard deviation 1 (`SplitMix64`, uniform).
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut h = state;
        h = (h ^ (h >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        h = (h ^ (h >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((h ^ (h >> 31)) >> 40) as f32 / (1 << 24) as f32
    };
    (0..n).map(|_| (next() - 0.5) * 12_f32.sqrt()).collect()
}
