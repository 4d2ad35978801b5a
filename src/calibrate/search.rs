//! The share at which each rule loses what it may: settings compared with the dense model on the tune text.

use super::{Progress, Target, divide, layer::LayerFit, run::Run, thresholds::GRID};
use crate::{
    profile::{LayerProfile, Rule},
    quality::Quality,
    simulate::{Choice, Simulation},
};
use candle_core::{Result, Tensor};
use candle_sparse_core::GluActivation;

/// The share at which blocks are compared.
const PROBE_SHARE: f32 = 0.4;
/// Halvings of the interval in which a fitted share lies: 0.9 / 2^7 is below the noise of the text.
const HALVINGS: usize = 7;

/// The dense model, what was fitted, and the text to compare on.
pub(super) struct Search<'a> {
    pub(super) run: Run,
    pub(super) fits: &'a [LayerFit],
    pub(super) act: GluActivation,
    windows: Vec<&'a Vec<u32>>,
    dense: Vec<Tensor>,
}

impl<'a> Search<'a> {
    pub(super) fn new(
        mut run: Run,
        fits: &'a [LayerFit],
        act: GluActivation,
        windows: Vec<&'a Vec<u32>>,
    ) -> Result<Self> {
        let dense = windows.iter().map(|w| run.logits(w, None)).collect::<Result<_>>()?;
        Ok(Self { run, fits, act, windows, dense })
    }

    fn quality(&mut self, simulation: &mut Simulation<'_>, windows: usize) -> Result<Quality> {
        let mut quality = Quality::default();
        for (window, dense) in self.windows.iter().zip(&self.dense).take(windows) {
            let logits = self.run.logits(window, Some(simulation))?;
            simulation.check()?;
            quality.add(window, 1, &logits, dense)?;
        }
        Ok(quality)
    }

    /// The blocks at a mean share.
    pub(super) fn layers(&self, share: f32, sensitivities: &[f32]) -> Vec<LayerProfile> {
        let shares = divide(self.fits, sensitivities, share);
        self.fits.iter().zip(&shares).map(|(f, &s)| f.at(&[s])).collect()
    }

    /// What a unit of error in each block costs in divergence.
    pub(super) fn sensitivities(&mut self, progress: &mut impl FnMut(Progress)) -> Result<Vec<f32>> {
        let layers: Vec<LayerProfile> = self.fits.iter().map(|f| f.at(&[PROBE_SHARE])).collect();
        let mut simulation = Simulation::new(&layers, self.act, Choice::All)?;
        let probe = GRID.iter().position(|&s| s >= PROBE_SHARE).unwrap_or(0);
        let windows = self.windows.len().div_ceil(4);
        let mut all = Vec::new();
        for l in 0..layers.len() {
            progress(Progress { stage: "weighing blocks", done: l, steps: layers.len() });
            simulation.choose_only(l, Choice::Rule(Rule::Cascade, 0));
            let kld = self.quality(&mut simulation, windows)?.kld().max(0.0) as f32;
            all.push(kld / self.fits[l].error[probe].max(f32::MIN_POSITIVE));
        }
        Ok(all)
    }

    /// The smallest share at which a rule keeps the target here.
    pub(super) fn fitted(&mut self, rule: Rule, target: Target, sensitivities: &[f32]) -> Result<f32> {
        let allowed = match target {
            Target::ActiveShare(share) => return Ok(share),
            Target::Loss(allowed) => allowed,
        };
        let (mut low, mut high) = (GRID[0], 1.0);
        for _ in 0..HALVINGS {
            let middle = (low + high) / 2.0;
            let layers = self.layers(middle, sensitivities);
            let mut simulation = Simulation::new(&layers, self.act, Choice::Rule(rule, 0))?;
            let loss = self.quality(&mut simulation, usize::MAX)?.loss();
            if loss.is_within(allowed) { high = middle } else { low = middle }
        }
        Ok(high)
    }
}
