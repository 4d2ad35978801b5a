//! Tensors that a checkpoint holds beside what its configuration speaks of: used, refused, or named.
#![allow(clippy::unwrap_used, reason = "tests")]

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_sparse::Error;
use candle_sparse_models::{
    convert::{GgufModel, Layout},
    files::ModelFiles,
    gguf::GgufFile,
    llama::{Cache, Config, Llama, LlamaConfig, LoadOptions},
    pretrained,
};
use std::{collections::HashMap, path::Path};

const CONFIG: &str = r#"{"hidden_size": 64, "intermediate_size": 96, "vocab_size": 100, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64"#;

type Tensors = HashMap<String, Tensor>;

fn json(more: &str) -> String {
    format!("{CONFIG}{more}}}")
}

fn config(more: &str) -> Config {
    serde_json::from_str::<LlamaConfig>(&json(more)).unwrap().into_config(false)
}

/// Numbers without a pattern, the same for the same name.
fn noise(name: &str, dims: &[usize]) -> Tensor {
    let mut state = name.bytes().fold(99_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    };
    let size = if dims.len() == 1 { 0.5 } else { 0.2 };
    let values: Vec<f32> = (0..dims.iter().product()).map(|_| next() * size).collect();
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

fn put(all: &mut Tensors, name: &str, dims: &[usize]) {
    all.insert(name.to_string(), noise(name, dims));
}

fn base() -> Tensors {
    let mut all = Tensors::new();
    put(&mut all, "model.embed_tokens.weight", &[100, 64]);
    put(&mut all, "lm_head.weight", &[100, 64]);
    put(&mut all, "model.norm.weight", &[64]);
    (0..2).for_each(|i| layer(&mut all, i));
    all
}

fn layer(all: &mut Tensors, i: usize) {
    for (name, dims) in [
        ("input_layernorm", vec![64]),
        ("post_attention_layernorm", vec![64]),
        ("self_attn.q_proj", vec![64, 64]),
        ("self_attn.k_proj", vec![32, 64]),
        ("self_attn.v_proj", vec![32, 64]),
        ("self_attn.o_proj", vec![64, 64]),
        ("mlp.gate_proj", vec![96, 64]),
        ("mlp.up_proj", vec![96, 64]),
        ("mlp.down_proj", vec![64, 96]),
    ] {
        put(all, &format!("model.layers.{i}.{name}.weight"), &dims);
    }
}

/// With biases of some projections in every layer.
fn biased(names: &[(&str, usize)]) -> Tensors {
    let mut all = base();
    for (name, n) in names {
        (0..2).for_each(|i| put(&mut all, &format!("model.layers.{i}.{name}.bias"), &[*n]));
    }
    all
}

const QKV: [(&str, usize); 3] =
    [("self_attn.q_proj", 64), ("self_attn.k_proj", 32), ("self_attn.v_proj", 32)];
const O: (&str, usize) = ("self_attn.o_proj", 64);
const MLP: [(&str, usize); 3] = [("mlp.gate_proj", 96), ("mlp.up_proj", 96), ("mlp.down_proj", 64)];

fn load(tensors: &Tensors, more: &str) -> Result<Llama> {
    let vb = VarBuilder::from_tensors(tensors.clone(), DType::F32, &Device::Cpu);
    Llama::load_with(vb, &config(more), LoadOptions::default())
}

fn logits(model: &Llama) -> Vec<f32> {
    let mut cache = Cache::of(model, candle_sparse::KvConfig::exact(candle_sparse::KvDType::F32));
    let ids = Tensor::new(&[[3_u32, 50, 99, 7]], &Device::Cpu).unwrap();
    model.forward(&ids, 0, &mut cache).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn save(tensors: &Tensors, more: &str, folder: &Path) -> ModelFiles {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("config.json"), json(more)).unwrap();
    std::fs::write(folder.join("tokenizer.json"), "{}").unwrap();
    candle_core::safetensors::save(tensors, folder.join("model.safetensors")).unwrap();
    ModelFiles::from_folder(folder).unwrap()
}

fn refused<T>(result: Result<T>, needles: &[&str]) {
    let Err(e) = result else { panic!("not refused: {needles:?}") };
    assert!(matches!(Error::of(&e), Some(Error::WrongModel { .. })), "{e}");
    let e = e.to_string();
    assert!(!e.contains('\n') && needles.iter().all(|needle| e.contains(needle)), "{needles:?}: {e}");
}

#[test]
fn biases_are_used_whatever_the_configuration_says() {
    let all = [&QKV[..], &[O], &MLP].concat();
    let asked = r#", "attention_bias": true, "mlp_bias": true"#;
    let (silent, told) = (load(&biased(&all), "").unwrap(), load(&biased(&all), asked).unwrap());
    assert_eq!(logits(&silent), logits(&told));
    assert!(told.decoder().notices().is_empty());
    let notices = silent.decoder().notices();
    assert!(notices.len() == 1 && notices[0].contains("14 biases"), "{notices:?}");
    assert_ne!(logits(&silent), logits(&load(&base(), "").unwrap()));
    // As in Qwen's: q, k and v alone. What is not there is 0.
    let mut zero = biased(&QKV);
    for i in 0..2 {
        let t = Tensor::zeros(64, DType::F32, &Device::Cpu).unwrap();
        zero.insert(format!("model.layers.{i}.self_attn.o_proj.bias"), t);
    }
    let some = logits(&load(&biased(&QKV), "").unwrap());
    assert_eq!(some, logits(&load(&zero, r#", "attention_bias": true"#).unwrap()));
    // One that the configuration asks for must be there.
    let e = load(&biased(&QKV), r#", "attention_bias": true"#).unwrap_err().to_string();
    assert!(e.contains("o_proj.bias"), "{e}");
    // One of q alone.
    let one = logits(&load(&biased(&QKV[..1]), "").unwrap());
    assert!(one != some && one != logits(&load(&base(), "").unwrap()));
}

#[test]
fn biases_survive_conversion() {
    let dir = tempfile::tempdir().unwrap();
    let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
    for (i, names) in [QKV.to_vec(), [&QKV[..], &[O], &MLP].concat()].into_iter().enumerate() {
        let tensors = biased(&names);
        let files = save(&tensors, "", &dir.path().join(i.to_string()));
        let vb = pretrained::var_builder(&files, None).unwrap();
        let model =
            GgufModel::new(&vb, &pretrained::config(&files).unwrap(), Layout::default(), "m").unwrap();
        let [path, again] = ["m.gguf", "again.gguf"].map(|name| dir.path().join(name));
        model.save(&path).unwrap();
        let opened = GgufFile::open(&path).unwrap();
        let converted = Llama::from_gguf(&opened, LoadOptions::default()).unwrap();
        let direct = logits(&load(&tensors, "").unwrap());
        assert!(close(&logits(&converted), &direct), "{names:?}");
        GgufModel::from_gguf(&opened, Layout::default()).unwrap().save(&again).unwrap();
        let converted = Llama::from_gguf(&GgufFile::open(&again).unwrap(), LoadOptions::default()).unwrap();
        assert!(close(&logits(&converted), &direct), "{names:?} again");
    }
}

#[test]
fn tensors_of_other_models_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let with = |name: &str, dims: &[usize]| {
        let mut all = base();
        put(&mut all, name, dims);
        all
    };
    let mut third = base();
    layer(&mut third, 2);
    let known = [
        (with("model.layers.1.self_attn.q_norm.weight", &[16]), "layers.1.self_attn.q_norm"),
        (with("model.layers.0.self_attn.k_norm.weight", &[16]), "layers.0.self_attn.k_norm"),
        (with("model.layers.0.input_layernorm.bias", &[64]), "input_layernorm.bias"),
        (with("lm_head.bias", &[100]), "lm_head.bias"),
        (third, "model.layers.2."),
    ];
    for (i, (tensors, name)) in known.iter().enumerate() {
        refused(load(tensors, ""), &[name, "num_hidden_layers"]);
        let files = save(tensors, "", &dir.path().join(i.to_string()));
        refused(pretrained::var_builder(&files, None), &[name]);
        refused(pretrained::config(&files), &[name]);
    }
    // Names that nobody thought of are seen where a file lists them.
    let unknown = with("model.layers.1.self_attn.q_proj.lora_A.weight", &[4, 64]);
    let files = save(&unknown, "", &dir.path().join("unknown"));
    refused(pretrained::var_builder(&files, None), &["q_proj.lora_A.weight"]);
}

#[test]
fn shards_are_looked_at_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let files = save(&base(), "", dir.path());
    std::fs::rename(dir.path().join("model.safetensors"), dir.path().join("a.safetensors")).unwrap();
    let norm = HashMap::from([("model.layers.0.self_attn.q_norm.weight".to_string(), noise("n", &[16]))]);
    candle_core::safetensors::save(&norm, dir.path().join("b.safetensors")).unwrap();
    drop(files);
    let index = r#"{"weight_map": {"model.norm.weight": "a.safetensors", "x": "b.safetensors"}}"#;
    std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    let files = ModelFiles::from_folder(dir.path()).unwrap();
    refused(pretrained::var_builder(&files, None), &["q_norm"]);
}

#[test]
fn harmless_tensors_are_named_and_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut all = base();
    put(&mut all, "model.layers.0.self_attn.rotary_emb.inv_freq", &[8]);
    put(&mut all, "model.layers.1.self_attn.rotary_emb.inv_freq", &[8]);
    let model = load(&all, "").unwrap();
    assert_eq!(logits(&model), logits(&load(&base(), "").unwrap()));
    let notices = model.decoder().notices();
    assert!(
        notices.len() == 1 && notices[0].contains("2 tensors") && notices[0].contains("inv_freq"),
        "{notices:?}"
    );
    pretrained::var_builder(&save(&all, "", dir.path()), None).unwrap();
}

#[test]
fn a_head_beside_a_tied_embedding_must_be_the_embedding() {
    let tied = r#", "tie_word_embeddings": true"#;
    let mut all = base();
    refused(load(&all, tied), &["lm_head.weight", "tie_word_embeddings"]);
    all.insert("lm_head.weight".into(), all["model.embed_tokens.weight"].clone());
    let both = load(&all, tied).unwrap();
    assert!(both.decoder().notices().iter().any(|n| n.contains("lm_head.weight is not used")));
    all.remove("lm_head.weight");
    assert_eq!(logits(&both), logits(&load(&all, tied).unwrap()));
}

/// candle's `VarBuilder::zeros` says that it has whatever it is asked for.
#[test]
fn a_builder_that_has_everything_is_not_asked() {
    let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
    let model = Llama::load(vb, &config("")).unwrap();
    assert!(model.decoder().notices().is_empty());
}
