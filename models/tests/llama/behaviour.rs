//! What the model promises by itself: formats, caches, threads, errors.

use crate::cases::{CASES, VOCAB, argmax, builder, noise, tokens, weights, worst};
use candle_core::{DType, Device, Tensor};
use candle_sparse::Format;
use candle_sparse_models::llama::{Cache, Llama, LlamaConfig, LoadOptions};

#[test]
fn quantised_weights_stay_near_the_dense_logits() {
    let case = &CASES[0];
    let config = case.config();
    let w = weights(&config, DType::F32);
    let run = |format| {
        let options = LoadOptions::default().with_format(Some(format));
        let model = Llama::load_with(builder(&w, DType::F32), &config, options).unwrap();
        let mut cache = Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
        let logits = model.forward_all(&tokens(1, 64, 5), 0, &mut cache).unwrap();
        (logits, model.decoder().weight_bytes())
    };
    let (dense, dense_bytes) = run(Format::F32);
    let size = dense.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    // A block of 32 normal numbers reaches 2.2 σ, so its step is 2.2 σ / 127 (or / 8) and its rounding 1/√12 of that.
    // Weights and (for Q8_0 as much) activations are rounded on the way through 13 products in a row; errors add
    // as a random walk, and norms and activations at most double them.
    let depth = 2.0 * 13_f32.sqrt() / 12_f32.sqrt();
    let (q8, q4) = (2.2 / 127.0, 2.2 / 8.0);
    for (format, bound, bits) in
        [(Format::Q8_0, depth * q8 * 2_f32.sqrt(), 8.5), (Format::Q4_0, depth * q4, 4.5)]
    {
        let (logits, bytes) = run(format);
        let rms =
            (logits - &dense).unwrap().sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        assert!(rms / size <= bound && rms > 0.0, "{format:?}: relative error {}", rms / size);
        assert_eq!(bytes as f64, dense_bytes as f64 / 32.0 * bits);
    }
}

#[test]
fn rows_that_cannot_be_quantised_are_kept_and_said() {
    let config = CASES[1].config();
    let w = weights(&config, DType::F32);
    let options = LoadOptions::default().with_format(Some(Format::Q8_0));
    let model = Llama::load_with(builder(&w, DType::F32), &config, options).unwrap();
    let notices = model.decoder().notices();
    assert!(notices.len() == 1 && notices[0].contains("no multiple of 32,"), "{notices:?}");
    assert!(notices[0].contains("3 matrices of ") && notices[0].ends_with(" columns in f32"), "{notices:?}");
    let options = LoadOptions::default().with_format(Some(Format::Q4K));
    let model = Llama::load_with(builder(&w, DType::F32), &config, options).unwrap();
    let notices = model.decoder().notices();
    assert!(notices.len() == 1 && notices[0].contains("no multiple of 256,"), "{notices:?}");
    // The narrower blocks of 32 that fit, before floats.
    assert!(notices[0].contains(" columns in q4_0, "), "{notices:?}");
}

#[test]
fn embeddings_enter_as_tokens_do() {
    let config = CASES[0].config();
    let model = Llama::load(builder(&weights(&config, DType::F32), DType::F32), &config).unwrap();
    let x = tokens(2, 9, 1);
    let mut cache = Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
    let want = model.forward(&x, 0, &mut cache).unwrap();
    let embeds = model.embed(&x).unwrap();
    assert_eq!(embeds.dims(), [2, 9, config.hidden_size]);
    let got = model.forward_input_embed(&embeds, 0, &mut cache).unwrap();
    assert_eq!(worst(&got, &want), 0.0);
    let err = model.forward_input_embed(&embeds.narrow(2, 0, 5).unwrap(), 0, &mut cache).unwrap_err();
    assert!(err.to_string().contains("[2, 9, 5]"), "{err}");
}

#[test]
fn index_pos_cuts_back_and_a_clone_is_a_snapshot() {
    let config = CASES[1].config();
    let model = Llama::load(builder(&weights(&config, DType::F32), DType::F32), &config).unwrap();
    let mut cache = Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
    model.forward(&tokens(1, 70, 1), 0, &mut cache).unwrap();
    let snapshot = cache.clone();
    let first = model.forward(&tokens(1, 3, 2), 40, &mut cache).unwrap();
    assert_eq!(cache.len(), 43);
    model.forward(&tokens(1, 30, 9), 43, &mut cache).unwrap();
    let again = model.forward(&tokens(1, 3, 2), 40, &mut cache).unwrap();
    assert_eq!(worst(&first, &again), 0.0, "what was written after the cut leaves no trace");
    let mut old = snapshot.clone();
    assert_eq!(old.len(), 70);
    let from_snapshot = model.forward(&tokens(1, 3, 2), 40, &mut old).unwrap();
    assert_eq!(worst(&first, &from_snapshot), 0.0);
    let err = model.forward(&tokens(1, 1, 2), 50, &mut cache).unwrap_err().to_string();
    assert!(err.contains("index_pos 50") && err.contains("43"), "{err}");
    for (x, pos) in [(tokens(1, 641, 0), 0), (tokens(1, 600, 0), 43), (tokens(2, 1, 0), 43)] {
        assert!(model.forward(&x, pos, &mut cache).is_err());
    }
    assert_eq!(cache.len(), 43, "an error leaves the cache as it was");
    assert_eq!(worst(&first, &model.forward(&tokens(1, 3, 2), 40, &mut cache).unwrap()), 0.0);
}

#[test]
fn threads_do_not_change_a_bit() {
    let config = CASES[3].config();
    let w = weights(&config, DType::F32);
    let run = |n| {
        let options = LoadOptions::default().with_threads(Some(candle_sparse::Threads::new(n).unwrap()));
        let model = Llama::load_with(builder(&w, DType::F32), &config, options).unwrap();
        let mut cache = Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
        model.forward(&tokens(1, 600, 1), 0, &mut cache).unwrap();
        model.forward(&tokens(1, 1, 2), 600, &mut cache).unwrap()
    };
    let all = candle_sparse::Threads::default().count();
    assert!(all > 1, "this test needs threads: set CANDLE_NUM_THREADS=4");
    assert_eq!(worst(&run(1), &run(all)), 0.0);
}

#[test]
fn without_a_kv_cache_every_call_starts_anew() {
    let config = CASES[0].config();
    let model = Llama::load(builder(&weights(&config, DType::F32), DType::F32), &config).unwrap();
    let mut cache = Cache::new(false, DType::F32, &config, &Device::Cpu).unwrap();
    let x = tokens(1, 9, 1);
    let a = model.forward(&x, 0, &mut cache).unwrap();
    let b = model.forward(&x, 0, &mut cache).unwrap();
    assert_eq!(worst(&a, &b), 0.0);
}

#[test]
fn all_positions_end_with_the_last() {
    let config = CASES[2].config();
    let model = Llama::load(builder(&weights(&config, DType::F32), DType::F32), &config).unwrap();
    let x = tokens(2, 600, 4);
    let mut cache = Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
    let all = model.forward_all(&x, 0, &mut cache).unwrap();
    assert_eq!(all.dims(), [2, 600, VOCAB]);
    let last = model.forward(&x, 0, &mut cache).unwrap();
    // Two rows of the head against many: the same sums.
    assert_eq!(worst(&all.narrow(1, 599, 1).unwrap().squeeze(1).unwrap(), &last), 0.0);
}

#[test]
fn wrong_input_is_named() {
    let case = &CASES[0];
    let config = case.config();
    let mut w = weights(&config, DType::F32);
    let model = Llama::load(builder(&w, DType::F32), &config).unwrap();
    let mut cache = Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
    let mut error = |x: &Tensor, pos| model.forward(x, pos, &mut cache).unwrap_err().to_string();
    let big = Tensor::new(&[[1_u32, VOCAB as u32]], &Device::Cpu).unwrap();
    assert!(error(&big, 0).contains(&format!("token id {VOCAB}")));
    assert!(error(&Tensor::zeros((1, 0), DType::U32, &Device::Cpu).unwrap(), 0).contains("empty"));
    assert!(error(&tokens(1, 641, 0), 0).contains("context of 640"));
    assert!(error(&Tensor::zeros((1, 2), DType::F32, &Device::Cpu).unwrap(), 0).contains("U32"));
    assert!(error(&Tensor::new(&[[4_294_967_301_i64]], &Device::Cpu).unwrap(), 0).contains("4294967301"));
    let mut other = Cache::new(true, DType::F32, &CASES[1].config(), &Device::Cpu).unwrap();
    assert!(
        model.forward(&tokens(1, 1, 0), 0, &mut other).unwrap_err().to_string().contains("another shape")
    );

    let name = "model.layers.1.mlp.up_proj.weight";
    let good = w.insert(name.into(), Tensor::zeros((3, 4), DType::F32, &Device::Cpu).unwrap());
    let err = Llama::load(builder(&w, DType::F32), &config).unwrap_err().to_string();
    assert!(err.contains(name) && err.contains("[3, 4]") && err.contains("[512, 288]"), "{err}");
    w.remove(name);
    let err = Llama::load(builder(&w, DType::F32), &config).unwrap_err().to_string();
    assert!(err.contains(name), "{err}");
    w.insert(name.into(), good.unwrap());
    let err = Llama::load(builder(&w, DType::F64), &config).unwrap_err().to_string();
    assert!(err.contains("F64"), "{err}");
    assert!(Cache::new(true, DType::U8, &config, &Device::Cpu).is_err());
}

#[test]
fn biases_and_wide_heads_follow_a_plain_reference() {
    // head_dim 40 is not hidden_size / heads; candle has no such Llama, so tensor ops are the reference.
    let json = r#"{"hidden_size": 96, "intermediate_size": 64, "vocab_size": 515, "num_hidden_layers": 1,
        "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 40, "rms_norm_eps": 1e-5, "hidden_act": "relu",
        "max_position_embeddings": 64, "tie_word_embeddings": true, "attention_bias": true, "mlp_bias": true}"#;
    let config = serde_json::from_str::<LlamaConfig>(json).unwrap().into_config(false);
    let mut w = weights(&config, DType::F32);
    for (name, n) in [("q", 120), ("k", 40), ("v", 40), ("o", 96)] {
        let bias = noise(name, &[n], 0.0, 0.5);
        w.insert(format!("model.layers.0.self_attn.{name}_proj.bias"), bias);
    }
    for (name, n) in [("gate", 64), ("up", 64), ("down", 96)] {
        let bias = noise(name, &[n], 0.0, 0.5);
        w.insert(format!("model.layers.0.mlp.{name}_proj.bias"), bias);
    }
    let model = Llama::load(builder(&w, DType::F32), &config).unwrap();
    let mut cache = Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
    // One token: attention gives its own value, whatever the scores.
    let x = tokens(1, 1, 3);
    let got = model.forward(&x, 0, &mut cache).unwrap();
    let linear = |x: &Tensor, name: &str| {
        let at = |s: &str| &w[&format!("model.layers.0.{name}.{s}")];
        x.matmul(&at("weight").t().unwrap()).unwrap().broadcast_add(at("bias")).unwrap()
    };
    let norm = |x: &Tensor, name: &str| candle_nn::ops::rms_norm_slow(x, &w[name], 1e-5).unwrap();
    let embed = &w["model.embed_tokens.weight"];
    let x = embed.index_select(&x.flatten_all().unwrap(), 0).unwrap();
    let v = linear(&norm(&x, "model.layers.0.input_layernorm.weight"), "self_attn.v_proj");
    let x = (&x + linear(&Tensor::cat(&[&v, &v, &v], 1).unwrap(), "self_attn.o_proj")).unwrap();
    let h = norm(&x, "model.layers.0.post_attention_layernorm.weight");
    let a = (linear(&h, "mlp.gate_proj").relu().unwrap() * linear(&h, "mlp.up_proj")).unwrap();
    let x = (&x + linear(&a, "mlp.down_proj")).unwrap();
    let want = norm(&x, "model.norm.weight").matmul(&embed.t().unwrap()).unwrap();
    assert!(worst(&got, &want) <= 1e-4);
}

#[test]
fn models_are_shared_between_threads_and_two_decode_at_once() {
    fn is_send_sync<T: Send + Sync>() {}
    is_send_sync::<Llama>();
    is_send_sync::<Cache>();
    let config = CASES[0].config();
    let model = Llama::load(builder(&weights(&config, DType::F32), DType::F32), &config).unwrap();
    let run = |seed| {
        let mut cache = Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
        let mut logits = model.forward(&tokens(1, 20, seed), 0, &mut cache).unwrap();
        for pos in 20..50 {
            let next = Tensor::new(&[[argmax(&logits)]], &Device::Cpu).unwrap();
            logits = model.forward(&next, pos, &mut cache).unwrap();
        }
        logits
    };
    let alone = [run(1), run(2)];
    let together = std::thread::scope(|s| {
        let threads = [s.spawn(|| run(1)), s.spawn(|| run(2))];
        threads.map(|t| t.join().unwrap())
    });
    for (a, b) in alone.iter().zip(&together) {
        assert_eq!(worst(a, b), 0.0);
    }
}
