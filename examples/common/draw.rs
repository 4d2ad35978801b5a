//! The next token from logits, as candle's `LogitsProcessor` draws it: the same seed gives the same tokens. candle-transformers
//! has it, but costs a program that needs nothing else of it two minutes of compiling; a test holds that both draw the same.

use anyhow::Result;
use candle_core::{D, Tensor};
use rand::{
    SeedableRng,
    distr::{Distribution, weighted::WeightedIndex},
    rngs::StdRng,
};
use std::collections::HashSet;

/// Which tokens may be drawn.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Among {
    /// The k most likely ones; as many as there are, or more: all.
    pub(crate) k: usize,
    /// Of these the smallest set with this total probability; 1: all of them.
    pub(crate) p: f32,
    /// Of these those that have at least this share of the most likely one's probability.
    pub(crate) min_p: f32,
}

/// Draws tokens.
pub(crate) struct Drawer {
    /// Divides the logits; 0: the most likely token always.
    temperature: f64,
    among: Among,
    random: StdRng,
}

impl Drawer {
    pub(crate) fn new(temperature: f64, among: Among, seed: u64) -> Self {
        Self { temperature, among, random: StdRng::seed_from_u64(seed) }
    }

    /// A token by its logits `[vocab_size]`, F32.
    pub(crate) fn draw(&mut self, logits: &Tensor) -> Result<u32> {
        if self.temperature == 0.0 {
            return Ok(logits.argmax(D::Minus1)?.to_scalar()?);
        }
        let mut probabilities = candle_nn::ops::softmax_last_dim(&(logits / self.temperature)?)?.to_vec1()?;
        let Among { k, p, min_p } = self.among;
        let least = probabilities.iter().fold(0.0_f32, |a, b| a.max(*b)) * min_p;
        probabilities.iter_mut().filter(|p| **p < least).for_each(|p| *p = 0.0);
        let ids = largest(&probabilities, k);
        let mut of_ids: Vec<f32> = ids.iter().map(|&i| probabilities[i]).collect();
        if p < 1.0 && (ids.len() == probabilities.len() || p < of_ids.iter().sum()) {
            keep_sum(&mut of_ids, p);
        }
        Ok(ids[WeightedIndex::new(&of_ids)?.sample(&mut self.random)] as u32)
    }
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
pub(crate) fn penalise(logits: &Tensor, penalty: f32, tokens: &[u32]) -> Result<Tensor> {
    let mut values = logits.to_vec1::<f32>()?;
    for token in tokens.iter().collect::<HashSet<_>>() {
        if let Some(logit) = values.get_mut(*token as usize) {
            *logit = if *logit >= 0.0 { *logit / penalty } else { *logit * penalty };
        }
    }
    Ok(Tensor::from_vec(values, logits.shape(), logits.device())?)
}
