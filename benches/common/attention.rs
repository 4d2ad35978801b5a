//! A layer at a depth, for the benches.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_sparse::{
    AttentionConfig, FastGrnnGate, KvCache, KvConfig,
    decoder::{Checkpoint, Decoder, Extras, Input, LoadOptions, Logits, Scratch, Step},
};
use candle_sparse_core::{Activation, Config, Rope, RopeScaling};
use candle_sparse_kernels::Kernels;
use std::collections::HashMap;

use super::common::uniform;

/// Heads, key/value heads and their size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
}

impl Shape {
    pub(crate) fn config(self) -> Config {
        Config {
            hidden_size: 64,
            intermediate_size: 1,
            vocab_size: 1,
            num_hidden_layers: 1,
            num_attention_heads: self.heads,
            num_key_value_heads: self.kv_heads,
            head_dim: self.head_dim,
            rms_norm_eps: 1e-5,
            rope: Rope { theta: 1e4, scaling: RopeScaling::None, interleaved: false },
            max_position_embeddings: 1 << 16,
            hidden_act: Activation::Silu,
            gated_mlp: true,
            gate_shift: 0.0,
            norm_shift: None,
            sliding_window: None,
        }
    }
}

/// Numbers in −1 .. 1.
pub(crate) fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut uniform = uniform(seed);
    (0..n).map(|_| uniform() as f32 * 2.0 - 1.0).collect()
}

/// A model of one layer that is nearly all attention, with a past.
pub(crate) struct Layer {
    pub(crate) cache: KvCache,
    decoder: Decoder,
    gate: FastGrnnGate,
    scratch: Scratch,
}

impl Layer {
    pub(crate) fn new(shape: Shape, kv: KvConfig, select: AttentionConfig, depth: usize) -> Result<Self> {
        let config = shape.config();
        let (hidden, heads) = (config.hidden_size, config.num_key_value_heads);
        let gate =
            FastGrnnGate::new(hidden, noise(heads * hidden, 1), vec![0.0; heads], vec![f32::MIN; heads])?;
        let decoder = decoder(config)?.with_gates(vec![gate.clone()])?.with_attention(select)?;
        let mut layer = Self { cache: KvCache::new(&config, kv), decoder, gate, scratch: Scratch::default() };
        for position in 0..depth {
            layer.append(position)?;
        }
        Ok(layer)
    }

    /// Writes a position and lets pages settle.
    pub(crate) fn append(&mut self, position: usize) -> Result<()> {
        let kernels = Kernels::get().map_err(candle_core::Error::wrap)?;
        let c = self.decoder.config();
        let (k, v) = (noise(c.kv_dim(), position as u64), noise(c.kv_dim(), !position as u64));
        self.cache.begin(1, position, 1)?;
        self.cache.write(0, 0, position, &k, &v);
        let x = noise(c.hidden_size, 7 * position as u64);
        self.cache.observe(0, 0, &self.gate, kernels, position, &x);
        self.cache.advance(1);
        Ok(())
    }

    /// The next token, which is then forgotten.
    pub(crate) fn decode(&mut self) -> Result<()> {
        let position = self.cache.len();
        let step = Step { batch: 1, seq_len: 1, index_pos: position };
        let (input, logits) = (Input::Ids(&[0]), &mut [0.0]);
        self.decoder.forward(input, step, &mut self.cache, &mut self.scratch, Logits::Last, logits)?;
        self.cache.truncate(position);
        Ok(())
    }
}

/// One layer of random weights; all but attention is small.
fn decoder(config: Config) -> Result<Decoder> {
    let (hidden, q, kv) = (config.hidden_size, config.q_dim(), config.kv_dim());
    let layer = "model.layers.0";
    let shapes = [
        ("model.embed_tokens", vec![1, hidden]),
        ("model.norm", vec![hidden]),
        (&format!("{layer}.input_layernorm"), vec![hidden]),
        (&format!("{layer}.post_attention_layernorm"), vec![hidden]),
        (&format!("{layer}.self_attn.q_proj"), vec![q, hidden]),
        (&format!("{layer}.self_attn.k_proj"), vec![kv, hidden]),
        (&format!("{layer}.self_attn.v_proj"), vec![kv, hidden]),
        (&format!("{layer}.self_attn.o_proj"), vec![hidden, q]),
        (&format!("{layer}.mlp.gate_proj"), vec![1, hidden]),
        (&format!("{layer}.mlp.up_proj"), vec![1, hidden]),
        (&format!("{layer}.mlp.down_proj"), vec![hidden, 1]),
    ];
    let tensor = |(seed, (name, shape)): (usize, (&str, Vec<usize>))| {
        let values = noise(shape.iter().product(), seed as u64);
        Ok((format!("{name}.weight"), Tensor::from_vec(values, shape, &Device::Cpu)?))
    };
    let tensors: HashMap<_, _> = shapes.into_iter().enumerate().map(tensor).collect::<Result<_>>()?;
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let extras = Extras::default().with_tie_word_embeddings(true);
    Decoder::load(&Checkpoint::from(vb), config, extras, LoadOptions::default())
}
