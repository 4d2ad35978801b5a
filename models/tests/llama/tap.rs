//! What a tap sees of a forward pass, and what it changes.

use crate::cases::{CASES, Seen, Tap, builder, tokens, weights, worst};
use candle_core::{DType, Device, Tensor};
use candle_sparse_models::llama::{Cache, LayerTap, Llama};

#[test]
fn a_tap_sees_activations_and_changes_what_it_says() {
    let config = CASES[0].config();
    let w = weights(&config, DType::F32);
    let model = Llama::load(builder(&w, DType::F32), &config).unwrap();
    let x = tokens(2, 9, 3);
    let cache = || Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
    let dense = model.forward_all(&x, 0, &mut cache()).unwrap();
    let run = |f: &mut Seen<'_>| model.forward_tapped(&x, 0, &mut cache(), &mut Tap(f)).unwrap();

    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let mut layers = Vec::new();
    let up = &w["model.layers.0.mlp.up_proj.weight"];
    let identity = run(&mut |layer, x, gate, a, y| {
        layers.push(layer);
        assert!(y.len() == 18 * hidden && y.iter().all(|&y| y == 0.0));
        if layer == 0 {
            let x = Tensor::from_slice(x, (18, hidden), &Device::Cpu).unwrap();
            let u = x.matmul(&up.t().unwrap()).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!((gate.len(), a.len()), (18 * inner, 18 * inner));
            for ((g, u), a) in gate.iter().zip(&u).zip(a) {
                let want = g / (1.0 + (-g).exp()) * u;
                assert!((*a - want).abs() <= 1e-5 * (1.0 + want.abs()), "{a} is not {want}");
            }
        }
    });
    assert_eq!(layers, [0, 1, 2]);
    assert_eq!(worst(&identity, &dense), 0.0);

    let silent = run(&mut |_, _, _, a, _| a.fill(0.0));
    assert!(worst(&silent, &dense) > 1e-2, "activations were set to zero and nothing changed");
    // Without activations all that an FFN gives is what the tap adds.
    let added = run(&mut |layer, _, _, a, y| {
        a.fill(0.0);
        y.fill(if layer == 1 { 0.5 } else { 0.0 });
    });
    assert!(worst(&added, &silent) > 1e-2, "what the tap added is lost");
}

#[test]
fn a_lone_token_and_long_prompts_pass_the_tap() {
    let config = CASES[1].config();
    let model = Llama::load(builder(&weights(&config, DType::F32), DType::F32), &config).unwrap();
    let mut cache = Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
    let mut rows = Vec::new();
    let count: &mut Seen<'_> = &mut |layer, x, _, _, _| {
        if layer == 2 {
            rows.push(x.len() / 64);
        }
    };
    let mut count = Tap(count);
    let all = model.forward_tapped(&tokens(1, 600, 1), 0, &mut cache, &mut count).unwrap();
    assert_eq!(all.dims()[..2], [1, 600]);
    let lone = model.forward_tapped(&tokens(1, 1, 2), 600, &mut cache, &mut count).unwrap();
    assert_eq!(rows, [512, 88, 1]);
    let decoded = model.forward(&tokens(1, 1, 2), 600, &mut cache).unwrap();
    assert!(worst(&lone.squeeze(1).unwrap(), &decoded) <= 1e-4);
}

/// Inputs and queries, keys and values of one block.
#[derive(Default)]
struct Attention {
    x: Vec<f32>,
    qkv: Vec<f32>,
    pieces: Vec<usize>,
}

impl LayerTap for Attention {
    fn attention(&mut self, layer: usize, x: &[f32], qkv: &[f32]) {
        self.pieces.push(layer);
        if layer == 1 {
            self.x.extend_from_slice(x);
            self.qkv.extend_from_slice(qkv);
        }
    }

    fn ffn(&mut self, _: usize, _: &[f32], _: &[f32], _: &mut [f32], _: &mut [f32]) {}
}

#[test]
fn a_tap_sees_what_attention_reads_and_makes_of_it() {
    let config = CASES[1].config();
    let w = weights(&config, DType::F32);
    let model = Llama::load(builder(&w, DType::F32), &config).unwrap();
    let mut cache = Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
    let mut seen = Attention::default();
    let tapped = model.forward_tapped(&tokens(1, 600, 1), 0, &mut cache, &mut seen).unwrap();
    assert_eq!(worst(&tapped, &model.forward_all(&tokens(1, 600, 1), 0, &mut cache).unwrap()), 0.0);
    assert_eq!(seen.pieces, [0, 1, 2, 0, 1, 2]);
    let (heads, kv_heads, dim) = (8, 4, 8);
    let width = (heads + 2 * kv_heads) * dim;
    assert_eq!((seen.x.len(), seen.qkv.len()), (600 * 64, 600 * width));
    let x = Tensor::from_slice(&seen.x, (600, 64), &Device::Cpu).unwrap();
    let product = |name: &str| {
        let w = &w[&format!("model.layers.1.self_attn.{name}.weight")];
        x.matmul(&w.t().unwrap()).unwrap().to_vec2::<f32>().unwrap()
    };
    let (q, k, v) = (product("q_proj"), product("k_proj"), product("v_proj"));
    let norm = |v: &[f32]| v.iter().map(|v| v * v).sum::<f32>().sqrt();
    for (t, row) in seen.qkv.chunks_exact(width).enumerate() {
        let (got_q, rest) = row.split_at(heads * dim);
        let (got_k, got_v) = rest.split_at(kv_heads * dim);
        assert!(got_v.iter().zip(&v[t]).all(|(a, b)| (a - b).abs() < 1e-4), "value of token {t}");
        // Rotation keeps norms.
        let heads = |v: &[f32]| v.chunks_exact(dim).map(norm).collect::<Vec<_>>();
        let near =
            |a: Vec<f32>, b: Vec<f32>, scale: f32| a.iter().zip(b).all(|(a, b)| (a - scale * b).abs() < 1e-4);
        assert!(near(heads(got_k), heads(&k[t]), 1.0), "key of token {t}");
        assert!(near(heads(got_q), heads(&q[t]), 1.0 / 8_f32.sqrt()), "query of token {t}");
    }
}
