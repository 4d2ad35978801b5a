//! The FFN of a block computed for some neurons only: its settings, its weights, and how the neurons are chosen.
//!
//! A [`crate::Profile`] says how a neuron is judged. The weights of a block are held in one way whatever the settings are;
//! the thresholds of a setting are separate from them, so that settings change without loading anything.

mod choose;
mod ffn;
mod plan;
mod token;

use crate::profile::{HeldOut, Rule};
use candle_core::{Result, bail};
use candle_sparse_core::Activation;
use candle_sparse_core::with_methods;
pub(crate) use choose::{ChoiceScratch, NeuronChoice};
pub(crate) use ffn::{PANEL, SparseFfn};
pub use plan::BREAK_EVEN;
pub(crate) use plan::{BlockSelection, ModelSelection, Points, pays};
pub(crate) use token::{GuardSample, TokenFfn, TokenRun, TokenScratch, TokenSelection};

/// Candidates of a cascade per neuron that it wants active, unless calibration was told otherwise: 1.4, and 2 where most gates
/// are shut: there a candidate costs little and the exact gate tells all.
#[must_use]
pub(crate) fn candidate_factor(act: Activation) -> f32 {
    match act {
        Activation::Silu | Activation::Gelu | Activation::GeluPytorchTanh => 1.4,
        Activation::Relu | Activation::Relu2 | Activation::FatRelu { .. } | Activation::DRelu => 2.0,
    }
}

/// Which neurons of an FFN are computed.
///
/// ```
/// use candle_sparse::{FfnMode, SparseConfig, profile::Rule};
///
/// assert_eq!(SparseConfig::default().mode, FfnMode::Auto);
/// assert_eq!(FfnMode::Cascade.rule(), Some(Rule::Cascade));
/// assert_eq!(FfnMode::Dense.rule(), None);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum FfnMode {
    /// What the profile found best: the rule that keeps what calibration was asked for and reads the fewest bytes. Where none
    /// keeps it, or there is no profile, [`Self::ExactZero`] if the activation is one for it, else all neurons.
    #[default]
    Auto,
    /// All neurons.
    Dense,
    /// The gates of all neurons; up and down rows of those whose gate is large enough.
    Gate,
    /// The neurons that the prediction names, and nothing of the others.
    LowRank,
    /// The gates of the neurons that the prediction names; up and down rows of those whose gate is large enough.
    Cascade,
    /// The gates of all neurons (ups, where there is no gate); the other rows of those whose activation is not exactly 0. What
    /// is left out would have added 0, so nothing is lost, and no profile is needed. For relu, relu2, fatrelu and drelu.
    ExactZero,
}

impl From<Rule> for FfnMode {
    fn from(rule: Rule) -> Self {
        match rule {
            Rule::Gate => Self::Gate,
            Rule::LowRank => Self::LowRank,
            Rule::Cascade => Self::Cascade,
            Rule::ExactZero => Self::ExactZero,
        }
    }
}

impl FfnMode {
    /// The rule that this mode follows; `None` for [`Self::Dense`], and for [`Self::Auto`] before a profile
    /// [resolves](SparseConfig::resolve) it.
    #[must_use]
    pub fn rule(self) -> Option<Rule> {
        match self {
            Self::Auto | Self::Dense => None,
            Self::Gate => Some(Rule::Gate),
            Self::LowRank => Some(Rule::LowRank),
            Self::Cascade => Some(Rule::Cascade),
            Self::ExactZero => Some(Rule::ExactZero),
        }
    }
}

/// How many neurons are computed.
///
/// ```
/// use candle_sparse::{Selection, SparseConfig};
///
/// // Nine of ten neurons are left out.
/// assert!(SparseConfig::default().with_selection(Selection::Share(0.1)).check().is_ok());
/// assert!(SparseConfig::default().with_selection(Selection::Share(1.5)).check().is_err());
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum Selection {
    /// As many as calibration found to lose what it allowed.
    #[default]
    Fitted,
    /// This share of all blocks' neurons in the mean, within those that were calibrated; 1 is dense, bit for bit.
    Share(f32),
    /// The so many largest of each block; neurons that add an exact zero are never among them.
    TopK(usize),
    /// Fitted thresholds times a factor: more neurons below 1, fewer above.
    Scale(f32),
}

/// A watch over the error of a sparse FFN: at every n-th position one block also computes all neurons, and the two outputs are
/// compared.
///
/// ```
/// use candle_sparse::{Guard, SparseConfig};
///
/// // Every 64 positions; a block whose output is off by more than a fifth in the mean computes more neurons from then on.
/// let config = SparseConfig::default().with_guard(Some(Guard::new(64, 0.2)));
/// assert!(config.check().is_ok());
/// assert!(config.with_guard(Some(Guard::new(0, 0.2))).check().is_err());
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Guard {
    /// Positions from one comparison to the next; each costs the dense FFN of one block.
    pub every: usize,
    /// Where the mean of `‖y_dense − y_sparse‖ / ‖y_dense‖` of a block is larger, its thresholds are lowered.
    pub limit: f32,
}

impl Guard {
    /// A comparison every `every` positions, with this limit of the error.
    #[must_use]
    pub const fn new(every: usize, limit: f32) -> Self {
        Self { every, limit }
    }
}

with_methods!(Guard {
    with_every: every: usize,
    with_limit: limit: f32,
});

/// Settings of the sparse FFN: which neurons are computed, how many, and who watches over the error.
///
/// ```
/// use candle_sparse::{FfnMode, Selection, SparseConfig};
///
/// let config = SparseConfig::default().with_mode(FfnMode::Cascade).with_selection(Selection::Share(0.3));
/// config.check()?;
/// assert_eq!((config.mode, config.guard, config.force), (FfnMode::Cascade, None, false));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct SparseConfig {
    /// Which neurons are computed.
    pub mode: FfnMode,
    /// How many of them.
    pub selection: Selection,
    /// Who watches over the error; `None`: nobody, at no cost.
    pub guard: Option<Guard>,
    /// Leaves neurons out even where that is not expected to be faster on this machine, and by a rule that does not keep
    /// what calibration was asked for. `CANDLE_SPARSE=always` sets it.
    pub force: bool,
}

with_methods!(SparseConfig {
    with_mode: mode: FfnMode,
    with_selection: selection: Selection,
    with_guard: guard: Option<Guard>,
    with_force: force: bool,
});

impl SparseConfig {
    /// The same with the mode that a profile's held-out text allows, never [`FfnMode::Auto`].
    ///
    /// A share, a top-k or a scale that was asked for is the caller's choice and promises nothing: then any rule serves, and
    /// `Auto` is the best one, or the cascade.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting): the fitted point of a rule that does not keep its target.
    pub fn resolve(&self, held_out: &HeldOut) -> Result<Self> {
        let promised = self.selection == Selection::Fitted;
        let mode = match (self.mode, held_out.best) {
            (FfnMode::Auto, Some(rule)) => rule.into(),
            (FfnMode::Auto, None) if promised && !self.force => FfnMode::Dense,
            (FfnMode::Auto, None) => FfnMode::Cascade,
            (mode, _) => mode,
        };
        let missed = |r: Rule| held_out.kept.get(r as usize) == Some(&false);
        if let Some(rule) = mode.rule().filter(|&r| promised && !self.force && missed(r)) {
            let others = Rule::ALL.into_iter().filter(|&r| held_out.kept[r as usize]);
            let others: Vec<String> = others.map(|r| format!("{:?}", FfnMode::from(r))).collect();
            let instead =
                if others.is_empty() { "none does".into() } else { format!("{} does", others.join(", ")) };
            let problem = format!(
                "{:?} loses more on held-out text than calibration was asked for ({instead}): take another rule, a share of \
                 your own, calibrate again, or force it",
                FfnMode::from(rule)
            );
            return Err(crate::Error::Setting { name: "ffn", problem }.into());
        }
        Ok(Self { mode, ..*self })
    }

    /// Checks that every number is in its range: shares above 0 and at most 1, counts at least 1, factors above 0.
    ///
    /// # Errors
    /// One is not; it is named.
    pub fn check(&self) -> Result<()> {
        match self.selection {
            Selection::Share(s) if !(s > 0.0 && s <= 1.0) => bail!("sparse: share {s} is not within 0 and 1"),
            Selection::TopK(0) => bail!("sparse: top-k of 0 neurons, give at least 1"),
            Selection::Scale(f) if !(f > 0.0 && f.is_finite()) => {
                bail!("sparse: scale {f} is not a positive number");
            }
            _ => {}
        }
        match self.guard {
            Some(Guard { every: 0, .. }) => {
                bail!("sparse: the guard looks every 0 positions, give at least 1")
            }
            Some(Guard { limit, .. }) if !(limit > 0.0 && limit.is_finite()) => {
                bail!("sparse: the guard's limit {limit} is not a positive number")
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
