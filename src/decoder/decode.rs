//! One token of one sequence: all threads run the whole step and share what reads weights or the past.
//!
//! The cache is read during the step and grows by the token when all is done.

mod sparse;

use super::{
    Decoder, DenseFfn, Ffn, Input, Layer, Projection, Scratch as AllScratch, add_bias, gate_up::GateUp,
    resize, state::LayerRun,
};
use crate::{
    attention::{self, LoneScratch, PagePlan, Selector, Token, lone_token},
    deadline::Deadline,
    kv_cache::{KvCache, PAGE_LEN},
    sparse::TokenFfn,
    team::{Cancelled, Member, Outcome, Outputs, Team},
    weight::{Prepared, ROW_STEP},
};
use candle_core::{Error, Result};
use candle_sparse_core::{KernelSet, kernel::rope};
use sparse::SparseLocal;
pub(super) use sparse::not_finite;
use std::sync::{Mutex, PoisonError};

/// Working memory of all threads.
#[derive(Default)]
pub(super) struct Scratch {
    team: Team,
    local: Vec<Mutex<Local>>,
}

/// A thread's own vectors: all but the inner ones of a phase are equal on all threads.
#[derive(Default)]
struct Local {
    x: Vec<f32>,
    normed: Vec<f32>,
    qkv: Vec<f32>,
    /// `[layer][key, value]` of the token, rounded as the cache does.
    kv: Vec<f32>,
    attended: Vec<f32>,
    /// What attention read in each layer that has a gate, `[layer, hidden_size]`.
    inputs: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// A piece of the logits.
    piece: Vec<f32>,
    prepared: Prepared,
    attention: LoneScratch,
    sparse: SparseLocal,
}

/// What a token attends to.
#[derive(Clone, Copy)]
struct Past<'a> {
    cache: &'a KvCache,
    select: Selector<'a>,
    plan: &'a PagePlan,
    position: usize,
}

impl Decoder {
    /// Runs a checked step of one token and writes its logits.
    ///
    /// # Errors
    /// The step was given up, or its numbers are not finite; the cache is unchanged then.
    pub(super) fn decode(
        &self,
        input: Input<'_>,
        position: usize,
        cache: &mut KvCache,
        s: &mut AllScratch,
        deadline: Option<Deadline>,
        logits: &mut [f32],
    ) -> Result<()> {
        let AllScratch { decode: s, state, plan, .. } = s;
        let select = self.selector();
        if select.config().chooses_by_token() {
            (0..self.layers.len()).for_each(|layer| cache.update_bounds(layer, position / PAGE_LEN));
        }
        plan.update(&select, cache, [self.layers.len(), self.config.num_key_value_heads], position);
        let plans = self.sparse.as_ref().map(|s| &*s.plans);
        if let Some(plans) = plans {
            state.begin(plans, self.config.intermediate_size);
        }
        s.local.resize_with(self.threads.count(), Mutex::default);
        for local in &mut s.local {
            self.resize(local.get_mut().unwrap_or_else(PoisonError::into_inner), cache);
        }
        let past = Past { cache, select, plan, position };
        let logits = Mutex::new(Some(logits));
        let program = |member: &mut Member<'_>, local: &mut Local| {
            self.enter_token(input, position, local);
            for (i, layer) in self.layers.iter().enumerate() {
                // The caller's end is everyone's.
                if member.is_caller() && deadline.is_some_and(|d| d.has_passed()) {
                    return Err(Cancelled);
                }
                self.attend_token(member, (i, layer), past, local)?;
                match (&layer.ffn, plans) {
                    (Ffn::Sparse(ffn), Some(plans)) => {
                        let selection = state.selection(plans, i, position);
                        self.sparse_ffn_token(member, (i, layer, ffn), selection, local)?;
                    }
                    (Ffn::Dense(ffn), _) => {
                        self.ffn_token(member, layer, ffn, local)?;
                        if let Some(run) = local.sparse.runs.get_mut(i) {
                            *run = LayerRun::all(self.config.intermediate_size, layer.ffn.dense_bytes());
                        }
                    }
                    (Ffn::Sparse(_), None) => unreachable!("a model with sparse blocks has plans"),
                }
            }
            let out = || logits.lock().unwrap_or_else(PoisonError::into_inner).take();
            self.head_token(member, local, if member.is_caller() { out() } else { None })
        };
        let outcome = self.threads.team(&mut s.team, &self.outputs(cache), &s.local, program);
        let local = s.local[0].get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(i) = local.sparse.damaged {
            return Err(not_finite(i));
        }
        if let (Err(Cancelled), Some(deadline)) = (outcome, deadline) {
            deadline.check()?;
        }
        outcome.map_err(|Cancelled| Error::msg("decode: the step was given up"))?;
        cache.begin(1, position, 1)?;
        let kv_dim = self.config.kv_dim();
        for (layer, kv) in local.kv.chunks_exact(2 * kv_dim).enumerate() {
            cache.write(0, layer, position, &kv[..kv_dim], &kv[kv_dim..]);
        }
        for (i, x) in local.inputs.chunks_exact(self.config.hidden_size).enumerate() {
            if let Some(gate) = select.gate(i) {
                cache.observe(0, i, gate, self.kernels, position, x);
            }
        }
        cache.advance(1);
        if let Some(plans) = plans {
            state.note(plans, &local.sparse.runs);
        }
        Ok(())
    }

    /// What the phases of a step put out at most.
    fn outputs(&self, cache: &KvCache) -> Outputs {
        let (c, mut outputs) = (&self.config, Outputs::of(self.threads.count()));
        for (i, layer) in self.layers.iter().enumerate() {
            outputs.add(layer.qkv_proj.weight.rows());
            attention::declare(c, &self.selector(), i, cache, &mut outputs);
            outputs.add(layer.o_proj.weight.rows());
            match &layer.ffn {
                Ffn::Sparse(ffn) => TokenFfn::declare(ffn, &mut outputs),
                Ffn::Dense(_) => {
                    outputs.add(c.intermediate_size);
                    outputs.add(c.hidden_size);
                }
            }
        }
        self.declare_sample(&mut outputs);
        outputs.add(c.vocab_size);
        outputs
    }

    fn resize(&self, local: &mut Local, cache: &KvCache) {
        let c = &self.config;
        resize(&mut local.x, c.hidden_size);
        resize(&mut local.normed, c.hidden_size);
        resize(&mut local.qkv, c.q_dim() + 2 * c.kv_dim());
        resize(&mut local.kv, self.layers.len() * 2 * c.kv_dim());
        resize(&mut local.attended, c.q_dim());
        let gated = if self.selector().gate(0).is_some() { self.layers.len() } else { 0 };
        resize(&mut local.inputs, gated * c.hidden_size);
        resize(&mut local.gate, c.intermediate_size);
        resize(&mut local.up, c.intermediate_size);
        resize(&mut local.cos, c.head_dim / 2);
        resize(&mut local.sin, c.head_dim / 2);
        // There are two pieces or more, or none is needed.
        resize(&mut local.piece, c.vocab_size.div_ceil(2).next_multiple_of(ROW_STEP));
        self.reserve_token(&mut local.prepared);
        local.attention.resize(c, cache);
        self.resize_sparse(&mut local.sparse);
    }

    fn enter_token(&self, input: Input<'_>, position: usize, local: &mut Local) {
        match input {
            Input::Ids(ids) => self.embed_tokens.matrix().dequantize_row(ids[0] as usize, &mut local.x),
            Input::Embeddings(e) => local.x.copy_from_slice(e),
        }
        let factor = self.config.rope.attention_factor();
        rope::angles(|i| self.inv_freq[i], factor, position, &mut local.cos, &mut local.sin);
    }

    /// `x += o(attention(norm(x)))`
    fn attend_token(
        &self,
        member: &mut Member<'_>,
        (i, layer): (usize, &Layer),
        past: Past<'_>,
        local: &mut Local,
    ) -> Outcome {
        let c = &self.config;
        let (q_dim, kv_dim) = (c.q_dim(), c.kv_dim());
        self.norm_row(&local.x, &layer.input_layernorm, &mut local.normed);
        if let Some(x) = local.inputs.chunks_exact_mut(c.hidden_size).nth(i) {
            x.copy_from_slice(&local.normed);
        }
        self.project(member, &layer.qkv_proj, &local.normed, &mut local.prepared, &mut local.qkv)?;
        self.rotate_row(&mut local.qkv, &local.cos, &local.sin);
        let kv = &mut local.kv[i * 2 * kv_dim..(i + 1) * 2 * kv_dim];
        kv.copy_from_slice(&local.qkv[q_dim..]);
        past.cache.round(kv);
        let (keys, values) = kv.split_at(kv_dim);
        let Past { cache, select, plan, position } = past;
        let token =
            Token { cache, select, plan, layer: i, position, queries: &local.qkv[..q_dim], keys, values };
        lone_token(member, self.kernels, c, token, &mut local.attention, &mut local.attended)?;
        self.project(member, &layer.o_proj, &local.attended, &mut local.prepared, &mut local.normed)?;
        self.kernels.axpy(1.0, &local.normed, &mut local.x);
        Ok(())
    }

    /// `x += down(act(gate(norm(x))) · up(norm(x)))`, or `x += down(act(up(norm(x))))`
    fn ffn_token(
        &self,
        member: &mut Member<'_>,
        layer: &Layer,
        ffn: &DenseFfn,
        local: &mut Local,
    ) -> Outcome {
        let (c, on) = (&self.config, self.on());
        self.norm_row(&local.x, &layer.post_attention_layernorm, &mut local.normed);
        let w = GateUp::of_dense(ffn);
        let x = on.input(w.formats(), c.hidden_size, &local.normed, &mut local.prepared);
        let piece = member.piece(c.intermediate_size, w.bytes(), ROW_STEP);
        member.phase(&mut local.up, piece, |i, up| {
            let r = i * piece..i * piece + up.len();
            let gate = &mut local.gate[..up.len()];
            w.activations(on.kernels, c, x, r, &mut [gate], &mut [up]);
        })?;
        self.project(member, &ffn.down_proj, &local.up, &mut local.prepared, &mut local.normed)?;
        self.kernels.axpy(1.0, &local.normed, &mut local.x);
        Ok(())
    }

    /// `y = p · x`
    fn project(
        &self,
        member: &mut Member<'_>,
        p: &Projection,
        x: &[f32],
        prepared: &mut Prepared,
        y: &mut [f32],
    ) -> Outcome {
        let w = &p.weight;
        let x = self.on().input(w.formats(), w.cols(), x, prepared);
        let piece = member.piece(w.rows(), w.bytes(), ROW_STEP);
        member.phase(y, piece, |i, y| {
            let r = i * piece..i * piece + y.len();
            w.multiply(self.kernels, r.clone(), x, &mut [y]);
            add_bias(y, p.bias.as_deref().map(|b| &b[r]));
        })
    }

    /// The logits, which the calling thread alone wants.
    fn head_token(&self, member: &mut Member<'_>, local: &mut Local, logits: Option<&mut [f32]>) -> Outcome {
        let (c, w) = (&self.config, self.lm_head.matrix());
        self.kernels.rms_norm(&local.x, &self.norm, c.rms_norm_eps, &mut local.normed);
        let x = self.on().column(self.lm_head.format(), &local.normed, &mut local.prepared);
        let piece = member.piece(w.rows(), w.bytes(), ROW_STEP);
        let compute = |i: usize, y: &mut [f32]| {
            self.kernels.matmul(w.slice_rows(i * piece..i * piece + y.len()), x, &mut [y]);
        };
        match logits {
            Some(logits) => member.phase(logits, piece, compute),
            None => member.assist(c.vocab_size, piece, &mut local.piece, compute),
        }
    }
}
