//! The next token as candle's `LogitsProcessor` draws it; candle-transformers has it, but costs a program that needs nothing else of
//! it two minutes of compiling. A test holds that both draw the same.

use candle_core::{Device, Error, Result, Tensor};
use rand::{
    SeedableRng,
    distr::{Distribution, weighted::WeightedIndex},
    rngs::StdRng,
};
use std::collections::HashSet;

/// Which tokens may be drawn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Among {
    /// The k most likely ones; as many as there are, or more: all.
    pub(super) k: usize,
    /// Of these the smallest set with this total probability; 1: all of them.
    pub(super) p: f32,
    /// Of these those that have at least this share of the most likely one's probability.
    pub(super) min_p: f32,
}

/// Draws tokens.
#[derive(Clone, Debug)]
pub(super) struct Drawer {
    /// Divides the logits; 0: the most likely token always.
    temperature: f64,
    among: Among,
    random: StdRng,
}

impl Drawer {
    pub(super) fn new(temperature: f64, among: Among, seed: u64) -> Self {
        Self { temperature, among, random: StdRng::seed_from_u64(seed) }
    }

    /// A token by its logits `[vocab_size]`, which are numbers.
    pub(super) fn draw(&mut self, logits: &[f32]) -> Result<u32> {
        if self.temperature == 0.0 {
            return Ok(most_likely(logits));
        }
        let mut probabilities = probabilities(logits, self.temperature)?;
        let Among { k, p, min_p } = self.among;
        let least = probabilities.iter().fold(0.0_f32, |a, b| a.max(*b)) * min_p;
        probabilities.iter_mut().filter(|p| **p < least).for_each(|p| *p = 0.0);
        let ids = largest(&probabilities, k);
        let mut of_ids: Vec<f32> = ids.iter().map(|&i| probabilities[i]).collect();
        if p < 1.0 && (ids.len() == probabilities.len() || p < of_ids.iter().sum()) {
            keep_sum(&mut of_ids, p);
        }
        Ok(ids[WeightedIndex::new(&of_ids).map_err(Error::wrap)?.sample(&mut self.random)] as u32)
    }
}

/// The first of the largest.
fn most_likely(logits: &[f32]) -> u32 {
    let first = |best: usize, i: usize| if logits[i] > logits[best] { i } else { best };
    (0..logits.len()).fold(0, first) as u32
}

/// `softmax(logits / temperature)` with candle's bits.
fn probabilities(logits: &[f32], temperature: f64) -> Result<Vec<f32>> {
    let logits = Tensor::from_slice(logits, logits.len(), &Device::Cpu)?;
    candle_nn::ops::softmax_last_dim(&(logits / temperature)?)?.to_vec1()
}

/// The indices of the `k` largest, in no order; all, in order, where there are no more.
fn largest(values: &[f32], k: usize) -> Vec<usize> {
    let mut indices: Vec<usize> = (0..values.len()).collect();
    if k < values.len() {
        indices.select_nth_unstable_by(k, |&i, &j| values[j].total_cmp(&values[i]));
        indices.truncate(k);
    }
    indices
}

/// Sets to 0 what is not among the largest that sum to `sum`.
fn keep_sum(values: &mut [f32], sum: f32) {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[j].total_cmp(&values[i]));
    let mut reached = 0.0;
    for i in order {
        if reached >= sum {
            values[i] = 0.0;
        } else {
            reached += values[i];
        }
    }
}

/// Divides the logits of `tokens` by `penalty`, and multiplies those below 0 (Keskar et al. 2019).
pub(super) fn penalise(logits: &mut [f32], penalty: f32, tokens: &[u32]) {
    for token in tokens.iter().collect::<HashSet<_>>() {
        if let Some(logit) = logits.get_mut(*token as usize) {
            *logit = if *logit >= 0.0 { *logit / penalty } else { *logit * penalty };
        }
    }
}
