//! Whether rules keep their target on text that nothing was learned from.

use super::{Target, course::Course, run::Run, search::Search, stages::some};
use crate::{
    decoder::Decoder,
    profile::{HeldOut, Rule},
    quality::Quality,
    simulate::{Choice, Simulation},
    sparse::candidate_factor,
};
use candle_core::Result;
use candle_sparse_core::{Config, Format};

/// Past this share no rule saves bytes, so none is tried there.
const LARGEST_SHARE: f32 = 0.9;
/// Of the neurons left out, what is computed as well when a rule misses its target.
const STEP: f32 = 0.25;
/// Parameters up to which a model is held in F32 as well, 1 GiB, to see what its rounded activations cost.
const MOST_PARAMETERS: usize = 1 << 28;
/// Tokens that show it.
const FLOOR_TOKENS: usize = 1024;

/// What one rule costs at its fitted point, on text that nothing was learned from.
///
/// ```
/// use candle_sparse::{calibrate::RuleReport, profile::Rule, quality::Quality};
///
/// let kept = |rule, share, kept| {
///     let quality = Quality::default();
///     RuleReport { rule, share, quality, active: f64::from(share), recall: vec![0.9; 4], kept }
/// };
/// let reports = [kept(Rule::Gate, 0.5, true), kept(Rule::LowRank, 0.4, true), kept(Rule::Cascade, 0.3, false)];
/// let best = reports.iter().filter(|r| r.kept).min_by(|a, b| a.active.total_cmp(&b.active)).expect("two are kept");
/// assert_eq!(best.rule, Rule::LowRank);
/// ```
#[derive(Clone, Debug)]
pub struct RuleReport {
    /// Which rule.
    pub rule: Rule,
    /// Mean share at which its thresholds were set.
    pub share: f32,
    /// What it costs.
    pub quality: Quality,
    /// Neurons that were active, of all.
    pub active: f64,
    /// Per block: share of the importance `Σ |act(g)·u|·‖w_down‖` that active neurons held.
    pub recall: Vec<f64>,
    /// Whether the target is kept, with a certainty of 95 %; a target that is a share promises nothing, so it is.
    pub kept: bool,
}

impl Search<'_> {
    /// The rules at `shares`, in the order of [`Rule`], on held-out text; those that miss the target at larger ones.
    ///
    /// Rules are compared in rounds, so that the dense model reads the text once for all of them.
    pub(super) fn on_held_out(
        &mut self,
        windows: &[Vec<u32>],
        target: Target,
        sensitivities: &[f32],
        shares: [f32; 3],
        course: &mut Course<'_>,
    ) -> Result<[RuleReport; 3]> {
        let at = |rule: Rule| (rule, shares[rule as usize]);
        let mut reports =
            self.round(windows, &Rule::ALL.map(at), target, sensitivities, "held_out.0", course)?;
        for round in 1.. {
            let larger = |r: &RuleReport| (r.rule, (r.share + STEP * (1.0 - r.share)).min(LARGEST_SHARE));
            let missed = reports.iter().filter(|r| !r.kept && r.share < LARGEST_SHARE);
            let missed: Vec<(Rule, f32)> = missed.map(larger).collect();
            if missed.is_empty() {
                break;
            }
            let name = format!("held_out.{round}");
            for report in self.round(windows, &missed, target, sensitivities, &name, course)? {
                let place = report.rule as usize;
                reports[place] = report;
            }
        }
        Ok(reports.try_into().expect("one for each rule"))
    }

    /// Reports of some rules at some shares, kept under a name.
    fn round(
        &mut self,
        windows: &[Vec<u32>],
        tried: &[(Rule, f32)],
        target: Target,
        sensitivities: &[f32],
        name: &str,
        course: &mut Course<'_>,
    ) -> Result<Vec<RuleReport>> {
        let layers = self.fits.len();
        let known = course.numbers::<f64>(name)?;
        if known.len() == tried.len() * RuleReport::numbers_of(layers) {
            let each = known.chunks_exact(RuleReport::numbers_of(layers)).zip(tried);
            return Ok(each
                .map(|(numbers, &(rule, share))| RuleReport::of_numbers(rule, share, numbers))
                .collect());
        }
        let layers: Vec<_> = tried.iter().map(|(_, share)| self.layers(*share, sensitivities)).collect();
        let act = self.act;
        let mut simulations: Vec<Simulation<'_>> = Vec::new();
        for (&(rule, _), layers) in tried.iter().zip(&layers) {
            simulations.push(Simulation::new(layers, act, Choice::Rule(rule, 0))?);
        }
        let mut qualities = vec![Quality::default(); tried.len()];
        for (done, window) in windows.iter().enumerate() {
            course.step("checking held-out text", done, windows.len())?;
            if window.len() < 2 {
                continue;
            }
            let dense = self.run.logits(window, None)?;
            for (simulation, quality) in simulations.iter_mut().zip(&mut qualities) {
                let logits = self.run.logits(window, Some(simulation))?;
                simulation.check()?;
                quality.add(window, 1, &logits, &dense)?;
            }
        }
        let report = |((&(rule, share), quality), simulation): ((&(Rule, f32), Quality), &Simulation<'_>)| {
            let active = simulation.active_share();
            let active = active.iter().sum::<f64>() / active.len() as f64;
            let kept = match target {
                Target::Loss(limit) => quality.at_most().is_within(limit),
                Target::ActiveShare(_) => true,
            };
            RuleReport { rule, share, quality, active, recall: simulation.recall(), kept }
        };
        let reports: Vec<_> = tried.iter().zip(qualities).zip(&simulations).map(report).collect();
        course.keep(name, &reports.iter().flat_map(RuleReport::numbers).collect::<Vec<_>>())?;
        course.stage_ends()?;
        Ok(reports)
    }
}

impl RuleReport {
    /// What was measured, as numbers.
    fn numbers(&self) -> Vec<f64> {
        let known = [self.active, f64::from(u8::from(self.kept))];
        self.quality.sums().into_iter().chain(known).chain(self.recall.iter().copied()).collect()
    }

    /// How many they are.
    fn numbers_of(layers: usize) -> usize {
        9 + layers
    }

    fn of_numbers(rule: Rule, share: f32, numbers: &[f64]) -> Self {
        let (sums, rest) = numbers.split_first_chunk().expect("so many numbers as a report has");
        let quality = Quality::of_sums(*sums);
        Self { rule, share, quality, active: rest[0], kept: rest[1] != 0.0, recall: rest[2..].to_vec() }
    }
}

/// Which rules keep their target, and which of them reads least; of a target that is a share, which promises nothing, the
/// cascade.
pub(super) fn verdict(reports: &[RuleReport; 3], target: Target, c: &Config, rank: usize) -> HeldOut {
    if let Target::ActiveShare(_) = target {
        return HeldOut::default();
    }
    let kept = reports.each_ref().map(|r| r.kept);
    let of_kept = reports.iter().filter(|r| r.kept);
    let best = of_kept.min_by(|a, b| elements_read(a, c, rank).total_cmp(&elements_read(b, c, rank)));
    HeldOut { kept, best: best.map(|r| r.rule) }
}

/// Elements of weights and prediction that a token reads in a block.
fn elements_read(r: &RuleReport, c: &Config, rank: usize) -> f64 {
    let (hidden, inner, rank) = (c.hidden_size as f64, c.intermediate_size as f64, rank as f64);
    let candidates = (f64::from(candidate_factor(c.hidden_act)) * r.active).min(1.0);
    let prediction = rank * (hidden + 2.0 * inner);
    // Of an active neuron, beside its gate.
    let rest = if c.gated_mlp { 2.0 } else { 1.0 } * r.active;
    match r.rule {
        Rule::Gate | Rule::ExactZero => inner * hidden * (1.0 + rest),
        Rule::LowRank => inner * hidden * (r.active + rest) + prediction,
        Rule::Cascade => inner * hidden * (candidates + rest) + prediction,
    }
}

/// Divergence of `model` from the same weights with activations that are not rounded; 0 where it rounds none, or is too
/// large to be held in F32 as well.
pub(super) fn noise_floor(model: &Decoder, windows: &[Vec<u32>], course: &mut Course<'_>) -> Result<f64> {
    if !model.rounds_activations() || model.parameters() > MOST_PARAMETERS {
        return Ok(0.0);
    }
    let (mut exact, mut rounded) = (Run::new(&model.in_format(Format::F32)?)?, Run::new(model)?);
    let windows: Vec<_> = some(windows, FLOOR_TOKENS).into_iter().filter(|w| w.len() > 1).collect();
    let mut quality = Quality::default();
    for (done, window) in windows.iter().enumerate() {
        course.step("the dense path's noise", done, windows.len())?;
        quality.add(window, 1, &rounded.logits(window, None)?, &exact.logits(window, None)?)?;
    }
    Ok(quality.kld().max(0.0))
}
