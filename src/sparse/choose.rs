//! Judging the neurons of a range: the rule is [`candle_sparse_core::ffn::choose`]'s.

use super::{BlockSelection, FfnMode, SparseFfn};
use candle_sparse_core::{Columns, GluActivation, ffn::choose};
use candle_sparse_kernels::Kernels;

/// Working memory of a range, as long as the longest.
#[derive(Clone, Debug, Default)]
pub(crate) struct ChoiceScratch {
    data: Vec<f32>,
    candidates: Vec<u32>,
}

impl ChoiceScratch {
    /// Makes room for ranges of `n` neurons that begin with a panel.
    pub(crate) fn resize(&mut self, n: usize) {
        self.data.resize(choose::ChoiceScratch::elements(n), 0.0);
        self.candidates.resize(n, 0);
    }
}

/// One token's choice in one block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NeuronChoice<'a> {
    /// Weights.
    pub ffn: &'a SparseFfn,
    /// Thresholds.
    pub plan: &'a BlockSelection,
    /// Squared thresholds are multiplied with it.
    pub factor: f32,
    /// Kernels.
    pub kernels: &'a Kernels,
    /// Activation.
    pub act: GluActivation,
    /// The FFN's input in the form of its weights.
    pub x: Columns<'a>,
    /// `P · x`; unused where nothing is predicted.
    pub z: &'a [f32],
}

impl NeuronChoice<'_> {
    /// Values per neuron that [`Self::range`] writes.
    #[must_use]
    pub(crate) fn width(plan: &BlockSelection) -> usize {
        if plan.top.is_some() { 2 } else { 1 }
    }

    /// Bytes that a choice among all neurons reads, roughly: it serves to cut the work.
    #[must_use]
    pub(crate) fn bytes(&self) -> usize {
        let q = self.ffn.predictor.as_ref().map_or(0, |p| p.q_gate.bytes() + p.q_up.bytes());
        match self.plan.mode {
            FfnMode::Auto | FfnMode::Dense | FfnMode::Gate | FfnMode::ExactZero => self.ffn.gate.bytes(),
            FfnMode::LowRank => q,
            FfnMode::Cascade => q + self.ffn.gate.bytes() / 2,
        }
    }

    /// Judges the neurons from `first` on: their gates (0 with [`FfnMode::LowRank`], which computes none) or what
    /// [`select`](candle_sparse_core::kernel::select) puts in their place, then, for a top-k, as many scores. A dense plan
    /// chooses nothing.
    ///
    /// # Panics
    /// `first` is no multiple of [`PANEL`](super::PANEL), `room` is too small, or the range ends past the last neuron.
    pub(crate) fn range(&self, first: usize, room: &mut ChoiceScratch, out: &mut [f32]) {
        let (gates, scores) = out.split_at_mut(out.len() / Self::width(self.plan));
        let Some(plan) = self.plan.rule() else { return };
        let Self { factor, kernels, act, x, z, .. } = *self;
        let choice = choose::Choice { ffn: self.ffn.view(), plan, factor, kernels, act, x, z };
        let mut room =
            choose::ChoiceScratch::new(room.candidates.len(), &mut room.data, &mut room.candidates);
        choice.range(first, &mut room, gates, scores);
    }
}
