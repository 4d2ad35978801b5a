//! The operations, each defined once by a scalar function, and the contract every implementation keeps.

pub mod activation;
pub mod fast_grnn;
pub mod matmul;
pub mod quantize;
pub mod rms_norm;
pub mod rope;
pub mod select;
pub mod softmax;
pub mod sparse_ffn;
mod special;
pub mod vector;

use crate::{
    config::Activation,
    format::ActivationGroup,
    matrix::{Columns, Matrix},
};
pub use sparse_ffn::{GluActivation, Neurons};

/// One implementation of every operation; [`Scalar`] is the definition, SIMD levels agree with it within rounding.
///
/// An operation that an implementation leaves out is the scalar one.
///
/// Shape mistakes are programming errors and panic. A row or a column computed alone equals the same one computed among
/// others, bit for bit.
pub trait KernelSet {
    /// `y[c][r] = Σ_k w[r, k] · x[c, k]`: a matvec for one column, a matmul for several.
    ///
    /// `w` is `[rows, cols]`, `x` is `[n, cols]` in the form `w`'s format wants, `y` holds `n` slices of `rows`.
    /// Cost: `n · rows · cols` multiply-adds; `w` is read about once from memory.
    fn matmul(&self, w: Matrix<'_>, x: Columns<'_>, y: &mut [&mut [f32]]) {
        matmul::matmul(w, x, y);
    }

    /// `y[c][k] += Σ_r a[c][r] · w[r, k]`: attention's weighted sum of values, `n` columns at once.
    ///
    /// `w` is `[rows, cols]`, each `a[c]` has `rows` and each `y[c]` has `cols` elements.
    /// Cost: `n · rows · cols` multiply-adds.
    fn matmul_t(&self, w: Matrix<'_>, a: &[&[f32]], y: &mut [&mut [f32]]) {
        matmul::matmul_t(w, a, y);
    }

    /// `y[i] = Σ_k w[rows[i], k] · x[k]` for one column `x` and strictly increasing `rows`.
    ///
    /// Bits equal those of [`Self::matmul`] with that column. Cost: `rows · cols` multiply-adds, the bytes of the rows.
    fn matvec_rows(&self, w: Matrix<'_>, rows: &[u32], x: Columns<'_>, y: &mut [f32]) {
        sparse_ffn::matvec_rows(w, rows, x, y);
    }

    /// `y[k] += Σ_i a[i] · w[rows[i], k]` for strictly increasing `rows`, added in their order.
    ///
    /// Cost: `rows · cols` multiply-adds, the bytes of the rows.
    fn axpy_rows(&self, w: Matrix<'_>, rows: &[u32], a: &[f32], y: &mut [f32]) {
        sparse_ffn::axpy_rows(w, rows, a, y);
    }

    /// The FFN of the `active` neurons: `y += Σ_n act(g_n − shift) · (up_n · x) · down_n`.
    ///
    /// `gate[i]` is `g` of neuron `active[i]`: given for [`Neurons::UpDown`], written as `gate_n · x` for
    /// [`Neurons::GateUpDown`]; for [`Neurons::Down`] it is `up_n · x`, given, and the product is `act(g_n − shift)` alone. `x` is one column of `hidden_size`, `y` has `hidden_size` elements. Neurons are added in
    /// order. Cost: 2 or 3 rows of multiply-adds and bytes per neuron, read one after the other.
    fn sparse_ffn(
        &self,
        w: Neurons<'_>,
        act: GluActivation,
        active: &[u32],
        x: Columns<'_>,
        gate: &mut [f32],
        y: &mut [f32],
    ) {
        sparse_ffn::sparse_ffn(w, act, active, x, gate, y);
    }

    /// `Σ x[i] · y[i]`.
    fn dot(&self, x: &[f32], y: &[f32]) -> f32 {
        vector::dot(x, y)
    }

    /// `y[i] += alpha · x[i]`.
    fn axpy(&self, alpha: f32, x: &[f32], y: &mut [f32]) {
        vector::axpy(alpha, x, y);
    }

    /// `y[i] = x[i] / √(mean(x²) + eps) · weight[i]` (Zhang and Sennrich 2019).
    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
        rms_norm::rms_norm(x, weight, eps, y);
    }

    /// Softmax in place: `x[i] ← e^(x[i] − max) / Σ e^(x[j] − max)`; an empty slice stays empty.
    fn softmax(&self, x: &mut [f32]) {
        softmax::softmax(x);
    }

    /// One piece of a softmax: `max = max(max_before, x)`, `x[i] ← e^(x[i] − max)`; returns `max` and the new `x`'s sum.
    fn exp_sum(&self, x: &mut [f32], max_before: f32) -> (f32, f32) {
        softmax::exp_sum(x, max_before)
    }

    /// `y[i] = act(gate[i] − gate_shift) · y[i]`, where `y` enters holding *up*, or ones for an FFN without a gate.
    fn gated(&self, act: Activation, gate_shift: f32, gate: &[f32], y: &mut [f32]) {
        activation::gated(act, gate_shift, gate, y);
    }

    /// Rounds one column `x` (a multiple of 32 elements) for an integer product; see [`ActivationGroup`].
    fn quantize(&self, x: &[f32], groups: &mut [ActivationGroup]) {
        quantize::quantize(x, groups);
    }
}

/// The definition of every operation, in plain Rust.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scalar;

impl KernelSet for Scalar {}
