//! Judging the neurons of a range: which of them a token needs.
//!
//! ```text
//! a candidate   if E[act(g)²] · (û² + v_u) ≥ candidate     LowRank, Cascade
//! kept          if   act(g)²  · (û² + v_u) ≥ keep          Cascade, with the exact gate g
//! kept          if   act(g)²  ·  E[u²]     ≥ keep          Gate
//! kept          if   act(g)   ≠  0                         ExactZero
//! ```
//!
//! with `z = P·x`, predicted `ĝ = Q_g·z` and `û = Q_u·z`, `v_g` and `v_u` the mean squares of what the prediction misses, and
//! `E[act(g)²] = (act(ĝ − √v_g)² + act(ĝ + √v_g)²) / 2`. Thresholds are squared and divided by the neuron's importance².

use super::{FfnPlan, PANEL, Predictor, Rule, SparseFfn};
use crate::{
    kernel::{
        GluActivation, KernelSet,
        select::{self, Predicted},
    },
    matrix::{Columns, Matrix},
};
use core::ops::Range;

/// Working memory for judging ranges of neurons.
#[derive(Debug)]
pub struct ChoiceScratch<'a> {
    /// Gates: predicted, or of candidates.
    gate: &'a mut [f32],
    /// Predicted up.
    up: &'a mut [f32],
    /// `act(gate − shift)`
    activated: &'a mut [f32],
    /// Expected squares of it.
    square: &'a mut [f32],
    candidates: &'a mut [u32],
}

impl<'a> ChoiceScratch<'a> {
    /// Elements for ranges of `n` neurons that begin with a panel: twice whole panels, and twice `n`.
    #[must_use]
    pub const fn elements(n: usize) -> usize {
        2 * n.next_multiple_of(PANEL) + 2 * n
    }

    /// Over `data` of [`Self::elements`] and `candidates` of `n` elements.
    ///
    /// # Panics
    /// They are shorter.
    #[must_use]
    pub fn new(n: usize, data: &'a mut [f32], candidates: &'a mut [u32]) -> Self {
        let panels = n.next_multiple_of(PANEL);
        let (gate, rest) = data.split_at_mut(panels);
        let (up, rest) = rest.split_at_mut(panels);
        let (activated, rest) = rest.split_at_mut(n);
        Self { gate, up, activated, square: &mut rest[..n], candidates: &mut candidates[..n] }
    }
}

/// One token's choice in one block.
#[derive(Debug)]
pub struct Choice<'a, K> {
    /// Weights.
    pub ffn: SparseFfn<'a>,
    /// Thresholds.
    pub plan: FfnPlan<'a>,
    /// Squared thresholds are multiplied with it.
    pub factor: f32,
    /// Kernels.
    pub kernels: &'a K,
    /// Activation.
    pub act: GluActivation,
    /// The FFN's input in the form of its weights.
    pub x: Columns<'a>,
    /// `P · x`; unused where nothing is predicted.
    pub z: &'a [f32],
}

impl<K: KernelSet> Choice<'_, K> {
    /// Judges the neurons from `first` on: writes their gates (0 with [`Rule::LowRank`], which computes none) or what
    /// [`select`] puts in their place, and, where `scores` is as long as `gates` and not empty, their scores for a top-k.
    ///
    /// A top-k has no hot neurons. Cost: the gates of the range, or `2 · rank` multiply-adds per neuron and the gates of the
    /// candidates.
    ///
    /// # Panics
    /// `first` is no multiple of [`PANEL`], `room` is too small, the range ends past the last neuron, or the rule needs a
    /// prediction that the FFN has not.
    pub fn range(&self, first: usize, room: &mut ChoiceScratch<'_>, gates: &mut [f32], scores: &mut [f32]) {
        assert!(first.is_multiple_of(PANEL), "choice: a range begins within a panel");
        let r = first..first + gates.len();
        let predictor = || self.ffn.predictor.expect("a rule that predicts was checked to have a prediction");
        match self.plan.rule {
            Rule::Gate => self.by_gate(r.clone(), room, gates, scores),
            Rule::LowRank => self.by_prediction(&predictor(), r.clone(), room, gates, scores),
            Rule::Cascade => self.by_both(&predictor(), r.clone(), room, gates, scores),
            Rule::ExactZero => {
                self.gates(r.clone(), gates);
                select::not_zero(self.activate(gates, room.activated), gates);
            }
        }
        // Without scores there may be no importance.
        let importance = self.ffn.learned.importance_squared.get(r).unwrap_or_default();
        scores.iter_mut().zip(importance).for_each(|(s, n)| *s *= n);
    }

    fn by_gate(&self, r: Range<usize>, room: &mut ChoiceScratch<'_>, gates: &mut [f32], scores: &mut [f32]) {
        self.gates(r.clone(), gates);
        let activated = self.activate(gates, room.activated);
        let square = &self.ffn.learned.up_square[r.clone()];
        if scores.is_empty() {
            select::keep(activated, square, &self.plan.keep[r], self.factor, gates);
        }
        for ((score, a), square) in scores.iter_mut().zip(activated).zip(square) {
            *score = *a * *a * square;
        }
    }

    fn by_prediction(
        &self,
        p: &Predictor<'_>,
        r: Range<usize>,
        room: &mut ChoiceScratch<'_>,
        gates: &mut [f32],
        scores: &mut [f32],
    ) {
        gates.fill(0.0);
        let cold = self.cold(&r);
        let ChoiceScratch { gate, up, activated, square, .. } = room;
        let predicted = self.predict(p, cold.clone(), [gate, activated], up, square);
        if scores.is_empty() {
            let thresholds = &self.plan.candidate[cold.clone()];
            for (i, gate) in gates[cold.start - r.start..].iter_mut().enumerate() {
                if !select::passes(score(&predicted, i), thresholds[i] * self.factor) {
                    *gate = select::inactive();
                }
            }
        }
        scores.iter_mut().enumerate().for_each(|(i, s)| *s = score(&predicted, i));
    }

    fn by_both(
        &self,
        p: &Predictor<'_>,
        r: Range<usize>,
        room: &mut ChoiceScratch<'_>,
        gates: &mut [f32],
        scores: &mut [f32],
    ) {
        let cold = self.cold(&r);
        let (hot_gates, cold_gates) = gates.split_at_mut(cold.start - r.start);
        self.gates(r.start..cold.start, hot_gates);
        let ChoiceScratch { gate, up, activated, square, candidates } = room;
        let predicted = self.predict(p, cold.clone(), [&mut *gate, &mut *activated], up, square);
        let (thresholds, base) = (&self.plan.candidate[cold.clone()], cold.start as u32);
        let n = select::candidates(predicted, thresholds, self.factor, base, candidates);
        let (list, exact) = (&candidates[..n], &mut gate[..n]);
        self.kernels.matvec_rows(self.ffn.gate, list, self.x, exact);
        let activated = self.activate(exact, activated);
        let keep = &self.plan.keep[cold];
        cold_gates.fill(select::inactive());
        scores.fill(0.0);
        for ((&n, &gate), &a) in list.iter().zip(&*exact).zip(activated) {
            let i = (n - base) as usize;
            let score = select::score(a * a, predicted.up[i], predicted.up_variance[i]);
            let kept = !scores.is_empty() || select::passes(score, keep[i] * self.factor);
            cold_gates[i] = if kept { shown(gate) } else { select::rejected() };
            if let Some(s) = scores.get_mut(i) {
                *s = score;
            }
        }
    }

    /// The neurons of a range that are judged; those before them are always active.
    fn cold(&self, r: &Range<usize>) -> Range<usize> {
        r.start.max(self.plan.hot).min(r.end)..r.end
    }

    /// Exact gates.
    fn gates(&self, r: Range<usize>, gates: &mut [f32]) {
        if !r.is_empty() {
            self.kernels.matmul(self.ffn.gate.slice_rows(r), self.x, &mut [&mut *gates]);
            gates.iter_mut().for_each(|g| *g = shown(*g));
        }
    }

    /// `act(g − shift)`
    fn activate<'b>(&self, gates: &[f32], activated: &'b mut [f32]) -> &'b [f32] {
        let activated = &mut activated[..gates.len()];
        activated.fill(1.0);
        self.kernels.gated(self.act.act, self.act.shift, gates, activated);
        activated
    }

    /// Expected squares of activations, and ups, of a range.
    fn predict<'b>(
        &'b self,
        p: &Predictor<'_>,
        r: Range<usize>,
        [gate, activated]: [&mut [f32]; 2],
        up: &'b mut [f32],
        square: &'b mut [f32],
    ) -> Predicted<'b> {
        let learned = &self.ffn.learned;
        let (gate, up) = (self.product(p.q_gate, &r, gate), self.product(p.q_up, &r, up));
        let square = &mut square[..r.len()];
        let deviation = &learned.gate_deviation[r.clone()];
        gate.iter_mut().zip(deviation).for_each(|(g, d)| *g -= d);
        square.copy_from_slice(self.activate(gate, activated));
        gate.iter_mut().zip(deviation).for_each(|(g, d)| *g += 2.0 * d);
        let high = self.activate(gate, activated);
        square.iter_mut().zip(high).for_each(|(s, h)| *s = select::expected_square(*s, *h));
        Predicted { gate_square: square, up, up_variance: &learned.up_variance[r] }
    }

    /// `Q · z` for the neurons of a range, at the front of `room`.
    fn product<'b>(&self, q: Matrix<'_>, r: &Range<usize>, room: &'b mut [f32]) -> &'b mut [f32] {
        if r.is_empty() {
            return &mut room[..0];
        }
        let rank = self.z.len();
        let (first, end) = (r.start / PANEL, r.end.div_ceil(PANEL));
        let room = &mut room[..(end - first) * PANEL];
        room.fill(0.0);
        for (i, y) in room.chunks_exact_mut(PANEL).enumerate() {
            let rows = (first + i) * rank..(first + i + 1) * rank;
            self.kernels.matmul_t(q.slice_rows(rows), &[self.z], &mut [y]);
        }
        let start = r.start - first * PANEL;
        room.copy_within(start..start + r.len(), 0);
        &mut room[..r.len()]
    }
}

/// A gate as it is handed on: whatever NaN a damaged weight has made of it, it is none that stands for "not active".
fn shown(gate: f32) -> f32 {
    if gate.is_nan() { f32::NAN } else { gate }
}

fn score(p: &Predicted<'_>, i: usize) -> f32 {
    select::score(p.gate_square[i], p.up[i], p.up_variance[i])
}
