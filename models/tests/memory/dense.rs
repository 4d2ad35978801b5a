//! Every answer is right with dense attention, whatever the cache keeps.

use crate::synthetic::{
    ask::{Reading, ask, ask_at_once, ids},
    model::{Settings, config, config_json, load, load_with, weights},
    tasks::{Share, Task, count, multi_needle, passkey, variables},
};
use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use candle_sparse_models::llama::{Cache, Llama};
use candle_transformers::models::llama as candle_llama;
use std::time::Instant;

/// Less than any task has, and far more than rounding takes away.
const MARGIN: f32 = 1.0;
const DEPTHS: [f64; 7] = [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0];
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

fn cache(dtype: DType) -> Cache {
    Cache::new(true, dtype, &config(), &Device::Cpu).unwrap()
}

/// The smallest margin of a task.
fn margin(llama: &Llama, dtype: DType, task: &Task) -> f32 {
    let readings = ask(llama, &mut cache(dtype), task).unwrap();
    assert_eq!(readings.len(), task.questions.len());
    smallest(&readings)
}

fn smallest(readings: &[Reading]) -> f32 {
    readings.iter().for_each(|r| assert_eq!(r.got == r.expected, r.margin > 0.0, "{r:?}"));
    readings.iter().map(|r| r.margin).fold(f32::INFINITY, f32::min)
}

fn even(most: f64, other: f64) -> Share {
    Share { most, other, misleading: 0 }
}

#[test]
fn a_passkey_is_found_at_every_depth() {
    let llama = load().unwrap();
    for length in [512, 2048] {
        for (seed, depth) in (0..).zip(DEPTHS) {
            for dtype in if length == 512 { &DTYPES[..] } else { &DTYPES[..2] } {
                let margin = margin(&llama, *dtype, &passkey(length, depth, seed));
                assert!(margin > MARGIN, "{length} tokens, depth {depth}, {dtype:?}: {margin}");
            }
        }
    }
}

#[test]
fn many_needles_and_chains_of_variables_are_found() {
    let llama = load().unwrap();
    for length in [256, 2048] {
        for seed in 0..4 {
            for dtype in &DTYPES[..2] {
                let needles = margin(&llama, *dtype, &multi_needle(length, 8, seed));
                let chains = margin(&llama, *dtype, &variables(length, 6, seed));
                assert!(
                    needles > MARGIN && chains > MARGIN,
                    "{length}, {seed}, {dtype:?}: {needles} {chains}"
                );
            }
        }
    }
}

#[test]
fn the_more_frequent_value_is_known() {
    let llama = load().unwrap();
    for (seed, share) in (0..).zip([
        even(0.3, 0.1),
        even(0.2, 0.15),
        even(0.1, 0.05),
        Share { most: 0.25, other: 0.2, misleading: 512 },
    ]) {
        for dtype in &DTYPES[..2] {
            let margin = margin(&llama, *dtype, &count(2048, share, seed));
            assert!(margin > MARGIN, "{share:?}, {dtype:?}: {margin}");
        }
    }
}

#[test]
fn weaker_heads_find_what_they_seek_too() {
    let llama = load_with(Settings { found_nats: 30.0, outlier: 32.0 }).unwrap();
    for dtype in &DTYPES[..2] {
        for task in [multi_needle(2048, 8, 1), variables(2048, 6, 2)] {
            let margin = margin(&llama, *dtype, &task);
            assert!(margin > MARGIN, "{dtype:?}: {margin}");
        }
    }
}

#[test]
fn one_prompt_says_what_decoding_says() {
    let llama = load().unwrap();
    for task in [passkey(700, 0.3, 1), variables(700, 2, 2), count(700, even(0.2, 0.1), 3)] {
        let decoded = ask(&llama, &mut cache(DType::F32), &task).unwrap();
        let at_once = ask_at_once(&llama, &mut cache(DType::F32), &task).unwrap();
        for (a, b) in decoded.iter().zip(&at_once) {
            assert!(a.got == b.got && (a.margin - b.margin).abs() < 1e-2, "{a:?} {b:?}");
        }
    }
}

#[test]
fn candles_own_llama_says_the_same() {
    let config: candle_llama::LlamaConfig = serde_json::from_str(&config_json()).unwrap();
    let config = config.into_config(false);
    let vb = VarBuilder::from_tensors(weights(Settings::default()).unwrap(), DType::F32, &Device::Cpu);
    let (ours, theirs) = (load().unwrap(), candle_llama::Llama::load(vb, &config).unwrap());
    for task in [passkey(200, 0.3, 1), variables(200, 2, 2), count(200, even(0.2, 0.1), 3)] {
        let x = ids(&task.prompt(0)).unwrap();
        let mut their_cache = candle_llama::Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
        let want = theirs.forward(&x, 0, &mut their_cache).unwrap();
        let got = ours.forward(&x, 0, &mut cache(DType::F32)).unwrap();
        let diff: f32 = (got - want).and_then(|d| d.abs()?.max_all()?.to_scalar()).unwrap();
        assert!(diff < 2e-3, "{diff}");
    }
}

/// Hundreds of GFLOP: run it with `cargo test --release -p candle-sparse-models --test memory -- --ignored --nocapture`.
#[test]
#[ignore = "minutes"]
fn long_contexts_are_remembered() {
    let llama = load().unwrap();
    let report = |what: &str, length: usize, task: &Task| {
        for dtype in &DTYPES[..2] {
            let start = Instant::now();
            let margin = margin(&llama, *dtype, task);
            println!("{length:6} {what:16} {dtype:?}: margin {margin:6.3}, {:.1?}", start.elapsed());
            assert!(margin > MARGIN, "{length} {what} {dtype:?}: {margin}");
        }
    };
    for length in [8192, 16_384] {
        let misled = Share { most: 0.2, other: 0.15, misleading: length / 8 };
        report("misleading count", length, &count(length, misled, 1));
        report("8 needles", length, &multi_needle(length, 8, 2));
        report("6 chains", length, &variables(length, 6, 3));
        for (seed, depth) in (0..).zip(DEPTHS) {
            report(&format!("passkey at {depth}"), length, &passkey(length, depth, seed));
        }
    }
}
