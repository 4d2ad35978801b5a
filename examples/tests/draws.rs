//! The programs draw the tokens that candle draws.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../common/draw.rs"]
mod draw;

use candle_core::{Device, Tensor};
use candle_transformers::{
    generation::{LogitsProcessor, Sampling},
    utils::apply_repeat_penalty,
};
use draw::{Among, Drawer, penalise};

/// Logits without a pattern, many of them alike.
fn logits(n: usize, seed: usize) -> Tensor {
    let values: Vec<f32> = (0..n).map(|i| ((i * 7919 + seed * 104_729) % 997) as f32 / 100.0).collect();
    Tensor::new(values, &Device::Cpu).unwrap()
}

#[test]
fn tokens_are_those_of_candle() {
    const ALL: Among = Among { k: usize::MAX, p: 1.0, min_p: 0.0 };
    for temperature in [0.3, 1.0, 2.5] {
        for (sampling, among) in [
            (Sampling::All { temperature }, ALL),
            (Sampling::TopK { k: 40, temperature }, Among { k: 40, ..ALL }),
            (Sampling::TopP { p: 0.9, temperature }, Among { p: 0.9, ..ALL }),
            (Sampling::TopKThenTopP { k: 40, p: 0.05, temperature }, Among { k: 40, p: 0.05, ..ALL }),
            (Sampling::TopKThenTopP { k: 40, p: 0.99, temperature }, Among { k: 40, p: 0.99, ..ALL }),
            (Sampling::TopKThenTopP { k: 2000, p: 0.5, temperature }, Among { k: 2000, p: 0.5, ..ALL }),
        ] {
            let mut theirs = LogitsProcessor::from_sampling(7, sampling.clone());
            let mut ours = Drawer::new(temperature, among, 7);
            for seed in 0..100 {
                let x = logits(1500, seed);
                assert_eq!(ours.draw(&x).unwrap(), theirs.sample(&x).unwrap(), "{sampling:?}, {seed}");
            }
        }
    }
    let (x, mut theirs) = (logits(1500, 1), LogitsProcessor::from_sampling(7, Sampling::ArgMax));
    assert_eq!(Drawer::new(0.0, ALL, 7).draw(&x).unwrap(), theirs.sample(&x).unwrap());
}

#[test]
fn unlikely_tokens_are_left_out_as_by_a_filter() {
    let sampling = Sampling::TopK { k: 500, temperature: 1.0 };
    let mut theirs = LogitsProcessor::from_sampling(3, sampling);
    let mut ours = Drawer::new(1.0, Among { k: 500, p: 1.0, min_p: 0.7 }, 3);
    for seed in 0..100 {
        let filter = |p: &mut [f32]| {
            let least = p.iter().fold(0.0_f32, |a, b| a.max(*b)) * 0.7;
            p.iter_mut().filter(|p| **p < least).for_each(|p| *p = 0.0);
        };
        let x = logits(1500, seed);
        assert_eq!(ours.draw(&x).unwrap(), theirs.sample_f(&x, filter).unwrap());
    }
}

#[test]
fn penalties_are_those_of_candle() {
    let (x, tokens) = ((logits(50, 1) - 3.0).unwrap(), [3, 7, 7, 49, 50, 1000]);
    let ours = penalise(&x, 1.3, &tokens).unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(ours, apply_repeat_penalty(&x, 1.3, &tokens).unwrap().to_vec1::<f32>().unwrap());
}
