//! Attention of a block that decodes: its past stays in pages, a step copies its own keys and values and no others.

use super::{
    SparseAttention,
    rows::floats,
    sparse_attention::{OP, dims},
};
use crate::{
    AttentionConfig, FastGrnnGate, Threads,
    attention::{Queries, Selector, attention},
    kv_cache::{KvCache, PAGE_LEN},
    weight::Compute,
};
use candle_core::{Device, Error, Result, Tensor, bail};
use candle_sparse_core::{Activation, Config, Rope, RopeScaling};
use candle_sparse_kernels::Kernels;

/// The keys and values of one block of any candle model, and attention over those that the settings choose; `Clone` is a deep
/// copy.
///
/// ```
/// use candle_core::{DType, Device, Result, Tensor};
/// use candle_sparse::{AttentionConfig, AttentionMode, ops::{PagedAttention, SparseAttention}};
///
/// # fn main() -> Result<()> {
/// let (heads, kv_heads, head_dim) = (8, 2, 32);
/// let how = SparseAttention::new(1.0 / (head_dim as f32).sqrt(), AttentionConfig::new(AttentionMode::Recall));
/// let mut past = PagedAttention::new(&how, [heads, kv_heads, head_dim], 4096)?;
/// // In `forward` of a block, after RoPE: a prompt of 5 tokens here, then one token at a time.
/// for n in [5, 1, 1] {
///     let q = Tensor::ones((1, heads, n, head_dim), DType::F16, &Device::Cpu)?;
///     let k = Tensor::ones((1, kv_heads, n, head_dim), DType::F16, &Device::Cpu)?;
///     past.append(&k, &k)?;
///     let y = past.attend(&q)?;
///     assert_eq!((y.dims(), y.dtype()), (q.dims(), DType::F16));
/// }
/// assert_eq!(past.len(), 7);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct PagedAttention {
    scale: f32,
    select: AttentionConfig,
    threads: Threads,
    /// One, or none.
    gates: Vec<FastGrnnGate>,
    config: Config,
    cache: KvCache,
}

impl PagedAttention {
    /// An empty past of at most `max_positions` positions for queries of `heads` heads and keys and values of `kv_heads`; the
    /// gate of `how` and its inputs play no part, see [`Self::with_gate`].
    ///
    /// # Errors
    /// Sizes of 0, an odd `head_dim`, or heads that are no multiple of key/value heads.
    pub fn new(
        how: &SparseAttention,
        [heads, kv_heads, head_dim]: [usize; 3],
        max_positions: usize,
    ) -> Result<Self> {
        let config = Config {
            hidden_size: 1,
            intermediate_size: 1,
            vocab_size: 1,
            num_hidden_layers: 1,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            rms_norm_eps: 1e-5,
            rope: Rope { theta: 1e4, scaling: RopeScaling::None, interleaved: false },
            max_position_embeddings: max_positions,
            hidden_act: Activation::Silu,
            gated_mlp: true,
            gate_shift: 0.0,
            norm_shift: None,
            sliding_window: None,
        };
        config.validate().map_err(|e| Error::msg(format!("{OP}: {e}")))?;
        let (scale, select, threads) = (how.scale, how.select, how.threads);
        let cache = KvCache::new(&config, how.kv);
        Ok(Self { scale, select, threads, gates: Vec::new(), config, cache })
    }

    /// With a gate that says which positions are worth keeping in sight; [`Self::append_with`] shows it what it reads.
    ///
    /// # Errors
    /// A gate that [`FastGrnnGate::check`] refuses, or of another number of heads.
    pub fn with_gate(self, gate: FastGrnnGate) -> Result<Self> {
        gate.check()?;
        if gate.kv_heads != self.config.num_key_value_heads {
            let heads = self.config.num_key_value_heads;
            bail!("{OP}: the gate scores {} heads, there are {heads} of keys and values", gate.kv_heads);
        }
        Ok(Self { gates: vec![gate], ..self })
    }

    /// Positions held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.cache.len()
    }

    /// Whether no position is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.cache.is_empty()
    }

    /// The pages: bytes, tiers.
    #[must_use]
    pub fn cache(&self) -> &KvCache {
        &self.cache
    }

    /// Forgets the positions from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.cache.truncate(len);
    }

    /// Adds the keys and values `[batch, kv_heads, n, head_dim]` of `n` positions, rotated already, in F32, F16 or BF16.
    ///
    /// Cost: a copy of them.
    ///
    /// # Errors
    /// Shapes that do not fit, another batch than before, another dtype, a device other than the CPU, more positions than there
    /// may be, or more bytes than the budget.
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<()> {
        self.add(k, v, None)
    }

    /// As [`Self::append`], and shows the gate what it reads of these positions, `x` `[batch, n, hidden_size]`.
    ///
    /// # Errors
    /// As [`Self::append`]; also an `x` of another shape.
    pub fn append_with(&mut self, k: &Tensor, v: &Tensor, x: &Tensor) -> Result<()> {
        self.add(k, v, Some(x))
    }

    fn add(&mut self, k: &Tensor, v: &Tensor, x: Option<&Tensor>) -> Result<()> {
        let (heads, d) = (self.config.num_key_value_heads, self.config.head_dim);
        let [batch, _, n, _] = dims("k", k)?;
        if k.dims() != [batch, heads, n, d] || v.dims() != k.dims() || batch * n == 0 {
            bail!("{OP}: k is {:?}, v {:?}: give twice [b, {heads}, n, {d}]", k.dims(), v.dims());
        }
        let x = match (x, self.gates.first()) {
            (Some(x), Some(gate)) if x.dims() != [batch, n, gate.hidden_size] => {
                bail!("{OP}: the gate reads [{batch}, {n}, {}], x is {:?}", gate.hidden_size, x.dims())
            }
            (Some(x), Some(_)) => floats(OP, "x", x)?,
            _ => Vec::new(),
        };
        let (k, v) = (floats(OP, "k", k)?, floats(OP, "v", v)?);
        let (kernels, start) = (kernels()?, self.cache.len());
        self.cache.begin(batch, start, n)?;
        let mut row = [vec![0.0; heads * d], vec![0.0; heads * d]];
        for b in 0..batch {
            for position in 0..n {
                for (row, all) in row.iter_mut().zip([&k, &v]) {
                    for (h, row) in row.chunks_exact_mut(d).enumerate() {
                        row.copy_from_slice(&all[((b * heads + h) * n + position) * d..][..d]);
                    }
                }
                self.cache.write(b, 0, start + position, &row[0], &row[1]);
            }
            if let (Some(gate), false) = (self.gates.first(), x.is_empty()) {
                let of_sequence = n * gate.hidden_size;
                self.cache.observe(b, 0, gate, kernels, start, &x[b * of_sequence..(b + 1) * of_sequence]);
            }
        }
        if self.select.chooses_by_token() {
            self.cache.update_bounds(0, (start + n) / PAGE_LEN);
        }
        self.cache.advance(n);
        Ok(())
    }

    /// `softmax(scale · q · Kᵀ) · V` for queries `q` `[batch, heads, seq_len, head_dim]` of the last `seq_len` positions, each of
    /// which sees those up to its own; the result has the shape and dtype of `q`.
    ///
    /// Cost: `2 · heads · head_dim` multiply-adds per query and chosen position; keys and values are read where they lie, shared by
    /// the query heads of a group. Key/value heads are shared by the threads.
    ///
    /// # Errors
    /// Another shape or dtype, more queries than positions, gated attention without a gate, or a device other than the CPU.
    pub fn attend(&self, q: &Tensor) -> Result<Tensor> {
        let (c, len) = (&self.config, self.cache.len());
        let (heads, d) = (c.num_attention_heads, c.head_dim);
        let [batch, _, n, _] = dims("q", q)?;
        if q.dims() != [self.cache.batch_size(), heads, n, d] || n == 0 || n > len {
            bail!(
                "{OP}: q is {:?}: give [{}, {heads}, s, {d}] with s at most {len}",
                q.dims(),
                self.cache.batch_size()
            );
        }
        let select = Selector::new(self.select, &self.gates, 1)?;
        let mut by_head = floats(OP, "q", q)?;
        let at = |row: usize, h: usize| ((row / n * heads + h) * n + row % n) * d;
        let mut rows = vec![0.0; by_head.len()];
        for (i, row) in rows.chunks_exact_mut(d).enumerate() {
            let q = &by_head[at(i / heads, i % heads)..][..d];
            row.iter_mut().zip(q).for_each(|(o, q)| *o = q * self.scale);
        }
        let mut y = vec![0.0; by_head.len()];
        let queries = Queries { rows: &rows, width: c.q_dim(), seq_len: n, index_pos: len - n };
        let on = Compute { kernels: kernels()?, threads: self.threads };
        attention(on, c, &self.cache, 0, &select, queries, &mut y);
        for (i, y) in y.chunks_exact(d).enumerate() {
            by_head[at(i / heads, i % heads)..][..d].copy_from_slice(y);
        }
        Tensor::from_vec(by_head, (batch, heads, n, d), &Device::Cpu)?.to_dtype(q.dtype())
    }
}

fn kernels() -> Result<&'static Kernels> {
    Kernels::get().map_err(Error::wrap)
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            sparse_attention,
            testing::{noise, relative_error},
        },
        *,
    };
    use crate::{AttentionMode, KvConfig};
    use candle_core::DType;

    /// Keys, values and queries `[1, heads, n, head_dim]`.
    fn qkv(n: usize) -> [Tensor; 3] {
        let all = noise(&[3, 6, n, 32]);
        let part =
            |i: usize, heads: usize| all.get(i).unwrap().narrow(0, 0, heads).unwrap().unsqueeze(0).unwrap();
        [part(0, 6), part(1, 3), part(2, 3)]
    }

    #[test]
    fn a_step_after_the_other_is_the_whole_at_once() {
        let [q, k, v] = qkv(300);
        let mode =
            |mode| AttentionConfig::new(mode).with_sinks(32).with_window(64).with_budget(64).with_recall(32);
        for select in
            [AttentionMode::Dense, AttentionMode::Window, AttentionMode::Recall, AttentionMode::Sampled]
                .map(mode)
        {
            for kv in [KvConfig::exact(crate::KvDType::F32), KvConfig::exact(crate::KvDType::F16)] {
                let how = SparseAttention::new(0.2, select).with_kv(kv);
                let whole = sparse_attention(&q, &k, &v, &how).unwrap();
                let mut past = PagedAttention::new(&how, [6, 3, 32], 300).unwrap();
                for (start, n) in
                    [(0, 100), (100, 1), (101, 150)].into_iter().chain((251..300).map(|p| (p, 1)))
                {
                    let part = |t: &Tensor| t.narrow(2, start, n).unwrap();
                    past.append(&part(&k), &part(&v)).unwrap();
                    let got = past.attend(&part(&q)).unwrap();
                    let error = relative_error(&got, &part(&whole).contiguous().unwrap());
                    assert!(error < 1e-6, "{select:?} {kv:?} at {start}: {error}");
                }
                let error =
                    past.append(&k.narrow(2, 0, 1).unwrap(), &v.narrow(2, 0, 1).unwrap()).unwrap_err();
                assert!(error.to_string().contains("context of 300"), "{error}");
            }
        }
    }

    #[test]
    fn half_precision_comes_back_in_its_dtype() {
        let [q, k, v] = qkv(70);
        let how = SparseAttention::new(0.2, AttentionConfig::default());
        for dtype in [DType::F16, DType::BF16] {
            let [q, k, v] = [&q, &k, &v].map(|t| t.to_dtype(dtype).unwrap());
            let got = sparse_attention(&q, &k, &v, &how).unwrap();
            assert_eq!(got.dtype(), dtype);
            let [q, k, v, got] = [&q, &k, &v, &got].map(|t| t.to_dtype(DType::F32).unwrap());
            let error = relative_error(&got, &sparse_attention(&q, &k, &v, &how).unwrap());
            assert!(error < 0.01, "{dtype:?}: {error}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        let how = SparseAttention::new(1.0, AttentionConfig::default());
        assert!(
            PagedAttention::new(&how, [6, 4, 32], 10).is_err()
                && PagedAttention::new(&how, [6, 0, 32], 10).is_err()
        );
        let mut past = PagedAttention::new(&how, [6, 3, 32], 100).unwrap();
        let [q, k, v] = qkv(10);
        assert!(past.attend(&q).unwrap_err().to_string().contains("at most 0"));
        assert!(past.append(&q, &v).unwrap_err().to_string().contains("[b, 3, n, 32]"));
        past.append(&k, &v).unwrap();
        let two = Tensor::cat(&[&k, &k], 0).unwrap();
        assert!(past.append(&two, &two).unwrap_err().to_string().contains("batch of 1"));
        assert!(
            past.attend(&Tensor::cat(&[&q, &q], 2).unwrap()).unwrap_err().to_string().contains("at most 10")
        );
        assert_eq!(past.len(), 10);
    }

    /// `cargo test -p candle-sparse --lib -- --ignored --nocapture decode_beside`: milliseconds of a step at 4096 positions.
    #[test]
    #[ignore = "a measurement"]
    fn decode_beside_tensor_ops() {
        let ([heads, kv_heads, d], n) = ([32, 4, 64], 4096);
        let q = noise(&[1, heads, 1, d]);
        let (k, v) = (noise(&[1, kv_heads, n, d]), noise(&[1, kv_heads, n + 1, d]).narrow(2, 0, n).unwrap());
        // Keys and values are not repeated for the heads of a group, as candle's models do: that is slower still.
        let grouped = q.reshape((1, kv_heads, heads / kv_heads, d)).unwrap();
        let plain = || -> Result<Tensor> {
            let scores = (grouped.matmul(&k.t()?)? / 8.0)?;
            candle_nn::ops::softmax_last_dim(&scores)?.matmul(&v.contiguous()?)
        };
        let time = |f: &mut dyn FnMut() -> Result<Tensor>| {
            let mut times: Vec<f64> = (0..21)
                .map(|_| {
                    let start = std::time::Instant::now();
                    f().unwrap();
                    start.elapsed().as_secs_f64() * 1e3
                })
                .collect();
            times.sort_by(f64::total_cmp);
            times[10]
        };
        println!("plain tensor ops: {:.2} ms", time(&mut || plain()));
        let modes =
            [AttentionMode::Dense, AttentionMode::Window, AttentionMode::Recall, AttentionMode::Sampled];
        for (mode, kv) in modes
            .into_iter()
            .flat_map(|m| [KvConfig::exact(crate::KvDType::F16), KvConfig::tiered()].map(|k| (m, k)))
        {
            let how = SparseAttention::new(0.125, AttentionConfig::new(mode)).with_kv(kv);
            let mut past = PagedAttention::new(&how, [heads, kv_heads, d], n).unwrap();
            past.append(&k, &v).unwrap();
            let last = |t: &Tensor| t.narrow(2, n - 1, 1).unwrap();
            let step = time(&mut || {
                past.truncate(n - 1);
                past.append(&last(&k), &last(&v))?;
                past.attend(&q)
            });
            println!(
                "{mode:?}, {} keys and values: {step:.2} ms",
                if kv.is_tiered() { "tiered" } else { "F16" }
            );
        }
    }
}
