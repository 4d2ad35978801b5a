//! What an app can set of a quantised Llama, as of the other models.

use crate::{convert::Built, files::ids};
use candle_core::{Device, Tensor, quantized::gguf_file};
use candle_sparse_models::{
    AttentionConfig, AttentionMode, Error, FfnMode, Format, KvConfig, SparseConfig, convert::Layout,
    decoder::LoadOptions, quantized_llama::ModelWeights,
};
use std::{fs::File, path::Path};

fn load(path: &Path, options: LoadOptions) -> ModelWeights {
    let mut file = File::open(path).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    ModelWeights::from_gguf_with(content, &mut file, &Device::Cpu, options).unwrap()
}

/// A prompt and tokens after it.
fn logits(model: &mut ModelWeights) -> Vec<f32> {
    let mut all = vec![model.forward(&ids(20, 3), 0).unwrap()];
    all.extend((0..100).map(|i| model.forward(&ids(1, 60 + i), 20 + i as usize).unwrap()));
    Tensor::cat(&all, 0).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn a_quantised_llama_is_set_as_the_other_models_are() {
    let (built, dir) = (Built::new("tales-relu"), tempfile::tempdir().unwrap());
    let path = dir.path().join("m.gguf");
    built.write(Layout::default().with_format(Some(Format::Q8_0)).with_neuron_major(None), &path);
    // Whatever is faster for a model of this size.
    let sparse = SparseConfig::default().with_mode(FfnMode::Gate).with_force(true);
    let dense = SparseConfig::default().with_mode(FfnMode::Dense);
    let mut model = load(&path, LoadOptions::default().with_sparse(sparse));
    let want = logits(&mut model);
    assert!(model.cache().sparse_stats().active_share() < 0.9);
    // Other settings, what was seen stays; back again.
    let model = model.with_sparse(dense).unwrap();
    assert_eq!(model.cache().len(), 120);
    let mut model = model.with_sparse(sparse).unwrap();
    assert_eq!(logits(&mut model), want);
    // Keys and values in tiers, and less of them read.
    let mut small = model.clone().with_kv(KvConfig::q4()).unwrap();
    assert!(small.cache().is_empty() && logits(&mut small) != want);
    assert!(small.cache().kv_bytes() < model.cache().kv_bytes());
    let window = AttentionConfig::new(AttentionMode::Window).with_sinks(0).with_window(32);
    let mut narrow = model.clone().with_attention(window).unwrap();
    assert!(logits(&mut narrow) != want);
    let mut narrow = narrow.with_attention(AttentionConfig::default()).unwrap();
    assert_eq!(logits(&mut narrow), want);
    narrow.warm_up().unwrap();
    narrow.set_time_limit(Some(std::time::Duration::ZERO));
    let error = narrow.forward(&ids(30, 1), 0).unwrap_err();
    assert!(matches!(Error::of(&error), Some(Error::Deadline(_))), "{error}");
    // Converted while it is loaded.
    let mut other = load(&path, LoadOptions::default().with_format(Some(Format::Q4_0)));
    assert!(logits(&mut other) != want);
}
