//! What calibration learned about a model: which neurons a token needs and which tokens attention needs, and how to tell.
//!
//! Neurons stand in the order in which they are held in memory, [`LayerProfile::order`]. With `z = P·x`, predicted
//! `ĝ = Q_g·z` and `û = Q_u·z`, `v_g` and `v_u` the mean squares of what the prediction misses, and `n` the neuron's
//! importance (the norm of its down row), neuron i is
//!
//! ```text
//! a candidate   if E[act(g)²] · (û² + v_u) · n² ≥ candidate²     LowRank, Cascade
//! kept          if   act(g)²  · (û² + v_u) · n² ≥ keep²          Cascade, with the exact gate g
//! kept          if   act(g)²  ·  E[u²]     · n² ≥ keep²          Gate
//! ```
//!
//! with `E[act(g)²] = (act(ĝ − √v_g)² + act(ĝ + √v_g)²) / 2`. Scores are thus expected squares: a neuron of which little is
//! known stays a candidate. What is skipped is replaced by its mean, `bias`.

mod check;
mod fingerprint;
pub(crate) mod gates;
mod shape;
mod store;
mod tensors;

use crate::gate::FastGrnnGate;
pub use candle_sparse_core::ffn::Rule;
pub use fingerprint::{Fingerprint, difference, fingerprint};

/// Whether the rules of a profile keep at their fitted points what calibration was asked for, on text that nothing was
/// learned from.
///
/// ```
/// use candle_sparse::{FfnMode, SparseConfig, profile::{HeldOut, Rule}};
///
/// let held_out = HeldOut { kept: [true, false, false], best: Some(Rule::Gate) };
/// assert_eq!(SparseConfig::default().resolve(&held_out)?.mode, FfnMode::Gate);
/// // A rule that loses more than calibration was asked for has to be forced.
/// let low_rank = SparseConfig::default().with_mode(FfnMode::LowRank);
/// assert!(low_rank.resolve(&held_out).is_err());
/// assert!(low_rank.with_force(true).resolve(&held_out).is_ok());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldOut {
    /// In the order of [`Rule`]. A rule that does not keep it is used by those alone who
    /// [insist](crate::SparseConfig::force).
    pub kept: [bool; 3],
    /// The rule among those that reads the fewest bytes; `None` where no rule keeps it.
    pub best: Option<Rule>,
}

impl HeldOut {
    /// No rule keeps a target, or there is none.
    pub(crate) const NONE: Self = Self { kept: [false; 3], best: None };
}

impl Default for HeldOut {
    /// Of a profile that nobody has checked, as they were before version 0.1: all rules, the cascade first.
    fn default() -> Self {
        Self { kept: [true; 3], best: Some(Rule::Cascade) }
    }
}

/// Everything that calibration learned about a model; [the module](self) says how it is used.
///
/// ```
/// use candle_sparse::{Profile, profile::Rule};
///
/// let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu/sparse.safetensors");
/// let profile = Profile::load(path)?;
/// profile.check()?;
/// assert_eq!((profile.layers.len(), profile.gates.len()), (4, 4));
/// // The mean share of active neurons at which the cascade loses what calibration allowed.
/// let share = profile.shares[profile.fitted[Rule::Cascade as usize]];
/// assert!(share > 0.1 && share < 0.5, "{share}");
/// assert_eq!(Profile::from_bytes(&profile.to_bytes()?)?, profile);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// What was learned about the FFN of each decoder block; empty where attention alone was calibrated. Then there are no
    /// [`Self::shares`] either, and no rule keeps a target.
    pub layers: Vec<LayerProfile>,
    /// The gate of attention of each decoder block; empty where none were fitted.
    pub gates: Vec<FastGrnnGate>,
    /// `[blocks][kv_heads]`: how many times the budget of [`AttentionMode::Recall`](crate::AttentionMode::Recall) each key/value
    /// head has, 1 in the mean; empty where that was not calibrated.
    pub recall_shares: Vec<Vec<f32>>,
    /// Mean active shares of the points at which thresholds were set, increasing.
    pub shares: Vec<f32>,
    /// The point at which each [`Rule`] loses what calibration allowed.
    pub fitted: [usize; 3],
    /// What text that nothing was learned from says about the fitted points.
    pub held_out: HeldOut,
    /// Numbers that tell the model, see [`Fingerprint`].
    pub fingerprint: Vec<f32>,
    /// Settings and held-out quality, for people.
    pub about: serde_json::Value,
}

impl Profile {
    /// What calibration learned about recall, and nothing else.
    pub(crate) fn of_attention_alone(recall_shares: Vec<Vec<f32>>, fingerprint: Vec<f32>) -> Self {
        Self {
            layers: Vec::new(),
            gates: Vec::new(),
            recall_shares,
            shares: Vec::new(),
            fitted: [0; 3],
            held_out: HeldOut::NONE,
            fingerprint,
            about: serde_json::Value::Null,
        }
    }
}

/// What was learned about the FFN of one block. Row-major, `[rows, cols]`.
///
/// ```
/// use candle_sparse::Profile;
///
/// let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu/sparse.safetensors");
/// let layer = &Profile::load(path)?.layers[0];
/// let (hidden_size, intermediate_size) = (256, 512);
/// assert_eq!(layer.p.len(), layer.rank * hidden_size);
/// assert_eq!(layer.q_gate.len(), intermediate_size * layer.rank);
/// // A permutation of all neurons.
/// let mut order = layer.order.clone();
/// order.sort();
/// assert!(order.into_iter().eq(0..intermediate_size as u32));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct LayerProfile {
    /// `[intermediate_size]`: neuron i in memory is neuron `order[i]` of the checkpoint.
    pub order: Vec<u32>,
    /// Rank of the prediction; 0: there is none, and P and Q are empty.
    pub rank: usize,
    /// P `[rank, hidden_size]`.
    pub p: Vec<f32>,
    /// `Q_g` `[intermediate_size, rank]`.
    pub q_gate: Vec<f32>,
    /// `Q_u` `[intermediate_size, rank]`.
    pub q_up: Vec<f32>,
    /// `v_g` `[intermediate_size]`: `E[(g − ĝ)²]`.
    pub gate_variance: Vec<f32>,
    /// `v_u` `[intermediate_size]`: `E[(u − û)²]`.
    pub up_variance: Vec<f32>,
    /// `[intermediate_size]`: `E[u²]`.
    pub up_square: Vec<f32>,
    /// n `[intermediate_size]`.
    pub importance: Vec<f32>,
    /// In the order of [`Rule`].
    pub rules: [LayerRule; 3],
}

/// Thresholds of one block and rule at each point of [`Profile::shares`].
///
/// ```
/// use candle_sparse::{Profile, profile::Rule};
///
/// let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu/sparse.safetensors");
/// let profile = Profile::load(path)?;
/// let cascade = &profile.layers[0].rules[Rule::Cascade as usize];
/// assert_eq!(cascade.keep.len(), profile.shares.len());
/// // The more neurons are to be active, the lower is the threshold.
/// assert!(cascade.keep.is_sorted_by(|a, b| a >= b));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerRule {
    /// `[points]`; 0 for [`Rule::Gate`].
    pub candidate: Vec<f32>,
    /// `[points]`; 0 for [`Rule::LowRank`].
    pub keep: Vec<f32>,
    /// `[points]`: expected active share of this block.
    pub share: Vec<f32>,
    /// `[points]`: so many neurons at the front are computed always.
    pub hot: Vec<u32>,
    /// `[points, hidden_size]`: the mean of what is skipped.
    pub bias: Vec<f32>,
}
