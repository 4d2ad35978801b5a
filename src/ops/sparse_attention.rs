//! Sparse causal attention as a candle op.

use super::PagedAttention;
use crate::{AttentionConfig, FastGrnnGate, KvConfig, KvDType, Threads};
use candle_core::{DType, Result, Tensor, bail};
use std::sync::Arc;

pub(super) const OP: &str = "sparse-attention";

/// How attention is computed, `softmax(scale · q · Kᵀ) · V` over the pages of the past that the settings choose; cheap to clone.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_sparse::{AttentionConfig, KvConfig, ops::{SparseAttention, sparse_attention}};
///
/// let random = |heads, len| Tensor::randn(0_f32, 1.0, (1, heads, len, 32), &Device::Cpu);
/// let (q, k, v) = (random(4, 1)?, random(2, 128)?, random(2, 128)?);
/// let exact = SparseAttention::new(1.0 / 32_f32.sqrt(), AttentionConfig::default());
/// // What quantised keys and values change.
/// let coarse = exact.clone().with_kv(KvConfig::q4());
/// let [exact, coarse] = [exact, coarse].map(|how| sparse_attention(&q, &k, &v, &how));
/// let difference = (exact? - coarse?)?.abs()?.max_all()?.to_scalar::<f32>()?;
/// assert!(difference > 0.0 && difference < 0.5, "{difference}");
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct SparseAttention {
    pub(super) scale: f32,
    pub(super) select: AttentionConfig,
    pub(super) kv: KvConfig,
    pub(super) threads: Threads,
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
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_sparse::ops::{SparseAttention, sparse_attention};
    /// use candle_sparse::{AttentionConfig, AttentionMode, FastGrnnGate};
    ///
    /// // Two key/value heads that score a token by the first element of the layer's input.
    /// let gate = FastGrnnGate::new(2, vec![1.0, 0.0, 1.0, 0.0], vec![0.0; 2], vec![1.0; 2])?;
    /// let inputs = Tensor::randn(0_f32, 1.0, (1, 640, 2), &Device::Cpu)?;
    /// // 4 sinks, a window of 64 positions, and of what lies between no more than 128.
    /// let select = AttentionConfig::new(AttentionMode::Gated).with_window(64).with_budget(128).with_recall(0);
    /// let how = SparseAttention::new(0.2, select).with_gate(gate, &inputs)?;
    /// let q = Tensor::zeros((1, 4, 1, 32), DType::F32, &Device::Cpu)?;
    /// let k = Tensor::zeros((1, 2, 640, 32), DType::F32, &Device::Cpu)?;
    /// assert_eq!(sparse_attention(&q, &k, &k, &how)?.dims(), q.dims());
    /// # Ok::<(), candle_core::Error>(())
    /// ```
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

/// Attention of queries `q` `[batch, heads, seq_len, head_dim]` over `k` and `v` `[batch, kv_heads, len, head_dim]`, in F32, F16 or
/// BF16; the queries are the last `seq_len` of `len` positions, and each sees those up to its own.
///
/// The result has the shape and dtype of `q`. Cost: a copy of `k` and `v` into pages; then `2 · heads · head_dim` multiply-adds
/// per query and chosen position. In decode that copy is all the time there is: a [`PagedAttention`] keeps the pages.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_sparse::{AttentionConfig, ops::{SparseAttention, sparse_attention}};
///
/// let how = SparseAttention::new(1.0 / 32_f32.sqrt(), AttentionConfig::default());
/// // 8 query heads on 2 of keys and values; the queries are the last 3 of 40 positions.
/// let q = Tensor::randn(0_f32, 1.0, (1, 8, 3, 32), &Device::Cpu)?;
/// let k = Tensor::randn(0_f32, 1.0, (1, 2, 40, 32), &Device::Cpu)?;
/// let v = Tensor::ones((1, 2, 40, 32), DType::F32, &Device::Cpu)?;
/// let y = sparse_attention(&q, &k, &v, &how)?;
/// assert_eq!(y.dims(), q.dims());
/// // A weighted mean of ones.
/// assert!((y - 1.0)?.abs()?.max_all()?.to_scalar::<f32>()? < 1e-5);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// Shapes that do not fit together, more queries than positions, another dtype, gated attention without a gate, or a device
/// other than the CPU.
pub fn sparse_attention(q: &Tensor, k: &Tensor, v: &Tensor, how: &SparseAttention) -> Result<Tensor> {
    let ([_, heads, seq_len, _], [_, kv_heads, len, head_dim]) = (dims("q", q)?, dims("k", k)?);
    if seq_len > len {
        bail!("{OP}: {seq_len} queries of {len} positions: q is {:?}, k {:?}", q.dims(), k.dims());
    }
    let mut pages = PagedAttention::new(how, [heads, kv_heads, head_dim], len.max(1))?;
    if let Some((gate, x)) = &how.gate {
        pages = pages.with_gate((**gate).clone())?;
        pages.append_with(k, v, x)?;
    } else {
        pages.append(k, v)?;
    }
    pages.attend(q)
}

pub(super) fn dims(name: &str, x: &Tensor) -> Result<[usize; 4]> {
    match *x.dims() {
        [b, h, n, d] => Ok([b, h, n, d]),
        _ => bail!("{OP}: {name} is {:?}, needed are four dimensions", x.dims()),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::testing::{noise, relative_error},
        *,
    };
    use crate::{AttentionMode, kv_cache::PAGE_LEN};
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
        let select = AttentionConfig::new(AttentionMode::Window)
            .with_sinks(32)
            .with_window(64)
            .with_budget(0)
            .with_recall(0);
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
