//! The FFN of a block that has a profile, for one token.

use super::Local;
use crate::{
    decoder::{Decoder, Layer, state::LayerRun},
    sparse::{SparseFfn, TokenFfn, TokenRun, TokenScratch, TokenSelection},
    team::{Cancelled, Member, Outcome, Outputs},
};
use candle_core::Error;
use candle_sparse_core::{Columns, Format, GluActivation, KernelSet};

/// A thread's own vectors for sparse FFNs.
#[derive(Default)]
pub(super) struct SparseLocal {
    scratch: TokenScratch,
    /// What this token did, block by block.
    pub(super) runs: Vec<LayerRun>,
    /// The block whose input is not finite.
    pub(super) damaged: Option<usize>,
}

/// The input of a block's FFN is NaN or infinite.
pub(in crate::decoder) fn not_finite(layer: usize) -> Error {
    Error::msg(format!(
        "layer {layer}: the input of the FFN is not finite (NaN or infinity): is the checkpoint damaged, or its dtype too \
         narrow?"
    ))
}

impl Decoder {
    /// What a sample of the guard puts out at most, of which a step takes one.
    pub(in crate::decoder) fn declare_sample(&self, outputs: &mut Outputs) {
        if self.sparse.as_ref().is_some_and(|s| s.plans.config.guard.is_some()) {
            TokenFfn::declare_sample([self.config.intermediate_size, self.config.hidden_size], outputs);
        }
    }

    /// Allocates nothing where no block is sparse.
    pub(super) fn resize_sparse(&self, s: &mut SparseLocal) {
        s.damaged = None;
        if self.sparse.is_none() {
            return;
        }
        let ranks = self.layers.iter().filter_map(|l| l.ffn.sparse()?.predictor.as_ref());
        let rank = ranks.map(|p| p.p.rows()).max().unwrap_or(0);
        s.scratch.resize([self.config.intermediate_size, self.config.hidden_size, rank]);
        s.runs.resize(self.layers.len(), LayerRun::default());
    }

    /// `x += bias + Σ act(g) · u · down` over the active neurons.
    pub(super) fn sparse_ffn_token(
        &self,
        member: &mut Member<'_>,
        (i, layer, ffn): (usize, &Layer, &SparseFfn),
        selection: TokenSelection<'_>,
        local: &mut Local,
    ) -> Outcome {
        let c = &self.config;
        let Local { x: residual, normed, prepared, sparse: s, .. } = local;
        self.norm_row(residual, &layer.post_attention_layernorm, normed);
        if !normed.iter().all(|v| v.is_finite()) {
            // All threads have the same input, so all leave here.
            s.damaged = Some(i);
            return Err(Cancelled);
        }
        let rounded = match ffn.rounds_input() {
            true => self.on().column(Format::Q8_0, normed, prepared),
            false => Columns::F32(normed),
        };
        let act = GluActivation { act: c.hidden_act, shift: c.gate_shift };
        let token = TokenFfn { kernels: self.kernels, ffn, act, selection, x: normed, rounded };
        let TokenRun { count, bytes, sample } = token.run(member, &mut s.scratch)?;
        self.kernels.axpy(1.0, &s.scratch.y, residual);
        let (active, candidates, dense) = (count.active, count.candidates, selection.dense);
        s.runs[i] = LayerRun { active, candidates, bytes, dense, sample };
        Ok(())
    }
}
