//! One decoder step of a Llama, readable from top to bottom and generic over the kernel set.

use crate::{
    config::Config,
    error::Error,
    format::{ActivationBlock, BLOCK_LEN},
    kernel::{KernelSet, rms_norm::shifted_relu, rope},
    kv_cache::KvCache,
    matrix::{Columns, Matrix, Rows},
};

/// Weights of one decoder block; shapes as in Hugging Face checkpoints, `[out, in]`.
#[derive(Clone, Copy, Debug)]
pub struct LayerWeights<'a> {
    /// `[hidden_size]`
    pub input_layernorm: &'a [f32],
    /// `[q_dim, hidden_size]`
    pub q_proj: Matrix<'a>,
    /// `[kv_dim, hidden_size]`
    pub k_proj: Matrix<'a>,
    /// `[kv_dim, hidden_size]`
    pub v_proj: Matrix<'a>,
    /// `[hidden_size, q_dim]`
    pub o_proj: Matrix<'a>,
    /// `[hidden_size]`
    pub post_attention_layernorm: &'a [f32],
    /// `[intermediate_size, hidden_size]`
    pub gate_proj: Matrix<'a>,
    /// `[intermediate_size, hidden_size]`
    pub up_proj: Matrix<'a>,
    /// `[hidden_size, intermediate_size]`
    pub down_proj: Matrix<'a>,
}

/// A whole model; with a tied head `lm_head` is `embed_tokens` again. Projections have no biases.
#[derive(Clone, Copy, Debug)]
pub struct Weights<'a> {
    /// `[vocab_size, hidden_size]`
    pub embed_tokens: Matrix<'a>,
    /// One per block.
    pub layers: &'a [LayerWeights<'a>],
    /// `[hidden_size]`
    pub norm: &'a [f32],
    /// `[vocab_size, hidden_size]`
    pub lm_head: Matrix<'a>,
}

impl Weights<'_> {
    /// Checks every shape against `config`.
    ///
    /// # Errors
    /// The first tensor whose shape differs, or a bad `config`.
    pub fn validate(&self, c: &Config) -> Result<(), Error> {
        c.validate()?;
        let matrix = |what, m: &Matrix<'_>, rows: usize, cols: usize| {
            let (expected, got) = (rows * cols, m.rows() * m.cols());
            (m.rows() == rows && m.cols() == cols).then_some(()).ok_or(Error::Length { what, expected, got })
        };
        let vector = |what, v: &[f32]| {
            let (expected, got) = (c.hidden_size, v.len());
            (expected == got).then_some(()).ok_or(Error::Length { what, expected, got })
        };
        let (expected, got) = (c.num_hidden_layers, self.layers.len());
        if expected != got {
            return Err(Error::Length { what: "layers", expected, got });
        }
        matrix("embed_tokens", &self.embed_tokens, c.vocab_size, c.hidden_size)?;
        matrix("lm_head", &self.lm_head, c.vocab_size, c.hidden_size)?;
        vector("norm", self.norm)?;
        for l in self.layers {
            vector("input_layernorm", l.input_layernorm)?;
            vector("post_attention_layernorm", l.post_attention_layernorm)?;
            matrix("q_proj", &l.q_proj, c.q_dim(), c.hidden_size)?;
            matrix("k_proj", &l.k_proj, c.kv_dim(), c.hidden_size)?;
            matrix("v_proj", &l.v_proj, c.kv_dim(), c.hidden_size)?;
            matrix("o_proj", &l.o_proj, c.hidden_size, c.q_dim())?;
            matrix("gate_proj", &l.gate_proj, c.intermediate_size, c.hidden_size)?;
            matrix("up_proj", &l.up_proj, c.intermediate_size, c.hidden_size)?;
            matrix("down_proj", &l.down_proj, c.hidden_size, c.intermediate_size)?;
        }
        Ok(())
    }
}

/// Working memory of [`forward`], carved from what the caller gives.
#[derive(Debug)]
pub struct Scratch<'a> {
    x: &'a mut [f32],
    normed: &'a mut [f32],
    q: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a mut [f32],
    attended: &'a mut [f32],
    gate: &'a mut [f32],
    up: &'a mut [f32],
    scores: &'a mut [f32],
    cos: &'a mut [f32],
    sin: &'a mut [f32],
    blocks: &'a mut [ActivationBlock],
}

impl<'a> Scratch<'a> {
    /// Elements of f32 that a model needs for contexts of `positions`.
    #[must_use]
    pub fn elements(c: &Config, positions: usize) -> usize {
        2 * c.hidden_size + 2 * c.q_dim() + 2 * c.kv_dim() + 2 * c.intermediate_size + positions + c.head_dim
    }

    /// Activation blocks that a model with quantised weights needs.
    #[must_use]
    pub fn blocks(c: &Config) -> usize {
        c.hidden_size.max(c.intermediate_size).max(c.q_dim()) / BLOCK_LEN
    }

    /// Carves the buffers; `blocks` may be empty when no weight is quantised.
    ///
    /// # Errors
    /// `data` is shorter than [`Self::elements`].
    pub fn new(
        c: &Config,
        positions: usize,
        data: &'a mut [f32],
        blocks: &'a mut [ActivationBlock],
    ) -> Result<Self, Error> {
        let expected = Self::elements(c, positions);
        if data.len() < expected {
            return Err(Error::Length { what: "scratch", expected, got: data.len() });
        }
        let mut rest = data;
        let mut take = |n: usize| {
            let (head, tail) = core::mem::take(&mut rest).split_at_mut(n);
            rest = tail;
            head
        };
        Ok(Self {
            x: take(c.hidden_size),
            normed: take(c.hidden_size),
            q: take(c.q_dim()),
            attended: take(c.q_dim()),
            k: take(c.kv_dim()),
            v: take(c.kv_dim()),
            gate: take(c.intermediate_size),
            up: take(c.intermediate_size),
            scores: take(positions),
            cos: take(c.head_dim / 2),
            sin: take(c.head_dim / 2),
            blocks,
        })
    }
}

/// Writes the logits `[vocab_size]` of the token that follows `token` at `position`.
///
/// `position` may lie anywhere in the past: the cache is cut back to it. Cost: every weight once.
///
/// # Errors
/// A token not in the vocabulary, a position that leaves a gap or is past the cache, or logits of the wrong length.
///
/// # Panics
/// `weights` or `scratch` were made for another `config` ([`Weights::validate`] checks them).
pub fn forward<K: KernelSet>(
    kernels: &K,
    c: &Config,
    weights: &Weights<'_>,
    token: usize,
    position: usize,
    cache: &mut KvCache<'_>,
    s: &mut Scratch<'_>,
    logits: &mut [f32],
) -> Result<(), Error> {
    if token >= c.vocab_size {
        return Err(Error::TokenId { token, vocab_size: c.vocab_size });
    }
    if position > cache.len() || position >= cache.capacity().min(s.scores.len()) {
        return Err(Error::Position { position, limit: cache.capacity().min(cache.len() + 1) });
    }
    if logits.len() != c.vocab_size {
        return Err(Error::Length { what: "logits", expected: c.vocab_size, got: logits.len() });
    }
    cache.truncate(position);
    weights.embed_tokens.dequantize_row(token, s.x);
    rope::angles(&c.rope, position, s.cos, s.sin);
    for (i, layer) in weights.layers.iter().enumerate() {
        norm(kernels, c, s.x, layer.input_layernorm, s.normed);
        matvec(kernels, layer.q_proj, s.normed, s.blocks, s.q);
        matvec(kernels, layer.k_proj, s.normed, s.blocks, s.k);
        matvec(kernels, layer.v_proj, s.normed, s.blocks, s.v);
        attention(kernels, c, i, position, cache, s);
        matvec(kernels, layer.o_proj, s.attended, s.blocks, s.normed);
        kernels.axpy(1.0, s.normed, s.x);

        norm(kernels, c, s.x, layer.post_attention_layernorm, s.normed);
        matvec(kernels, layer.gate_proj, s.normed, s.blocks, s.gate);
        matvec(kernels, layer.up_proj, s.normed, s.blocks, s.up);
        kernels.gated(c.hidden_act, c.gate_shift, s.gate, s.up);
        matvec(kernels, layer.down_proj, s.up, s.blocks, s.normed);
        kernels.axpy(1.0, s.normed, s.x);
    }
    cache.set_len(position + 1);
    kernels.rms_norm(s.x, weights.norm, c.rms_norm_eps, s.normed);
    matvec(kernels, weights.lm_head, s.normed, s.blocks, logits);
    Ok(())
}

/// What attention and FFN read: the norm, for shifted-ReLU models `max(norm − shift, 0)`.
fn norm<K: KernelSet>(kernels: &K, c: &Config, x: &[f32], weight: &[f32], y: &mut [f32]) {
    kernels.rms_norm(x, weight, c.rms_norm_eps, y);
    if let Some(shift) = c.norm_shift {
        shifted_relu(y, shift);
    }
}

fn matvec<K: KernelSet>(
    kernels: &K,
    w: Matrix<'_>,
    x: &[f32],
    blocks: &mut [ActivationBlock],
    y: &mut [f32],
) {
    if w.format().is_quantized() {
        let blocks = &mut blocks[..x.len() / BLOCK_LEN];
        kernels.quantize(x, blocks);
        kernels.matmul(w, Columns::Quantized(blocks), &mut [y]);
    } else {
        kernels.matmul(w, Columns::F32(x), &mut [y]);
    }
}

/// Causal attention of one token: `softmax(q·Kᵀ / √head_dim) · V` for every query head.
fn attention<K: KernelSet>(
    kernels: &K,
    c: &Config,
    layer: usize,
    position: usize,
    cache: &mut KvCache<'_>,
    s: &mut Scratch<'_>,
) {
    for head in s.q.chunks_exact_mut(c.head_dim).chain(s.k.chunks_exact_mut(c.head_dim)) {
        rope::rope(head, s.cos, s.sin, c.rope.interleaved);
    }
    cache.write(layer, 0, position, s.k);
    cache.write(layer, 1, position, s.v);
    let len = position + 1;
    let scale = 1.0 / libm::sqrtf(c.head_dim as f32);
    let scores = &mut s.scores[..len];
    s.attended.fill(0.0);
    for (head, (q, y)) in
        s.q.chunks_exact_mut(c.head_dim).zip(s.attended.chunks_exact_mut(c.head_dim)).enumerate()
    {
        let kv_head = head / c.group_size();
        q.iter_mut().for_each(|v| *v *= scale);
        let past = |kv| {
            let rows = Rows::F32(cache.head(layer, kv, kv_head, len));
            Matrix::new(len, c.head_dim, rows).expect("the cache holds len rows of head_dim")
        };
        kernels.matmul(past(0), Columns::F32(q), &mut [&mut *scores]);
        kernels.softmax(scores);
        kernels.matmul_t(past(1), &[&*scores], &mut [y]);
    }
}
