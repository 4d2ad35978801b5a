//! Shapes and weights that the tests share.

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sparse_models::llama::{Config, LayerTap, LlamaConfig};
use candle_transformers::models::llama as candle_llama;
use std::collections::HashMap;

pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) hidden: usize,
    pub(crate) inner: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) tied: bool,
    pub(crate) rope: &'static str,
}

pub(crate) const CASES: [Case; 4] = [
    Case {
        name: "gqa 3:1, head_dim 48, tied",
        hidden: 288,
        inner: 512,
        heads: 6,
        kv_heads: 2,
        tied: true,
        rope: "",
    },
    Case {
        name: "gqa 2:1, ffn 172, untied",
        hidden: 64,
        inner: 172,
        heads: 8,
        kv_heads: 4,
        tied: false,
        rope: "",
    },
    Case { name: "no groups", hidden: 128, inner: 352, heads: 4, kv_heads: 4, tied: false, rope: "" },
    Case {
        name: "one kv head, llama3 rope",
        hidden: 256,
        inner: 320,
        heads: 8,
        kv_heads: 1,
        tied: true,
        rope: r#", "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}"#,
    },
];

pub(crate) const VOCAB: usize = 515;

impl Case {
    pub(crate) fn json(&self) -> String {
        let Self { hidden, inner, heads, kv_heads, tied, rope, .. } = self;
        format!(
            r#"{{"hidden_size": {hidden}, "intermediate_size": {inner}, "vocab_size": {VOCAB}, "num_hidden_layers": 3,
            "num_attention_heads": {heads}, "num_key_value_heads": {kv_heads}, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 640, "tie_word_embeddings": {tied} {rope}}}"#
        )
    }

    pub(crate) fn config(&self) -> Config {
        serde_json::from_str::<LlamaConfig>(&self.json()).unwrap().into_config(false)
    }

    pub(crate) fn candle_config(&self) -> candle_llama::Config {
        serde_json::from_str::<candle_llama::LlamaConfig>(&self.json()).unwrap().into_config(false)
    }
}

/// Numbers of a mean and a standard deviation that depend on nothing but the name: a failure comes back.
pub(crate) fn noise(name: &str, dims: &[usize], mean: f32, std: f32) -> Tensor {
    let mut state =
        name.bytes().fold(0x9e37_79b9_7f4a_7c15_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Uniform, whose standard deviation is its width / sqrt 12.
        mean + ((state >> 40) as f32 / (1 << 24) as f32 - 0.5) * 12_f32.sqrt() * std
    };
    let n = dims.iter().product();
    Tensor::from_vec((0..n).map(|_| next()).collect::<Vec<_>>(), dims, &Device::Cpu).unwrap()
}

/// Random weights of a size that keeps the logits around 1.
pub(crate) fn weights(c: &Config, dtype: DType) -> HashMap<String, Tensor> {
    let core = c.to_core().unwrap();
    let mut all = HashMap::new();
    let mut put = |name: String, dims: &[usize]| {
        let std = if dims.len() == 1 { 0.1 } else { 1.0 / (dims[1] as f32).sqrt() };
        let mean = if dims.len() == 1 { 1.0 } else { 0.0 };
        let t = noise(&name, dims, mean, std).to_dtype(dtype).unwrap();
        all.insert(name, t);
    };
    let (h, i, q, kv) = (c.hidden_size, c.intermediate_size, core.q_dim(), core.kv_dim());
    put("model.embed_tokens.weight".into(), &[c.vocab_size, h]);
    if !c.tie_word_embeddings {
        put("lm_head.weight".into(), &[c.vocab_size, h]);
    }
    put("model.norm.weight".into(), &[h]);
    for l in 0..c.num_hidden_layers {
        for (name, dims) in [
            ("input_layernorm", vec![h]),
            ("post_attention_layernorm", vec![h]),
            ("self_attn.q_proj", vec![q, h]),
            ("self_attn.k_proj", vec![kv, h]),
            ("self_attn.v_proj", vec![kv, h]),
            ("self_attn.o_proj", vec![h, q]),
            ("mlp.gate_proj", vec![i, h]),
            ("mlp.up_proj", vec![i, h]),
            ("mlp.down_proj", vec![h, i]),
        ] {
            put(format!("model.layers.{l}.{name}.weight"), &dims);
        }
    }
    all
}

pub(crate) fn builder(w: &HashMap<String, Tensor>, dtype: DType) -> VarBuilder<'static> {
    VarBuilder::from_tensors(w.clone(), dtype, &Device::Cpu)
}

pub(crate) fn tokens(batch: usize, n: usize, seed: u32) -> Tensor {
    let ids: Vec<u32> = (0..(batch * n) as u32)
        .map(|i| (i.wrapping_add(seed).wrapping_mul(2_654_435_761) >> 7) % VOCAB as u32)
        .collect();
    Tensor::from_vec(ids, (batch, n), &Device::Cpu).unwrap()
}

pub(crate) fn worst(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    assert_eq!(a.dtype(), b.dtype());
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

pub(crate) fn argmax(t: &Tensor) -> u32 {
    t.flatten_all().unwrap().argmax(0).unwrap().to_scalar().unwrap()
}

/// What a tap does: layer, input, gates, activations, what is added.
pub(crate) type Seen<'a> = dyn FnMut(usize, &[f32], &[f32], &mut [f32], &mut [f32]) + 'a;

pub(crate) struct Tap<'a>(pub(crate) &'a mut Seen<'a>);

impl LayerTap for Tap<'_> {
    fn ffn(&mut self, layer: usize, x: &[f32], gate: &[f32], a: &mut [f32], y: &mut [f32]) {
        (self.0)(layer, x, gate, a, y);
    }
}
