//! What later queries do with a token (the oracle `KVzip+` of `KVzap`, arXiv 2601.07891).

use super::{
    super::seen::{Grams, Seen},
    GateSettings,
};
use candle_core::{Error, Result, Tensor, bail};
use candle_sparse_core::{Config, KernelSet};
use candle_sparse_kernels::Kernels;
use rayon::prelude::*;

/// ‖`W_O`·v‖ of each query head's part of `W_O`.
#[derive(Clone, Debug)]
pub(crate) struct ValueNorms {
    config: Config,
    grams: Grams,
}

impl ValueNorms {
    /// For an output projection `o_proj` `[hidden_size, heads · head_dim]`.
    ///
    /// # Errors
    /// Another shape.
    pub(crate) fn new(o_proj: &Tensor, c: &Config) -> Result<Self> {
        Ok(Self { config: *c, grams: Grams::new(o_proj, c)? })
    }

    /// Labels `[n, kv_heads]` of a window's tokens, from position 0 on:
    /// `label[i] = ln max_{h, j ≥ i + window} a_ji·‖W_O·v_i‖` over the query heads h of a group and later queries j, with
    /// `a_ji` the attention that j pays to i, in the model's sliding window if it has one. NaN for tokens without enough later
    /// queries, and for sinks.
    ///
    /// `qkv` `[n, q_dim + 2 · kv_dim]`: rotated queries that are scaled by `1/√head_dim`, rotated keys, values. Cost: `n²/2`
    /// products and exponentials per query head; memory: `[n, n]` f32.
    ///
    /// # Errors
    /// `qkv` has another width, or the model's sliding window leaves nothing beyond `window`.
    pub(crate) fn labels(&self, qkv: &[f32], window: usize, s: &GateSettings) -> Result<Vec<f32>> {
        let seen = Seen::new(qkv, &self.config)?;
        let (heads, kv_heads, n) = (self.config.num_attention_heads, self.config.num_key_value_heads, seen.n);
        if let Some(sliding) = self.config.sliding_window.filter(|w| *w <= window) {
            bail!(
                "calibrate: the model's sliding window of {sliding} leaves nothing beyond the gate's window of {window} \
                 tokens: give the gate a shorter one, or fit none"
            );
        }
        let labelled = n.saturating_sub(window.saturating_add(s.min_later.max(1)));
        let mut labels = vec![f32::NAN; n * kv_heads];
        if labelled <= s.sinks {
            return Ok(labels);
        }
        let group = self.config.group_size();
        let of_head = |head: usize| self.of_head(&seen, head, n, window);
        let found = (0..heads).into_par_iter().map(of_head).collect::<Result<Vec<_>>>()?;
        for (head, found) in found.iter().enumerate() {
            for i in s.sinks..labelled {
                let label = &mut labels[i * kv_heads + head / group];
                // `max` prefers a number to NaN.
                *label = label.max(found[i]);
            }
        }
        Ok(labels)
    }

    /// `ln max_j a_ji·‖W_O·v_i‖` of one query head for each token i.
    fn of_head(&self, seen: &Seen, head: usize, n: usize, window: usize) -> Result<Vec<f32>> {
        let kv = head / self.config.group_size();
        let scores = seen.q.get(head)?.narrow(0, window, n - window)?.matmul(&seen.k.get(kv)?)?;
        let scores = scores.flatten_all()?.to_vec1::<f32>()?;
        let kernels = Kernels::get().map_err(Error::wrap)?;
        let (mut most, mut room) = (vec![f32::NEG_INFINITY; n], Vec::with_capacity(n));
        for (j, row) in (window..n).zip(scores.chunks_exact(n)) {
            let first = self.config.sliding_window.map_or(0, |w| (j + 1).saturating_sub(w));
            let row = &row[first..=j];
            room.clear();
            room.extend_from_slice(row);
            let (max, sum) = kernels.exp_sum(&mut room, f32::NEG_INFINITY);
            let sum = max + sum.ln();
            // A logarithm cannot underflow as the probability would.
            let far = &row[..=j - window - first];
            most[first..].iter_mut().zip(far).for_each(|(m, s)| *m = m.max(s - sum));
        }
        let v = seen.v.get(kv)?;
        let squares = (v.matmul(&self.grams.0[head])? * &v)?.sum(1)?.to_vec1::<f32>()?;
        Ok(most.iter().zip(squares).map(|(m, q)| m + 0.5 * q.max(f32::MIN_POSITIVE).ln()).collect())
    }
}
