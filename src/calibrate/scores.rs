//! Gates, ups and scores of every neuron at every sampled token, `[tokens, intermediate_size]`.

use super::{
    block::{Exact, FfnWeights, gated, product},
    predictor::Predictor,
};
use crate::simulate::expected_squares;
use candle_core::{Error, Result, Tensor};
use candle_sparse_kernels::Kernels;
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
        let (inner, kernels) = (importance.len(), Kernels::get().map_err(Error::wrap)?);
        let z = x.matmul(&p.p.t()?)?;
        let (gate_hat, up_hat) = (product(&z, &p.q_gate)?, product(&z, &p.q_up)?);
        let gate_variance = mean_square(inner, &exact.gate, Some(&gate_hat));
        let up_variance = mean_square(inner, &exact.up, Some(&up_hat));
        let up_square = mean_square(inner, &exact.up, None);
        let mut cascade = gated(w.act, &exact.gate, vec![1.0; exact.gate.len()])?;
        let value = gated(w.act, &exact.gate, exact.up)?;
        let mut gate = cascade.clone();
        let up_size: Vec<f32> = up_square.iter().zip(&importance).map(|(u, n)| u.sqrt() * n).collect();
        by_rows(inner, &mut gate, |_, alpha| {
            alpha.iter_mut().zip(&up_size).for_each(|(a, u)| *a = a.abs() * u);
        });
        let mut expected = up_hat;
        by_rows(inner, &mut expected, |_, up| {
            let missed = up_variance.iter().zip(&importance);
            up.iter_mut().zip(missed).for_each(|(u, (v, n))| *u = (u.powi(2) + v).sqrt() * n);
        });
        by_rows(inner, &mut cascade, |t, alpha| {
            let expected = &expected[t * inner..(t + 1) * inner];
            alpha.iter_mut().zip(expected).for_each(|(a, u)| *a = a.abs() * u);
        });
        let deviation: Vec<f32> = gate_variance.iter().map(|v| v.sqrt()).collect();
        let mut predicted = expected;
        by_rows(inner, &mut predicted, |t, up| {
            let gates = &gate_hat[t * inner..(t + 1) * inner];
            let squares = expected_squares(kernels, w.act, gates, &deviation);
            up.iter_mut().zip(squares).for_each(|(u, s)| *u *= s.sqrt());
        });
        Ok(Self { inner, value, cascade, gate, predicted, gate_variance, up_variance, up_square, importance })
    }

    /// Sampled tokens.
    pub(super) fn tokens(&self) -> usize {
        self.value.len() / self.inner
    }
}

/// Calls `f` with each token and its row.
fn by_rows(inner: usize, rows: &mut [f32], f: impl Fn(usize, &mut [f32]) + Sync) {
    rows.par_chunks_mut(inner).enumerate().for_each(|(t, row)| f(t, row));
}

/// Mean over the tokens of `(x − y)²`, per neuron; y is 0 where it is not given.
fn mean_square(inner: usize, x: &[f32], y: Option<&[f32]>) -> Vec<f32> {
    let mut sums = vec![0.0_f64; inner];
    for (t, row) in x.chunks_exact(inner).enumerate() {
        match y.map(|y| &y[t * inner..(t + 1) * inner]) {
            None => sums.iter_mut().zip(row).for_each(|(s, x)| *s += f64::from(*x).powi(2)),
            Some(y) => {
                let missed = row.iter().zip(y).map(|(x, y)| f64::from(x - y));
                sums.iter_mut().zip(missed).for_each(|(s, missed)| *s += missed.powi(2));
            }
        }
    }
    let n = (x.len() / inner).max(1) as f64;
    sums.iter().map(|s| (s / n) as f32).collect()
}
