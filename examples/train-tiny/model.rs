//! The Llama model with a backward pass, under the tensor names of Hugging Face.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::config::{Config, HiddenAct};
use super::loss::{CrossEntropy, GatedProduct};
use super::ops::{CausalSoftmax, RmsNorm, RopeHeads, RopeTable};
use super::rng::Rng;

/// What one forward pass does besides computing logits.
#[derive(Default)]
pub(crate) struct Pass<'a> {
    /// Drops hidden values with this probability, drawn from this generator.
    pub(crate) dropout: Option<(f64, &'a mut Rng)>,
    /// Adds up, per layer, the share of feed-forward gates above zero, or of ups where there is no gate.
    pub(crate) active: Option<&'a mut Vec<f64>>,
    /// Collects, layer by layer, what goes into the activation: `(tokens, intermediate_size)`.
    pub(crate) gates: Option<&'a mut Vec<Tensor>>,
}

impl Pass<'_> {
    fn drop(&mut self, x: Tensor) -> Result<Tensor> {
        match &mut self.dropout {
            Some((p, rng)) if *p > 0.0 => {
                let mask = rng.dropout_mask(x.elem_count(), *p);
                Ok((x.mul(&Tensor::from_vec(mask, x.shape(), x.device())?))?)
            }
            _ => Ok(x),
        }
    }

    fn note(&mut self, layer: usize, gate: &Tensor) -> Result<()> {
        if let Some(gates) = &mut self.gates {
            gates.push(gate.clone());
        }
        if let Some(active) = &mut self.active {
            let gate = gate.flatten_all()?.to_vec1::<f32>()?;
            let above = gate.iter().filter(|x| **x > 0.0).count();
            active[layer] += above as f64 / gate.len() as f64;
        }
        Ok(())
    }
}

/// The model and its trainable tensors.
pub(crate) struct Llama {
    /// Sizes and activation.
    pub(crate) config: Config,
    /// All tensors by their name in the checkpoint.
    pub(crate) vars: BTreeMap<String, Var>,
    /// Which of them are trained: no gradient goes to the others.
    pub(crate) is_trained: fn(&str) -> bool,
    rope: Arc<RopeTable>,
}

const EMBEDDING: &str = "model.embed_tokens.weight";
/// The last matrix, where it is not the embedding.
const HEAD: &str = "lm_head.weight";

/// The names and shapes of all tensors.
fn shapes(config: &Config) -> Vec<(String, Vec<usize>)> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let q = config.num_attention_heads * config.head_dim;
    let kv = config.num_key_value_heads * config.head_dim;
    let mut out = vec![
        (EMBEDDING.to_string(), vec![config.vocab_size, hidden]),
        ("model.norm.weight".to_string(), vec![hidden]),
    ];
    if !config.tie_word_embeddings {
        out.push((HEAD.to_string(), vec![config.vocab_size, hidden]));
    }
    for layer in 0..config.num_hidden_layers {
        let mut add = |name: &str, shape: Vec<usize>| {
            out.push((format!("model.layers.{layer}.{name}.weight"), shape));
        };
        add("input_layernorm", vec![hidden]);
        add("self_attn.q_proj", vec![q, hidden]);
        add("self_attn.k_proj", vec![kv, hidden]);
        add("self_attn.v_proj", vec![kv, hidden]);
        add("self_attn.o_proj", vec![hidden, q]);
        add("post_attention_layernorm", vec![hidden]);
        if config.gated_mlp {
            add("mlp.gate_proj", vec![inner, hidden]);
        }
        add("mlp.up_proj", vec![inner, hidden]);
        add("mlp.down_proj", vec![hidden, inner]);
    }
    out
}

fn init(name: &str, shape: &[usize], layers: usize, rng: &mut Rng) -> Vec<f32> {
    let count = shape.iter().product();
    if shape.len() == 1 {
        return vec![1.0; count];
    }
    let std = if name.contains("embed_tokens") { 0.02 } else { 0.64 / (shape[1] as f64).sqrt() };
    // Each layer adds two branches to the residual stream; this keeps their sum at one's size.
    let adds = name.contains("o_proj") || name.contains("down_proj");
    let branches = if adds { (2.0 * layers as f64).sqrt() } else { 1.0 };
    rng.normals(count, std / branches)
}

impl Llama {
    /// A model with random weights.
    pub(crate) fn new(config: &Config, rng: &mut Rng) -> Result<Self> {
        let mut vars = BTreeMap::new();
        for (name, shape) in shapes(config) {
            let data = init(&name, &shape, config.num_hidden_layers, rng);
            let tensor = Tensor::from_vec(data, shape, &Device::Cpu)?;
            vars.insert(name, Var::from_tensor(&tensor)?);
        }
        Ok(Self::build(config, vars))
    }

    /// A model with the weights of a checkpoint.
    pub(crate) fn from_tensors(config: &Config, tensors: &HashMap<String, Tensor>) -> Result<Self> {
        Self::from_lookup(config, |name, shape| {
            let tensor = tensors.get(name).with_context(|| format!("no tensor {name}"))?;
            ensure!(tensor.dims() == shape, "{name} has shape {:?}", tensor.dims());
            Ok(tensor.clone())
        })
    }

    /// A model with the weights that `get` finds by name and shape.
    pub(crate) fn from_lookup(
        config: &Config,
        get: impl Fn(&str, &[usize]) -> Result<Tensor>,
    ) -> Result<Self> {
        let mut vars = BTreeMap::new();
        for (name, shape) in shapes(config) {
            let tensor = get(&name, &shape)?;
            vars.insert(name, Var::from_tensor(&tensor.to_dtype(DType::F32)?)?);
        }
        Ok(Self::build(config, vars))
    }

    fn build(config: &Config, vars: BTreeMap<String, Var>) -> Self {
        let rope = RopeTable::new(config.max_position_embeddings, config.head_dim, config.rope_theta);
        Self { config: config.clone(), vars, is_trained: |_| true, rope: Arc::new(rope) }
    }

    /// How many numbers there are.
    pub(crate) fn parameters(&self) -> usize {
        self.vars.values().map(|var| var.elem_count()).sum()
    }

    fn weight(&self, name: &str) -> Result<Tensor> {
        let var = self.vars.get(name).with_context(|| format!("no tensor {name}"))?;
        Ok(if (self.is_trained)(name) { var.as_tensor().clone() } else { var.as_detached_tensor() })
    }

    fn linear(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        Ok(x.matmul(&self.weight(&format!("{name}.weight"))?.t()?)?)
    }

    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let eps = self.config.rms_norm_eps as f32;
        Ok(x.apply_op2(&self.weight(&format!("{name}.weight"))?, RmsNorm { eps })?)
    }

    /// Logits of shape `(batch * time, vocab)` for `batch` rows of token ids.
    pub(crate) fn forward(&self, ids: &[u32], batch: usize, pass: &mut Pass) -> Result<Tensor> {
        let time = ids.len() / batch;
        ensure!(time <= self.config.max_position_embeddings, "{time} tokens exceed the context");
        let ids = Tensor::new(ids, &Device::Cpu)?;
        let embed = self.weight(EMBEDDING)?;
        let mut x = pass.drop(embed.index_select(&ids, 0)?)?;
        for layer in 0..self.config.num_hidden_layers {
            let name = format!("model.layers.{layer}");
            let normed = self.norm(&x, &format!("{name}.input_layernorm"))?;
            let out = self.attention(&normed, &format!("{name}.self_attn"), batch, time)?;
            x = (x + pass.drop(out)?)?;
            let normed = self.norm(&x, &format!("{name}.post_attention_layernorm"))?;
            let out = self.feed_forward(&normed, &format!("{name}.mlp"), layer, pass)?;
            x = (x + pass.drop(out)?)?;
        }
        let head = if self.config.tie_word_embeddings { embed } else { self.weight(HEAD)? };
        Ok(self.norm(&x, "model.norm")?.matmul(&head.t()?)?)
    }

    fn attention(&self, x: &Tensor, name: &str, batch: usize, time: usize) -> Result<Tensor> {
        let (heads, kv, dim) =
            (self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim);
        let project = |part: &str, heads: usize| -> Result<Tensor> {
            let out = self.linear(x, &format!("{name}.{part}"))?;
            Ok(out.reshape((batch, time, heads, dim))?)
        };
        let rope = RopeHeads { table: self.rope.clone(), inverse: false };
        let q = project("q_proj", heads)?.apply_op1(rope.clone())?;
        let k = project("k_proj", kv)?.apply_op1(rope)?;
        let v = project("v_proj", kv)?.transpose(1, 2)?.contiguous()?;
        // The heads that share a key head become more query rows, so keys are never copied.
        let q = q.reshape((batch, kv, heads / kv * time, dim))?;
        let scale = 1.0 / (dim as f32).sqrt();
        let probs = q.matmul(&k.t()?)?.apply_op1(CausalSoftmax { scale })?;
        let out = probs.matmul(&v)?.reshape((batch, heads, time, dim))?;
        let out = out.transpose(1, 2)?.reshape((batch * time, heads * dim))?;
        self.linear(&out, &format!("{name}.o_proj"))
    }

    fn feed_forward(&self, x: &Tensor, name: &str, layer: usize, pass: &mut Pass) -> Result<Tensor> {
        let up = self.linear(x, &format!("{name}.up_proj"))?;
        let (gate, up) = if self.config.gated_mlp {
            (self.linear(x, &format!("{name}.gate_proj"))?, up)
        } else {
            let ones = up.ones_like()?;
            (up, ones)
        };
        pass.note(layer, &gate)?;
        let inner = gate.apply_op2(&up, GatedProduct(self.config.hidden_act))?;
        self.linear(&inner, &format!("{name}.down_proj"))
    }

    /// Whether the gate can be exactly zero.
    pub(crate) fn is_sparse(&self) -> bool {
        self.config.hidden_act != HiddenAct::Silu
    }
}

/// Negative log-likelihood of each target token, in nats.
pub(crate) fn token_losses(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    let targets = Tensor::new(targets, &Device::Cpu)?;
    Ok(logits.apply_op2(&targets, CrossEntropy)?)
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod tests;
