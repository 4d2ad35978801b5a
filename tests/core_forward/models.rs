//! Models for the comparison: random ones, and those in folders.

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sparse::{
    Activation, Config, Profile,
    decoder::{Checkpoint, Decoder, Extras, LoadOptions},
    loading,
};
use candle_sparse_core::{Rope, RopeScaling};
use std::{collections::HashMap, path::Path, sync::Arc};

/// hidden, inner, heads, kv heads, tied, rope
const SHAPES: [(usize, usize, usize, usize, bool, RopeScaling); 4] = [
    (288, 512, 6, 2, true, RopeScaling::None),
    (64, 172, 8, 4, false, RopeScaling::None),
    (128, 352, 4, 4, false, RopeScaling::Linear { factor: 2.0 }),
    (
        256,
        320,
        8,
        1,
        true,
        RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 128,
        },
    ),
];

/// Random weights of a size that keeps the logits around 1.
fn random_weights(c: &Config, tied: bool, bias: bool) -> HashMap<String, Tensor> {
    let mut state = 88_172_645_463_325_252_u64;
    let mut noise = |rows: usize, cols: usize, size: f32, mean: f32| {
        let values = (0..rows * cols).map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            mean + ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * size
        });
        let shape = if rows == 1 { vec![cols] } else { vec![rows, cols] };
        Tensor::from_vec(values.collect::<Vec<_>>(), shape, &Device::Cpu).unwrap()
    };
    let (h, inner, q, kv) = (c.hidden_size, c.intermediate_size, c.q_dim(), c.kv_dim());
    let mut all = HashMap::from([("model.norm.weight".to_string(), noise(1, h, 0.2, 1.0))]);
    let mut matrices = vec![("model.embed_tokens".to_string(), c.vocab_size, h)];
    matrices.extend((!tied).then(|| ("lm_head".to_string(), c.vocab_size, h)));
    for l in 0..c.num_hidden_layers {
        let at = |name: &str| format!("model.layers.{l}.{name}");
        for name in ["input_layernorm", "post_attention_layernorm"] {
            all.insert(at(&format!("{name}.weight")), noise(1, h, 0.2, 1.0));
        }
        for (name, rows, cols) in [
            ("self_attn.q_proj", q, h),
            ("self_attn.k_proj", kv, h),
            ("self_attn.v_proj", kv, h),
            ("self_attn.o_proj", h, q),
            ("mlp.gate_proj", inner, h),
            ("mlp.up_proj", inner, h),
            ("mlp.down_proj", h, inner),
        ] {
            if bias && name.starts_with("self_attn") {
                all.insert(at(&format!("{name}.bias")), noise(1, rows, 0.2, 0.0));
            }
            matrices.push((at(name), rows, cols));
        }
    }
    for (name, rows, cols) in matrices {
        all.insert(format!("{name}.weight"), noise(rows, cols, 1.7 / (cols as f32).sqrt(), 0.0));
    }
    all
}

/// Random models of several shapes, every second one with biases.
pub(crate) fn random(options: &LoadOptions) -> impl Iterator<Item = (String, Decoder)> {
    SHAPES.into_iter().enumerate().map(|(i, (hidden, inner, heads, kv_heads, tied, scaling))| {
        let config = Config {
            hidden_size: hidden,
            intermediate_size: inner,
            vocab_size: 515,
            num_hidden_layers: 3,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim: hidden / heads,
            rms_norm_eps: 1e-5,
            rope: Rope { theta: 1e4, scaling, interleaved: i == 2 },
            max_position_embeddings: 640,
            hidden_act: Activation::Silu,
            gated_mlp: true,
            gate_shift: 0.0,
            norm_shift: None,
            sliding_window: (i == 2).then_some(20),
        };
        let bias = i % 2 == 1;
        let weights = random_weights(&config, tied, bias);
        let vb = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
        let extras = Extras::default().with_tie_word_embeddings(tied).with_attention_bias(bias);
        let model = Decoder::load(&vb.into(), config, extras, options.clone()).unwrap();
        (format!("{hidden} x {inner}, {heads} heads on {kv_heads}"), model)
    })
}

/// The model in a folder, with the profile beside it.
pub(crate) fn folder(path: &Path, options: LoadOptions) -> Decoder {
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(path.join("config.json")).unwrap()).unwrap();
    let number = |name: &str| json[name].as_u64().map(|n| n as usize);
    let heads = number("num_attention_heads").unwrap();
    let hidden = number("hidden_size").unwrap();
    let config = Config {
        hidden_size: hidden,
        intermediate_size: number("intermediate_size").unwrap(),
        vocab_size: number("vocab_size").unwrap(),
        num_hidden_layers: number("num_hidden_layers").unwrap(),
        num_attention_heads: heads,
        num_key_value_heads: number("num_key_value_heads").unwrap(),
        head_dim: number("head_dim").unwrap_or(hidden / heads),
        rms_norm_eps: json["rms_norm_eps"].as_f64().unwrap() as f32,
        rope: Rope {
            theta: json["rope_theta"].as_f64().unwrap() as f32,
            scaling: RopeScaling::None,
            interleaved: false,
        },
        max_position_embeddings: number("max_position_embeddings").unwrap(),
        hidden_act: if json["hidden_act"] == "relu" { Activation::Relu } else { Activation::Silu },
        gated_mlp: true,
        gate_shift: 0.0,
        norm_shift: None,
        sliding_window: None,
    };
    let vb = loading::var_builder(&[path.join("model.safetensors")], None, &Device::Cpu).unwrap();
    let profile = path.join("sparse.safetensors");
    let profile = profile.exists().then(|| Arc::new(Profile::load(profile).unwrap()));
    let tied = json["tie_word_embeddings"] == true;
    let extras = Extras::default().with_tie_word_embeddings(tied);
    Decoder::load(&Checkpoint::from(vb), config, extras, options.with_profile(profile)).unwrap()
}
