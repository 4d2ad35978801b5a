//! Gates, ups and scores of every neuron at every sampled token, `[tokens, intermediate_size]`.

use super::{
    block::{Exact, FfnWeights, gated, product},
    predictor::Predictor,
};
use candle_core::{Result, Tensor};
use candle_sparse_core::{
    GluActivation,
    kernel::{activation, select},
};
use rayon::prelude::*;

pub(super) struct Scores {
    pub(super) inner: usize,
    /// `act(g) · u`
    pub(super) value: Vec<f32>,
    /// What decides in a cascade: `|act(g)|·√(û² + v_u)·n`.
    pub(super) cascade: Vec<f32>,
    /// What decides by gates alone: `|act(g)|·√E[u²]·n`.
    pub(super) gate: Vec<f32>,
    /// What is predicted: `√(E[act(g)²]·(û² + v_u))·n`.
    pub(super) predicted: Vec<f32>,
    pub(super) gate_variance: Vec<f32>,
    pub(super) up_variance: Vec<f32>,
    pub(super) up_square: Vec<f32>,
    pub(super) importance: Vec<f32>,
}

impl Scores {
    pub(super) fn new(
        w: &FfnWeights,
        x: &Tensor,
        exact: Exact,
        p: &Predictor,
        importance: Vec<f32>,
    ) -> Result<Self> {
        let inner = importance.len();
        let z = x.matmul(&p.p.t()?)?;
        let (gate_hat, up_hat) = (product(&z, &p.q_gate)?, product(&z, &p.q_up)?);
        let one = |_: usize| 1.0;
        let alpha = gated(w.act, &exact.gate, one);
        let value = gated(w.act, &exact.gate, |i| exact.up[i]);
        let gate_variance = mean_square(inner, &exact.gate, |i| gate_hat[i]);
        let up_variance = mean_square(inner, &exact.up, |i| up_hat[i]);
        let up_square = mean_square(inner, &exact.up, |_| 0.0);
        let expected = |i: usize| (up_hat[i].powi(2) + up_variance[i % inner]).sqrt() * importance[i % inner];
        let all = |f: &(dyn Fn(usize) -> f32 + Sync)| (0..alpha.len()).into_par_iter().map(f).collect();
        Ok(Self {
            cascade: all(&|i| alpha[i].abs() * expected(i)),
            gate: all(&|i| alpha[i].abs() * up_square[i % inner].sqrt() * importance[i % inner]),
            predicted: all(&|i| {
                expected_square(w.act, gate_hat[i], gate_variance[i % inner]).sqrt() * expected(i)
            }),
            inner,
            value,
            gate_variance,
            up_variance,
            up_square,
            importance,
        })
    }

    /// Sampled tokens.
    pub(super) fn tokens(&self) -> usize {
        self.value.len() / self.inner
    }
}

/// Mean over the tokens of `(x − y)²`, per neuron.
fn mean_square(inner: usize, x: &[f32], y: impl Fn(usize) -> f32) -> Vec<f32> {
    let mut sums = vec![0.0_f64; inner];
    for (t, row) in x.chunks_exact(inner).enumerate() {
        for (i, (s, x)) in sums.iter_mut().zip(row).enumerate() {
            *s += f64::from(x - y(t * inner + i)).powi(2);
        }
    }
    let n = (x.len() / inner).max(1) as f64;
    sums.iter().map(|s| (s / n) as f32).collect()
}

/// E[act(g)²] of a gate around `gate_hat`: the mean at one deviation below and above.
fn expected_square(act: GluActivation, gate_hat: f32, variance: f32) -> f32 {
    let deviation = variance.sqrt();
    let at = |g: f32| activation::apply(act.act, g - act.shift, 1.0);
    select::expected_square(at(gate_hat - deviation), at(gate_hat + deviation))
}
