//! Numbers that nobody means: they are errors, or mean no limit; nothing panics or aborts.

use crate::cases::{CASES, builder, tokens, weights, worst};
use candle_core::{DType, Device, Result, Tensor};
use candle_sparse_models::{
    AttentionConfig, AttentionMode, Error, KvConfig, KvDType, Profile, SparseConfig,
    llama::{Cache, Config, Llama, LlamaConfig, LoadOptions},
};
use std::sync::Arc;

const LARGE: [usize; 6] =
    [usize::MAX, usize::MAX / 2, 1 << 62, 1_000_000_000_000_000, 4_294_967_295, 1 << 32];

fn load(config: &Config) -> Llama {
    Llama::load(builder(&weights(config, DType::F32), DType::F32), config).unwrap()
}

/// A prompt and some tokens.
fn read(model: &Llama, cache: &mut Cache) -> Result<Tensor> {
    model.forward(&tokens(1, 150, 1), 0, cache)?;
    let mut logits = vec![0.0; model.decoder().config().vocab_size];
    for position in 150..200 {
        model.decode(7, position, cache, &mut logits)?;
    }
    let n = logits.len();
    Tensor::from_vec(logits, (1, n), &Device::Cpu)
}

#[test]
fn a_context_of_any_length_is_read() {
    let config = CASES[1].config();
    let small = load(&config);
    let want = read(&small, &mut Cache::of(&small, KvConfig::exact(KvDType::F32))).unwrap();
    for n in LARGE {
        let mut config = config.clone();
        config.max_position_embeddings = n;
        let model = load(&config);
        for mode in
            [AttentionMode::Dense, AttentionMode::Window, AttentionMode::Recall, AttentionMode::Sampled]
        {
            let model = model.with_attention(AttentionConfig::new(mode)).unwrap();
            let got = read(&model, &mut Cache::of(&model, KvConfig::exact(KvDType::F32))).unwrap();
            assert_eq!(worst(&got, &want), 0.0, "{n} {mode:?}");
        }
        let mut cache = Cache::of(&model, KvConfig::exact(KvDType::F32));
        assert!(cache.reserve(1, usize::MAX).is_err());
    }
}

#[test]
fn a_budget_of_any_size_is_no_limit() {
    let config = CASES[1].config();
    let model = load(&config);
    let want = read(&model, &mut Cache::of(&model, KvConfig::exact(KvDType::F32))).unwrap();
    for n in LARGE {
        for mode in
            [AttentionMode::Dense, AttentionMode::Window, AttentionMode::Recall, AttentionMode::Sampled]
        {
            let few = AttentionConfig::default()
                .with_mode(mode)
                .with_sinks(4)
                .with_window(32)
                .with_budget(32)
                .with_recall(32);
            for select in [
                few.with_budget(n),
                few.with_window(n),
                few.with_sinks(n),
                few.with_recall(n),
                AttentionConfig::default()
                    .with_mode(mode)
                    .with_sinks(n)
                    .with_window(n)
                    .with_budget(n)
                    .with_recall(n),
            ] {
                let model = model.with_attention(select).unwrap();
                let got = read(&model, &mut Cache::of(&model, KvConfig::exact(KvDType::F32))).unwrap();
                let all = select.window == n
                    || select.sinks == n
                    || select.budget == n && mode == AttentionMode::Recall;
                assert!(!all || worst(&got, &want) < 1e-5, "{select:?}: {}", worst(&got, &want));
            }
        }
    }
}

#[test]
fn sizes_of_a_config_are_refused_or_run() {
    let case = &CASES[1];
    let good: serde_json::Value = serde_json::from_str(&case.json()).unwrap();
    let w = weights(&case.config(), DType::F32);
    let sizes = [
        "hidden_size",
        "intermediate_size",
        "vocab_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ];
    for (name, n) in sizes.iter().flat_map(|name| LARGE.into_iter().chain([0, 1, 3]).map(move |n| (name, n)))
    {
        let mut json = good.clone();
        json[*name] = n.into();
        let config = serde_json::from_value::<LlamaConfig>(json).unwrap().into_config(false);
        let error = Llama::load(builder(&w, DType::F32), &config).map(|_| ()).err();
        assert!(error.is_some() || *name == "num_hidden_layers" && [1, 3].contains(&n), "{name} {n}");
        if let Ok(mut cache) = Cache::new(true, DType::F32, &config, &Device::Cpu) {
            cache.truncate(n);
        }
    }
}

#[test]
fn a_full_budget_is_told_apart() {
    let config = CASES[2].config();
    let model = load(&config);
    let mut cache = Cache::of(&model, KvConfig::q4().with_max_bytes(Some(500_000)));
    let x = tokens(1, 600, 1);
    let error = model.forward(&x, 0, &mut cache).unwrap_err();
    assert!(matches!(Error::of(&error), Some(Error::Full { .. })) && cache.is_empty(), "{error}");
    // In smaller parts it fits.
    for start in (0..600).step_by(20) {
        model.forward(&x.narrow(1, start, 20).unwrap(), start, &mut cache).unwrap();
        assert!(cache.kv_bytes() <= 500_000);
    }
    let error = model.forward(&tokens(1, 41, 1), 600, &mut cache).unwrap_err();
    assert!(matches!(Error::of(&error), Some(Error::Full { .. })), "{error}");
    assert!(error.to_string().contains("context of 640"), "{error}");
}

#[test]
fn few_neurons_of_long_rows_are_summed() {
    // Of 100 neurons 16 pieces of 7 would be more than there are.
    let json = r#"{"hidden_size": 10496, "intermediate_size": 100, "vocab_size": 515, "num_hidden_layers": 1,
        "num_attention_heads": 1, "head_dim": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
        "tie_word_embeddings": true}"#;
    let config = serde_json::from_str::<LlamaConfig>(json).unwrap().into_config(false);
    let (hidden, inner, w) = (config.hidden_size, config.intermediate_size, weights(&config, DType::F32));
    let rule = candle_sparse::profile::LayerRule {
        candidate: vec![0.1],
        keep: vec![0.1],
        share: vec![0.4],
        hot: vec![0],
        bias: vec![0.0; hidden],
    };
    let layer = candle_sparse::profile::LayerProfile {
        order: (0..inner as u32).collect(),
        rank: 1,
        p: vec![0.0; hidden],
        q_gate: vec![0.0; inner],
        q_up: vec![0.0; inner],
        gate_variance: vec![0.0; inner],
        up_variance: vec![0.0; inner],
        up_square: vec![1.0; inner],
        importance: vec![1.0; inner],
        rules: [rule.clone(), rule.clone(), rule],
    };
    let dense = load(&config);
    let profile = Profile {
        layers: vec![layer],
        gates: Vec::new(),
        recall_shares: Vec::new(),
        shares: vec![0.4],
        fitted: [0; 3],
        held_out: Default::default(),
        fingerprint: dense.decoder().origin().fingerprint.to_vec(),
        about: serde_json::Value::Null,
    };
    let options = LoadOptions::default()
        .with_profile(Some(Arc::new(profile)))
        .with_sparse(SparseConfig::default().with_force(true));
    let sparse = Llama::load_with(builder(&w, DType::F32), &config, options).unwrap();
    let logits = |model: &Llama| {
        model.forward(&tokens(1, 3, 1), 0, &mut Cache::of(model, KvConfig::exact(KvDType::F32))).unwrap()
    };
    assert!(worst(&logits(&sparse), &logits(&dense)) < 1e-3);
}
