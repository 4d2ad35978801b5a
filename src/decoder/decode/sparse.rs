//! The FFN of one token for some neurons: choose them together, then share the list of them.

use super::Own;
use crate::decoder::{
    Decoder, Layer, resize,
    state::{LayerRun, Look, Turn},
};
use crate::{
    sparse::{Choice, FfnMode, PANEL, Room as ChoiceRoom, SparseFfn},
    team::{Member, Outcome, Over, Room},
    weight::ROW_STEP,
};
use candle_sparse_core::{Columns, Format, Gate, KernelSet, Neurons, kernel::select};

/// Bytes of up and down rows that make a piece of the list.
const PIECE_BYTES: usize = 256 * 1024;
/// Pieces at most: each hands over a whole hidden vector.
const MOST_PIECES: usize = 16;

/// A thread's own vectors for sparse FFNs.
#[derive(Default)]
pub(super) struct SparseOwn {
    z: Vec<f32>,
    /// What the pieces of a choice wrote, one beside the other.
    chosen: Vec<f32>,
    /// Active neurons.
    list: Vec<u32>,
    /// Their gates.
    gates: Vec<f32>,
    scores: Vec<f32>,
    /// Of all neurons: activations of a look, or room to find the largest scores.
    inner: Vec<f32>,
    /// `[pieces, hidden_size]`
    partials: Vec<f32>,
    y: Vec<f32>,
    dense_y: Vec<f32>,
    room: ChoiceRoom,
    /// What this token did, block by block.
    pub(super) runs: Vec<LayerRun>,
    /// The block whose input is not finite.
    pub(super) damaged: Option<usize>,
}

/// The FFN's input in the form of its weights, and what does not change while a block is computed.
#[derive(Clone, Copy)]
struct Block<'a> {
    ffn: &'a SparseFfn,
    turn: Turn<'a>,
    x: Columns<'a>,
    act: Gate,
}

/// How many pieces `n` neurons make: a matter of bytes, so that no number of threads changes a bit.
fn cut(n: usize, row_bytes: usize) -> usize {
    n.div_ceil((2 * n * row_bytes / PIECE_BYTES).clamp(1, MOST_PIECES)).max(1)
}

impl Decoder {
    /// What the sparse FFNs of a step publish at most, beside what dense ones do.
    pub(super) fn sparse_room(&self) -> Room {
        let c = &self.config;
        let rank = |l: &Layer| l.ffn.sparse().map(|f| f.predictor.as_ref().map_or(0, |p| p.p.rows()));
        let sum = MOST_PIECES * c.hidden_size;
        let elements = |rank: usize| rank + c.intermediate_size + sum;
        let look = if self.sparse.is_some() { c.intermediate_size + sum } else { 0 };
        let layers = self.layers.iter().filter_map(rank);
        Room { phases: layers.clone().count() + 2, elements: layers.map(elements).sum::<usize>() + look }
    }

    /// Allocates nothing where no block is sparse.
    pub(super) fn resize_sparse(&self, s: &mut SparseOwn) {
        s.damaged = None;
        let ranks = self.layers.iter().filter_map(|l| l.ffn.sparse()?.predictor.as_ref());
        let rank = ranks.map(|p| p.p.rows()).max().unwrap_or(0);
        if self.sparse.is_none() {
            return;
        }
        let (hidden, inner) = (self.config.hidden_size, self.config.intermediate_size);
        resize(&mut s.z, rank);
        resize(&mut s.chosen, 2 * inner);
        s.list.resize(inner, 0);
        resize(&mut s.gates, inner);
        resize(&mut s.scores, inner);
        resize(&mut s.inner, inner);
        resize(&mut s.partials, MOST_PIECES * hidden);
        resize(&mut s.y, hidden);
        resize(&mut s.dense_y, hidden);
        s.room.resize(inner);
        s.runs.resize(self.layers.len(), LayerRun::default());
    }

    /// `x += bias + Σ act(g) · u · down` over the active neurons.
    pub(super) fn sparse_ffn_token(
        &self,
        member: &mut Member<'_>,
        (i, layer, ffn): (usize, &Layer, &SparseFfn),
        turn: Turn<'_>,
        own: &mut Own,
    ) -> Outcome {
        let c = &self.config;
        let Own { x: residual, normed, groups, sparse: s, .. } = own;
        self.norm_row(residual, &layer.post_attention_layernorm, normed);
        if !normed.iter().all(|v| v.is_finite()) {
            // All threads have the same input, so all leave here.
            s.damaged = Some(i);
            return Err(Over);
        }
        let p = ffn.predictor.as_ref().map(|p| p.p.format());
        let quantised = if ffn.gate.format().is_quantized() || p.is_some_and(Format::is_quantized) {
            self.on().columns(Format::Q8_0, c.hidden_size, normed, groups)
        } else {
            Columns::F32(normed)
        };
        let form = |f: Format| if f.is_quantized() { quantised } else { Columns::F32(normed) };
        let act = Gate { act: c.hidden_act, shift: c.gate_shift };
        let block = Block { ffn, turn, x: form(ffn.gate.format()), act };
        let count = self.choose(member, block, p.map(form), s)?;
        let by_prediction = !turn.dense && turn.plan.mode == FfnMode::LowRank;
        self.sum_list(member, block, count.active, by_prediction, s)?;
        self.kernels.axpy(1.0, &s.y, residual);
        let look = if turn.look { Some(self.look(member, block, count.active, s)?) } else { None };
        let (dense, bytes) = (turn.dense, bytes(&block, count, look.is_some()));
        s.runs[i] = LayerRun { active: count.active, candidates: count.candidates, bytes, dense, look };
        Ok(())
    }

    /// Puts the active neurons into `list` and, unless the prediction alone decides, their gates into `gates`.
    fn choose(
        &self,
        member: &mut Member<'_>,
        Block { ffn, turn, x, act }: Block<'_>,
        x_of_p: Option<Columns<'_>>,
        s: &mut SparseOwn,
    ) -> Result<select::Count, Over> {
        let inner = self.config.intermediate_size;
        if turn.dense {
            let w = ffn.gate.matrix();
            let piece = member.piece(inner, w.bytes(), ROW_STEP);
            member.phase(&mut s.gates, piece, |i, y| {
                self.kernels.matmul(w.slice_rows(i * piece..i * piece + y.len()), x, &mut [y]);
            })?;
            s.list.iter_mut().zip(0..).for_each(|(n, i)| *n = i);
            return Ok(select::Count { active: inner, candidates: inner });
        }
        let z = match (&ffn.predictor, x_of_p) {
            (Some(p), Some(x)) if turn.plan.mode != FfnMode::Gate => {
                let (w, z) = (p.p.matrix(), &mut s.z[..p.p.rows()]);
                let piece = member.piece(w.rows(), w.bytes(), ROW_STEP);
                member.phase(z, piece, |i, y| {
                    self.kernels.matmul(w.slice_rows(i * piece..i * piece + y.len()), x, &mut [y]);
                })?;
                &*z
            }
            _ => &[],
        };
        let choice = Choice { ffn, plan: turn.plan, factor: turn.factor, kernels: self.kernels, act, x, z };
        let width = Choice::width(turn.plan);
        let piece = member.piece(inner, choice.bytes(), PANEL);
        member.phase(&mut s.chosen[..width * inner], width * piece, |i, out| {
            choice.range(i * piece, &mut s.room, out);
        })?;
        Ok(match turn.top {
            None => select::active(&s.chosen[..inner], &mut s.list, &mut s.gates),
            Some(k) => s.take_largest(k, piece),
        })
    }

    /// `y = bias + Σ act(g) · u · down` over the first `n` of the list.
    fn sum_list(
        &self,
        member: &mut Member<'_>,
        Block { ffn, turn, x, act }: Block<'_>,
        n: usize,
        by_prediction: bool,
        s: &mut SparseOwn,
    ) -> Outcome {
        let (hidden, w) = (self.config.hidden_size, Neurons::UpDown(ffn.up_down.matrix()));
        let cut = cut(n, ffn.row_bytes());
        let partials = &mut s.partials[..n.div_ceil(cut) * hidden];
        member.phase(partials, hidden, |i, y| {
            let r = i * cut..((i + 1) * cut).min(n);
            let (list, gates) = (&s.list[r.clone()], &mut s.gates[r]);
            if by_prediction {
                self.kernels.matvec_rows(ffn.gate.matrix(), list, x, gates);
            }
            y.fill(0.0);
            self.kernels.sparse_ffn(w, act, list, x, gates, y);
        })?;
        if turn.dense {
            s.y.fill(0.0);
        } else {
            s.y.copy_from_slice(&turn.plan.bias);
        }
        partials.chunks_exact(hidden).for_each(|part| self.kernels.axpy(1.0, part, &mut s.y));
        Ok(())
    }

    /// The same FFN with all neurons, and how far `y` of the first `n` of the list is from it.
    fn look(
        &self,
        member: &mut Member<'_>,
        Block { ffn, x, act, .. }: Block<'_>,
        n: usize,
        s: &mut SparseOwn,
    ) -> Result<Look, Over> {
        let (hidden, inner) = (self.config.hidden_size, self.config.intermediate_size);
        let (gate_w, up_down) = (ffn.gate.matrix(), ffn.up_down.matrix());
        let (up_w, down_w) = (up_down.every(0, 2), up_down.every(1, 2));
        let piece = member.piece(inner, 2 * gate_w.bytes(), ROW_STEP);
        member.phase(&mut s.inner, piece, |i, a| {
            let (r, gates) = (i * piece..i * piece + a.len(), &mut s.scores[..a.len()]);
            self.kernels.matmul(gate_w.slice_rows(r.clone()), x, &mut [gates]);
            self.kernels.matmul(up_w.slice_rows(r), x, &mut [a]);
            self.kernels.gated(act.act, act.shift, gates, a);
        })?;
        let cut = cut(inner, ffn.row_bytes());
        let partials = &mut s.partials[..inner.div_ceil(cut) * hidden];
        member.phase(partials, hidden, |i, y| {
            let r = i * cut..((i + 1) * cut).min(inner);
            y.fill(0.0);
            self.kernels.matmul_t(down_w.slice_rows(r.clone()), &[&s.inner[r]], &mut [y]);
        })?;
        s.dense_y.fill(0.0);
        partials.chunks_exact(hidden).for_each(|part| self.kernels.axpy(1.0, part, &mut s.dense_y));
        let mass = |i: usize| s.inner[i].abs() * ffn.importance_squared()[i].sqrt();
        let active = s.list[..n].iter().map(|&i| mass(i as usize)).sum();
        Ok(Look::new(&s.dense_y, &s.y, active, (0..inner).map(mass).sum()))
    }
}

impl SparseOwn {
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

/// Weight bytes that were read.
fn bytes(Block { ffn, turn, .. }: &Block<'_>, count: select::Count, look: bool) -> usize {
    let look = if look { ffn.dense_bytes() } else { 0 };
    if turn.dense {
        return ffn.dense_bytes() + look;
    }
    let inner = ffn.intermediate_size();
    let predicted =
        ffn.predictor.as_ref().map_or(0, |p| p.p.bytes() + (inner - turn.plan.hot) * p.bytes_per_neuron());
    let (gates, predicted) = match turn.plan.mode {
        FfnMode::Auto | FfnMode::Dense | FfnMode::Gate => (inner, 0),
        FfnMode::LowRank => (count.active, predicted),
        FfnMode::Cascade => (count.candidates, predicted),
    };
    (gates + 2 * count.active) * ffn.row_bytes() + predicted + look
}
