//! FFNs that leave neurons out, token by token.

use super::{BatchScratch, Turn};
use crate::{
    decoder::{Decoder, Layer, decode::not_finite, resize, state::LayerRun},
    sparse::{ModelSelection, SparseFfn, TokenFfn, TokenRun, TokenScratch, TokenSelection},
    team::{Cancelled, Outputs, Team},
    weight::Prepared,
};
use candle_core::Result;
use candle_sparse_core::{Columns, Format, GluActivation, KernelSet};
use std::sync::{Mutex, PoisonError};

/// Working memory of all threads.
#[derive(Default)]
pub(super) struct FfnScratch {
    team: Team,
    local: Vec<Mutex<Local>>,
}

/// A thread's own vectors.
#[derive(Default)]
struct Local {
    normed: Vec<f32>,
    prepared: Prepared,
    scratch: TokenScratch,
    run: Option<TokenRun>,
}

impl Decoder {
    /// `x += bias + Σ act(g) · u · down` over each token's active neurons.
    ///
    /// # Errors
    /// The input of a token's FFN is not finite.
    pub(super) fn sparse_ffn_turns(
        &self,
        (i, layer, ffn): (usize, &Layer, &SparseFfn),
        plans: &ModelSelection,
        turns: &[Turn<'_>],
        s: &mut BatchScratch,
    ) -> Result<()> {
        let hidden = self.config.hidden_size;
        let mut outputs = Outputs::of(self.threads.count());
        TokenFfn::declare(ffn, &mut outputs);
        self.declare_sample(&mut outputs);
        s.ffn.local.resize_with(self.threads.count(), Mutex::default);
        for local in &mut s.ffn.local {
            self.resize_local(ffn, local.get_mut().unwrap_or_else(PoisonError::into_inner));
        }
        s.runs[i].clear();
        let mut rows = s.rows.x.chunks_exact_mut(hidden);
        for (turn, state) in turns.iter().zip(&mut s.states) {
            for (position, x) in (turn.cache.len()..).zip(rows.by_ref().take(turn.ids.len())) {
                let selection = state.selection(plans, i, position);
                let run = self.sparse_ffn_row((i, layer, ffn), selection, &outputs, &mut s.ffn, x)?;
                state.note_layer(plans, i, &run);
                s.runs[i].push(run);
            }
        }
        Ok(())
    }

    fn resize_local(&self, ffn: &SparseFfn, local: &mut Local) {
        let c = &self.config;
        resize(&mut local.normed, c.hidden_size);
        self.reserve_token(&mut local.prepared);
        let rank = ffn.predictor.as_ref().map_or(0, |p| p.p.rows());
        local.scratch.resize([c.intermediate_size, c.hidden_size, rank]);
    }

    fn sparse_ffn_row(
        &self,
        (i, layer, ffn): (usize, &Layer, &SparseFfn),
        selection: TokenSelection<'_>,
        outputs: &Outputs,
        s: &mut FfnScratch,
        x: &mut [f32],
    ) -> Result<LayerRun> {
        let c = &self.config;
        let act = GluActivation { act: c.hidden_act, shift: c.gate_shift };
        let input = &*x;
        let outcome = self.threads.team(&mut s.team, outputs, &s.local, |member, local: &mut Local| {
            self.norm_row(input, &layer.post_attention_layernorm, &mut local.normed);
            if !local.normed.iter().all(|v| v.is_finite()) {
                return Err(Cancelled);
            }
            let Local { normed, prepared, scratch, run } = local;
            let rounded = match ffn.rounds_input() {
                true => self.on().column(Format::Q8_0, normed, prepared),
                false => Columns::F32(normed),
            };
            let token = TokenFfn { kernels: self.kernels, ffn, act, selection, x: normed, rounded };
            *run = Some(token.run(member, scratch)?);
            Ok(())
        });
        if outcome.is_err() {
            return Err(not_finite(i));
        }
        let local = s.local[0].get_mut().unwrap_or_else(PoisonError::into_inner);
        let run = local.run.take().unwrap_or_else(|| unreachable!("the calling thread ran"));
        self.kernels.axpy(1.0, &local.scratch.y, x);
        let TokenRun { count, bytes, sample } = run;
        let (active, candidates, dense) = (count.active, count.candidates, selection.dense);
        Ok(LayerRun { active, candidates, bytes, dense, sample })
    }
}
