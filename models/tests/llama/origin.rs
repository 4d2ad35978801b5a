//! A cache belongs to the model whose keys and values it holds.

use crate::cases::{CASES, builder, noise, tokens, weights, worst};
use candle_core::{DType, Device, Tensor};
use candle_sparse_models::{
    Error, KvConfig, KvDType,
    convert::{GgufModel, Layout},
    gguf::GgufFile,
    llama::{Cache, Config, Llama, LoadOptions},
};
use std::{collections::HashMap, path::Path};

fn load(w: &HashMap<String, Tensor>, config: &Config) -> Llama {
    Llama::load(builder(w, DType::F32), config).unwrap()
}

/// Of layer 2, with a `LoRA` merged into it.
fn tuned(w: &HashMap<String, Tensor>, name: &str) -> HashMap<String, Tensor> {
    let (mut w, name) = (w.clone(), format!("model.layers.2.{name}.weight"));
    let (rows, cols) = w[&name].dims2().unwrap();
    let [a, b] = [noise("a", &[rows, 4], 0.0, 1.0), noise("b", &[4, cols], 0.0, 1.0)];
    let delta = (a.matmul(&b).unwrap() * (0.01 / (cols as f64).sqrt())).unwrap();
    w.insert(name.clone(), (&w[&name] + delta).unwrap());
    w
}

fn wrong_model(e: &candle_core::Error) -> String {
    assert!(matches!(Error::of(e), Some(Error::WrongModel { .. })), "{e}");
    e.to_string()
}

fn saved(model: &Llama, path: &Path) -> Cache {
    let mut cache = Cache::of(model, KvConfig::exact(KvDType::F32));
    model.forward(&tokens(1, 70, 1), 0, &mut cache).unwrap();
    cache.save(path).unwrap();
    cache
}

#[test]
fn a_cache_of_another_fine_tune_is_refused() {
    let config = CASES[0].config();
    let (w, folder) = (weights(&config, DType::F32), tempfile::tempdir().unwrap());
    let (model, path) = (load(&w, &config), folder.path().join("chat"));
    let mut cache = saved(&model, &path);
    let next = tokens(1, 1, 9);
    let want = model.forward(&next, 70, &mut cache).unwrap();
    // Another process, another load of the same files; a cache made before the model.
    for mut cache in [
        Cache::of(&load(&w, &config), KvConfig::exact(KvDType::F32)),
        Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap(),
    ] {
        cache.load(&path).unwrap();
        let got = load(&w, &config).forward(&next, 70, &mut cache).unwrap();
        assert_eq!(worst(&got, &want), 0.0);
    }
    for name in ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"] {
        let other = load(&tuned(&w, name), &config);
        let mut tied = Cache::of(&other, KvConfig::exact(KvDType::F32));
        let error = wrong_model(&tied.load(&path).unwrap_err());
        assert!(error.contains(&format!("model.layers.2.{name}")) && tied.is_empty(), "{error}");
        let mut free = Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
        free.load(&path).unwrap();
        let error = wrong_model(&other.forward(&next, 70, &mut free).unwrap_err());
        assert!(error.contains(name) && free.len() == 70, "{error}");
        let mut logits = vec![0.0; config.vocab_size];
        wrong_model(&other.decode(3, 70, &mut free, &mut logits).unwrap_err());
        // From the beginning it is this model's.
        other.forward(&tokens(1, 5, 1), 0, &mut free).unwrap();
        other.forward(&next, 5, &mut free).unwrap();
    }
    let mut scaled = config.clone();
    scaled.rope_theta = 5e5;
    let error = wrong_model(&load(&w, &scaled).forward(&next, 71, &mut cache).unwrap_err());
    assert!(error.contains("RoPE"), "{error}");
}

#[test]
fn the_layouts_of_gguf_and_hugging_face_are_not_mixed() {
    for case in [&CASES[0], &CASES[3]] {
        let config = case.config();
        let (w, folder) = (weights(&config, DType::F32), tempfile::tempdir().unwrap());
        let (path, file) = (folder.path().join("chat"), folder.path().join("m.gguf"));
        let model = load(&w, &config);
        saved(&model, &path);
        GgufModel::new(&builder(&w, DType::F32), &config, Layout::default(), "m")
            .unwrap()
            .save(&file)
            .unwrap();
        let from_gguf = || Llama::from_gguf(&GgufFile::open(&file).unwrap(), LoadOptions::default()).unwrap();
        let (gguf, next) = (from_gguf(), tokens(1, 1, 9));
        let mut cache = Cache::of(&gguf, KvConfig::q8());
        let error = wrong_model(&cache.load(&path).unwrap_err());
        assert!(error.contains("GGUF") && error.contains("Hugging Face"), "{error}");
        let mut cache = saved(&gguf, &path);
        let want = gguf.forward(&next, 70, &mut cache).unwrap();
        let mut cache = Cache::of(&from_gguf(), KvConfig::q8());
        cache.load(&path).unwrap();
        assert_eq!(worst(&gguf.forward(&next, 70, &mut cache).unwrap(), &want), 0.0);
        // What the two have in common is the same: but for the order of keys one is the other.
        let [a, b] = [&model, &gguf].map(|m| (**m.decoder().origin()).clone());
        let same = candle_sparse::kv_cache::Origin { interleaved: false, ..b };
        assert_eq!(a.difference(&same), None);
    }
}
