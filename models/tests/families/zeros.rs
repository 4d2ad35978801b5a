//! Leaving out exact zeros changes nothing.

use super::{Golden, decode, f32s};
use candle_nn::VarBuilder;
use candle_sparse_core::Activation;
use candle_sparse_models::{
    FfnMode, Format, Guard, SparseConfig, convert::Layout, decoder::LoadOptions, llama::Llama,
};
use std::collections::HashMap;

const SHUTTING: [&str; 4] = ["arcee", "llama-relu-yarn", "sparsellama-fatrelu", "bamboo"];

fn forced(mode: FfnMode) -> LoadOptions {
    LoadOptions::default().with_sparse(SparseConfig::default().with_mode(mode).with_force(true))
}

/// Whether what is left out is more than a little, and changes no bit of what all neurons give in the same layout.
fn same_bits(golden: &Golden, model: &Llama, what: &str) {
    let config = model.decoder().sparse_config().unwrap();
    assert_eq!(config.mode, FfnMode::ExactZero, "{what}");
    let all = model.with_sparse(config.with_mode(FfnMode::Dense)).unwrap();
    let (mut cache, mut logits) = (super::cache(model), vec![0.0; model.decoder().config().vocab_size]);
    for (position, token) in golden.tokens.iter().enumerate() {
        model.decode(*token, position, &mut cache, &mut logits).unwrap();
    }
    let share = cache.sparse_stats().active_share();
    assert!(share > 0.1 && share < 0.7, "{what}: {share}");
    assert_eq!(decode(model, &golden.tokens), decode(&all, &golden.tokens), "{what}");
}

#[test]
fn they_change_no_bit() {
    for name in SHUTTING {
        let golden = Golden::open(name);
        for format in [None, Some(Format::F16), Some(Format::Q8_0), Some(Format::Q4_0)] {
            let model = golden.load(forced(FfnMode::ExactZero).with_format(format));
            same_bits(&golden, &model, &format!("{name} in {format:?}"));
            if format.is_none() {
                golden.check(&model, "exact zeros");
            }
        }
        // No profile and no mode is needed.
        assert_eq!(
            golden.load(forced(FfnMode::Auto)).decoder().sparse_config().unwrap().mode,
            FfnMode::ExactZero
        );
    }
}

#[test]
fn a_neuron_major_file_needs_no_profile() {
    for name in SHUTTING {
        let golden = Golden::open(name);
        for format in [Format::F32, Format::Q8_0] {
            let layout = Layout::default().with_format(Some(format)).with_own_order(true);
            let model = golden.through_gguf(layout, LoadOptions::default());
            same_bits(&golden, &model, &format!("{name} in {}", format.name()));
            let loaded = golden.load(forced(FfnMode::ExactZero).with_format(Some(format)));
            assert!(model.decoder().weight_bytes() == loaded.decoder().weight_bytes(), "{name}");
            if format == Format::F32 {
                golden.check(&model, "neuron-major");
            }
        }
    }
}

#[test]
fn blocks_are_rounded_anew_for_those_alone_who_ask() {
    let golden = Golden::open("arcee");
    let q8 = Layout::default().with_format(Some(Format::Q8_0));
    let model = golden.through_gguf(q8, LoadOptions::default());
    let notices = model.decoder().notices().join("\n");
    assert!(model.decoder().sparse_config().is_none() && notices.contains("--neuron-major"), "{notices}");
    let asked = golden.through_gguf(q8, forced(FfnMode::ExactZero));
    assert!(asked.decoder().sparse_config().is_some());
    // Floats are the same numbers in any order.
    let f32 = golden.through_gguf(f32s(), forced(FfnMode::Auto));
    golden.check(&f32, "gguf in F32, neuron by neuron");
}

#[test]
fn a_guard_finds_nothing_amiss() {
    let golden = Golden::open("arcee");
    let options = forced(FfnMode::ExactZero);
    let guarded = options.sparse.with_guard(Some(Guard::new(1, 0.01)));
    let model = golden.load(options.with_sparse(guarded));
    let (mut cache, mut logits) = (super::cache(&model), vec![0.0; golden.config.vocab_size]);
    for (position, token) in golden.tokens.iter().enumerate() {
        model.decode(*token, position, &mut cache, &mut logits).unwrap();
    }
    for layer in cache.sparse_stats().layers {
        assert!(layer.looks > 0 && layer.error < 1e-5 && layer.recall > 0.999, "{layer:?}");
    }
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let mistral = Golden::open("mistral-yarn");
    let load =
        |g: &Golden, options| Llama::load_with(g.var_builder(), &g.config, options).unwrap_err().to_string();
    let error = load(&mistral, forced(FfnMode::ExactZero));
    assert!(error.contains("exact-zero needs an activation") && error.contains("Silu"), "{error}");
    let arcee = Golden::open("arcee");
    let error = load(&arcee, forced(FfnMode::Gate));
    assert!(error.contains("settings without a profile"), "{error}");
    // A gate that the configuration does not know, and one that it wants.
    let with_gate = Golden { config: arcee.config.clone(), ..Golden::open("llama-relu-yarn") };
    let error = load(&with_gate, LoadOptions::default());
    assert!(error.contains("mlp.gate_proj.weight") && error.contains("no gate"), "{error}");
    let mut without = arcee.config.clone();
    (without.gated_mlp, without.hidden_act) = (true, Activation::Silu);
    let error = load(&Golden { config: without, ..Golden::open("arcee") }, LoadOptions::default());
    assert!(error.contains("gate_proj"), "{error}");
    let biased = arcee_with_bias(&arcee);
    let error = Llama::load_with(biased, &arcee.config, forced(FfnMode::ExactZero)).unwrap_err().to_string();
    assert!(error.contains("mlp_bias"), "{error}");
}

/// The weights of the model, and a bias of the first block's up.
fn arcee_with_bias(golden: &Golden) -> VarBuilder<'static> {
    let path = super::folder("arcee").join("model.safetensors");
    let mut all: HashMap<_, _> = candle_core::safetensors::load(path, &candle_core::Device::Cpu).unwrap();
    let bias = candle_core::Tensor::zeros(
        golden.config.intermediate_size,
        candle_core::DType::F16,
        &candle_core::Device::Cpu,
    );
    all.insert("model.layers.0.mlp.up_proj.bias".into(), bias.unwrap());
    VarBuilder::from_tensors(all, candle_core::DType::F32, &candle_core::Device::Cpu)
}
