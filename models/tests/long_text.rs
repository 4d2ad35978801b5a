//! A text that goes on for very long: every logit is a number, memory has a bound, and the model is the one it was at the beginning.
//!
//! 3000 tokens; `CANDLE_SPARSE_TEST_TOKENS=100000` asks for more.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests")]

use candle_sparse_models::{
    AttentionConfig, AttentionMode, KvConfig, KvDType, Threads,
    files::ModelFiles,
    llama::{Cache, Llama, LoadOptions},
    pretrained::{Pretrained, var_builder},
    sampling::{Sampler, Sampling},
};
use std::path::Path;

/// Positions that a token sees.
const WINDOW: usize = 128;
/// More than what a token sees by way of all four layers.
const PAST: usize = 5 * WINDOW;
const PAGE: usize = 32;

fn tokens() -> usize {
    std::env::var("CANDLE_SPARSE_TEST_TOKENS").map_or(3000, |n| n.parse().unwrap())
}

/// The built-in model with a longer context.
fn model(window: Option<usize>) -> Llama {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
    let mut files = ModelFiles::from_folder(folder).unwrap();
    files.sparse_profile = None;
    let options = LoadOptions::default().with_threads(Threads::new(1).ok());
    let mut config = Pretrained::load(&files, options.clone()).unwrap().config;
    config.max_position_embeddings = tokens() + 1;
    config.sliding_window = window;
    Llama::load_with(var_builder(&files, None).unwrap(), &config, options).unwrap()
}

fn tiny_tiers() -> KvConfig {
    KvConfig::tiered().with_hot(40).with_warm(100)
}

/// Writes so many tokens; `look` sees the text, the logits of what follows it, and the cache.
fn write(model: &Llama, kv: KvConfig, mut look: impl FnMut(&[u32], &[f32], &Cache)) {
    let (mut text, mut cache) = (vec![0_u32], Cache::of(model, kv));
    let mut logits = vec![0.0; model.decoder().config().vocab_size];
    let mut sampler = Sampler::new(&Sampling::default().with_temperature(1.0).with_seed(7)).unwrap();
    while text.len() <= tokens() {
        model.decode(text[text.len() - 1], text.len() - 1, &mut cache, &mut logits).unwrap();
        assert!(logits.iter().all(|logit| logit.is_finite()), "after {} tokens", text.len());
        look(&text, &logits, &cache);
        let next = sampler.sample(&logits, &text).unwrap();
        text.push(next);
    }
}

/// The logits after the end of a text, where what is before it was never read.
fn afresh(model: &Llama, kv: KvConfig, text: &[u32]) -> Vec<f32> {
    // Pages begin where they began.
    let start = (text.len() - PAST) / PAGE * PAGE;
    let mut cache = Cache::of(model, kv);
    let mut logits = vec![0.0; model.decoder().config().vocab_size];
    for (position, token) in text[start..].iter().enumerate() {
        model.decode(*token, position, &mut cache, &mut logits).unwrap();
    }
    logits
}

/// How much worse one distribution foretells what the other one says, nats.
fn divergence(a: &[f32], b: &[f32]) -> f64 {
    let log_probabilities = |logits: &[f32]| -> Vec<f64> {
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|x| f64::from(x - most).exp()).sum();
        logits.iter().map(|x| f64::from(x - most) - sum.ln()).collect()
    };
    let (a, b) = (log_probabilities(a), log_probabilities(b));
    a.iter().zip(&b).map(|(a, b)| a.exp() * (a - b)).sum()
}

/// Over a gliding window the last token knows nothing of what has left it, so a cache that never held it must say the same.
#[test]
fn nothing_adds_up_over_a_gliding_window() {
    let (model, n) = (model(Some(WINDOW)), tokens());
    for (name, kv, most) in [("exact", KvConfig::exact(KvDType::F32), 1e-4), ("tiers", tiny_tiers(), 0.05)] {
        let (mut differences, mut bytes) = (Vec::new(), Vec::new());
        write(&model, kv, |text, logits, cache| {
            if text.len() >= 1000 && text.len() % (n / 40) == 0 {
                differences.push(divergence(logits, &afresh(&model, kv, text)));
                bytes.push(cache.kv().bytes());
            }
        });
        let tenth = differences.len() / 5;
        let mean = |all: &[f64]| all.iter().sum::<f64>() / all.len() as f64;
        let (first, last) = (mean(&differences[..tenth]), mean(&differences[differences.len() - tenth..]));
        let (least, largest) = (bytes.iter().min().unwrap(), bytes.iter().max().unwrap());
        println!(
            "{name}: {n} tokens, divergence {first:.1e} at first, {last:.1e} at last, {least} to {largest} bytes"
        );
        assert!(first < most && last < most, "{name}: {differences:?}");
        assert!(
            *largest < 2 * model.decoder().config().num_hidden_layers * 2 * (WINDOW + 2 * PAGE) * 64 * 4,
            "{largest} bytes"
        );
    }
}

/// Where all positions are kept, what they take is known before.
#[test]
fn what_is_kept_of_all_positions_is_what_was_said() {
    let attention = AttentionConfig::new(AttentionMode::Recall).with_window(64).with_budget(96);
    let model = model(None).with_attention(attention).unwrap();
    write(&model, tiny_tiers(), |text, _, cache| {
        // Beside what has settled a few hot pages of each layer at most.
        let said = cache.kv().bytes_at(1, text.len()) + 3 * cache.kv().bytes_at(1, PAGE);
        assert!(cache.kv().bytes() <= said, "{} bytes at {}", cache.kv().bytes(), text.len());
    });
}
