//! A profile for random weights: the work of a real one, with a stated model of activity.
//!
//! Nothing is learned from random weights, so the profile is drawn: P and Q at random, thresholds such that neuron i is
//! active with probability p_i, independently of the others. What decides is computed as always: the prediction, its
//! scores, the exact gates.
//!
//! - skewed: p falls as a power of the neuron's rank such that 43 % of the neurons hold 80 % of all activity, as PowerInfer
//!   reports of a gated 70B model (<https://arxiv.org/abs/2312.12456>); the most active stand first.
//! - uniform: p is the same for all, the worst case.
//!
//! Exact zeros need no profile. Random weights open half of all gates, so a `gate_shift` is taken off what is activated, such that a
//! normal number of its deviation passes with the probability that was asked for: the same for all neurons, the worst case.

use super::source::WIDTH;
use anyhow::Result;
use candle_nn::VarBuilder;
use candle_sparse::{
    profile::{LayerProfile, LayerRule, Profile, fingerprint},
    sparse::FfnMode,
};
use candle_sparse_core::{Activation, kernel::activation};
use candle_sparse_models::llama::Config;
use clap::ValueEnum;

/// How activity is spread over the neurons.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activity {
    /// 43 % of the neurons hold 80 % of the activity
    Skewed,
    /// All neurons are equally active
    Uniform,
}

/// Candidates of a cascade per active neuron.
const CANDIDATES: f32 = 1.4;
/// A neuron that is active so often is computed always.
const HOT: f32 = 0.9;
/// ln 0.8 / ln 0.43 = 1 − exponent.
const EXPONENT: f32 = 0.736;
/// Draws that the distribution of a score is taken from.
const DRAWS: usize = 1 << 16;

/// Numbers of standard deviation 1.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        // The sum of four uniform numbers is normal enough.
        let mut sum = 0.0;
        for _ in 0..4 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            sum += (self.0 >> 40) as f32 / (1 << 24) as f32 - 0.5;
        }
        sum * 3.0_f32.sqrt()
    }

    fn take(&mut self, n: usize, deviation: f32) -> Vec<f32> {
        (0..n).map(|_| self.next() * deviation).collect()
    }
}

/// The probability of each of `n` neurons to be active, whose mean is `share`.
fn probabilities(activity: Activity, n: usize, share: f32) -> Vec<f32> {
    let spread = |scale: f32| -> Vec<f32> {
        let p = |i: usize| match activity {
            Activity::Uniform => scale,
            Activity::Skewed => scale * ((i as f32 + 0.5) / n as f32).powf(-EXPONENT),
        };
        (0..n).map(|i| p(i).min(1.0)).collect()
    };
    let (mut low, mut high) = (0.0, 2.0);
    for _ in 0..40 {
        let middle = (low + high) / 2.0;
        let mean = spread(middle).iter().sum::<f32>() / n as f32;
        if mean < share { low = middle } else { high = middle }
    }
    spread(high)
}

/// What a score of standard normal numbers exceeds with probability `p`.
struct Quantiles(Vec<f32>);

impl Quantiles {
    fn new(mut score: impl FnMut(&mut Noise) -> f32) -> Self {
        let mut noise = Noise(0x1234_5678_9abc_def1);
        let mut draws: Vec<f32> = (0..DRAWS).map(|_| score(&mut noise)).collect();
        draws.sort_by(|a, b| b.total_cmp(a));
        Self(draws)
    }

    fn at(&self, p: f32) -> f32 {
        self.0[((p * DRAWS as f32) as usize).min(DRAWS - 1)].max(1e-6)
    }
}

/// What the drawn profile is to make of the model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Drawn {
    pub(crate) ffn: Ffn,
    pub(crate) activity: Activity,
    pub(crate) share: f32,
    pub(crate) rank: usize,
    /// Of the shape.
    pub(crate) hidden_size: usize,
}

/// What chooses the neurons.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ffn {
    /// All gates are computed and choose
    Gate,
    /// The prediction chooses
    LowRank,
    /// The prediction names candidates, their gates choose
    Cascade,
    /// What the activation does not shut: for shapes whose activation gives exact zeros
    ExactZero,
}

impl From<Ffn> for FfnMode {
    fn from(ffn: Ffn) -> Self {
        match ffn {
            Ffn::Gate => Self::Gate,
            Ffn::LowRank => Self::LowRank,
            Ffn::Cascade => Self::Cascade,
            Ffn::ExactZero => Self::ExactZero,
        }
    }
}

impl Drawn {
    /// What is taken off the gates so that the share of exact zeros is the one that was asked for; 0 for a profile.
    pub(crate) fn gate_shift(self) -> f32 {
        if self.ffn != Ffn::ExactZero {
            return 0.0;
        }
        // A norm makes its output's mean square 1, so a row of uniform weights gives a normal number of this deviation.
        let deviation = WIDTH * (self.hidden_size as f32 / 12.0).sqrt();
        deviation * Quantiles::new(Noise::next).at(self.share)
    }

    /// A profile with one point.
    pub(crate) fn profile(self, vb: &VarBuilder<'_>, c: &Config) -> Result<Profile> {
        let Self { ffn, activity, share, rank, hidden_size: _ } = self;
        let (inner, hidden) = (c.intermediate_size, c.hidden_size);
        let p = probabilities(activity, inner, share);
        let alpha = |g: f32| activation::apply(Activation::Silu, g, 1.0).abs();
        let wanted: Vec<f32> = match ffn {
            Ffn::Cascade => p.iter().map(|p| (p * CANDIDATES).min(1.0)).collect(),
            _ => p.clone(),
        };
        let scores = match ffn {
            Ffn::Gate => Quantiles::new(|n| alpha(n.next())),
            _ => Quantiles::new(|n| alpha(n.next()) * n.next().abs()),
        };
        // A neuron's importance is what makes it pass a threshold of 1 as often as it is to be active.
        let importance: Vec<f32> = wanted.iter().map(|&p| 1.0 / scores.at(p)).collect();
        let hot = p.iter().take_while(|&&p| p >= HOT).count() as u32;
        let rule = |candidate: f32, keep: f32| LayerRule {
            candidate: vec![candidate],
            keep: vec![keep],
            share: vec![share],
            hot: vec![hot],
            bias: vec![0.0; hidden],
        };
        let layer = |l: usize| {
            let mut noise = Noise(0x9e37_79b9_7f4a_7c15 ^ (l as u64 + 1));
            LayerProfile {
                order: (0..inner as u32).collect(),
                rank,
                p: noise.take(rank * hidden, (hidden as f32).powf(-0.5)),
                q_gate: noise.take(inner * rank, (rank as f32).powf(-0.5)),
                q_up: noise.take(inner * rank, (rank as f32).powf(-0.5)),
                gate_variance: vec![0.0; inner],
                up_variance: vec![0.0; inner],
                up_square: vec![1.0; inner],
                importance: importance.clone(),
                rules: [rule(0.0, 1.0), rule(1.0, 0.0), rule(1.0, 0.3)],
            }
        };
        Ok(Profile {
            layers: (0..c.num_hidden_layers).map(layer).collect(),
            shares: vec![share],
            gates: Vec::new(),
            recall_shares: Vec::new(),
            fitted: [0; 3],
            held_out: Default::default(),
            fingerprint: fingerprint(vb, c.num_hidden_layers, hidden, inner)?,
            about: serde_json::Value::Null,
        })
    }
}
