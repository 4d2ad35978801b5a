//! The thresholds of one setting.

use super::{FfnMode, Selection, SparseConfig, SparseFfn};
use crate::profile::{HeldOut, LayerProfile, LayerRule, Profile, Rule};
use candle_core::{Result, bail};
use candle_sparse_core::ffn::{CROSSOVER, FfnPlan};
use std::sync::atomic::{AtomicU64, Ordering};

/// Active share, from 0 to 1, at which a sparse FFN takes as long as a dense one with row-major weights, where bytes alone
/// decide. Some machines and small models need a smaller share: a decoder that is loaded measures it.
///
/// ```
/// use candle_sparse::sparse::BREAK_EVEN;
///
/// let pays = |active_share: f32| active_share <= BREAK_EVEN;
/// assert!(pays(0.3) && !pays(0.9));
/// ```
pub const BREAK_EVEN: f32 = 0.75;

/// Whether leaving neurons out is expected to read fewer bytes of block `layer`, at a fitted point of the profile or with
/// `config`.
///
/// Where it is not, the block is better loaded as a dense one.
///
/// # Panics
/// There is no such block.
#[must_use]
pub(crate) fn pays(config: &SparseConfig, profile: &Profile, layer: usize) -> bool {
    let l = &profile.layers[layer];
    let fitted = l.rules.iter().zip(profile.fitted).filter_map(|(rule, i)| rule.share.get(i).copied());
    let asked = match config.selection {
        Selection::Share(share) => share,
        Selection::TopK(k) => k as f32 / l.order.len() as f32,
        Selection::Fitted | Selection::Scale(_) => 1.0,
    };
    fitted.fold(asked, f32::min) <= BREAK_EVEN
}

impl Profile {
    /// The share of block `layer` that is expected to be active with `config`, which names a mode; 1 for all neurons, and for
    /// [`FfnMode::ExactZero`], of which a profile does not speak. Up to
    /// [`BREAK_EVEN`] it reads fewer bytes than a dense block.
    ///
    /// # Errors
    /// A share that the profile has not.
    ///
    /// # Panics
    /// There is no such block.
    pub fn expected_share(&self, config: &SparseConfig, layer: usize) -> Result<f32> {
        let (points, l) = (Points::from(self), &self.layers[layer]);
        let Some(rule) = config.mode.rule().filter(|&r| r != Rule::ExactZero) else { return Ok(1.0) };
        let (of_layer, inner) = (&l.rules[rule as usize], l.order.len());
        let place = points.place(config, rule, of_layer, inner)?;
        Ok(place.map_or(1.0, |p| p.share(config, of_layer, inner)))
    }
}

/// What settings there are to choose from: the points at which a profile has thresholds, and exact zeros.
#[derive(Clone, Debug)]
pub(crate) struct Points {
    /// None without a profile.
    shares: Vec<f32>,
    fitted: [usize; 3],
    held_out: HeldOut,
    /// The activation gives exact zeros.
    exact_zeros: bool,
}

impl From<&Profile> for Points {
    fn from(p: &Profile) -> Self {
        Self { shares: p.shares.clone(), fitted: p.fitted, held_out: p.held_out, exact_zeros: false }
    }
}

impl Points {
    /// Of a profile, if there is one, and of a model whose activation gives exact zeros, or not.
    pub(crate) fn of(profile: Option<&Profile>, exact_zeros: bool) -> Self {
        let nothing = HeldOut { kept: [false; 3], best: None };
        let none = Self { shares: Vec::new(), fitted: [0; 3], held_out: nothing, exact_zeros };
        profile.map_or(none, |p| Self { exact_zeros, ..Self::from(p) })
    }

    /// The same settings with the mode that is meant, never [`FfnMode::Auto`].
    ///
    /// # Errors
    /// A rule that does not keep its target, one that needs a profile where there is none, or exact zeros where there are
    /// none or with a share of one's own.
    pub(crate) fn resolve(&self, config: SparseConfig) -> Result<SparseConfig> {
        let has_profile = !self.shares.is_empty();
        let by_zeros = SparseConfig { mode: FfnMode::ExactZero, ..config };
        match config.mode {
            FfnMode::Dense => Ok(config),
            FfnMode::Auto if has_profile => {
                let resolved = config.resolve(&self.held_out)?;
                Ok(if resolved.mode == FfnMode::Dense && self.exact_zeros { by_zeros } else { resolved })
            }
            FfnMode::Auto | FfnMode::ExactZero if !self.exact_zeros => bail!(
                "sparse: exact-zero needs an activation that shuts neurons (relu, relu2, fatrelu, drelu): others need a profile"
            ),
            FfnMode::Auto | FfnMode::ExactZero if config.selection != Selection::Fitted => bail!(
                "sparse: exact-zero leaves out what adds nothing, however many neurons that are: a share, a top-k or a scale \
                 needs a profile and one of its rules"
            ),
            FfnMode::Auto | FfnMode::ExactZero => Ok(by_zeros),
            _ if has_profile => config.resolve(&self.held_out),
            mode => {
                bail!("sparse: {mode:?} needs a profile: give LoadOptions one, or calibrate the model first")
            }
        }
    }

    /// Where the setting lies among the points of a block's rule; `None` for all neurons.
    fn place(
        &self,
        config: &SparseConfig,
        rule: Rule,
        of_layer: &LayerRule,
        inner: usize,
    ) -> Result<Option<Place>> {
        Ok(Some(match config.selection {
            Selection::Fitted | Selection::Scale(_) => Place { low: self.fitted[rule as usize], part: 0.0 },
            Selection::TopK(k) => Place::of(k as f32 / inner as f32, &of_layer.share),
            Selection::Share(s) if s >= 1.0 => return Ok(None),
            Selection::Share(s) => {
                let (first, last) = (self.shares[0], self.shares[self.shares.len() - 1]);
                if !(first..=last).contains(&s) {
                    bail!("sparse: share {s} was not calibrated, the profile has {first} to {last}");
                }
                Place::of(s, &self.shares)
            }
        }))
    }
}

/// Between two points: `part` of the way from `low` to the next.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Place {
    low: usize,
    part: f32,
}

impl Place {
    /// Where `share` lies among `shares`, at an end where it lies outside.
    fn of(share: f32, shares: &[f32]) -> Self {
        let last = shares.len() - 1;
        let low = shares.iter().position(|&s| s > share).unwrap_or(last + 1).saturating_sub(1);
        if low == last || share <= shares[low] {
            return Self { low, part: 0.0 };
        }
        Self { low, part: (share - shares[low]) / (shares[low + 1] - shares[low]) }
    }

    /// The active share of a block that is expected here.
    fn share(self, config: &SparseConfig, rule: &LayerRule, inner: usize) -> f32 {
        match config.selection {
            Selection::TopK(k) => k.min(inner) as f32 / inner as f32,
            _ => self.mix(|i| rule.share[i]),
        }
    }

    fn mix(self, at: impl Fn(usize) -> f32) -> f32 {
        let low = at(self.low);
        if self.part == 0.0 { low } else { low + (at(self.low + 1) - low) * self.part }
    }

    /// Thresholds of equal steps in share grow by factors.
    fn mix_threshold(self, v: &[f32]) -> f32 {
        if self.part == 0.0 || v[self.low] <= 0.0 || v[self.low + 1] <= 0.0 {
            return self.mix(|i| v[i]);
        }
        self.mix(|i| v[i].ln()).exp()
    }
}

/// How one block chooses its neurons.
#[derive(Clone, Debug)]
pub(crate) struct BlockSelection {
    /// [`FfnMode::Dense`] also where so many neurons are expected that leaving out the others costs more than it saves.
    pub mode: FfnMode,
    /// The largest so many, instead of those that pass a threshold.
    pub top: Option<usize>,
    /// Neurons at the front that are always computed.
    pub hot: usize,
    /// `[intermediate_size]`: squared, divided by importance².
    pub(super) candidate: Vec<f32>,
    /// `[intermediate_size]`: squared, divided by importance².
    pub(super) keep: Vec<f32>,
    /// `[hidden_size]`: what is skipped, in the mean; empty for [`FfnMode::Dense`] and [`FfnMode::ExactZero`].
    pub bias: Vec<f32>,
}

impl BlockSelection {
    /// The same as the rule that chooses sees it; `None` where all neurons are computed.
    pub(crate) fn rule(&self) -> Option<FfnPlan<'_>> {
        let rule = self.mode.rule()?;
        let Self { top, hot, candidate, keep, bias, .. } = self;
        Some(FfnPlan { rule, top: *top, hot: *hot, candidate, keep, bias })
    }

    fn dense() -> Self {
        Self::without_thresholds(FfnMode::Dense)
    }

    fn without_thresholds(mode: FfnMode) -> Self {
        let (candidate, keep, bias) = (Vec::new(), Vec::new(), Vec::new());
        Self { mode, top: None, hot: 0, candidate, keep, bias }
    }

    fn new(config: &SparseConfig, rule: &LayerRule, place: Place, ffn: &SparseFfn) -> Self {
        let (inner, hidden) = (ffn.intermediate_size(), ffn.gate.cols());
        let top = match config.selection {
            Selection::TopK(k) => Some(k.min(inner)),
            _ => None,
        };
        let share = place.share(config, rule, inner);
        if share > CROSSOVER {
            return Self::dense();
        }
        let factor = if let Selection::Scale(f) = config.selection { f } else { 1.0 };
        // Of a top-k the hot ones are judged as all others: their number is the caller's.
        let hot = if top.is_some() { 0 } else { place.mix(|i| rule.hot[i] as f32) as usize };
        let thresholds =
            |v: &[f32]| thresholds(ffn.importance_squared(), place.mix_threshold(v) * factor, hot);
        Self {
            mode: config.mode,
            top,
            hot,
            candidate: thresholds(&rule.candidate),
            keep: thresholds(&rule.keep),
            bias: (0..hidden).map(|k| place.mix(|i| rule.bias[i * hidden + k])).collect(),
        }
    }
}

impl BlockSelection {
    /// Of `shares` of the neurons, the active ones and the candidates: thresholds that let the same drawn neurons through
    /// whatever the input.
    fn drawn(mode: FfnMode, [share, candidates]: [f32; 2], ffn: &SparseFfn) -> Self {
        // The golden ratio's multiples fill the unit interval evenly, so the drawn neurons lie apart: the worst case of a gather.
        let draw = |i: usize| (i as f32 * 0.618_034).fract();
        let thresholds = |share: f32| {
            (0..ffn.intermediate_size()).map(|i| if draw(i) < share { -1.0 } else { f32::INFINITY }).collect()
        };
        let candidate = thresholds(if mode == FfnMode::LowRank { share } else { candidates });
        let (keep, bias) = (thresholds(share), vec![0.0; ffn.gate.cols()]);
        Self { mode, top: None, hot: 0, candidate, keep, bias }
    }
}

/// `threshold²` over each neuron's importance squared; −1, which all pass, for the `hot` first.
fn thresholds(importance_squared: &[f32], threshold: f32, hot: usize) -> Vec<f32> {
    let each = |(i, n): (usize, &f32)| if i < hot { -1.0 } else { divided(threshold * threshold, *n) };
    importance_squared.iter().enumerate().map(each).collect()
}

impl LayerProfile {
    /// What the squared score of each neuron, without its importance n, is compared with: `threshold² / n²`, and −1, which all
    /// pass, for the `hot` first neurons.
    ///
    /// ```
    /// # use candle_sparse_models::files::ModelFiles;
    /// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu"));
    /// # let files = ModelFiles::from_folder(folder)?;
    /// # let profile = files.sparse_profile.ok_or_else(|| candle_core::Error::msg("no profile"))?.load()?;
    /// let layer = &profile.layers[0];
    /// let thresholds = layer.thresholds(0.5, 2);
    /// assert_eq!(thresholds[..2], [-1.0; 2]);
    /// assert!((thresholds[2] - (0.5 / layer.importance[2]).powi(2)).abs() < 1e-4 * thresholds[2]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    #[must_use]
    pub fn thresholds(&self, threshold: f32, hot: usize) -> Vec<f32> {
        let squared: Vec<f32> = self.importance.iter().map(|n| n * n).collect();
        thresholds(&squared, threshold, hot)
    }
}

/// A neuron of no importance passes nothing but a threshold of 0.
fn divided(threshold: f32, importance: f32) -> f32 {
    if importance > 0.0 {
        threshold / importance
    } else if threshold > 0.0 {
        f32::INFINITY
    } else {
        0.0
    }
}

/// One setting for all blocks of a model.
#[derive(Debug)]
pub(crate) struct ModelSelection {
    /// The setting.
    pub config: SparseConfig,
    /// One per block.
    pub layers: Vec<BlockSelection>,
    /// No other plans have it: what was counted under one setting is not mixed with another's.
    pub id: u64,
}

impl ModelSelection {
    /// The thresholds of `config` for all blocks, `None` for those that are dense. Cost: a few operations per neuron.
    ///
    /// # Errors
    /// Numbers that make no sense, a share outside the calibrated ones, a mode that needs a prediction which the profile
    /// has not, or one that [`Points::resolve`] refuses.
    pub(crate) fn new<'a>(
        config: SparseConfig,
        points: &Points,
        ffns: impl Iterator<Item = Option<&'a SparseFfn>>,
    ) -> Result<Self> {
        config.check()?;
        let config = points.resolve(config)?;
        let plan =
            |ffn: Option<_>| ffn.map_or_else(|| Ok(BlockSelection::dense()), |f| plan(&config, points, f));
        let layers = ffns.map(plan).collect::<Result<_>>()?;
        Ok(Self::with_layers(config, layers))
    }

    /// Selections that compute drawn neurons, `shares[l]` of block l, and with [`FfnMode::Cascade`] `candidates` times as many
    /// gates, whatever the input: to time blocks, not to use them.
    #[must_use]
    pub(crate) fn drawn<'a>(
        mode: FfnMode,
        candidates: f32,
        blocks: impl Iterator<Item = (f32, Option<&'a SparseFfn>)>,
    ) -> Self {
        let plan = |(share, ffn): (f32, Option<_>)| {
            ffn.map_or_else(BlockSelection::dense, |ffn| {
                BlockSelection::drawn(mode, [share, candidates * share], ffn)
            })
        };
        let config = SparseConfig { mode, force: true, ..SparseConfig::default() };
        Self::with_layers(config, blocks.map(plan).collect())
    }

    fn with_layers(config: SparseConfig, layers: Vec<BlockSelection>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self { config, layers, id: NEXT.fetch_add(1, Ordering::Relaxed) }
    }
}

fn plan(config: &SparseConfig, points: &Points, ffn: &SparseFfn) -> Result<BlockSelection> {
    let Some(rule) = config.mode.rule() else { return Ok(BlockSelection::dense()) };
    if rule == Rule::ExactZero {
        return Ok(BlockSelection::without_thresholds(FfnMode::ExactZero));
    }
    if rule != Rule::Gate && ffn.predictor.is_none() {
        bail!(
            "sparse: mode {:?} needs a prediction, the profile has none: calibrate with a rank or use Gate",
            config.mode
        );
    }
    let layer_rule = &ffn.learned.rules[rule as usize];
    let place = points.place(config, rule, layer_rule, ffn.intermediate_size())?;
    Ok(place.map_or_else(BlockSelection::dense, |place| BlockSelection::new(config, layer_rule, place, ffn)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_and_mixtures() {
        let shares = [0.1, 0.2, 0.4];
        assert_eq!(Place::of(0.1, &shares), Place { low: 0, part: 0.0 });
        assert_eq!(Place::of(0.05, &shares), Place { low: 0, part: 0.0 });
        assert_eq!(Place::of(0.4, &shares), Place { low: 2, part: 0.0 });
        assert_eq!(Place::of(0.9, &shares), Place { low: 2, part: 0.0 });
        let half = Place::of(0.3, &shares);
        assert!(half.low == 1 && (half.part - 0.5).abs() < 1e-6);
        let (v, zeros) = ([9.0, 1.0, 4.0], [9.0, 0.0, 4.0]);
        assert!((half.mix(|i| v[i]) - 2.5).abs() < 1e-5);
        assert!((half.mix_threshold(&v) - 2.0).abs() < 1e-5, "halfway from 1 to 4 in factors");
        assert!((half.mix_threshold(&zeros) - 2.0).abs() < 1e-5, "there are no factors from 0");
    }

    #[test]
    fn neurons_of_no_importance_pass_no_threshold() {
        assert_eq!([divided(4.0, 2.0), divided(4.0, 0.0), divided(0.0, 0.0)], [2.0, f32::INFINITY, 0.0]);
    }
}
