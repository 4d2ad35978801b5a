//! A Mistral in plain tensor ops, all positions at once, under any mask.

use candle_core::{D, Device, Result, Tensor};
use candle_nn::Module;
use candle_sparse_models::mistral::Config;
use std::collections::HashMap;

/// Logits `[n, vocab_size]` of one sequence of token ids `[1, n]`, where query `i` sees the keys `j` that `seen(i, j)` says.
pub(crate) fn logits(
    c: &Config,
    w: &HashMap<String, Tensor>,
    ids: &Tensor,
    seen: impl Fn(usize, usize) -> bool,
) -> Result<Tensor> {
    let n = ids.dim(1)?;
    let linear = |x: &Tensor, name: &str| x.matmul(&w[&format!("{name}.weight")].t()?);
    let norm = |x: &Tensor, name: &str| {
        candle_nn::RmsNorm::new(w[&format!("{name}.weight")].clone(), c.rms_norm_eps).forward(x)
    };
    let mask: Vec<f32> =
        (0..n * n).map(|i| if seen(i / n, i % n) { 0.0 } else { f32::NEG_INFINITY }).collect();
    let mask = Tensor::from_vec(mask, (n, n), &Device::Cpu)?;
    let mut x = w["model.embed_tokens.weight"].index_select(&ids.flatten_all()?, 0)?;
    for l in 0..c.num_hidden_layers {
        let at = |name: &str| format!("model.layers.{l}.{name}");
        let h = norm(&x, &at("input_layernorm"))?;
        let [q, k, v] = ["q", "k", "v"].map(|p| linear(&h, &at(&format!("self_attn.{p}_proj"))));
        let a = attention(c, &q?, &k?, &v?, &mask)?;
        x = (x + linear(&a, &at("self_attn.o_proj"))?)?;
        let h = norm(&x, &at("post_attention_layernorm"))?;
        let a = (linear(&h, &at("mlp.gate_proj"))?.silu()? * linear(&h, &at("mlp.up_proj"))?)?;
        x = (x + linear(&a, &at("mlp.down_proj"))?)?;
    }
    linear(&norm(&x, "model.norm")?, "lm_head")
}

fn attention(c: &Config, q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let (n, d, heads) = (q.dim(0)?, c.head_dim.unwrap(), c.num_attention_heads);
    let split = |x: &Tensor| x.reshape((n, (), d))?.transpose(0, 1)?.contiguous();
    let group = heads / c.num_key_value_heads;
    let repeat = |x: Tensor| {
        x.unsqueeze(1)?.expand((c.num_key_value_heads, group, n, d))?.reshape((heads, n, d))?.contiguous()
    };
    let (q, k, v) = (rope(c, &split(q)?)?, repeat(rope(c, &split(k)?)?)?, repeat(split(v)?)?);
    let scores = (q.matmul(&k.transpose(1, 2)?.contiguous()?)? / (d as f64).sqrt())?.broadcast_add(mask)?;
    let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
    weights.matmul(&v)?.transpose(0, 1)?.reshape((n, heads * d))
}

/// `x` `[heads, n, head_dim]`, its halves rotated by position.
fn rope(c: &Config, x: &Tensor) -> Result<Tensor> {
    let (_, n, d) = x.dims3()?;
    let angle = |i: usize| (i / (d / 2)) as f64 * c.rope_theta.powf(-2.0 * (i % (d / 2)) as f64 / d as f64);
    let table = |f: fn(f64) -> f64| {
        Tensor::from_vec(
            (0..n * d / 2).map(|i| f(angle(i)) as f32).collect::<Vec<_>>(),
            (n, d / 2),
            &Device::Cpu,
        )
    };
    let (cos, sin) = (table(f64::cos)?, table(f64::sin)?);
    let (a, b) = (x.narrow(2, 0, d / 2)?, x.narrow(2, d / 2, d / 2)?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Tensor::cat(&[first, second], 2)
}
