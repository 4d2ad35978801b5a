//! Models whose FFN gives exact zeros, and `YaRN`: published configurations, and logits that transformers computed.
#![allow(clippy::unwrap_used, reason = "tests")]

mod configs;
mod profile;
mod zeros;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sparse_models::{
    FfnMode, Format, KvConfig, KvDType, SparseConfig,
    convert::{GgufModel, Layout},
    decoder::LoadOptions,
    gguf::GgufFile,
    llama::{Cache, Config, Llama, LlamaConfig},
};
use std::path::{Path, PathBuf};

const FAMILIES: [&str; 5] = ["arcee", "llama-relu-yarn", "mistral-yarn", "sparsellama-fatrelu", "bamboo"];

/// A model of `testdata/families`.
struct Golden {
    name: &'static str,
    config: Config,
    tokens: Vec<u32>,
    /// `[tokens, vocab_size]`
    logits: Vec<Vec<f32>>,
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/families").join(name)
}

impl Golden {
    fn open(name: &'static str) -> Self {
        #[derive(serde::Deserialize)]
        struct Stored {
            tokens: Vec<u32>,
            logits: Vec<Vec<f32>>,
        }
        let read = |file: &str| std::fs::read(folder(name).join(file)).unwrap();
        let config: LlamaConfig = serde_json::from_slice(&read("config.json")).unwrap();
        let Stored { tokens, logits } = serde_json::from_slice(&read("logits.json")).unwrap();
        Self { name, config: config.into_config(false), tokens, logits }
    }

    fn var_builder(&self) -> VarBuilder<'static> {
        let path = folder(self.name).join("model.safetensors");
        candle_sparse::loading::var_builder(&[path], Some(DType::F32), &Device::Cpu).unwrap()
    }

    fn load(&self, options: LoadOptions) -> Llama {
        Llama::load_with(self.var_builder(), &self.config, options).unwrap()
    }

    /// The model from a GGUF file that was made of it.
    fn through_gguf(&self, layout: Layout<'_>, options: LoadOptions) -> Llama {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        GgufModel::new(&self.var_builder(), &self.config, layout, self.name).unwrap().save(&path).unwrap();
        let file = GgufFile::open(&path).unwrap();
        let read = candle_sparse_models::gguf::config(file.content()).unwrap().to_core().unwrap();
        let own = self.config.to_core().unwrap();
        let yarn = own.rope.inv_freq(3, own.head_dim) - read.rope.inv_freq(3, own.head_dim);
        assert!(
            yarn.abs() < 1e-7 && (own.rope.attention_factor() - read.rope.attention_factor()).abs() < 1e-6
        );
        let rope = own.rope;
        assert_eq!(candle_sparse_core::Config { rope, ..read }, own, "{}", self.name);
        Llama::from_gguf(&file, options).unwrap()
    }

    /// Whether the logits of a prompt, and of one token after the other, are those of transformers.
    fn check(&self, model: &Llama, name: &str) {
        let ids = Tensor::new(&*self.tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let all = model.forward_all(&ids, 0, &mut cache(model)).unwrap().squeeze(0).unwrap();
        self.same(&all.to_vec2().unwrap(), &format!("{name}, prompt"));
        self.same(&decode(model, &self.tokens), &format!("{name}, decode"));
    }

    fn same(&self, got: &[Vec<f32>], what: &str) {
        let size = self.logits.iter().flatten().fold(0.0_f32, |m, v| m.max(v.abs()));
        assert!(size > 1.0, "{}: logits that say something", self.name);
        for (position, (got, want)) in got.iter().zip(&self.logits).enumerate() {
            let apart = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(apart < 1e-4, "{} {what}: {apart} at {position}", self.name);
        }
    }
}

fn cache(model: &Llama) -> Cache {
    Cache::of(model, KvConfig::exact(KvDType::F32))
}

/// Logits of one token after the other.
fn decode(model: &Llama, tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut cache = cache(model);
    let mut one = |(position, token): (usize, &u32)| {
        let mut logits = vec![0.0; model.decoder().config().vocab_size];
        model.decode(*token, position, &mut cache, &mut logits).unwrap();
        logits
    };
    tokens.iter().enumerate().map(&mut one).collect()
}

fn f32s() -> Layout<'static> {
    Layout::default().with_format(Some(Format::F32))
}

#[test]
fn logits_are_those_of_transformers() {
    for name in FAMILIES {
        let golden = Golden::open(name);
        golden.check(&golden.load(LoadOptions::default()), "safetensors");
        golden.check(&golden.through_gguf(f32s(), LoadOptions::default()), "gguf");
    }
}

#[test]
fn gguf_files_have_the_architecture_that_runs_them_elsewhere() {
    let architecture = |name| {
        let golden = Golden::open(name);
        let model = GgufModel::new(&golden.var_builder(), &golden.config, f32s(), name).unwrap();
        (model.is_ordinary(), model.is_llama())
    };
    let expected = [(true, false), (false, false), (true, true), (false, false), (false, false)];
    assert_eq!(FAMILIES.map(architecture), expected);
}

/// The core's forward pass, which images run, of the same weights.
#[test]
fn the_core_says_the_same() {
    use candle_sparse_core::{ActivationGroup, KvCache, Scalar, Scratch, forward::forward};
    for name in FAMILIES {
        let golden = Golden::open(name);
        let by_zeros = SparseConfig::default().with_mode(FfnMode::ExactZero).with_force(true);
        let shuts = golden.config.hidden_act.has_exact_zeros();
        let sparse = if shuts { by_zeros } else { SparseConfig::default() };
        let llama = golden.load(LoadOptions::default().with_sparse(sparse));
        let layers = llama.decoder().core_layers().unwrap();
        let model = llama.decoder().core_model(&layers, KvConfig::exact(KvDType::F32)).unwrap();
        let positions = golden.tokens.len();
        let mut memory = vec![0; KvCache::words(&model, positions)];
        let mut cache = KvCache::new(&model, &mut memory).unwrap();
        let mut data = vec![0.0; Scratch::elements(&model, positions)];
        let mut groups = vec![ActivationGroup::ZERO; Scratch::groups(model.config())];
        let mut scratch = Scratch::new(&model, positions, &mut data, &mut groups).unwrap();
        let mut all = Vec::new();
        for (position, &token) in golden.tokens.iter().enumerate() {
            let (mut logits, at) = (vec![0.0; model.config().vocab_size], (token as usize, position));
            forward(&Scalar, &model, at, &mut cache, &mut scratch, Some(&mut logits), &mut || false).unwrap();
            all.push(logits);
            let active: u32 = (0..layers.len()).map(|l| scratch.run(l).active).sum();
            let neurons = (layers.len() * golden.config.intermediate_size) as u32;
            assert!(if shuts { active < neurons * 7 / 10 } else { active == neurons }, "{name}: {active}");
        }
        golden.same(&all, "core");
    }
}
