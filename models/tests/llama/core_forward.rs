//! Three forward passes of one checkpoint: the drop-in model, the core over SIMD, the core over its definition.

use crate::cases::{CASES, Case, builder, tokens, weights};
use candle_core::{DType, Device, Tensor};
use candle_sparse::{Format, weight::Weight};
use candle_sparse_core::{
    KernelSet, Scalar,
    forward::{LayerWeights, Scratch, Weights, forward},
    kv_cache::KvCache,
};
use candle_sparse_kernels::Kernels;
use candle_sparse_models::llama::{Cache, Llama, LoadOptions};
use std::collections::HashMap;

fn core_logits<K: KernelSet>(
    kernels: &K,
    case: &Case,
    w: &HashMap<String, Tensor>,
    ids: &[u32],
    format: Format,
) -> Vec<f32> {
    let c = case.config().to_core().unwrap();
    let matrix = |name: &str| Weight::from_tensor(&w[&format!("{name}.weight")], format).unwrap();
    let vector = |name: &str| w[&format!("{name}.weight")].to_vec1::<f32>().unwrap();
    let names = ["q_proj", "k_proj", "v_proj", "o_proj"].map(|n| format!("self_attn.{n}"));
    let names = names.into_iter().chain(["gate_proj", "up_proj", "down_proj"].map(|n| format!("mlp.{n}")));
    let names: Vec<String> = names.collect();
    let layers: Vec<(Vec<Weight>, Vec<f32>, Vec<f32>)> = (0..c.num_hidden_layers)
        .map(|l| {
            let at = |n: &str| format!("model.layers.{l}.{n}");
            let all = names.iter().map(|n| matrix(&at(n))).collect();
            (all, vector(&at("input_layernorm")), vector(&at("post_attention_layernorm")))
        })
        .collect();
    let layers: Vec<LayerWeights<'_>> = layers
        .iter()
        .map(|(m, input_layernorm, post_attention_layernorm)| LayerWeights {
            input_layernorm,
            q_proj: m[0].matrix(),
            k_proj: m[1].matrix(),
            v_proj: m[2].matrix(),
            o_proj: m[3].matrix(),
            post_attention_layernorm,
            gate_proj: m[4].matrix(),
            up_proj: m[5].matrix(),
            down_proj: m[6].matrix(),
        })
        .collect();
    let embed = matrix("model.embed_tokens");
    let head = if case.tied { embed.clone() } else { matrix("lm_head") };
    let norm = vector("model.norm");
    let weights =
        Weights { embed_tokens: embed.matrix(), layers: &layers, norm: &norm, lm_head: head.matrix() };
    weights.validate(&c).unwrap();
    let mut kv = vec![0.0; KvCache::elements(&c, ids.len())];
    let mut cache = KvCache::new(&c, ids.len(), &mut kv).unwrap();
    let mut data = vec![0.0; Scratch::elements(&c, ids.len())];
    let zero = candle_sparse_core::ActivationGroup::ZERO;
    let mut groups = vec![zero; Scratch::groups(&c)];
    let mut scratch = Scratch::new(&c, ids.len(), &mut data, &mut groups).unwrap();
    let mut logits = vec![0.0; c.vocab_size];
    for (pos, &id) in ids.iter().enumerate() {
        forward(kernels, &c, &weights, id as usize, pos, &mut cache, &mut scratch, &mut logits).unwrap();
    }
    logits
}

#[test]
fn core_forward_over_every_level_agrees_with_the_candle_model() {
    for case in CASES {
        let config = case.config();
        let w = weights(&config, DType::F32);
        let x = tokens(1, 40, 11);
        let ids = x.flatten_all().unwrap().to_vec1::<u32>().unwrap();
        // The second format rounds activations between layers: what lies on an edge may go to either side, so that two
        // implementations differ by as much as rounding itself makes (see the test of quantised weights), not more.
        let rounding = 2.0 * 13_f32.sqrt() * 2.2 / 127.0 / 12_f32.sqrt() * 2_f32.sqrt();
        for (format, bound) in [(Format::F32, 1e-5), (Format::Q8_0, rounding)] {
            if format == Format::Q8_0 && config.intermediate_size % 32 != 0 {
                continue;
            }
            let options = LoadOptions::default().with_format(Some(format));
            let model = Llama::load_with(builder(&w, DType::F32), &config, options).unwrap();
            let mut cache = Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
            let want =
                model.forward(&x, 0, &mut cache).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let check = |name: &str, got: Vec<f32>| {
                let rms = |v: &mut dyn Iterator<Item = f32>| v.map(|x| x * x).sum::<f32>().sqrt();
                let error =
                    rms(&mut got.iter().zip(&want).map(|(g, v)| g - v)) / rms(&mut want.iter().copied());
                assert!(error <= bound, "{} {format:?} {name}: relative error {error}", case.name);
            };
            check("scalar definition", core_logits(&Scalar, &case, &w, &ids, format));
            for kernels in Kernels::available() {
                check(kernels.level().name(), core_logits(&kernels, &case, &w, &ids, format));
            }
        }
    }
}
