//! The drop-in Llama against candle's, and against the core forward pass over every kernel level.
#![allow(clippy::unwrap_used, reason = "tests")]

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sparse::{
    core::{
        self, Format, KernelSet, Scalar,
        forward::{LayerWeights, Scratch, Weights, forward},
        kv_cache::KvCache,
    },
    kernels::Kernels,
    weight::Weight,
};
use candle_sparse_models::llama::{Cache, Config, Llama, LlamaConfig, LoadOptions};
use candle_transformers::models::llama as candle_llama;
use std::collections::HashMap;

struct Case {
    name: &'static str,
    hidden: usize,
    inner: usize,
    heads: usize,
    kv_heads: usize,
    tied: bool,
    rope: &'static str,
}

const CASES: [Case; 4] = [
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

const VOCAB: usize = 515;

impl Case {
    fn json(&self) -> String {
        let Self { hidden, inner, heads, kv_heads, tied, rope, .. } = self;
        format!(
            r#"{{"hidden_size": {hidden}, "intermediate_size": {inner}, "vocab_size": {VOCAB}, "num_hidden_layers": 3,
            "num_attention_heads": {heads}, "num_key_value_heads": {kv_heads}, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 640, "tie_word_embeddings": {tied} {rope}}}"#
        )
    }

    fn config(&self) -> Config {
        serde_json::from_str::<LlamaConfig>(&self.json()).unwrap().into_config(false)
    }

    fn candle_config(&self) -> candle_llama::Config {
        serde_json::from_str::<candle_llama::LlamaConfig>(&self.json()).unwrap().into_config(false)
    }
}

/// Numbers of a mean and a standard deviation that depend on nothing but the name: a failure comes back.
fn noise(name: &str, dims: &[usize], mean: f32, std: f32) -> Tensor {
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
fn weights(c: &Config, dtype: DType) -> HashMap<String, Tensor> {
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

fn builder(w: &HashMap<String, Tensor>, dtype: DType) -> VarBuilder<'static> {
    VarBuilder::from_tensors(w.clone(), dtype, &Device::Cpu)
}

fn tokens(batch: usize, n: usize, seed: u32) -> Tensor {
    let ids: Vec<u32> = (0..(batch * n) as u32)
        .map(|i| (i.wrapping_add(seed).wrapping_mul(2_654_435_761) >> 7) % VOCAB as u32)
        .collect();
    Tensor::from_vec(ids, (batch, n), &Device::Cpu).unwrap()
}

fn worst(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    assert_eq!(a.dtype(), b.dtype());
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

fn argmax(t: &Tensor) -> u32 {
    t.flatten_all().unwrap().argmax(0).unwrap().to_scalar().unwrap()
}

#[test]
fn logits_equal_candles_for_every_prompt_length_and_chunking() {
    for case in CASES {
        let config = case.config();
        let w = weights(&config, DType::F32);
        let ours = Llama::load(builder(&w, DType::F32), &config).unwrap();
        let theirs = candle_llama::Llama::load(builder(&w, DType::F32), &case.candle_config()).unwrap();
        let new_cache =
            || candle_llama::Cache::new(true, DType::F32, &case.candle_config(), &Device::Cpu).unwrap();
        for (batch, n) in [(1, 1), (1, 2), (1, 31), (1, 257), (3, 1), (3, 31), (3, 257), (1, 530)] {
            let x = tokens(batch, n, 7);
            let mut cache = Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
            let got = ours.forward(&x, 0, &mut cache).unwrap();
            let mut candle_cache = new_cache();
            let want = theirs.forward(&x, 0, &mut candle_cache).unwrap();
            let diff = worst(&got, &want);
            assert!(diff <= 1e-4, "{}: batch {batch}, {n} tokens: {diff}", case.name);

            // Then decode, and the same in chunks.
            let next = tokens(batch, 1, 99);
            let (a, b) = (
                ours.forward(&next, n, &mut cache).unwrap(),
                theirs.forward(&next, n, &mut candle_cache).unwrap(),
            );
            assert!(worst(&a, &b) <= 1e-4, "{}: decode after {n}", case.name);
            if n > 2 {
                let mut cache = Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
                for (start, len) in [(0, n / 3), (n / 3, 1), (n / 3 + 1, n - n / 3 - 1)] {
                    let chunked = ours.forward(&x.narrow(1, start, len).unwrap(), start, &mut cache).unwrap();
                    if start + len == n {
                        assert!(worst(&chunked, &want) <= 1e-4, "{}: chunks of {n}", case.name);
                    }
                }
            }
        }
    }
}

#[test]
fn two_hundred_greedy_tokens_equal_candles() {
    for case in CASES {
        let config = case.config();
        let w = weights(&config, DType::F32);
        let ours = Llama::load(builder(&w, DType::F32), &config).unwrap();
        let theirs = candle_llama::Llama::load(builder(&w, DType::F32), &case.candle_config()).unwrap();
        let mut cache = Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
        let mut candle_cache =
            candle_llama::Cache::new(true, DType::F32, &case.candle_config(), &Device::Cpu).unwrap();
        let (mut x, mut pos) = (tokens(1, 5, 3), 0);
        for step in 0..200 {
            let (a, b) = (
                ours.forward(&x, pos, &mut cache).unwrap(),
                theirs.forward(&x, pos, &mut candle_cache).unwrap(),
            );
            assert_eq!(argmax(&a), argmax(&b), "{}: token {step}", case.name);
            pos += x.dim(1).unwrap();
            x = Tensor::new(&[[argmax(&a)]], &Device::Cpu).unwrap();
        }
    }
}

#[test]
fn half_precision_is_within_its_own_rounding() {
    for dtype in [DType::F16, DType::BF16] {
        for case in CASES {
            let config = case.config();
            let w = weights(&config, dtype);
            let ours = Llama::load(builder(&w, dtype), &config).unwrap();
            // The exact result on the same rounded weights, from candle in f32.
            let wide = w.iter().map(|(k, v)| (k.clone(), v.to_dtype(DType::F32).unwrap())).collect();
            let theirs =
                candle_llama::Llama::load(builder(&wide, DType::F32), &case.candle_config()).unwrap();
            let x = tokens(1, 40, 5);
            let mut candle_cache =
                candle_llama::Cache::new(true, DType::F32, &case.candle_config(), &Device::Cpu).unwrap();
            let want = theirs.forward(&x, 0, &mut candle_cache).unwrap();
            // With an f32 cache only sums are rounded; a half cache rounds keys and values.
            for (kv, bound) in [(DType::F32, 1e-4), (DType::F16, 2e-2), (DType::BF16, 8e-2)] {
                let mut cache = Cache::new(true, kv, &config, &Device::Cpu).unwrap();
                let diff = worst(&ours.forward(&x, 0, &mut cache).unwrap(), &want);
                assert!(diff <= bound, "{} {dtype:?} kv {kv:?}: {diff}", case.name);
            }
            assert_eq!(ours.decoder().weight_bytes() % 2, 0);
        }
    }
}

#[test]
fn quantised_weights_stay_near_the_dense_logits() {
    let case = &CASES[0];
    let config = case.config();
    let w = weights(&config, DType::F32);
    let run = |format| {
        let options = LoadOptions { format: Some(format), threads: None };
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
    let options = LoadOptions { format: Some(Format::Q8_0), threads: None };
    let model = Llama::load_with(builder(&w, DType::F32), &config, options).unwrap();
    let notices = model.decoder().notices();
    assert_eq!(notices.len(), 3, "one per layer: {notices:?}");
    assert!(notices[0].contains("down_proj") || notices[0].contains("mlp"), "{notices:?}");
}

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
    let zero = core::ActivationBlock { d: 0.0, sum: 0, qs: [0; 32] };
    let mut blocks = vec![zero; Scratch::blocks(&c)];
    let mut scratch = Scratch::new(&c, ids.len(), &mut data, &mut blocks).unwrap();
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
            let options = LoadOptions { format: Some(format), threads: None };
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
        let options = LoadOptions { format: None, threads: Some(candle_sparse::Threads::new(n).unwrap()) };
        let model = Llama::load_with(builder(&w, DType::F32), &config, options).unwrap();
        let mut cache = Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
        model.forward(&tokens(1, 600, 1), 0, &mut cache).unwrap();
        model.forward(&tokens(1, 1, 2), 600, &mut cache).unwrap()
    };
    let all = candle_sparse::Threads::default().count();
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
