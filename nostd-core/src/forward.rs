//! One decoder step of a Llama, readable from top to bottom and generic over the kernel set.

use crate::{
    config::Config,
    error::Error,
    format::ActivationGroup,
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
        let matrix = |what, layer, m: &Matrix<'_>, rows: usize, cols: usize| {
            let (expected, got) = ([rows, cols], [m.rows(), m.cols()]);
            (expected == got).then_some(()).ok_or(Error::Shape { what, layer, expected, got })
        };
        let vector = |what, layer, v: &[f32]| {
            let (expected, got) = ([1, c.hidden_size], [1, v.len()]);
            (expected == got).then_some(()).ok_or(Error::Shape { what, layer, expected, got })
        };
        let (expected, got) = (c.num_hidden_layers, self.layers.len());
        if expected != got {
            return Err(Error::Length { what: "layers", expected, got });
        }
        let (hidden, inner, q, kv) = (c.hidden_size, c.intermediate_size, c.q_dim(), c.kv_dim());
        matrix("embed_tokens", None, &self.embed_tokens, c.vocab_size, hidden)?;
        matrix("lm_head", None, &self.lm_head, c.vocab_size, hidden)?;
        vector("norm", None, self.norm)?;
        for (i, l) in self.layers.iter().enumerate() {
            let i = Some(i);
            vector("input_layernorm", i, l.input_layernorm)?;
            vector("post_attention_layernorm", i, l.post_attention_layernorm)?;
            matrix("q_proj", i, &l.q_proj, q, hidden)?;
            matrix("k_proj", i, &l.k_proj, kv, hidden)?;
            matrix("v_proj", i, &l.v_proj, kv, hidden)?;
            matrix("o_proj", i, &l.o_proj, hidden, q)?;
            matrix("gate_proj", i, &l.gate_proj, inner, hidden)?;
            matrix("up_proj", i, &l.up_proj, inner, hidden)?;
            matrix("down_proj", i, &l.down_proj, hidden, inner)?;
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
    groups: &'a mut [ActivationGroup],
}

impl<'a> Scratch<'a> {
    /// Elements of f32 that a model needs for contexts of `positions`.
    #[must_use]
    pub fn elements(c: &Config, positions: usize) -> usize {
        2 * c.hidden_size + 2 * c.q_dim() + 2 * c.kv_dim() + 2 * c.intermediate_size + positions + c.head_dim
    }

    /// Activation groups that a model with quantised weights needs.
    #[must_use]
    pub fn groups(c: &Config) -> usize {
        ActivationGroup::count(c.hidden_size.max(c.intermediate_size).max(c.q_dim()))
    }

    /// Carves the buffers; `groups` may be empty when no weight is quantised.
    ///
    /// # Errors
    /// `data` is shorter than [`Self::elements`].
    pub fn new(
        c: &Config,
        positions: usize,
        data: &'a mut [f32],
        groups: &'a mut [ActivationGroup],
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
            groups,
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
    if position > cache.len() {
        return Err(Error::Gap { position, len: cache.len() });
    }
    let limit = cache.capacity().min(s.scores.len()).min(c.max_position_embeddings);
    if position >= limit {
        return Err(Error::Position { position, limit });
    }
    if logits.len() != c.vocab_size {
        return Err(Error::Length { what: "logits", expected: c.vocab_size, got: logits.len() });
    }
    cache.truncate(position);
    weights.embed_tokens.dequantize_row(token, s.x);
    rope::angles(|i| c.rope.inv_freq(i, c.head_dim), position, s.cos, s.sin);
    for (i, layer) in weights.layers.iter().enumerate() {
        norm(kernels, c, s.x, layer.input_layernorm, s.normed);
        matvec(kernels, layer.q_proj, s.normed, s.groups, s.q);
        matvec(kernels, layer.k_proj, s.normed, s.groups, s.k);
        matvec(kernels, layer.v_proj, s.normed, s.groups, s.v);
        attention(kernels, c, i, position, cache, s);
        matvec(kernels, layer.o_proj, s.attended, s.groups, s.normed);
        kernels.axpy(1.0, s.normed, s.x);

        norm(kernels, c, s.x, layer.post_attention_layernorm, s.normed);
        matvec(kernels, layer.gate_proj, s.normed, s.groups, s.gate);
        matvec(kernels, layer.up_proj, s.normed, s.groups, s.up);
        kernels.gated(c.hidden_act, c.gate_shift, s.gate, s.up);
        matvec(kernels, layer.down_proj, s.up, s.groups, s.normed);
        kernels.axpy(1.0, s.normed, s.x);
    }
    cache.set_len(position + 1);
    kernels.rms_norm(s.x, weights.norm, c.rms_norm_eps, s.normed);
    matvec(kernels, weights.lm_head, s.normed, s.groups, logits);
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
    groups: &mut [ActivationGroup],
    y: &mut [f32],
) {
    if w.format().is_quantized() {
        let groups = &mut groups[..ActivationGroup::count(x.len())];
        kernels.quantize(x, groups);
        kernels.matmul(w, Columns::Quantized(groups), &mut [y]);
    } else {
        kernels.matmul(w, Columns::F32(x), &mut [y]);
    }
}

/// Causal attention of one token: `softmax(q·Kᵀ / √head_dim) · V` for every query head, over the positions that the
/// sliding window leaves.
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
    let seen = c.first_visible(position)..position + 1;
    let scale = 1.0 / libm::sqrtf(c.head_dim as f32);
    let scores = &mut s.scores[..seen.len()];
    s.attended.fill(0.0);
    for (head, (q, y)) in
        s.q.chunks_exact_mut(c.head_dim).zip(s.attended.chunks_exact_mut(c.head_dim)).enumerate()
    {
        let kv_head = head / c.group_size();
        q.iter_mut().for_each(|v| *v *= scale);
        let past = |kv| {
            let rows = Rows::F32(cache.head(layer, kv, kv_head, seen.clone()));
            Matrix::new(seen.len(), c.head_dim, rows).expect("the cache holds these rows of head_dim")
        };
        kernels.matmul(past(0), Columns::F32(q), &mut [&mut *scores]);
        kernels.softmax(scores);
        kernels.matmul_t(past(1), &[&*scores], &mut [y]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Activation, Rope, RopeScaling, Scalar};
    use std::{string::ToString, vec};

    const C: Config = Config {
        hidden_size: 8,
        intermediate_size: 12,
        vocab_size: 5,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 4,
        rms_norm_eps: 1e-5,
        rope: Rope { theta: 1e4, scaling: RopeScaling::None, interleaved: false },
        max_position_embeddings: 6,
        hidden_act: Activation::Silu,
        gate_shift: 0.0,
        norm_shift: None,
        sliding_window: None,
    };

    fn with_weights(f: impl Fn(&Weights<'_>)) {
        let data: vec::Vec<f32> = (0..96).map(|i| libm::sinf(i as f32)).collect();
        let m = |rows: usize, cols: usize| Matrix::new(rows, cols, Rows::F32(&data[..rows * cols])).unwrap();
        let layer = LayerWeights {
            input_layernorm: &data[..8],
            q_proj: m(8, 8),
            k_proj: m(4, 8),
            v_proj: m(4, 8),
            o_proj: m(8, 8),
            post_attention_layernorm: &data[..8],
            gate_proj: m(12, 8),
            up_proj: m(12, 8),
            down_proj: m(8, 12),
        };
        let layers = [layer];
        f(&Weights { embed_tokens: m(5, 8), layers: &layers, norm: &data[..8], lm_head: m(5, 8) });
    }

    #[test]
    fn positions_are_checked_and_rolled_back() {
        with_weights(|weights| {
            weights.validate(&C).unwrap();
            let mut kv = [0.0; 2 * 20 * 4];
            let mut cache = KvCache::new(&C, 20, &mut kv).unwrap();
            let mut data = [0.0; 200];
            let mut scratch = Scratch::new(&C, 20, &mut data, &mut []).unwrap();
            let mut step = |token, position, cache: &mut KvCache<'_>| {
                let mut logits = [0.0; 5];
                let result = forward(&Scalar, &C, weights, token, position, cache, &mut scratch, &mut logits);
                result.map(|()| logits)
            };
            assert_eq!(step(5, 0, &mut cache), Err(Error::TokenId { token: 5, vocab_size: 5 }));
            assert_eq!(step(1, 1, &mut cache), Err(Error::Gap { position: 1, len: 0 }));
            for position in 0..6 {
                step(position % 5, position, &mut cache).unwrap();
            }
            assert_eq!(step(1, 6, &mut cache), Err(Error::Position { position: 6, limit: 6 }));
            let first = step(2, 2, &mut cache).unwrap();
            assert_eq!(cache.len(), 3);
            assert_eq!(step(2, 2, &mut cache).unwrap(), first);
            assert_ne!(step(3, 2, &mut cache).unwrap(), first);
        });
    }

    /// Attention of the token at `position` by hand: a mask over all positions, in f64.
    fn masked(
        c: &Config,
        q: &[f32],
        kv: [&[f32]; 2],
        position: usize,
        seen: impl Fn(usize) -> bool,
    ) -> vec::Vec<f64> {
        let d = c.head_dim;
        let row = |x: &[f32], p: usize| {
            x[p * d..(p + 1) * d].iter().map(|v| f64::from(*v)).collect::<vec::Vec<_>>()
        };
        let mut out = vec::Vec::new();
        for q in q.chunks_exact(d) {
            let dot = |p: usize| row(kv[0], p).iter().zip(q).map(|(k, q)| k * f64::from(*q)).sum::<f64>();
            let weight = |p: usize| if seen(p) { libm::exp(dot(p) / libm::sqrt(d as f64)) } else { 0.0 };
            let total: f64 = (0..=position).map(weight).sum();
            out.extend(
                (0..d).map(|i| (0..=position).map(|p| weight(p) * row(kv[1], p)[i]).sum::<f64>() / total),
            );
        }
        out
    }

    #[test]
    fn a_sliding_window_is_the_hand_made_mask() {
        let noise =
            |n: usize, seed: f32| (0..n).map(|i| libm::sinf(i as f32 * 1.7 + seed)).collect::<vec::Vec<_>>();
        let (kv_dim, q_dim, positions) = (C.kv_dim(), C.q_dim(), 6);
        // Which of 6 positions the last one sees, and the fourth.
        let masks = [
            (None, [true; 6], [true; 4]),
            (Some(1), [false, false, false, false, false, true], [false, false, false, true]),
            (Some(2), [false, false, false, false, true, true], [false, false, true, true]),
            (Some(5), [false, true, true, true, true, true], [true; 4]),
            (Some(6), [true; 6], [true; 4]),
        ];
        for (sliding_window, last, fourth) in masks {
            let c = Config { sliding_window, ..C };
            let mut kv = vec![0.0; KvCache::elements(&c, positions)];
            let mut cache = KvCache::new(&c, positions, &mut kv).unwrap();
            let mut data = vec![0.0; Scratch::elements(&c, positions)];
            let mut s = Scratch::new(&c, positions, &mut data, &mut []).unwrap();
            // No rotation, so that the rows are what was given.
            s.cos.fill(1.0);
            s.sin.fill(0.0);
            let (mut keys, mut values) = (vec![], vec![]);
            for position in 0..positions {
                let q = noise(q_dim, position as f32);
                s.q.copy_from_slice(&q);
                s.k.copy_from_slice(&noise(kv_dim, 10.0 + position as f32));
                s.v.copy_from_slice(&noise(kv_dim, 20.0 + position as f32));
                keys.extend_from_slice(s.k);
                values.extend_from_slice(s.v);
                attention(&Scalar, &c, 0, position, &mut cache, &mut s);
                let mask: &[bool] = if position == 5 { &last } else { &fourth };
                if position == 5 || position == 3 {
                    let want = masked(&c, &q, [&keys, &values], position, |p| mask[p]);
                    let off = s.attended.iter().zip(&want).map(|(a, b)| (f64::from(*a) - b).abs());
                    assert!(off.fold(0.0, f64::max) < 1e-6, "{sliding_window:?} at {position}");
                }
            }
        }
    }

    #[test]
    fn a_transposed_matrix_is_named_with_its_layer() {
        with_weights(|weights| {
            let mut layer = weights.layers[0];
            layer.down_proj = layer.gate_proj;
            let err = Weights { layers: &[layer], ..*weights }.validate(&C).unwrap_err().to_string();
            assert_eq!(err, "layer 0: down_proj has shape [12, 8], expected [8, 12]");
        });
    }
}
