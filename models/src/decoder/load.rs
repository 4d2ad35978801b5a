//! Loading a checkpoint with Hugging Face tensor names.

use super::{Decoder, Layer, Projection};
use candle_core::{Error, Result, bail};
use candle_nn::VarBuilder;
use candle_sparse::{
    Threads, Weight,
    core::{Config, Format},
    kernels::Kernels,
    weight::format_of,
};

/// How to hold and run a model.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadOptions {
    /// Format of the projections and the embedding; `None` keeps the dtype of the `VarBuilder`.
    pub format: Option<Format>,
    /// Threads to use; `None` uses all of candle's pool.
    pub threads: Option<Threads>,
}

/// Biases and head sharing of a checkpoint, which the shape does not tell.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extras {
    /// q, k, v and o have biases.
    pub attention_bias: bool,
    /// gate, up and down have biases.
    pub mlp_bias: bool,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
}

struct Loader<'a> {
    format: Format,
    notices: &'a mut Vec<String>,
}

impl Loader<'_> {
    fn projection(
        &mut self,
        vb: &VarBuilder<'_>,
        cols: usize,
        parts: &[(&str, usize)],
        bias: bool,
    ) -> Result<Projection> {
        let rows: Vec<usize> = parts.iter().map(|p| p.1).collect();
        let weight =
            Weight::stacked(self.format, cols, &rows, |i| vb.pp(parts[i].0).get((rows[i], cols), "weight"))?;
        if weight.format() != self.format {
            let name = vb.pp(parts[0].0).prefix();
            let (wanted, got) = (self.format.name(), weight.format().name());
            let block = self.format.block_len();
            self.notices.push(format!(
                "{name}: {cols} columns are no multiple of {block}, kept in {got} instead of {wanted}"
            ));
        }
        let bias = if bias {
            let mut all = Vec::new();
            for (name, n) in parts {
                all.extend(vector(&vb.pp(name), *n, "bias")?);
            }
            Some(all)
        } else {
            None
        };
        Ok(Projection { weight, bias })
    }

    fn layer(&mut self, c: &Config, extras: Extras, vb: &VarBuilder<'_>) -> Result<Layer> {
        let (attn, mlp) = (vb.pp("self_attn"), vb.pp("mlp"));
        let (hidden, inner, q, kv) = (c.hidden_size, c.intermediate_size, c.q_dim(), c.kv_dim());
        let qkv = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)];
        Ok(Layer {
            input_layernorm: vector(&vb.pp("input_layernorm"), hidden, "weight")?,
            qkv_proj: self.projection(&attn, hidden, &qkv, extras.attention_bias)?,
            o_proj: self.projection(&attn, q, &[("o_proj", hidden)], extras.attention_bias)?,
            post_attention_layernorm: vector(&vb.pp("post_attention_layernorm"), hidden, "weight")?,
            gate_proj: self.projection(&mlp, hidden, &[("gate_proj", inner)], extras.mlp_bias)?,
            up_proj: self.projection(&mlp, hidden, &[("up_proj", inner)], extras.mlp_bias)?,
            down_proj: self.projection(&mlp, inner, &[("down_proj", hidden)], extras.mlp_bias)?,
        })
    }
}

fn vector(vb: &VarBuilder<'_>, n: usize, name: &str) -> Result<Vec<f32>> {
    vb.get(n, name)?.to_dtype(candle_core::DType::F32)?.to_vec1()
}

impl Decoder {
    /// Loads a checkpoint with Hugging Face tensor names.
    ///
    /// Each tensor is dropped before the next is read, the largest come first: peak memory stays near the model's size.
    ///
    /// # Errors
    /// A bad `config`, a missing or wrong-shaped tensor (named), a dtype or device that is not supported, or a
    /// `CANDLE_SPARSE_LEVEL` that this CPU lacks.
    pub fn load(vb: &VarBuilder<'_>, config: Config, extras: Extras, options: LoadOptions) -> Result<Self> {
        config.validate().map_err(|e| Error::msg(format!("config: {e}")))?;
        let kernels = Kernels::get().map_err(|e| Error::msg(e.to_string()))?;
        let Some(format) = options.format.or(format_of(vb.dtype())) else {
            bail!("dtype {:?} is not supported, use F32, F16 or BF16", vb.dtype());
        };
        let mut notices = Vec::new();
        let mut loader = Loader { format, notices: &mut notices };
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embed_tokens =
            loader.projection(&vb.pp("model"), hidden, &[("embed_tokens", vocab)], false)?.weight;
        let lm_head = if extras.tie_word_embeddings {
            embed_tokens.clone()
        } else {
            loader.projection(vb, hidden, &[("lm_head", vocab)], false)?.weight
        };
        let layers = (0..config.num_hidden_layers)
            .map(|i| loader.layer(&config, extras, &vb.pp(format!("model.layers.{i}"))))
            .collect::<Result<_>>()?;
        let norm = vector(&vb.pp("model.norm"), hidden, "weight")?;
        let threads = options.threads.unwrap_or_default();
        Ok(Self { config, kernels, threads, embed_tokens, layers, norm, lm_head, notices })
    }
}
