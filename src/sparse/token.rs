//! The FFN of one token for some neurons: choose them together, then share the list of them.
//!
//! `y = bias + Σ act(g_n − shift) · (up_n · x) · down_n` over the active neurons n; without a gate `up_n · x` is what is
//! activated, in its place. All threads of a team run this; the phases
//! are the products and the choice.

use super::{BlockSelection, ChoiceScratch, FfnMode, NeuronChoice, PANEL, SparseFfn};
use crate::tuning::{LIST_PIECE_BYTES, LIST_PIECES};
use crate::{
    team::{Cancelled, Member, Outcome, Outputs},
    weight::ROW_STEP,
};
use candle_sparse_core::{Columns, Format, GluActivation, KernelSet, Neurons, ffn::Rule, kernel::select};
use candle_sparse_kernels::Kernels;

/// How a block chooses for one token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TokenSelection<'a> {
    /// Thresholds.
    pub(crate) plan: &'a BlockSelection,
    /// All neurons.
    pub(crate) dense: bool,
    /// Squared thresholds are multiplied with it.
    pub(crate) factor: f32,
    /// The largest so many, instead of those that pass a threshold.
    pub(crate) top: Option<usize>,
    /// Whether the guard samples this token.
    pub(crate) sample: bool,
}

/// What the guard found when it computed all neurons beside the active ones.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GuardSample {
    /// `‖y_dense − y_sparse‖ / ‖y_dense‖`
    pub(crate) error: f32,
    /// Share of `Σ |a|·n` that the active neurons held.
    pub(crate) recall: f32,
}

impl GuardSample {
    /// `active` and `all` are masses. Where there is nothing to miss nothing is missed.
    pub(crate) fn new(dense: &[f32], sparse: &[f32], active: f32, all: f32) -> Self {
        let missed: f32 = dense.iter().zip(sparse).map(|(d, s)| (d - s) * (d - s)).sum();
        let size: f32 = dense.iter().map(|d| d * d).sum();
        let error = if missed > 0.0 { (missed / size.max(f32::MIN_POSITIVE)).sqrt() } else { 0.0 };
        Self { error, recall: if all > 0.0 { active / all } else { 1.0 } }
    }
}

/// What was done for a token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TokenRun {
    pub(crate) count: select::Count,
    /// Weight bytes that were read.
    pub(crate) bytes: usize,
    pub(crate) sample: Option<GuardSample>,
}

/// A thread's own vectors.
#[derive(Debug, Default)]
pub(crate) struct TokenScratch {
    z: Vec<f32>,
    /// What the pieces of a choice wrote, one beside the other.
    chosen: Vec<f32>,
    /// Active neurons.
    pub(crate) list: Vec<u32>,
    /// Their gates.
    gates: Vec<f32>,
    scores: Vec<f32>,
    /// Of all neurons: activations of a sample of the guard, or room to find the largest scores.
    inner: Vec<f32>,
    /// `[pieces, hidden_size]`
    partials: Vec<f32>,
    /// The output.
    pub(crate) y: Vec<f32>,
    dense_y: Vec<f32>,
    choice: ChoiceScratch,
}

impl TokenScratch {
    /// Makes room for FFNs of `inner` neurons, `hidden` inputs and predictions of a rank up to `rank`.
    pub(crate) fn resize(&mut self, [inner, hidden, rank]: [usize; 3]) {
        self.z.resize(rank, 0.0);
        self.chosen.resize(2 * inner, 0.0);
        self.list.resize(inner, 0);
        for v in [&mut self.gates, &mut self.scores, &mut self.inner] {
            v.resize(inner, 0.0);
        }
        self.partials.resize(LIST_PIECES * hidden, 0.0);
        self.y.resize(hidden, 0.0);
        self.dense_y.resize(hidden, 0.0);
        self.choice.resize(inner);
    }

    /// The list of the `k` largest scores, and their gates.
    fn take_largest(&mut self, k: usize, piece: usize) -> select::Count {
        let inner = self.gates.len();
        let places = self.gates.chunks_mut(piece).zip(self.scores.chunks_mut(piece));
        for (chosen, (gates, scores)) in self.chosen[..2 * inner].chunks(2 * piece).zip(places) {
            let (g, s) = chosen.split_at(gates.len());
            gates.copy_from_slice(g);
            scores.copy_from_slice(s);
        }
        let candidates = self.gates.iter().filter(|g| g.to_bits() != select::inactive().to_bits()).count();
        let active = select::largest(&self.scores, k, &mut self.inner, &mut self.list);
        for i in 0..active {
            // The list increases: nothing is overwritten before it is read.
            self.gates[i] = self.gates[self.list[i] as usize];
        }
        select::Count { active, candidates }
    }
}

/// An FFN, and one token's input in the form of its weights.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TokenFfn<'a> {
    pub(crate) kernels: &'a Kernels,
    pub(crate) ffn: &'a SparseFfn,
    pub(crate) act: GluActivation,
    pub(crate) selection: TokenSelection<'a>,
    /// The input, `[hidden_size]`.
    pub(crate) x: &'a [f32],
    /// The same rounded for quantised weights; unused where nothing is quantised.
    pub(crate) rounded: Columns<'a>,
}

/// How many of `n` neurons make a piece: a matter of bytes, so that no number of threads changes a bit.
fn neurons_per_piece(n: usize, row_bytes: usize) -> usize {
    n.div_ceil((2 * n * row_bytes / LIST_PIECE_BYTES).clamp(1, LIST_PIECES)).max(1)
}

impl TokenFfn<'_> {
    /// What the phases of `ffn` put out at most, without the guard's.
    pub(crate) fn declare(ffn: &SparseFfn, outputs: &mut Outputs) {
        outputs.add(ffn.predictor.as_ref().map_or(0, |p| p.p.rows()));
        outputs.add(2 * ffn.intermediate_size());
        outputs.add(LIST_PIECES * ffn.gate.cols());
    }

    /// What the phases of a sample of the guard put out at most.
    pub(crate) fn declare_sample([inner, hidden]: [usize; 2], outputs: &mut Outputs) {
        outputs.add(inner);
        outputs.add(LIST_PIECES * hidden);
    }

    /// Computes [`TokenScratch::y`].
    ///
    /// # Errors
    /// The computation is over.
    pub(crate) fn run(&self, member: &mut Member<'_>, s: &mut TokenScratch) -> Result<TokenRun, Cancelled> {
        let count = self.choose(member, s)?;
        self.sum_list(member, count.active, s)?;
        let sample = if self.selection.sample { Some(self.sample(member, count.active, s)?) } else { None };
        Ok(TokenRun { count, bytes: self.bytes(count, sample.is_some()), sample })
    }

    fn column(&self, format: Format) -> Columns<'_> {
        if format.is_quantized() { self.rounded } else { Columns::F32(self.x) }
    }

    /// `y = w · x`
    fn product(&self, member: &mut Member<'_>, w: &crate::Weight, y: &mut [f32]) -> Outcome {
        let (x, w) = (self.column(w.format()), w.matrix());
        let piece = member.piece(w.rows(), w.bytes(), ROW_STEP);
        member.phase(y, piece, |i, y| {
            self.kernels.matmul(w.slice_rows(i * piece..i * piece + y.len()), x, &mut [y]);
        })
    }

    /// Puts the active neurons into `list` and, unless the prediction alone decides, their gates into `gates`.
    ///
    /// # Errors
    /// The computation is over.
    pub(crate) fn choose(
        &self,
        member: &mut Member<'_>,
        s: &mut TokenScratch,
    ) -> Result<select::Count, Cancelled> {
        let TokenSelection { plan, dense, factor, top, .. } = self.selection;
        let (ffn, inner) = (self.ffn, self.ffn.intermediate_size());
        if dense {
            self.product(member, &ffn.gate, &mut s.gates)?;
            s.list.iter_mut().zip(0..).for_each(|(n, i)| *n = i);
            return Ok(select::Count { active: inner, candidates: inner });
        }
        let z = match &ffn.predictor {
            Some(p) if plan.mode.rule().is_some_and(Rule::predicts) => {
                let z = &mut s.z[..p.p.rows()];
                self.product(member, &p.p, z)?;
                &*z
            }
            _ => &[],
        };
        let (kernels, act, x) = (self.kernels, self.act, self.column(ffn.gate.format()));
        let choice = NeuronChoice { ffn, plan, factor, kernels, act, x, z };
        let width = NeuronChoice::width(plan);
        let piece = member.piece(inner, choice.bytes(), PANEL);
        member.phase(&mut s.chosen[..width * inner], width * piece, |i, out| {
            choice.range(i * piece, &mut s.choice, out);
        })?;
        Ok(match top {
            None => select::active(&s.chosen[..inner], &mut s.list, &mut s.gates),
            Some(k) => s.take_largest(k, piece),
        })
    }

    /// `y` of the first `n` of the list.
    fn sum_list(&self, member: &mut Member<'_>, n: usize, s: &mut TokenScratch) -> Outcome {
        let TokenSelection { plan, dense, .. } = self.selection;
        let (ffn, hidden, x) = (self.ffn, s.y.len(), self.column(self.ffn.gate.format()));
        let by_prediction = !dense && plan.mode == FfnMode::LowRank;
        // Of exact zeros as many neurons to a piece as of all: sums that are cut alike have the bits of all neurons.
        let by_number = !dense && plan.mode == FfnMode::ExactZero;
        let cut = if by_number { ffn.intermediate_size() } else { n };
        let each = neurons_per_piece(cut, ffn.row_bytes());
        let partials = &mut s.partials[..cut.div_ceil(each) * hidden];
        let all = &s.list[..n];
        let place =
            |end: usize| if by_number { all.partition_point(|&n| (n as usize) < end) } else { end.min(n) };
        member.phase(partials, hidden, |i, y| {
            let r = place(i * each)..place((i + 1) * each);
            let (list, gates) = (&all[r.clone()], &mut s.gates[r]);
            if by_prediction {
                self.kernels.matvec_rows(ffn.gate.matrix(), list, x, gates);
            }
            y.fill(0.0);
            self.kernels.sparse_ffn(ffn.neurons(), self.act, list, x, gates, y);
        })?;
        if dense || plan.bias.is_empty() {
            s.y.fill(0.0);
        } else {
            s.y.copy_from_slice(&plan.bias);
        }
        partials.chunks_exact(hidden).for_each(|part| self.kernels.axpy(1.0, part, &mut s.y));
        Ok(())
    }

    /// The same FFN with all neurons, and how far `y` of the first `n` of the list is from it.
    fn sample(
        &self,
        member: &mut Member<'_>,
        n: usize,
        s: &mut TokenScratch,
    ) -> Result<GuardSample, Cancelled> {
        let (ffn, hidden, inner) = (self.ffn, s.y.len(), self.ffn.intermediate_size());
        let x = self.column(ffn.gate.format());
        let (gate_w, neurons, down_w) = (ffn.gate.matrix(), ffn.neurons(), ffn.down());
        let piece = member.piece(inner, 2 * gate_w.bytes(), ROW_STEP);
        member.phase(&mut s.inner, piece, |i, a| {
            let (r, gates) = (i * piece..i * piece + a.len(), &mut s.scores[..a.len()]);
            self.kernels.matmul(gate_w.slice_rows(r.clone()), x, &mut [gates]);
            match neurons {
                Neurons::Down(_) => a.fill(1.0),
                rows => self.kernels.matmul(rows.matrix().every(0, 2).slice_rows(r), x, &mut [&mut *a]),
            }
            self.kernels.gated(self.act.act, self.act.shift, gates, a);
        })?;
        let each = neurons_per_piece(inner, ffn.row_bytes());
        let partials = &mut s.partials[..inner.div_ceil(each) * hidden];
        member.phase(partials, hidden, |i, y| {
            let r = i * each..((i + 1) * each).min(inner);
            y.fill(0.0);
            self.kernels.matmul_t(down_w.slice_rows(r.clone()), &[&s.inner[r]], &mut [y]);
        })?;
        s.dense_y.fill(0.0);
        partials.chunks_exact(hidden).for_each(|part| self.kernels.axpy(1.0, part, &mut s.dense_y));
        let mass = |i: usize| s.inner[i].abs() * ffn.importance_squared()[i].sqrt();
        let active = s.list[..n].iter().map(|&i| mass(i as usize)).sum();
        Ok(GuardSample::new(&s.dense_y, &s.y, active, (0..inner).map(mass).sum()))
    }

    fn bytes(&self, count: select::Count, sample: bool) -> usize {
        let (ffn, plan) = (self.ffn, self.selection.plan);
        let sample = if sample { ffn.dense_bytes() } else { 0 };
        if self.selection.dense {
            return ffn.dense_bytes() + sample;
        }
        let inner = ffn.intermediate_size();
        let predicted =
            ffn.predictor.as_ref().map_or(0, |p| p.p.bytes() + (inner - plan.hot) * p.bytes_per_neuron());
        let (gates, predicted) = match plan.mode {
            FfnMode::Auto | FfnMode::Dense | FfnMode::Gate | FfnMode::ExactZero => (inner, 0),
            FfnMode::LowRank => (count.active, predicted),
            FfnMode::Cascade => (count.candidates, predicted),
        };
        (gates + ffn.neurons().rows_per_neuron() * count.active) * ffn.row_bytes() + predicted + sample
    }
}

#[cfg(test)]
mod tests {
    use super::GuardSample;

    #[test]
    fn samples_by_hand() {
        let sample = GuardSample::new(&[3.0, 4.0], &[3.0, 1.0], 1.0, 4.0);
        assert_eq!((sample.error, sample.recall), (0.6, 0.25));
        let nothing = GuardSample::new(&[0.0], &[0.0], 0.0, 0.0);
        assert_eq!((nothing.error, nothing.recall), (0.0, 1.0));
    }
}
