//! The library draws the tokens that candle draws.
#![allow(clippy::unwrap_used, reason = "tests")]

use candle_core::{Device, Tensor};
use candle_sparse_models::sampling::{Sampler, Sampling};
use candle_transformers::{
    generation::{LogitsProcessor, Sampling as Theirs},
    utils::apply_repeat_penalty,
};

/// Logits without a pattern, many of them alike.
fn logits(n: usize, seed: usize) -> Tensor {
    let values: Vec<f32> = (0..n).map(|i| ((i * 7919 + seed * 104_729) % 997) as f32 / 100.0).collect();
    Tensor::new(values, &Device::Cpu).unwrap()
}

fn all(temperature: f64) -> Sampling {
    Sampling::default()
        .with_temperature(temperature)
        .with_top_k(0)
        .with_top_p(1.0)
        .with_min_p(0.0)
        .with_seed(7)
}

fn draw(ours: &mut Sampler, x: &Tensor, written: &[u32]) -> u32 {
    ours.sample(&x.to_vec1::<f32>().unwrap(), written).unwrap()
}

#[test]
fn tokens_are_those_of_candle() {
    for temperature in [0.3, 1.0, 2.5] {
        let all = all(temperature);
        for (theirs, ours) in [
            (Theirs::All { temperature }, all),
            (Theirs::TopK { k: 40, temperature }, all.with_top_k(40)),
            (Theirs::TopP { p: 0.9, temperature }, all.with_top_p(0.9)),
            (Theirs::TopKThenTopP { k: 40, p: 0.05, temperature }, all.with_top_k(40).with_top_p(0.05)),
            (Theirs::TopKThenTopP { k: 40, p: 0.99, temperature }, all.with_top_k(40).with_top_p(0.99)),
            (Theirs::TopKThenTopP { k: 2000, p: 0.5, temperature }, all.with_top_k(2000).with_top_p(0.5)),
        ] {
            let mut processor = LogitsProcessor::from_sampling(7, theirs.clone());
            let mut sampler = Sampler::new(&ours).unwrap();
            for seed in 0..100 {
                let x = logits(1500, seed);
                assert_eq!(draw(&mut sampler, &x, &[]), processor.sample(&x).unwrap(), "{theirs:?}, {seed}");
            }
        }
    }
    // Of equals the same one.
    for seed in 0..100 {
        let (x, mut theirs) = (logits(1500, seed), LogitsProcessor::from_sampling(7, Theirs::ArgMax));
        let mut ours = Sampler::new(&Sampling::greedy()).unwrap();
        assert_eq!(draw(&mut ours, &x, &[]), theirs.sample(&x).unwrap());
    }
}

#[test]
fn unlikely_tokens_are_left_out_as_by_a_filter() {
    let mut theirs = LogitsProcessor::from_sampling(7, Theirs::TopK { k: 500, temperature: 1.0 });
    let mut ours = Sampler::new(&all(1.0).with_top_k(500).with_min_p(0.7)).unwrap();
    for seed in 0..100 {
        let filter = |p: &mut [f32]| {
            let least = p.iter().fold(0.0_f32, |a, b| a.max(*b)) * 0.7;
            p.iter_mut().filter(|p| **p < least).for_each(|p| *p = 0.0);
        };
        let x = logits(1500, seed);
        assert_eq!(draw(&mut ours, &x, &[]), theirs.sample_f(&x, filter).unwrap());
    }
}

#[test]
fn penalties_are_those_of_candle() {
    let tokens = [3, 7, 7, 49, 50, 1000];
    let mut theirs = LogitsProcessor::from_sampling(7, Theirs::All { temperature: 1.0 });
    let mut ours = Sampler::new(&all(1.0).with_repeat_penalty(1.3)).unwrap();
    for seed in 0..300 {
        let x = (logits(50, seed) - 3.0).unwrap();
        let penalised = apply_repeat_penalty(&x, 1.3, &tokens).unwrap();
        assert_eq!(draw(&mut ours, &x, &tokens), theirs.sample(&penalised).unwrap(), "{seed}");
    }
}
