//! Fitting the gate of sparse attention: which tokens later queries will look back at.
//!
//! ```text
//! attention of the dense model → a label per token and key/value head (labels), without what its place in the window says
//! ridge:  label from what attention reads of the token
//! cell:   a fixed stable FastGRNN over the tokens so far, its state read by a ridge on what the first ridge misses
//! held-out R² of both → the cell stays where it adds enough; thresholds that let the wanted share pass
//! ```

mod labels;
mod reservoir;

pub(super) use labels::ValueNorms;

use super::regression::{Linear, Regression, r2};
use crate::gate::FastGrnnGate;
use candle_core::{Device, Result, Tensor, bail};
use candle_sparse_core::with_methods;
use rayon::prelude::*;
use reservoir::Reservoir;

/// Penalties of the ridge that are tried, as shares of the inputs' mean variance.
const PENALTIES: [f64; 4] = [1e-3, 1e-2, 1e-1, 1.0];
/// Every so many windows of the fit text one is kept to choose by.
const CHOOSE_EVERY: usize = 6;
/// Labelled tokens without which a part of the text tells nothing.
const FEWEST: usize = 64;

/// How the gates of sparse attention are fitted.
///
/// ```
/// use candle_sparse::calibrate::GateSettings;
///
/// let settings = GateSettings::default();
/// assert_eq!((settings.window_of(512), settings.window_of(4096)), (128, 256));
/// // Tokens of a window that enough later queries see from far away.
/// assert!(settings.labelled(1024) > 0 && settings.labelled(256) < 256);
/// assert!(settings.is_enough(1024, 12, 4) && !settings.is_enough(1024, 1, 4));
/// ```
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct GateSettings {
    /// Tokens that every query sees: labels tell of attention from further away. `None` takes a quarter of the text's
    /// windows, at most 256.
    pub window: Option<usize>,
    /// A token has a label where at least so many later queries see it from further away than the window.
    pub min_later: usize,
    /// So many tokens at the front are seen always and have no label.
    pub sinks: usize,
    /// Share of the tune text's labelled tokens that passes the threshold of each head.
    pub share: f32,
    /// Elements of the cell's state.
    pub cell_hidden: usize,
    /// Rank of W and U.
    pub rank: usize,
    /// The cell stays where it adds so much to the held-out R² of the ridge.
    pub least_gain: f32,
    /// Tokens of each text that are looked at, at most.
    pub tokens: usize,
    /// Bytes of inputs that are held at once: where all blocks need more, the texts are run several times.
    pub memory: usize,
    /// Of the cell's random weights.
    pub seed: u64,
}

with_methods!(GateSettings {
    with_window: window: Option<usize>,
    with_min_later: min_later: usize,
    with_sinks: sinks: usize,
    with_share: share: f32,
    with_cell_hidden: cell_hidden: usize,
    with_rank: rank: usize,
    with_least_gain: least_gain: f32,
    with_tokens: tokens: usize,
    with_memory: memory: usize,
    with_seed: seed: u64,
});

impl Default for GateSettings {
    /// A quarter of the window passes; a state of 16, rank 16; 24 k tokens and 1 GiB.
    fn default() -> Self {
        Self {
            window: None,
            min_later: 16,
            sinks: 4,
            share: 0.25,
            cell_hidden: 16,
            rank: 16,
            least_gain: 0.03,
            tokens: 24 * 1024,
            memory: 1 << 30,
            seed: 1,
        }
    }
}

impl GateSettings {
    /// The window, in positions, for texts in windows of `context` tokens.
    #[must_use]
    pub fn window_of(&self, context: usize) -> usize {
        self.window.unwrap_or_else(|| (context / 4).min(256))
    }

    /// How many tokens of a window of `context` tokens have labels.
    #[must_use]
    pub fn labelled(&self, context: usize) -> usize {
        let later = self.window_of(context).saturating_add(self.min_later.max(1));
        context.saturating_sub(later).saturating_sub(self.sinks)
    }

    /// Whether `fit` windows of `context` tokens to learn from, and `tune` windows to report on, are enough to fit gates.
    #[must_use]
    pub fn is_enough(&self, context: usize, fit: usize, tune: usize) -> bool {
        let labels = |windows: usize| windows.saturating_mul(self.labelled(context));
        // The part to choose by is a sixth of the windows, rounded down.
        fit >= 2 && labels(fit) >= 2 * CHOOSE_EVERY * FEWEST && labels(tune) >= FEWEST
    }

    fn check(&self) -> Result<()> {
        if !(self.share > 0.0 && self.share < 1.0) {
            bail!(
                "calibrate: a share of {} of the tokens cannot pass a gate: give one between 0 and 1",
                self.share
            );
        }
        if self.cell_hidden == 0 || self.rank == 0 {
            let (n, r) = (self.cell_hidden, self.rank);
            bail!("calibrate: a cell of state {n} and rank {r} remembers nothing: give 1 or more of each");
        }
        Ok(())
    }
}

/// One window of a text as a block's attention saw it, from position 0 on.
#[derive(Clone, Debug)]
pub(super) struct WatchedWindow {
    /// `[n, hidden_size]`: what attention read.
    pub x: Vec<f32>,
    /// `[n, kv_heads]`: see [`ValueNorms::labels`]; NaN for tokens without.
    pub labels: Vec<f32>,
}

/// A fitted gate and how well it predicts on windows that nothing was fitted to.
///
/// ```
/// use candle_sparse::{FastGrnnGate, calibrate::GateFit};
///
/// let gate = FastGrnnGate::new(2, vec![1.0, 0.0, 0.0, 1.0], vec![0.0; 2], vec![1.0; 2])?;
/// let fit = GateFit { gate, r2_ridge: vec![0.25, 0.75], r2_cell: vec![0.5, 1.0], share: vec![0.25; 2] };
/// assert_eq!(fit.r2(), [0.5, 0.75]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct GateFit {
    /// The gate; without a cell where that added too little.
    pub gate: FastGrnnGate,
    /// Per key/value head: R² of the ridge alone.
    pub r2_ridge: Vec<f32>,
    /// Per key/value head: R² with the best cell, kept or not.
    pub r2_cell: Vec<f32>,
    /// Per key/value head: share of the labelled tune tokens that passes.
    pub share: Vec<f32>,
}

impl GateFit {
    /// Means over heads of [`Self::r2_ridge`] and [`Self::r2_cell`].
    #[must_use]
    pub fn r2(&self) -> [f32; 2] {
        [mean(&self.r2_ridge), mean(&self.r2_cell)]
    }
}

fn mean(v: &[f32]) -> f32 {
    v.iter().sum::<f32>() / v.len() as f32
}

/// Fits the gate of one block for `kv_heads` heads.
///
/// Cost: about `fit tokens · hidden_size²` multiply-adds and four decompositions of `[hidden_size, hidden_size]`; memory: a
/// copy of the fit's inputs.
///
/// # Errors
/// Windows that do not fit together, too few tokens with labels, or numbers that are not finite.
pub(super) fn fit_gate(
    fit: &[WatchedWindow],
    tune: &[WatchedWindow],
    kv_heads: usize,
    s: &GateSettings,
) -> Result<GateFit> {
    s.check()?;
    let hidden = check(fit, tune, kv_heads)?;
    let split = |chosen: bool| -> Vec<&WatchedWindow> {
        let every = CHOOSE_EVERY.min(fit.len());
        let here = |i: usize| (i % every == every - 1) == chosen;
        fit.iter().enumerate().filter(|(i, _)| here(*i)).map(|(_, w)| w).collect()
    };
    let parts = [split(false), split(true), tune.iter().collect()];
    let mut parts = parts.map(|windows| Part::new(windows, hidden, kv_heads));
    let counts = parts.each_ref().map(|p| p.y.len() / kv_heads);
    if counts.iter().any(|&n| n < FEWEST) {
        bail!(
            "calibrate: {counts:?} tokens with labels are too few to fit, choose and report: give more text"
        );
    }
    forget_places(&mut parts)?;
    let ridge = fit_ridge(&parts)?;
    let [fit, choose, tune] = &parts;
    let (cell, readout) = reservoir::best(fit, choose, &ridge, s)?;
    kept(tune, ridge, cell, &readout, s)
}

/// The gate with the cell if it adds enough on the windows to report on, and its thresholds there.
fn kept(
    tune: &Part<'_>,
    ridge: Linear,
    cell: Reservoir,
    readout: &Linear,
    s: &GateSettings,
) -> Result<GateFit> {
    let heads = tune.kv_heads;
    let ridge_scores = tune.predictions(&ridge)?;
    let cell_scores = sum(&ridge_scores, &readout.apply(&cell.states(tune)?, s.cell_hidden)?);
    let (r2_ridge, r2_cell) = (r2(&ridge_scores, &tune.y, heads), r2(&cell_scores, &tune.y, heads));
    let keep = mean(&r2_cell) - mean(&r2_ridge) >= s.least_gain;
    let scores = if keep { &cell_scores } else { &ridge_scores };
    let threshold = thresholds(scores, heads, s.share);
    let passes = |t: usize| {
        let scores = scores.iter().skip(t).step_by(heads);
        scores.filter(|s| **s >= threshold[t]).count() as f32 * heads as f32 / tune.y.len() as f32
    };
    let share = (0..heads).map(passes).collect();
    let bias = if keep { sum(&ridge.bias, &readout.bias) } else { ridge.bias };
    let mut gate = FastGrnnGate::new(tune.hidden, ridge.weights, bias, threshold)?;
    if keep {
        gate = gate.with_cell(cell.cell, readout.weights.clone())?;
    }
    Ok(GateFit { gate, r2_ridge, r2_cell, share })
}

/// The windows' `hidden_size`.
fn check(fit: &[WatchedWindow], tune: &[WatchedWindow], kv_heads: usize) -> Result<usize> {
    let Some(first) = fit.first() else { bail!("calibrate: no windows to fit a gate to: give more text") };
    let tokens = first.labels.len() / kv_heads.max(1);
    if tokens == 0 || !first.x.len().is_multiple_of(tokens) || first.x.is_empty() {
        bail!("calibrate: {} inputs and {} labels are no window", first.x.len(), first.labels.len());
    }
    let hidden = first.x.len() / tokens;
    for w in fit.iter().chain(tune) {
        if w.x.len() * kv_heads != w.labels.len() * hidden || !w.labels.len().is_multiple_of(kv_heads) {
            bail!("calibrate: {} inputs and {} labels are no window", w.x.len(), w.labels.len());
        }
        if w.x.iter().any(|v| !v.is_finite()) || w.labels.iter().any(|v| v.is_infinite()) {
            bail!("calibrate: what attention reads is not finite: the checkpoint or the text is broken");
        }
    }
    Ok(hidden)
}

/// Some windows, and their labelled tokens.
struct Part<'a> {
    windows: Vec<&'a WatchedWindow>,
    hidden: usize,
    kv_heads: usize,
    /// `[labelled, hidden]`
    x: Vec<f32>,
    /// `[labelled, kv_heads]`
    y: Vec<f32>,
    /// `[labelled, PLACE]`: see [`place`].
    places: Vec<f32>,
}

/// Features of a place in a window.
const PLACE: usize = 3;

/// What a label owes to token `i` of `n` having its place: how many queries come later, and among how many tokens their
/// attention is divided.
fn place(i: usize, n: usize) -> [f32; PLACE] {
    let (i, later) = ((i + 1) as f32, (n - i) as f32);
    [i.ln(), later.ln(), i / n as f32]
}

/// Takes from all labels what the places of the tokens to fit explain linearly. A window begins anywhere in a text, so this is
/// no salience; but the cell, which counts tokens if that helps, would learn it.
fn forget_places(parts: &mut [Part<'_>; 3]) -> Result<()> {
    let [fit, ..] = &*parts;
    let mut moments = Regression::new(PLACE, fit.kv_heads);
    moments.add(&fit.places, &fit.y)?;
    let trend = moments.solve(1e-6)?;
    for part in parts {
        let owed = trend.apply(&part.places, PLACE)?;
        part.y.iter_mut().zip(owed).for_each(|(y, o)| *y -= o);
    }
    Ok(())
}

impl<'a> Part<'a> {
    fn new(windows: Vec<&'a WatchedWindow>, hidden: usize, kv_heads: usize) -> Self {
        let mut part = Self { windows, hidden, kv_heads, x: Vec::new(), y: Vec::new(), places: Vec::new() };
        for w in &part.windows {
            let n = w.labels.len() / kv_heads;
            for (i, (x, y)) in w.x.chunks_exact(hidden).zip(w.labels.chunks_exact(kv_heads)).enumerate() {
                if y.iter().all(|y| !y.is_nan()) {
                    part.places.extend(place(i, n));
                    part.x.extend_from_slice(x);
                    part.y.extend_from_slice(y);
                }
            }
        }
        part
    }

    /// Rows of features of all tokens, `[n, width]` per window, that belong to labelled ones.
    fn labelled(&self, features: &[Vec<f32>], width: usize) -> Vec<f32> {
        let windows = self.windows.iter().zip(features);
        let rows = windows.flat_map(|(w, f)| w.labels.chunks_exact(self.kv_heads).zip(f.chunks_exact(width)));
        rows.filter(|(y, _)| y.iter().all(|y| !y.is_nan())).flat_map(|(_, f)| f).copied().collect()
    }

    fn predictions(&self, linear: &Linear) -> Result<Vec<f32>> {
        linear.apply(&self.x, self.hidden)
    }

    fn residual(&self, linear: &Linear) -> Result<Vec<f32>> {
        let predicted = self.predictions(linear)?;
        Ok(self.y.iter().zip(predicted).map(|(y, p)| y - p).collect())
    }
}

impl Linear {
    /// `[n, targets]` of inputs `[n, inputs]`.
    pub(super) fn apply(&self, x: &[f32], inputs: usize) -> Result<Vec<f32>> {
        let w = Tensor::from_slice(&self.weights, (self.bias.len(), inputs), &Device::Cpu)?;
        let x = Tensor::from_slice(x, (x.len() / inputs, inputs), &Device::Cpu)?;
        let mut y = x.matmul(&w.t()?)?.flatten_all()?.to_vec1::<f32>()?;
        for y in y.chunks_exact_mut(self.bias.len()) {
            y.iter_mut().zip(&self.bias).for_each(|(y, b)| *y += b);
        }
        Ok(y)
    }
}

/// The ridge with the penalty that predicts the windows to choose by best.
fn fit_ridge([fit, choose, _]: &[Part<'_>; 3]) -> Result<Linear> {
    let mut moments = Regression::new(fit.hidden, fit.kv_heads);
    moments.add(&fit.x, &fit.y)?;
    let mut best: Option<(f32, Linear)> = None;
    for penalty in PENALTIES {
        let linear = moments.solve(penalty)?;
        let found = mean(&r2(&choose.predictions(&linear)?, &choose.y, choose.kv_heads));
        if best.as_ref().is_none_or(|(r, _)| found > *r) {
            best = Some((found, linear));
        }
    }
    best.map_or_else(|| bail!("calibrate: no ridge"), |(_, linear)| Ok(linear))
}

fn sum(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

/// Per head the score that `share` of the tokens reach.
fn thresholds(scores: &[f32], kv_heads: usize, share: f32) -> Vec<f32> {
    let of = |head: usize| {
        let mut scores: Vec<f32> = scores.iter().skip(head).step_by(kv_heads).copied().collect();
        let n = scores.len();
        let at = n - ((share * n as f32).round() as usize).clamp(1, n);
        *scores.select_nth_unstable_by(at, f32::total_cmp).1
    };
    (0..kv_heads).into_par_iter().map(of).collect()
}

#[cfg(test)]
mod tests;
