//! Sparse FFN and sparse attention in a Mistral: the built-in Llama with a head of its own and a sliding window.

use crate::{decode, relative};
use candle_core::{Device, Tensor};
use candle_nn::VarBuilder;
use candle_sparse::{AttentionConfig, AttentionMode, FfnMode, KvConfig, SparseConfig, kv_cache::KvDType};
use candle_sparse_models::{
    files::ModelFiles,
    llama::LoadOptions,
    mistral::{Config, Model},
};
use std::sync::Arc;

fn model(window: usize) -> Model {
    load(window, 4)
}

/// Its first layers, without a profile but with its gates.
fn shallow(layers: usize) -> Model {
    load(100, layers)
}

fn load(window: usize, layers: usize) -> Model {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu");
    let files = ModelFiles::from_folder(folder.as_ref()).unwrap();
    let json = String::from_utf8(files.config.unwrap().to_vec()).unwrap();
    let json = json.replace("\"llama\"", "\"mistral\"");
    let config: Config = serde_json::from_str(&json).unwrap();
    let config = Config { sliding_window: Some(window), num_hidden_layers: layers, ..config };
    let mut w = candle_core::safetensors::load(format!("{folder}/model.safetensors"), &Device::Cpu).unwrap();
    w.insert("lm_head.weight".into(), w["model.embed_tokens.weight"].clone());
    // A checkpoint with more layers than its configuration says is refused.
    let of_layer = |name: &str| name.strip_prefix("model.layers.")?.split('.').next()?.parse::<usize>().ok();
    w.retain(|name, _| of_layer(name).is_none_or(|layer| layer < layers));
    let dtype = w["lm_head.weight"].dtype();
    let profile = files.sparse_profile.unwrap().load().unwrap();
    let (all, gates) = (layers == 4, profile.gates[..layers].to_vec());
    // Whatever is faster for a model of this size.
    let sparse = SparseConfig::default().with_force(all);
    let options = LoadOptions::default().with_profile(all.then(|| Arc::new(profile))).with_sparse(sparse);
    let vb = VarBuilder::from_tensors(w, dtype, &Device::Cpu);
    Model::load_with(&config, vb, options).unwrap().with_gates(gates).unwrap()
}

fn dense(window: usize) -> Model {
    let mode = FfnMode::Dense;
    let model = model(window).with_sparse(SparseConfig::default().with_mode(mode)).unwrap();
    // Exact, so that prefill and decode differ by the order of sums alone.
    model.with_kv(KvConfig::exact(KvDType::F32)).unwrap()
}

fn text() -> Tensor {
    let ids: Vec<u32> = (0..400_u32).map(|i| i.wrapping_mul(2_654_435_761) >> 21).collect();
    Tensor::from_vec(ids, (1, 400), &Device::Cpu).unwrap()
}

#[test]
fn sparse_ffns_work_past_the_window() {
    let (x, dense) = (text(), dense(64));
    let want = decode(&mut dense.clone(), &x, 200);
    for mode in [FfnMode::Gate, FfnMode::LowRank, FfnMode::Cascade] {
        let mut sparse = dense.clone().with_sparse(SparseConfig::default().with_mode(mode)).unwrap();
        let got = decode(&mut sparse, &x, 200);
        let stats = sparse.cache().sparse_stats();
        assert!(
            stats.active_share() < 0.8 && stats.layers.iter().all(|l| l.tokens == 200),
            "{mode:?}: {stats:?}"
        );
        let off = relative(&got, &want);
        assert!(off > 0.0 && off < 0.3, "{mode:?}: {off}");
    }
}

#[test]
fn every_attention_works_in_the_window() {
    let (x, dense) = (text(), dense(200));
    let want = decode(&mut dense.clone(), &x, 400);
    for mode in [AttentionMode::Window, AttentionMode::Gated, AttentionMode::Recall, AttentionMode::Sampled] {
        let narrow = AttentionConfig::default()
            .with_mode(mode)
            .with_sinks(4)
            .with_window(32)
            .with_budget(64)
            .with_recall(32);
        let model = dense.clone().with_attention(narrow).unwrap();
        let mut decoded = model.clone();
        let got = decode(&mut decoded, &x, 400);
        assert!(relative(&got, &want) > 1e-3, "{mode:?} reads less");
        // A prompt chooses as decode does.
        let prompt =
            model.llama().forward_all(&x, 0, &mut model.cache().clone()).unwrap().squeeze(0).unwrap();
        assert!(relative(&got, &prompt) < 1e-3, "{mode:?}: {}", relative(&got, &prompt));
        // Settings that read everything are dense.
        let all = AttentionConfig::default()
            .with_mode(mode)
            .with_sinks(4)
            .with_window(200)
            .with_budget(200)
            .with_recall(32);
        let got = decode(&mut dense.clone().with_attention(all).unwrap(), &x, 400);
        assert!(relative(&got, &want) < 1e-3, "{mode:?} over everything: {}", relative(&got, &want));
    }
}

#[test]
fn one_layer_says_nothing_of_what_its_window_has_passed() {
    let x = text();
    // Another beginning, four whole pages, which a first layer cannot see from the end; later layers can, through it.
    let other: Vec<u32> = (0..128_u32).map(|i| (i * 37 + 11) % 2048).collect();
    let other = Tensor::from_vec(other, (1, 128), &Device::Cpu).unwrap();
    let other = Tensor::cat(&[&other, &x.narrow(1, 128, 272).unwrap()], 1).unwrap();
    for mode in [
        AttentionMode::Dense,
        AttentionMode::Window,
        AttentionMode::Gated,
        AttentionMode::Recall,
        AttentionMode::Sampled,
    ] {
        let select = AttentionConfig::default()
            .with_mode(mode)
            .with_sinks(4)
            .with_window(64)
            .with_budget(32)
            .with_recall(32);
        let end = |x: &Tensor, layers: usize| {
            let mut model = shallow(layers).with_attention(select).unwrap();
            decode(&mut model, x, 400).narrow(0, 256, 144).unwrap()
        };
        assert_eq!(relative(&end(&x, 1), &end(&other, 1)), 0.0, "{mode:?}");
        assert!(relative(&end(&x, 4), &end(&other, 4)) > 0.0, "{mode:?}: through the layers");
    }
}
