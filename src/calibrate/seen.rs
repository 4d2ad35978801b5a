//! What attention of a block did in a window of text, and what its output projection makes of that.

use candle_core::{Device, Result, Tensor, bail};
use candle_sparse_core::Config;

/// One block's queries, keys and values of a window.
pub(super) struct Seen {
    /// `[heads, n, head_dim]`
    pub(super) q: Tensor,
    /// `[kv_heads, head_dim, n]`
    pub(super) k: Tensor,
    /// `[kv_heads, n, head_dim]`
    pub(super) v: Tensor,
    /// Positions.
    pub(super) n: usize,
}

impl Seen {
    /// Of `qkv` `[n, q_dim + 2 · kv_dim]`: rotated queries that are scaled by `1/√head_dim`, rotated keys, values.
    ///
    /// # Errors
    /// `qkv` has another width.
    pub(super) fn new(qkv: &[f32], c: &Config) -> Result<Self> {
        let (heads, kv_heads, head_dim) = (c.num_attention_heads, c.num_key_value_heads, c.head_dim);
        let width = c.q_dim() + 2 * c.kv_dim();
        if !qkv.len().is_multiple_of(width) {
            bail!("calibrate: {} numbers are no rows of {width} queries, keys and values", qkv.len());
        }
        let n = qkv.len() / width;
        let all = Tensor::from_slice(qkv, (n, heads + 2 * kv_heads, head_dim), &Device::Cpu)?;
        let of = |first, count| all.narrow(1, first, count)?.transpose(0, 1)?.contiguous();
        Ok(Self {
            q: of(0, heads)?,
            k: of(heads, kv_heads)?.transpose(1, 2)?.contiguous()?,
            v: of(heads + kv_heads, kv_heads)?,
            n,
        })
    }
}

/// Of each query head's part of `W_O` the products of its columns, `W_Oᵀ·W_O` `[head_dim, head_dim]`: `xᵀ·G·x = ‖W_O·x‖²`.
#[derive(Clone, Debug)]
pub(super) struct Grams(pub(super) Vec<Tensor>);

impl Grams {
    /// For an output projection `o_proj` `[hidden_size, heads · head_dim]`.
    ///
    /// # Errors
    /// Another shape.
    pub(super) fn new(o_proj: &Tensor, c: &Config) -> Result<Self> {
        if o_proj.dims() != [c.hidden_size, c.q_dim()] {
            bail!("calibrate: o_proj is {:?}, expected {:?}", o_proj.dims(), [c.hidden_size, c.q_dim()]);
        }
        let gram = |h: usize| {
            let w = o_proj.narrow(1, h * c.head_dim, c.head_dim)?.contiguous()?;
            w.t()?.contiguous()?.matmul(&w)
        };
        Ok(Self((0..c.num_attention_heads).map(gram).collect::<Result<_>>()?))
    }
}
