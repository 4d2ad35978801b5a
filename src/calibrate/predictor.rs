//! The best linear prediction of gate and up at a rank: reduced-rank regression under the covariance of the inputs.
//!
//! With `E[xxᵀ] = L·Lᵀ` and `W` the rows of gate and up, each weighted by what an error in it does to the output,
//! `P = Vᵀ·L⁻¹` and `Q = W·L·V`, where V are the first eigenvectors of `Lᵀ·Wᵀ·W·L` (Izenman 1975).

use super::{
    block::{Exact, FfnWeights},
    sample::Moments,
};
use crate::simulate::activated;
use candle_core::{DType, Device, Error, Result, Tensor};
use candle_sparse_kernels::Kernels;
use faer::{Mat, MatRef, Side};

pub(super) struct Predictor {
    /// `[rank, hidden_size]`
    pub(super) p: Tensor,
    /// `[intermediate_size, rank]`
    pub(super) q_gate: Tensor,
    /// `[intermediate_size, rank]`
    pub(super) q_up: Tensor,
}

pub(super) fn fit(
    w: &FfnWeights,
    moments: &Moments,
    exact: &Exact,
    importance: &[f32],
    rank: usize,
) -> Result<Predictor> {
    let (_, hidden) = w.dims()?;
    let (gate_weight, up_weight) = sensitivities(w, exact, importance)?;
    let weighted =
        |m: &Tensor, by: Vec<f32>| m.broadcast_mul(&Tensor::from_vec(by, (m.dim(0)?, 1), m.device())?);
    let square = |m: &Tensor| m.t()?.contiguous()?.matmul(m);
    let mut sum = square(&weighted(&w.gate, gate_weight)?)?;
    if let Some(up) = &w.up {
        sum = (sum + square(&weighted(up, up_weight)?)?)?;
    }
    let square = sum.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    let square = MatRef::from_row_major_slice(&square, hidden, hidden);
    let mean = moments.mean();
    let mean = MatRef::from_row_major_slice(&mean, hidden, hidden);
    let singular =
        |e: &dyn std::fmt::Debug| Error::msg(format!("calibrate: no decomposition of the inputs: {e:?}"));
    let llt = mean.llt(Side::Lower).map_err(|e| singular(&e))?;
    let l = llt.L();
    let inner: Mat<f64> = l.transpose() * square * l;
    let eigen = inner.self_adjoint_eigen(Side::Lower).map_err(|e| singular(&e))?;
    // Eigenvalues come in increasing order.
    let v = eigen.U().subcols(hidden - rank, rank);
    let mut p = v.to_owned();
    faer::linalg::triangular_solve::solve_upper_triangular_in_place(
        l.transpose(),
        p.as_mut(),
        faer::get_global_parallelism(),
    );
    let lv: Mat<f64> = l * v;
    // P = Vᵀ·L⁻¹ is (L⁻ᵀ·V)ᵀ.
    let p = Tensor::from_vec(row_major(p.transpose()), (rank, hidden), &Device::Cpu)?;
    let lv = Tensor::from_vec(row_major(lv.as_ref()), (hidden, rank), &Device::Cpu)?;
    let q_gate = w.gate.matmul(&lv)?;
    // Without a gate there is no up to predict: all of it is variance, whose mean square is 1.
    let q_up = w.up.as_ref().map_or_else(|| q_gate.zeros_like(), |up| up.matmul(&lv))?;
    Ok(Predictor { p, q_gate, q_up })
}

fn row_major(m: MatRef<'_, f64>) -> Vec<f32> {
    (0..m.nrows()).flat_map(|r| (0..m.ncols()).map(move |c| m[(r, c)] as f32)).collect()
}

/// How much an error in a gate and in an up changes the output: `n·√E[(act'(g)·u)²]` and `n·√E[act(g)²]`.
fn sensitivities(w: &FfnWeights, exact: &Exact, importance: &[f32]) -> Result<(Vec<f32>, Vec<f32>)> {
    const STEP: f32 = 1e-2;
    let inner = importance.len();
    let (mut gate, mut up) = (vec![0.0_f64; inner], vec![0.0_f64; inner]);
    let kernels = Kernels::get().map_err(Error::wrap)?;
    let around = |g: &[f32], step: f32| -> Vec<f32> {
        activated(kernels, w.act, &g.iter().map(|g| g + step).collect::<Vec<_>>())
    };
    for (g, u) in exact.gate.chunks_exact(inner).zip(exact.up.chunks_exact(inner)) {
        let (at, above, below) = (around(g, 0.0), around(g, STEP), around(g, -STEP));
        for i in 0..inner {
            let slope = (above[i] - below[i]) / (2.0 * STEP);
            gate[i] += f64::from(slope * u[i]).powi(2);
            up[i] += f64::from(at[i]).powi(2);
        }
    }
    let n = (exact.gate.len() / inner) as f64;
    let scaled = |v: Vec<f64>| v.iter().zip(importance).map(|(v, n_i)| (v / n).sqrt() as f32 * n_i).collect();
    Ok((scaled(gate), scaled(up)))
}
