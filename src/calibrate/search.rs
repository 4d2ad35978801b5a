//! The share at which each rule loses what it may: settings compared with the dense model on the tune text.

use super::{Target, course::Course, layer::LayerFit, run::Run, stages::divide, thresholds::GRID};
use crate::{
    profile::{LayerProfile, Rule},
    quality::{Loss, Quality},
    simulate::{Choice, Simulation},
};
use candle_core::{Result, Tensor, bail};
use candle_sparse_core::GluActivation;

/// The share at which blocks are compared.
const PROBE_SHARE: f32 = 0.4;
/// Halvings of the interval in which a fitted share lies: 0.9 / 2^7 is below the noise of the text.
const HALVINGS: usize = 7;

/// A part of the text decides where the loss is so many standard errors away from the limit. Neighbours are alike, so errors
/// of independent tokens say too little of a few windows: more than the usual two.
const CERTAIN: f64 = 4.0;

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
    pub(super) fn sensitivities(&mut self, course: &mut Course<'_>) -> Result<Vec<f32>> {
        const NAME: &str = "sensitivities";
        let layers: Vec<LayerProfile> = self.fits.iter().map(|f| f.at(&[PROBE_SHARE])).collect();
        let mut simulation = Simulation::new(&layers, self.act, Choice::All)?;
        let probe = GRID.iter().position(|&s| s >= PROBE_SHARE).unwrap_or(0);
        let windows = self.windows.len().div_ceil(4);
        let mut all: Vec<f32> = course.numbers(NAME)?;
        for l in all.len()..layers.len() {
            course.step("weighing blocks", l, layers.len())?;
            simulation.choose_only(l, Choice::Rule(Rule::Cascade, 0));
            let kld = self.quality(&mut simulation, windows)?.kld().max(0.0) as f32;
            all.push(kld / self.fits[l].error[probe].max(f32::MIN_POSITIVE));
            course.keep(NAME, &all)?;
        }
        course.stage_ends()?;
        Ok(all)
    }

    /// The smallest share at which each rule keeps the target here, in the order of [`Rule`].
    pub(super) fn shares(
        &mut self,
        target: Target,
        sensitivities: &[f32],
        course: &mut Course<'_>,
    ) -> Result<[f32; 3]> {
        const NAME: &str = "shares";
        let allowed = match target {
            Target::ActiveShare(share) => return Ok([share; 3]),
            Target::Loss(allowed) => allowed,
        };
        let mut shares: Vec<f32> = course.numbers(NAME)?;
        for &rule in &Rule::ALL[shares.len().min(3)..] {
            shares.push(self.fitted(rule, allowed, sensitivities, course)?);
            course.keep(NAME, &shares)?;
            course.stage_ends()?;
        }
        Ok([0, 1, 2].map(|rule| shares[rule]))
    }

    fn fitted(
        &mut self,
        rule: Rule,
        allowed: Loss,
        sensitivities: &[f32],
        course: &mut Course<'_>,
    ) -> Result<f32> {
        let (mut low, mut high) = (GRID[0], 1.0);
        for done in 0..HALVINGS {
            course.step("searching shares", rule as usize * HALVINGS + done, 3 * HALVINGS)?;
            let middle = (low + high) / 2.0;
            let layers = self.layers(middle, sensitivities);
            let mut simulation = Simulation::new(&layers, self.act, Choice::Rule(rule, 0))?;
            if self.is_within(&mut simulation, allowed)? { high = middle } else { low = middle }
        }
        Ok(high)
    }

    /// Whether a rule's loss on the text is within a limit; windows after those that decide it are not read.
    fn is_within(&mut self, simulation: &mut Simulation<'_>, limit: Loss) -> Result<bool> {
        let mut quality = Quality::default();
        let tokens = |windows: &[&Vec<u32>]| windows.iter().map(|w| w.len()).sum::<usize>() as f64;
        let all = tokens(&self.windows);
        for (i, (window, dense)) in self.windows.iter().zip(&self.dense).enumerate() {
            let logits = self.run.logits(window, Some(simulation))?;
            simulation.check()?;
            quality.add(window, 1, &logits, dense)?;
            if let Some(decided) = decided(&quality, limit, tokens(&self.windows[i + 1..]) / all) {
                return Ok(decided);
            }
        }
        bail!("calibrate: there is no text to compare on: give more text")
    }
}

/// Whether the loss on a whole text is within a limit, where a part of the text tells; `left` is the share of the rest.
fn decided(part: &Quality, limit: Loss, left: f64) -> Option<bool> {
    // A sample without replacement: the error falls to 0 where nothing is left.
    let errors = CERTAIN * left.sqrt();
    let loss = |errors: f64| Loss {
        ppl: part.ppl_change() + errors * part.ppl_change_error(),
        kld: part.kld() + errors * part.kld_error(),
    };
    if loss(errors).is_within(limit) {
        return Some(true);
    }
    (!loss(-errors).is_within(limit)).then_some(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    /// 64 tokens of a text in which each costs `cost` more than with the dense model, but for every fourth.
    fn part(cost: f32) -> Result<Quality> {
        let window = [0; 65];
        let dense = Tensor::zeros((65, 2), DType::F32, &Device::Cpu)?;
        let rows = (0..65).flat_map(|t| if t % 4 == 0 { [0.0, 0.0] } else { [-cost, cost] });
        let logits = Tensor::from_vec(rows.collect::<Vec<_>>(), (65, 2), &Device::Cpu)?;
        let mut quality = Quality::default();
        quality.add(&window, 1, &logits, &dense)?;
        Ok(quality)
    }

    #[test]
    fn a_part_decides_where_it_is_far_from_the_limit() -> Result<()> {
        let quality = part(0.1)?;
        let found = quality.loss();
        let times = |by: f64| Loss { ppl: by * found.ppl, kld: by * found.kld };
        for left in [0.9, 0.5, 0.1] {
            assert_eq!(decided(&quality, times(3.0), left), Some(true), "{left}");
            assert_eq!(decided(&quality, times(0.3), left), Some(false), "{left}");
            // One number that is clearly too large is enough.
            assert_eq!(decided(&quality, Loss { kld: 1.0, ..times(0.3) }, left), Some(false), "{left}");
            assert_eq!(decided(&quality, times(1.01), left), None, "{left}");
            assert_eq!(decided(&quality, times(0.99), left), None, "{left}");
        }
        Ok(())
    }

    #[test]
    fn a_whole_text_always_decides() -> Result<()> {
        let quality = part(0.1)?;
        let found = quality.loss();
        let times = |by: f64| Loss { ppl: by * found.ppl, kld: by * found.kld };
        assert_eq!(decided(&quality, found, 0.0), Some(true));
        assert_eq!(decided(&quality, times(1.01), 0.0), Some(true));
        assert_eq!(decided(&quality, times(0.99), 0.0), Some(false));
        Ok(())
    }
}
