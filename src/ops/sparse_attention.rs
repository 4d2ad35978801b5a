//! Sparse causal attention as a candle op.

use crate::{
    AttentionConfig, FastGrnnGate, KvConfig, Threads,
    attention::{Queries, Selector, attention},
    core::{Activation, Config, Rope, RopeScaling},
    kernels::Kernels,
    kv_cache::{KvCache, KvDType, PAGE_LEN},
    weight::On,
};
use candle_core::{CpuStorage, CustomOp3, DType, Error, Layout, Result, Shape, Tensor, bail};
use std::sync::Arc;

const OP: &str = "sparse-attention";

/// `softmax(scale · q · Kᵀ) · V` over the pages of the past that the settings choose; cheap to clone.
#[derive(Clone, Debug)]
pub struct SparseAttention {
    scale: f32,
    select: AttentionConfig,
    kv: KvConfig,
    threads: Threads,
    gate: Option<(Arc<FastGrnnGate>, Tensor)>,
}

impl SparseAttention {
    /// Attention with a factor for the scores, usually `1/√head_dim`, over keys and values as they are given.
    #[must_use]
    pub fn new(scale: f32, select: AttentionConfig) -> Self {
        let kv = KvConfig::exact(KvDType::F32);
        Self { scale, select, kv, threads: Threads::default(), gate: None }
    }

    /// The same with keys and values in tiers, to see what these cost in quality.
    #[must_use]
    pub fn with_kv(self, kv: KvConfig) -> Self {
        Self { kv, ..self }
    }

    /// With a gate and what it reads, the layer's inputs `[batch, len, hidden_size]` of all keys' positions.
    ///
    /// # Errors
    /// A gate that [`FastGrnnGate::check`] refuses, or another last dimension than its `hidden_size`.
    pub fn with_gate(self, gate: FastGrnnGate, inputs: &Tensor) -> Result<Self> {
        gate.check()?;
        if inputs.dims3()?.2 != gate.hidden_size {
            bail!("{OP}: inputs are {:?}, the gate reads [batch, len, {}]", inputs.dims(), gate.hidden_size);
        }
        let inputs = inputs.to_dtype(DType::F32)?.contiguous()?;
        Ok(Self { gate: Some((Arc::new(gate), inputs)), ..self })
    }

    /// With fewer threads.
    #[must_use]
    pub fn with_threads(self, threads: Threads) -> Self {
        Self { threads, ..self }
    }
}

/// Attention of queries `q` `[batch, heads, seq_len, head_dim]` over `k` and `v` `[batch, kv_heads, len, head_dim]`, all F32;
/// the queries are the last `seq_len` of `len` positions, and each sees those up to its own.
///
/// The result is shaped as `q`. Cost: a copy of `k` and `v` into pages; then `2 · heads · head_dim` multiply-adds per query and
/// chosen position. Models that decode keep the pages instead: [`crate::attention`].
///
/// # Errors
/// Shapes that do not fit together, more queries than positions, another dtype than F32, gated attention without a gate,
/// or a device other than the CPU.
pub fn sparse_attention(q: &Tensor, k: &Tensor, v: &Tensor, how: &SparseAttention) -> Result<Tensor> {
    let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
    q.apply_op3_no_bwd(&k, &v, how)
}

fn slice<'a>(name: &str, x: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (x, layout.contiguous_offsets()) {
        (CpuStorage::F32(x), Some((start, end))) => Ok(&x[start..end]),
        _ => bail!("{OP}: {name} must be F32 and contiguous"),
    }
}

/// Sizes of a call.
struct Sizes {
    batch: usize,
    seq_len: usize,
    len: usize,
    config: Config,
}

impl SparseAttention {
    fn sizes(&self, q: &Layout, k: &Layout, v: &Layout) -> Result<Sizes> {
        let (batch, heads, seq_len, head_dim) = q.shape().dims4()?;
        let (k_batch, kv_heads, len, k_dim) = k.shape().dims4()?;
        let fits = [k_batch, k_dim] == [batch, head_dim] && v.dims() == k.dims();
        if !fits
            || kv_heads == 0
            || heads % kv_heads != 0
            || seq_len > len
            || batch * heads * seq_len * head_dim == 0
        {
            bail!(
                "{OP}: q is {:?}, k {:?}, v {:?}: give [b, h, s, d] and twice [b, h / g, l, d] with s at most l",
                q.dims(),
                k.dims(),
                v.dims()
            );
        }
        if let Some((gate, x)) = &self.gate
            && (x.dims3()? != (batch, len, gate.hidden_size) || gate.kv_heads != kv_heads)
        {
            bail!(
                "{OP}: the gate scores {} heads and its inputs are {:?}, keys are {:?}",
                gate.kv_heads,
                x.dims(),
                k.dims()
            );
        }
        let config = Config {
            hidden_size: heads * head_dim,
            intermediate_size: 1,
            vocab_size: 1,
            num_hidden_layers: 1,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            rms_norm_eps: 1e-5,
            rope: Rope { theta: 1e4, scaling: RopeScaling::None, interleaved: false },
            max_position_embeddings: len,
            hidden_act: Activation::Silu,
            gate_shift: 0.0,
            norm_shift: None,
            sliding_window: None,
        };
        Ok(Sizes { batch, seq_len, len, config })
    }

    /// A cache that holds all keys and values.
    fn fill(&self, s: &Sizes, k: &[f32], v: &[f32], select: &Selector<'_>) -> Result<KvCache> {
        let (kernels, head_dim, heads) = (kernels()?, s.config.head_dim, s.config.num_key_value_heads);
        let mut cache = KvCache::new(&s.config, self.kv);
        cache.begin(s.batch, 0, s.len)?;
        let row = |x: &[f32], b: usize, position: usize| -> Vec<f32> {
            let at = |h: usize| ((b * heads + h) * s.len + position) * head_dim;
            (0..heads).flat_map(|h| x[at(h)..at(h) + head_dim].iter().copied()).collect()
        };
        for b in 0..s.batch {
            for position in 0..s.len {
                cache.write(b, 0, position, &row(k, b, position), &row(v, b, position));
            }
            if let (Some(gate), Some((_, x))) = (select.gate(0), &self.gate) {
                cache.observe(b, 0, gate, kernels, 0, &x.get(b)?.flatten_all()?.to_vec1::<f32>()?);
            }
        }
        cache.update_bounds(0, s.len / PAGE_LEN);
        cache.advance(s.len);
        Ok(cache)
    }
}

fn kernels() -> Result<&'static Kernels> {
    Kernels::get().map_err(|e| Error::msg(e.to_string()))
}

impl CustomOp3 for SparseAttention {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let s = self.sizes(q_layout, k_layout, v_layout)?;
        let (q, k, v) = (slice("q", q, q_layout)?, slice("k", k, k_layout)?, slice("v", v, v_layout)?);
        let gates: Vec<FastGrnnGate> = self.gate.iter().map(|(gate, _)| (**gate).clone()).collect();
        let select = Selector::new(self.select, &gates, 1)?;
        let cache = self.fill(&s, k, v, &select)?;
        let (c, d, n) = (&s.config, s.config.head_dim, s.seq_len);
        let heads = c.num_attention_heads;
        let at = |row: usize, h: usize| ((row / n * heads + h) * n + row % n) * d;
        let mut rows = vec![0.0; q.len()];
        for (i, out) in rows.chunks_exact_mut(d).enumerate() {
            let q = &q[at(i / heads, i % heads)..][..d];
            out.iter_mut().zip(q).for_each(|(o, q)| *o = q * self.scale);
        }
        let mut y = vec![0.0; q.len()];
        let queries = Queries { rows: &rows, width: c.q_dim(), seq_len: n, index_pos: s.len - n };
        let on = On { kernels: kernels()?, threads: self.threads };
        attention(on, c, &cache, 0, &select, queries, &mut y);
        for (i, y) in y.chunks_exact(d).enumerate() {
            rows[at(i / heads, i % heads)..][..d].copy_from_slice(y);
        }
        Ok((CpuStorage::F32(rows), q_layout.shape().clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::testing::{noise, relative_error},
        *,
    };
    use crate::AttentionMode;
    use candle_core::{D, Device};

    /// The same in plain tensor ops; `seen(query, key)` says what is read.
    fn twin(
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        scale: f64,
        seen: impl Fn(usize, usize) -> bool,
    ) -> Result<Tensor> {
        let ((_, heads, n, _), (b, kv_heads, len, d)) = (q.dims4()?, k.dims4()?);
        let group = heads / kv_heads;
        let repeat =
            |x: &Tensor| x.unsqueeze(2)?.expand((b, kv_heads, group, len, d))?.reshape((b, heads, len, d));
        let mask = |i: usize| {
            let (query, key) = (len - n + i / len, i % len);
            if key <= query && seen(query, key) { 0.0_f32 } else { f32::NEG_INFINITY }
        };
        let mask = Tensor::from_vec((0..n * len).map(mask).collect::<Vec<_>>(), (n, len), &Device::Cpu)?;
        let scores = (q.matmul(&repeat(k)?.transpose(2, 3)?.contiguous()?)? * scale)?.broadcast_add(&mask)?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?.matmul(&repeat(v)?)
    }

    #[test]
    fn equals_plain_tensor_ops() {
        let (q, k) = (noise(&[2, 6, 70, 16]), noise(&[2, 3, 200, 16]));
        let v = (noise(&[2, 3, 16, 200]).transpose(2, 3)).unwrap();
        let select =
            AttentionConfig { mode: AttentionMode::Window, sinks: 32, window: 64, budget: 0, recall: 0 };
        for (select, window) in [(AttentionConfig::default(), usize::MAX), (select, 64)] {
            let got = sparse_attention(&q, &k, &v, &SparseAttention::new(0.25, select)).unwrap();
            let seen = |query: usize, key: usize| {
                key < 32 || key / PAGE_LEN >= (query / PAGE_LEN).saturating_sub(window / PAGE_LEN)
            };
            let want = twin(&q, &k, &v.contiguous().unwrap(), 0.25, seen).unwrap();
            let error = relative_error(&got, &want);
            assert!(error < 1e-5, "{select:?}: {error}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        let how = SparseAttention::new(1.0, AttentionConfig::default());
        let (q, k) = (noise(&[1, 4, 3, 8]), noise(&[1, 2, 5, 8]));
        let error = |q: &Tensor, k: &Tensor, how| sparse_attention(q, k, k, how).unwrap_err().to_string();
        assert!(error(&noise(&[1, 4, 6, 8]), &k, &how).contains("[1, 4, 6, 8]"));
        assert!(error(&noise(&[1, 3, 3, 8]), &k, &how).contains(OP));
        assert!(error(&q.to_dtype(DType::F64).unwrap(), &k, &how).contains("F32"));
        let gated = SparseAttention::new(1.0, AttentionConfig::new(AttentionMode::Gated));
        assert!(error(&q, &k, &gated).contains("calibrate"));
    }
}
