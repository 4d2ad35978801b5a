//! Judging the neurons of a range.

use super::{FfnMode, Plan, Predictor, SparseFfn, ffn::PANEL};
use crate::weight::Weight;
use candle_sparse_core::{
    Columns, Gate, KernelSet,
    kernel::select::{self, Predicted},
};
use candle_sparse_kernels::Kernels;
use std::ops::Range;

/// Working memory of a range, as long as the longest.
#[derive(Clone, Debug, Default)]
pub(crate) struct Room {
    /// Gates: predicted, or of candidates.
    gate: Vec<f32>,
    /// Predicted up.
    up: Vec<f32>,
    /// `act(gate − shift)`
    activated: Vec<f32>,
    /// Expected squares of it.
    square: Vec<f32>,
    candidates: Vec<u32>,
}

impl Room {
    /// Makes room for ranges of `n` neurons.
    pub(crate) fn resize(&mut self, n: usize) {
        // Whole panels around the range.
        self.gate.resize(n + 2 * PANEL, 0.0);
        self.up.resize(n + 2 * PANEL, 0.0);
        self.activated.resize(n, 0.0);
        self.square.resize(n, 0.0);
        self.candidates.resize(n, 0);
    }
}

/// One token's choice in one block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Choice<'a> {
    /// Weights.
    pub ffn: &'a SparseFfn,
    /// Thresholds.
    pub plan: &'a Plan,
    /// Squared thresholds are multiplied with it.
    pub factor: f32,
    /// Kernels.
    pub kernels: &'a Kernels,
    /// Activation.
    pub act: Gate,
    /// The FFN's input in the form of its weights.
    pub x: Columns<'a>,
    /// `P · x`; unused where nothing is predicted.
    pub z: &'a [f32],
}

impl Choice<'_> {
    /// Values per neuron that [`Self::range`] writes.
    #[must_use]
    pub(crate) fn width(plan: &Plan) -> usize {
        if plan.top.is_some() { 2 } else { 1 }
    }

    /// Bytes that a choice among all neurons reads, roughly: it serves to cut the work.
    #[must_use]
    pub(crate) fn bytes(&self) -> usize {
        let q = self.ffn.predictor.as_ref().map_or(0, |p| p.q_gate.bytes() + p.q_up.bytes());
        match self.plan.mode {
            FfnMode::Auto | FfnMode::Dense | FfnMode::Gate => self.ffn.gate.bytes(),
            FfnMode::LowRank => q,
            FfnMode::Cascade => q + self.ffn.gate.bytes() / 2,
        }
    }

    /// Judges the neurons from `first` on: their gates (0 with [`FfnMode::LowRank`], which computes none) or what
    /// [`select`] puts in their place, then, for a top-k, as many scores.
    ///
    /// # Panics
    /// `room` is too small, or the range ends past the last neuron.
    pub(crate) fn range(&self, first: usize, room: &mut Room, out: &mut [f32]) {
        let (gates, scores) = out.split_at_mut(out.len() / Self::width(self.plan));
        let r = first..first + gates.len();
        match (self.plan.mode, &self.ffn.predictor) {
            (FfnMode::LowRank, Some(p)) => self.by_prediction(p, r.clone(), room, gates, scores),
            (FfnMode::Cascade, Some(p)) => self.by_both(p, r.clone(), room, gates, scores),
            _ => self.by_gate(r.clone(), room, gates, scores),
        }
        let importance = &self.ffn.learned.importance[r];
        scores.iter_mut().zip(importance).for_each(|(s, n)| *s *= n);
    }

    fn by_gate(&self, r: Range<usize>, room: &mut Room, gates: &mut [f32], scores: &mut [f32]) {
        self.kernels.matmul(self.ffn.gate.matrix().slice_rows(r.clone()), self.x, &mut [&mut *gates]);
        gates.iter_mut().for_each(|g| *g = shown(*g));
        if self.plan.mode == FfnMode::Dense {
            return;
        }
        let activated = self.activate(gates, &mut room.activated);
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
        p: &Predictor,
        r: Range<usize>,
        room: &mut Room,
        gates: &mut [f32],
        scores: &mut [f32],
    ) {
        gates.fill(0.0);
        let cold = r.start.max(self.plan.hot).min(r.end)..r.end;
        let predicted = self.predict(p, cold.clone(), room);
        if scores.is_empty() {
            let thresholds = &self.plan.candidate[cold.clone()];
            for (i, gate) in gates[cold.start - r.start..].iter_mut().enumerate() {
                if !select::passes(score(&predicted, i), thresholds[i] * self.factor) {
                    *gate = select::inactive();
                }
            }
        }
        // A top-k has no hot neurons: the range is cold.
        scores.iter_mut().enumerate().for_each(|(i, s)| *s = score(&predicted, i));
    }

    fn by_both(
        &self,
        p: &Predictor,
        r: Range<usize>,
        room: &mut Room,
        gates: &mut [f32],
        scores: &mut [f32],
    ) {
        let cold = r.start.max(self.plan.hot).min(r.end)..r.end;
        let w = self.ffn.gate.matrix();
        let (hot_gates, cold_gates) = gates.split_at_mut(cold.start - r.start);
        if !hot_gates.is_empty() {
            self.kernels.matmul(w.slice_rows(r.start..cold.start), self.x, &mut [&mut *hot_gates]);
            hot_gates.iter_mut().for_each(|g| *g = shown(*g));
        }
        let mut list = std::mem::take(&mut room.candidates);
        let predicted = self.predict(p, cold.clone(), room);
        let (thresholds, base) = (&self.plan.candidate[cold.clone()], cold.start as u32);
        let n = select::candidates(predicted, thresholds, self.factor, base, &mut list);
        self.kernels.matvec_rows(w, &list[..n], self.x, &mut room.gate[..n]);
        let activated = self.activate(&room.gate[..n], &mut room.activated);
        let (variance, keep) = (&self.ffn.learned.up_variance[cold.clone()], &self.plan.keep[cold]);
        cold_gates.fill(select::inactive());
        scores.fill(0.0);
        for ((&n, &gate), &a) in list[..n].iter().zip(&room.gate).zip(activated) {
            let i = n as usize - base as usize;
            let score = select::score(a * a, room.up[i], variance[i]);
            let kept = !scores.is_empty() || select::passes(score, keep[i] * self.factor);
            cold_gates[i] = if kept { shown(gate) } else { select::rejected() };
            if let Some(s) = scores.get_mut(i) {
                *s = score;
            }
        }
        room.candidates = list;
    }

    /// `act(g − shift)`
    fn activate<'b>(&self, gates: &[f32], activated: &'b mut [f32]) -> &'b [f32] {
        let activated = &mut activated[..gates.len()];
        activated.fill(1.0);
        self.kernels.gated(self.act.act, self.act.shift, gates, activated);
        activated
    }

    /// Expected squares of activations, and ups, of a range.
    fn predict<'b>(&'b self, p: &Predictor, r: Range<usize>, room: &'b mut Room) -> Predicted<'b> {
        let (n, learned) = (r.len(), &self.ffn.learned);
        let Room { gate, up, activated, square, .. } = room;
        let (gate, up, square) =
            (self.product(&p.q_gate, &r, gate), self.product(&p.q_up, &r, up), &mut square[..n]);
        let deviation = &learned.gate_deviation[r.clone()];
        gate.iter_mut().zip(deviation).for_each(|(g, d)| *g -= d);
        square.copy_from_slice(self.activate(gate, activated));
        gate.iter_mut().zip(deviation).for_each(|(g, d)| *g += 2.0 * d);
        let high = self.activate(gate, activated);
        square.iter_mut().zip(high).for_each(|(s, h)| *s = select::expected_square(*s, *h));
        Predicted { gate_square: square, up, up_variance: &learned.up_variance[r] }
    }
}

impl Choice<'_> {
    /// `Q · z` for the neurons of a range, at the front of `room`.
    fn product<'b>(&self, q: &Weight, r: &Range<usize>, room: &'b mut [f32]) -> &'b mut [f32] {
        let rank = self.z.len();
        let (first, end) = (r.start / PANEL, r.end.div_ceil(PANEL));
        let room = &mut room[..if r.is_empty() { 0 } else { (end - first) * PANEL }];
        room.fill(0.0);
        for (i, y) in room.chunks_exact_mut(PANEL).enumerate() {
            let rows = (first + i) * rank..(first + i + 1) * rank;
            self.kernels.matmul_t(q.matrix().slice_rows(rows), &[self.z], &mut [y]);
        }
        if !r.is_empty() {
            let start = r.start - first * PANEL;
            room.copy_within(start..start + r.len(), 0);
        }
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
