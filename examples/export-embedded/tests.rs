//! Images against the models they were written from.

mod cores;
mod texts;

use crate::embedded::EMBEDDED;
use crate::{
    cost,
    export::{ExportArgs, image},
};
use candle_core::{DType, Device, Tensor};
use candle_sparse_core::{
    ActivationGroup, KvCache, Scalar, Scratch,
    forward::forward,
    image::{Image, empty_layer},
    sampler::Sampler,
    tokenizer::Tokenizer,
};
use candle_sparse_models::{decoder::LoadOptions, files::ModelFiles, llama::Cache, pretrained::Pretrained};
use clap::Parser;
use std::path::PathBuf;

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    export: ExportArgs,
}

fn exported(files: &ModelFiles, flags: &[&str]) -> Vec<u128> {
    let args = [&["export"], flags].concat();
    image(files, &Flags::parse_from(args).export).unwrap()
}

/// Third-party checkpoints, where this machine has them.
fn reference_models() -> Vec<PathBuf> {
    let Some(folder) = std::env::var_os("CANDLE_SPARSE_TEST_MODELS") else {
        println!("skipped: CANDLE_SPARSE_TEST_MODELS is not set");
        return Vec::new();
    };
    let all = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    all.filter(|path| path.join("reference.json").is_file()).collect()
}

/// The tokens of a prompt and `n` greedy ones.
fn continued(image: &Image<'_>, mut ids: Vec<u32>, n: usize) -> Vec<u32> {
    let c = image.config();
    let mut layers = vec![empty_layer(); c.num_hidden_layers];
    let model = image.model(&mut layers).unwrap();
    let positions = image.settings().positions;
    let mut kv = vec![0; KvCache::words(&model, positions)];
    let mut data = vec![0.0; Scratch::elements(&model, positions)];
    let mut groups = vec![ActivationGroup::ZERO; Scratch::groups(c)];
    let mut cache = KvCache::new(&model, &mut kv).unwrap();
    let mut scratch = Scratch::new(&model, positions, &mut data, &mut groups).unwrap();
    let mut logits = vec![0.0; c.vocab_size];
    let end = ids.len() + n;
    for position in 0..end - 1 {
        let (at, out) = ((ids[position] as usize, position), Some(logits.as_mut_slice()));
        forward(&Scalar, &model, at, &mut cache, &mut scratch, out, &mut || false).unwrap();
        if position + 1 == ids.len() {
            ids.push(Sampler::Greedy.sample(&mut logits, || 0).unwrap() as u32);
        }
    }
    ids
}

fn prompt(tokenizer: &Tokenizer<'_>, text: &str) -> Vec<u32> {
    let (mut ids, mut ranks) = (vec![0; 256], vec![0; 256]);
    let n = tokenizer.encode_prompt(text, &mut ids, &mut ranks).unwrap();
    ids[..n].to_vec()
}

#[test]
fn an_image_says_what_the_model_says() {
    for model in &EMBEDDED {
        let files = ModelFiles::from_embedded(model);
        let words = exported(&files, &["--dtype", "f32", "--ffn", "dense", "--kv", "f32"]);
        let image = Image::open(bytemuck::cast_slice(&words)).unwrap();
        let ids = prompt(&image.tokenizer().unwrap(), "Once upon a time there was a");
        let got = continued(&image, ids.clone(), 40);
        let options = LoadOptions::default().with_format(Some(candle_sparse::Format::F32));
        let sparse = options.sparse.with_mode(candle_sparse::FfnMode::Dense);
        let model = Pretrained::load(&files, options.with_sparse(sparse)).unwrap();
        let mut cache = Cache::new(true, DType::F32, &model.config, &Device::Cpu).unwrap();
        let mut want = ids.clone();
        let mut next = ids;
        while want.len() < got.len() {
            let input = Tensor::new(next.as_slice(), &Device::Cpu).unwrap().unsqueeze(0).unwrap();
            let logits = model.model.forward(&input, want.len() - next.len(), &mut cache).unwrap();
            next = vec![logits.squeeze(0).unwrap().argmax(0).unwrap().to_scalar().unwrap()];
            want.extend(&next);
        }
        assert_eq!(got, want, "{}", files.name);
    }
}

#[test]
fn budgets_of_heads_go_into_an_image_that_recalls() {
    let files = ModelFiles::from_embedded(&EMBEDDED[0]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse.safetensors");
    let mut profile = files.sparse_profile.as_ref().unwrap().load().unwrap();
    profile.recall_shares = (0..4).map(|layer| vec![0.5 * layer as f32, 0.5]).collect();
    profile.save(&path).unwrap();
    let (given, path) = (profile.recall_shares.clone(), path.display().to_string());
    let shares = |attention: &str| -> Vec<Option<Vec<f32>>> {
        let flags = ["--profile", &path, "--attention", attention, "--window", "32", "--budget", "64"];
        let words = exported(&files, &flags);
        let image = Image::open(bytemuck::cast_slice(&words)).unwrap();
        let mut layers = vec![empty_layer(); image.config().num_hidden_layers];
        let model = image.model(&mut layers).unwrap();
        model.weights().layers.iter().map(|l| l.recall_shares.map(<[f32]>::to_vec)).collect()
    };
    assert_eq!(shares("recall"), given.into_iter().map(Some).collect::<Vec<_>>());
    assert_eq!(shares("gated"), vec![None; 4]);
}

#[test]
fn images_reproduce_independent_references() {
    for path in reference_models() {
        let reference = std::fs::read(path.join("reference.json")).unwrap();
        let reference: serde_json::Value = serde_json::from_slice(&reference).unwrap();
        let ids = |key: &str| -> Vec<u32> { serde_json::from_value(reference[key].clone()).unwrap() };
        let (start, want) = (ids("prompt_ids"), ids("greedy_ids"));
        let files = ModelFiles::from_folder(&path).unwrap();
        let words = exported(&files, &["--dtype", "f32", "--kv", "f32"]);
        let image = Image::open(bytemuck::cast_slice(&words)).unwrap();
        let n = want.len() - start.len();
        assert_eq!(continued(&image, start, n), want, "{}", path.display());
    }
}

/// Neurons that a profile leaves out, gates of attention, tiers: all of it goes through an image and is run.
#[test]
fn every_setting_is_exported() {
    for model in &EMBEDDED {
        let files = ModelFiles::from_embedded(model);
        for ffn in ["auto", "gate", "low-rank", "cascade"] {
            for attention in ["dense", "window", "gated", "recall"] {
                let flags = ["--ffn", ffn, "--attention", attention, "--window", "32", "--budget", "32"];
                let words = exported(&files, &flags);
                let image = Image::open(bytemuck::cast_slice(&words)).unwrap();
                let ids = prompt(&image.tokenizer().unwrap(), "The king said");
                let said = continued(&image, ids, 20);
                assert!(
                    said.iter().all(|id| (*id as usize) < image.config().vocab_size),
                    "{ffn} {attention}"
                );
                assert!(image.config().num_hidden_layers == 4, "{ffn} {attention}");
            }
        }
    }
}

#[test]
fn the_cost_of_a_dense_token_is_every_weight_once() {
    let files = ModelFiles::from_embedded(&EMBEDDED[0]);
    let words = exported(&files, &["--ffn", "dense"]);
    let image = Image::open(bytemuck::cast_slice(&words)).unwrap();
    let work = cost::work(&image, 0.5).unwrap();
    // All parameters but nine norms; the embedding is the head.
    let matrices = f64::from(2_754_816 - 9 * 256);
    assert_eq!([work.multiply_adds, work.head], [matrices, 2048.0 * 256.0]);
    assert_eq!(work.bytes, matrices * 34.0 / 32.0);
    let words = exported(&files, &["--ffn", "cascade"]);
    let less = cost::work(&Image::open(bytemuck::cast_slice(&words)).unwrap(), 0.3).unwrap();
    assert!(less.bytes < 0.85 * work.bytes, "{less:?}");
}
