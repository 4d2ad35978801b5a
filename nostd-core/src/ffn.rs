//! The FFN of one token: all neurons, or those that a rule chooses.

pub mod choose;

use crate::{
    config::Activation,
    error::Error,
    kernel::{GluActivation, KernelSet, Neurons, select},
    matrix::Matrix,
    scratch::{FfnScratch, Forms},
    weights::DenseFfn,
};
use choose::{Choice, ChoiceScratch};

/// Neurons of a panel of [`Predictor::q_gate`].
pub const PANEL: usize = 128;

/// Active share past which a block is faster when it computes all neurons, in the layout of a sparse one.
pub const CROSSOVER: f32 = 0.85;

/// Tokens for which a block runs dense after one that needed nearly all neurons.
pub const DENSE_TOKENS: u32 = 15;

/// For how many tokens more a block that chooses its neurons runs dense, after one that computed `active` of `neurons`.
#[must_use]
pub fn dense_left(before: u32, dense: bool, active: usize, neurons: usize) -> u32 {
    if !dense && active as f32 > CROSSOVER * neurons as f32 { DENSE_TOKENS } else { before.saturating_sub(1) }
}

/// How a block tells which neurons a token needs; the dense mode needs no rule.
///
/// ```
/// use candle_sparse_core::ffn::Rule;
///
/// assert_eq!(Rule::ALL.map(|rule| rule as usize), [0, 1, 2]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Exact gates decide about up and down.
    Gate,
    /// The prediction alone decides.
    LowRank,
    /// The prediction chooses candidates, their exact gates decide.
    Cascade,
    /// Exact gates are computed, and what they shut to an exact 0 is left out: nothing is lost, and nothing is learned for it.
    ExactZero,
}

impl Rule {
    /// Whether a prediction names neurons before a gate is computed.
    #[must_use]
    pub fn predicts(self) -> bool {
        matches!(self, Self::LowRank | Self::Cascade)
    }

    /// Those that a profile has thresholds of, in its order.
    pub const ALL: [Self; 3] = [Self::Gate, Self::LowRank, Self::Cascade];

    /// As in the names of tensors.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Gate => "gate",
            Self::LowRank => "low_rank",
            Self::Cascade => "cascade",
            Self::ExactZero => "exact_zero",
        }
    }
}

/// `ĝ = Q_g·P·x`, `û = Q_u·P·x`.
///
/// The rows of Q are short: as rows they would cost more in sums across a vector than in multiply-adds. So Q is held
/// transposed, in panels of [`PANEL`] neurons: row `i · rank + k` is column k of panel i.
#[derive(Clone, Copy, Debug)]
pub struct Predictor<'a> {
    /// `[rank, hidden_size]`
    pub p: Matrix<'a>,
    /// `[panels · rank, PANEL]`
    pub q_gate: Matrix<'a>,
    /// `[panels · rank, PANEL]`
    pub q_up: Matrix<'a>,
}

/// What calibration learned about each neuron, `[intermediate_size]`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Learned<'a> {
    /// Standard deviation of a gate from its prediction, `√v_g`; may be empty without a prediction.
    pub gate_deviation: &'a [f32],
    /// `v_u`, of up; may be empty without a prediction.
    pub up_variance: &'a [f32],
    /// `E[u²]`; may be empty where [`Rule::Gate`] is not used.
    pub up_square: &'a [f32],
    /// The squared norm of the neuron's down row; may be empty without a top-k.
    pub importance_squared: &'a [f32],
}

/// One FFN held so that a neuron can be left out: gates apart, up and down row of a neuron side by side, all quantised
/// along `hidden_size`.
#[derive(Clone, Copy, Debug)]
pub struct SparseFfn<'a> {
    /// `[intermediate_size, hidden_size]`; of an FFN without a gate the rows of `up_proj`, which decide as gates do.
    pub gate: Matrix<'a>,
    /// `[2 · intermediate_size, hidden_size]`: up row, then column of `down_proj`, neuron by neuron; without a gate
    /// `[intermediate_size, hidden_size]`, the columns of `down_proj` alone.
    pub up_down: Matrix<'a>,
    /// For [`Rule::LowRank`] and [`Rule::Cascade`].
    pub predictor: Option<Predictor<'a>>,
    /// How neurons are judged.
    pub learned: Learned<'a>,
}

/// How one block chooses its neurons in one setting.
#[derive(Clone, Copy, Debug)]
pub struct FfnPlan<'a> {
    /// By what.
    pub rule: Rule,
    /// The largest so many, instead of those that pass a threshold.
    pub top: Option<usize>,
    /// Neurons at the front that are always computed; 0 with a top-k.
    pub hot: usize,
    /// `[intermediate_size]`: squared, divided by importance²; may be empty with [`Rule::Gate`] and [`Rule::ExactZero`].
    pub candidate: &'a [f32],
    /// `[intermediate_size]`: squared, divided by importance²; may be empty with [`Rule::LowRank`], [`Rule::ExactZero`] or a top-k.
    pub keep: &'a [f32],
    /// `[hidden_size]`: what is skipped, in the mean; empty with [`Rule::ExactZero`], which skips nothing.
    pub bias: &'a [f32],
}

impl SparseFfn<'_> {
    /// Neurons.
    #[must_use]
    pub fn intermediate_size(&self) -> usize {
        self.gate.rows()
    }

    /// What is read of an active neuron, beside its gate.
    #[must_use]
    pub fn neurons(&self) -> Neurons<'_> {
        if self.up_down.rows() == self.gate.rows() {
            Neurons::Down(self.up_down)
        } else {
            Neurons::UpDown(self.up_down)
        }
    }

    /// Rank of the prediction, 0 without.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.predictor.map_or(0, |p| p.p.rows())
    }

    /// Checks every shape for `inner` neurons of `hidden` inputs.
    ///
    /// # Errors
    /// The first part whose shape does not fit.
    pub fn validate(&self, layer: usize, [inner, hidden]: [usize; 2], gated: bool) -> Result<(), Error> {
        let matrix = |what, m: Matrix<'_>, expected: [usize; 2]| {
            let got = [m.rows(), m.cols()];
            (got == expected).then_some(()).ok_or(Error::Shape { what, layer: Some(layer), expected, got })
        };
        matrix("gate_proj", self.gate, [inner, hidden])?;
        let (what, rows) = if gated { ("up and down rows", 2 * inner) } else { ("down rows", inner) };
        matrix(what, self.up_down, [rows, hidden])?;
        if self.gate.format() != self.up_down.format() {
            return Err(Error::OutOfRange("format of the gates (it must be that of up and down rows)"));
        }
        if let Some(p) = self.predictor {
            let panels = inner.div_ceil(PANEL) * p.p.rows();
            matrix("profile P", p.p, [p.p.rows().max(1), hidden])?;
            matrix("profile Q_gate", p.q_gate, [panels, PANEL])?;
            matrix("profile Q_up", p.q_up, [panels, PANEL])?;
            if p.q_gate.format() != p.q_up.format() {
                return Err(Error::OutOfRange("format of profile Q_gate (it must be that of Q_up)"));
            }
        }
        Ok(())
    }

    /// Checks that `plan` has what its rule needs, of an FFN whose shapes are right.
    ///
    /// # Errors
    /// The first part that is missing or of another length, or [`Rule::ExactZero`] for an activation that gives none.
    pub fn validate_plan(&self, plan: &FfnPlan<'_>, act: Activation) -> Result<(), Error> {
        let (inner, hidden) = (self.gate.rows(), self.gate.cols());
        if plan.rule == Rule::ExactZero {
            return match plan {
                FfnPlan { top: None, hot: 0, bias: [], .. } if act.has_exact_zeros() => Ok(()),
                _ => Err(Error::OutOfRange(
                    "rule (exact zeros need an activation that gives them, and nothing else)",
                )),
            };
        }
        let predicts = plan.rule.predicts();
        if predicts && self.predictor.is_none() {
            return Err(Error::Missing(
                "the prediction of the profile (P and Q), which LowRank and Cascade need",
            ));
        }
        let thresholds = plan.top.is_none();
        let Learned { gate_deviation, up_variance, up_square, importance_squared } = self.learned;
        for (needed, what, v, expected) in [
            (predicts, "gate_deviation", gate_deviation, inner),
            (predicts, "up_variance", up_variance, inner),
            (plan.rule == Rule::Gate, "up_square", up_square, inner),
            (!thresholds, "importance_squared", importance_squared, inner),
            (predicts, "candidate", plan.candidate, inner),
            (thresholds && plan.rule != Rule::LowRank, "keep", plan.keep, inner),
            (true, "bias of what is skipped", plan.bias, hidden),
        ] {
            if needed && v.len() != expected {
                return Err(Error::Length { what, expected, got: v.len() });
            }
        }
        let hot = plan.hot > inner || plan.hot > 0 && !thresholds;
        if hot { Err(Error::OutOfRange("hot neurons")) } else { Ok(()) }
    }
}

/// Neurons of one block that a token computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Run {
    /// Neurons whose up and down rows were read.
    pub active: u32,
    /// Those, and the ones whose gates were computed in vain.
    pub candidates: u32,
}

/// `y = down(act(gate(x)) · up(x))`, or `down(act(up(x)))`
pub(crate) fn dense<K: KernelSet>(
    kernels: &K,
    act: GluActivation,
    ffn: &DenseFfn<'_>,
    x: &[f32],
    s: &mut FfnScratch<'_>,
    y: &mut [f32],
) {
    if let Some(gate_proj) = &ffn.gate_proj {
        gate_proj.product(kernels, x, s.groups, s.gate);
        ffn.up_proj.product(kernels, x, s.groups, s.up);
    } else {
        ffn.up_proj.product(kernels, x, s.groups, s.gate);
        s.up.fill(1.0);
    }
    kernels.gated(act.act, act.shift, s.gate, s.up);
    ffn.down_proj.product(kernels, s.up, s.groups, y);
}

/// `y = bias + Σ act(g) · u · down` over the active neurons; all of them, and no bias, without a plan.
pub(crate) fn sparse<K: KernelSet>(
    kernels: &K,
    act: GluActivation,
    ffn: &SparseFfn<'_>,
    plan: Option<&FfnPlan<'_>>,
    x: &[f32],
    s: &mut FfnScratch<'_>,
    y: &mut [f32],
) -> Run {
    let predictor = plan.filter(|plan| plan.rule.predicts()).and(ffn.predictor.as_ref());
    let formats = [Some(ffn.gate.format()), predictor.map(|p| p.p.format())];
    let forms = Forms::new(kernels, formats.into_iter().flatten(), x, s.groups);
    let form = forms.of(ffn.gate.format());
    let Some(plan) = plan else {
        kernels.matmul(ffn.gate, form, &mut [&mut *s.gate]);
        s.list.iter_mut().zip(0..).for_each(|(n, i)| *n = i);
        y.fill(0.0);
        kernels.sparse_ffn(ffn.neurons(), act, s.list, form, s.gate, y);
        let all = s.list.len() as u32;
        return Run { active: all, candidates: all };
    };
    let z = &mut s.z[..predictor.map_or(0, |p| p.p.rows())];
    if let Some(p) = predictor {
        kernels.matmul(p.p, forms.of(p.p.format()), &mut [&mut *z]);
    }
    let choice = Choice { ffn: *ffn, plan: *plan, factor: 1.0, kernels, act, x: form, z };
    let count = choose(&choice, s.room, s.candidates, s.gate, s.up, s.scores, s.list);
    let (list, gates) = (&s.list[..count.active], &mut s.up[..count.active]);
    if plan.rule == Rule::LowRank {
        kernels.matvec_rows(ffn.gate, list, form, gates);
    }
    y.fill(0.0);
    kernels.sparse_ffn(ffn.neurons(), act, list, form, gates, y);
    if !plan.bias.is_empty() {
        kernels.axpy(1.0, plan.bias, y);
    }
    Run { active: count.active as u32, candidates: count.candidates as u32 }
}

/// Puts the active neurons into `list` and their gates into `kept`, both at the front.
fn choose<K: KernelSet>(
    choice: &Choice<'_, K>,
    room: &mut [f32],
    candidates: &mut [u32],
    gates: &mut [f32],
    kept: &mut [f32],
    scores: &mut [f32],
    list: &mut [u32],
) -> select::Count {
    let top = choice.plan.top;
    let mut room = ChoiceScratch::new(PANEL, room, candidates);
    let judged: &mut [f32] = if top.is_some() { scores } else { &mut [] };
    let mut of_panels = judged.chunks_mut(PANEL);
    for (i, gates) in gates.chunks_mut(PANEL).enumerate() {
        choice.range(i * PANEL, &mut room, gates, of_panels.next().unwrap_or_default());
    }
    let Some(k) = top else { return select::active(gates, list, kept) };
    select::active_of_largest(gates, scores, k, list, kept)
}
