//! Memory while a file is loaded and used: the file, once.
//!
//! The file has some 75 MB of F16, so that the process itself, which a run with a tiny model tells, does not count.

use crate::{Folder, number, ok};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sparse::{
    Format,
    profile::{LayerProfile, LayerRule, Profile, fingerprint},
};
use candle_sparse_models::{
    convert::{GgufModel, Layout},
    files::ModelFiles,
    llama::{Config, LlamaConfig},
};
use std::{collections::HashMap, path::Path};

const CONFIG: &str = r#"{"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 3,
    "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 4000, "tie_word_embeddings": true,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 256}"#;
const RANK: usize = 16;

fn noise(seed: usize, n: usize, size: f32) -> Vec<f32> {
    let mut state = (seed as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next() * size).collect()
}

fn checkpoint(c: &Config) -> VarBuilder<'static> {
    let mut all = HashMap::new();
    let mut put = |name: String, dims: &[usize]| {
        let n = dims.iter().product();
        let values =
            if dims.len() == 1 { vec![1.0; n] } else { noise(all.len(), n, 1.7 / (dims[1] as f32).sqrt()) };
        let t = Tensor::from_vec(values, dims, &Device::Cpu).unwrap();
        all.insert(name, t.to_dtype(DType::F16).unwrap());
    };
    let (h, i, kv) = (c.hidden_size, c.intermediate_size, 256);
    put("model.embed_tokens.weight".into(), &[c.vocab_size, h]);
    put("model.norm.weight".into(), &[h]);
    for l in 0..c.num_hidden_layers {
        for (name, dims) in [
            ("input_layernorm", vec![h]),
            ("post_attention_layernorm", vec![h]),
            ("self_attn.q_proj", vec![h, h]),
            ("self_attn.k_proj", vec![kv, h]),
            ("self_attn.v_proj", vec![kv, h]),
            ("self_attn.o_proj", vec![h, h]),
            ("mlp.gate_proj", vec![i, h]),
            ("mlp.up_proj", vec![i, h]),
            ("mlp.down_proj", vec![h, i]),
        ] {
            put(format!("model.layers.{l}.{name}.weight"), &dims);
        }
    }
    VarBuilder::from_tensors(all, DType::F16, &Device::Cpu)
}

/// A profile that leaves out some neurons, the order of which is not the model's.
fn profile(vb: &VarBuilder<'_>, c: &Config) -> Profile {
    let (hidden, inner, layers) = (c.hidden_size, c.intermediate_size, c.num_hidden_layers);
    let rule = |candidate: f32, keep: f32| LayerRule {
        candidate: vec![candidate],
        keep: vec![keep],
        share: vec![0.5],
        hot: vec![0],
        bias: vec![0.0; hidden],
    };
    let layer = |l: usize| LayerProfile {
        order: (0..inner as u32).rev().collect(),
        rank: RANK,
        p: noise(100 + l, RANK * hidden, 0.05),
        q_gate: noise(200 + l, inner * RANK, 0.4),
        q_up: noise(300 + l, inner * RANK, 0.4),
        gate_variance: vec![0.0; inner],
        up_variance: vec![0.0; inner],
        up_square: vec![1.0; inner],
        importance: vec![1.0; inner],
        rules: [rule(0.0, 0.2), rule(0.05, 0.0), rule(0.05, 0.1)],
    };
    Profile {
        layers: (0..layers).map(layer).collect(),
        shares: vec![0.5],
        gates: Vec::new(),
        recall_shares: Vec::new(),
        fitted: [0; 3],
        held_out: Default::default(),
        fingerprint: fingerprint(vb, layers, hidden, inner).unwrap(),
        about: serde_json::Value::Null,
    }
}

struct Run {
    peak: f64,
    weights: f64,
    active: f64,
}

fn run(model: &str, more: &[&str]) -> Run {
    let args = [
        "--model",
        model,
        "--prompt-ids",
        "1,2,3",
        "-n",
        "4",
        "--temperature",
        "0",
        "--threads",
        "1",
        "--json",
    ];
    let json = ok("llama-sparse", &[&args[..], more].concat()).json();
    let [peak, weights, active] =
        ["peak_rss_bytes", "weight_bytes", "active_fraction"].map(|key| number(&json, key));
    Run { peak, weights, active }
}

/// Where the files are made, and what a process takes beside its weights.
struct Big {
    dir: Folder,
    config: Config,
    vb: VarBuilder<'static>,
    base: f64,
}

impl Big {
    fn new() -> Self {
        let dir = Folder::new();
        let config: LlamaConfig = serde_json::from_str(CONFIG).unwrap();
        let config = config.into_config(false);
        let (tiny, _) = dir.convert("tiny.gguf", "tales-silu", &["--no-profile"]);
        let tiny = run(&tiny, &[]);
        Self { dir, vb: checkpoint(&config), config, base: tiny.peak - tiny.weights }
    }

    /// A file and its bytes.
    fn save(&self, name: &str, layout: Layout<'_>) -> (String, f64) {
        let path = self.dir.path(name);
        let tokenizer =
            ModelFiles::local(&crate::testdata("tales-silu")).unwrap().unwrap().load_tokenizer().unwrap();
        let model = GgufModel::new(&self.vb, &self.config, layout, name).unwrap();
        model.with_tokenizer(&tokenizer, &self.config).unwrap().save(Path::new(&path)).unwrap();
        let bytes = std::fs::metadata(&path).unwrap().len() as f64;
        (path, bytes)
    }
}

#[test]
fn a_dense_file_is_held_once_or_as_what_it_becomes() {
    let big = Big::new();
    let (path, bytes) = big.save("dense.gguf", Layout::default());
    assert!(bytes > 60e6, "{bytes}");
    for flags in [&[][..], &["--no-mmap"]] {
        let run = run(&path, flags);
        let over = run.peak - big.base;
        assert!(run.weights > 0.95 * bytes && run.active == 1.0, "{flags:?}");
        assert!(over <= 1.15 * bytes, "{flags:?}: {over:e} over {:e} for {bytes:e}", big.base);
    }
    let q8 = run(&path, &["--dtype", "q8_0"]);
    assert!(q8.weights < 0.55 * bytes, "{}", q8.weights);
    // Beside what it becomes one matrix at a time, in the file and as floats.
    let matrix = (2816 * 1024 * (2 + 4)) as f64;
    let over = q8.peak - big.base;
    let most = (1.15 * bytes).min(1.15 * q8.weights + matrix);
    assert!(over <= most, "q8_0: {over:e} over {:e} for {bytes:e}", big.base);
}

#[test]
fn a_neuron_major_file_is_held_once_with_its_profile() {
    let big = Big::new();
    for format in [Format::F16, Format::Q8_0] {
        let profile = profile(&big.vb, &big.config);
        let layout = Layout::default().with_format(Some(format)).with_neuron_major(Some(&profile));
        let (path, bytes) = big.save("neurons.gguf", layout);
        for flags in [&[][..], &["--ffn", "dense"], &["--no-mmap"]] {
            let run = run(&path, flags);
            assert_eq!(run.active < 0.95, !flags.contains(&"dense"), "{format:?} {flags:?}: {}", run.active);
            // While it is copied, a block's up and down, one matrix here, are there twice: a seventh of so small a file.
            let copied = if flags.contains(&"--no-mmap") { 2 * 2816 * format.row_bytes(1024) } else { 0 };
            let (over, most) = (run.peak - big.base, 1.15 * bytes + copied as f64);
            assert!(over <= most, "{format:?} {flags:?}: {over:e} over {:e} for {bytes:e}", big.base);
        }
    }
}
