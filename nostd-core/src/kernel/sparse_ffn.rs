//! Products with some rows of a matrix, and the FFN of some neurons.

use crate::{
    config::Activation,
    kernel::{activation, matmul},
    matrix::{Columns, Matrix},
};

/// The neurons of an FFN with their rows side by side in one matrix, because a gathered byte costs more than a streamed
/// one and long runs are the cure.
#[derive(Clone, Copy, Debug)]
pub enum Neurons<'a> {
    /// `[3 · intermediate_size, hidden_size]`: gate, up and down row of each neuron.
    GateUpDown(Matrix<'a>),
    /// `[2 · intermediate_size, hidden_size]`: up and down row of each neuron; the gate is computed elsewhere.
    UpDown(Matrix<'a>),
    /// `[intermediate_size, hidden_size]`: down row of each neuron of an FFN without a gate; up, which the activation takes, is
    /// computed elsewhere in the place of gates.
    Down(Matrix<'a>),
}

impl<'a> Neurons<'a> {
    /// The matrix.
    #[must_use]
    pub fn matrix(&self) -> Matrix<'a> {
        match *self {
            Self::GateUpDown(w) | Self::UpDown(w) | Self::Down(w) => w,
        }
    }

    /// Rows per neuron.
    #[must_use]
    pub fn rows_per_neuron(&self) -> usize {
        match self {
            Self::GateUpDown(_) => 3,
            Self::UpDown(_) => 2,
            Self::Down(_) => 1,
        }
    }

    /// How many neurons there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.matrix().rows() / self.rows_per_neuron()
    }
}

/// The activation of a gate and what is taken off the gate before it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GluActivation {
    /// The function.
    pub act: Activation,
    /// Shift.
    pub shift: f32,
}

/// Panics unless `rows` are strictly increasing rows of `w`, one for each of `n` values.
///
/// # Panics
/// As said.
pub fn check_rows(rows: &[u32], count: usize, n: usize) {
    assert_eq!(rows.len(), n, "rows: as many values as rows");
    assert!(rows.is_sorted_by(|a, b| a < b), "rows: not strictly increasing");
    assert!(rows.last().is_none_or(|&r| (r as usize) < count), "rows: past the last of {count}");
}

/// Panics unless the operands of [`matvec_rows`] fit together.
///
/// # Panics
/// As [`check_rows`]; also wrong form or number of columns.
pub fn check_matvec_rows(w: &Matrix<'_>, rows: &[u32], x: &Columns<'_>, y: &[f32]) {
    check_rows(rows, w.rows(), y.len());
    assert!(x.fits(w.format()), "matvec_rows: the column is in the wrong form for {:?}", w.format());
    assert_eq!(x.count(w.cols()), 1, "matvec_rows: takes one column");
}

/// Panics unless the operands of [`axpy_rows`] fit together.
///
/// # Panics
/// As [`check_rows`]; also a wrong length of `y`.
pub fn check_axpy_rows(w: &Matrix<'_>, rows: &[u32], a: &[f32], y: &[f32]) {
    check_rows(rows, w.rows(), a.len());
    assert_eq!(y.len(), w.cols(), "axpy_rows: the result has not {} columns", w.cols());
}

/// Panics unless the operands of [`sparse_ffn`] fit together.
///
/// # Panics
/// As [`check_rows`]; also wrong form or number of columns, or a wrong length of `y`.
pub fn check_sparse_ffn(w: &Neurons<'_>, active: &[u32], x: &Columns<'_>, gate: &[f32], y: &[f32]) {
    let m = w.matrix();
    check_rows(active, w.count(), gate.len());
    assert!(x.fits(m.format()), "sparse_ffn: the column is in the wrong form for {:?}", m.format());
    assert_eq!(x.count(m.cols()), 1, "sparse_ffn: takes one column");
    assert_eq!(y.len(), m.cols(), "sparse_ffn: the result has not {} columns", m.cols());
}

/// `y[i] = Σ_k w[rows[i], k] · x[k]`; see [`crate::KernelSet::matvec_rows`].
///
/// # Panics
/// Shapes do not fit ([`check_matvec_rows`]).
pub fn matvec_rows(w: Matrix<'_>, rows: &[u32], x: Columns<'_>, y: &mut [f32]) {
    check_matvec_rows(&w, rows, &x, y);
    matmul::products(w, x, rows.iter().map(|&r| r as usize), y);
}

/// `y[k] += Σ_i a[i] · w[rows[i], k]`; see [`crate::KernelSet::axpy_rows`].
///
/// # Panics
/// Shapes do not fit ([`check_axpy_rows`]).
pub fn axpy_rows(w: Matrix<'_>, rows: &[u32], a: &[f32], y: &mut [f32]) {
    check_axpy_rows(&w, rows, a, y);
    matmul::add_rows(w, rows.iter().map(|&r| r as usize), |i, _| a[i], &mut [y]);
}

/// Neurons whose products are computed before their down rows are added.
const TOGETHER: usize = 32;

/// The FFN of some neurons; see [`crate::KernelSet::sparse_ffn`].
///
/// # Panics
/// Shapes do not fit ([`check_sparse_ffn`]).
pub fn sparse_ffn(
    w: Neurons<'_>,
    act: GluActivation,
    active: &[u32],
    x: Columns<'_>,
    gate: &mut [f32],
    y: &mut [f32],
) {
    check_sparse_ffn(&w, active, &x, gate, y);
    let (m, per_neuron) = (w.matrix(), w.rows_per_neuron());
    let mut ups = [0.0; TOGETHER];
    for (active, gate) in active.chunks(TOGETHER).zip(gate.chunks_mut(TOGETHER)) {
        let rows = |i: usize| active.iter().map(move |&n| n as usize * per_neuron + i);
        if let Neurons::GateUpDown(_) = w {
            matmul::products(m, x, rows(0), gate);
        }
        let ups = &mut ups[..active.len()];
        match w {
            Neurons::Down(_) => ups.fill(1.0),
            _ => matmul::products(m, x, rows(per_neuron - 2), ups),
        }
        activation::gated(act.act, act.shift, gate, ups);
        matmul::add_rows(m, rows(per_neuron - 1), |i, _| ups[i], &mut [y]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rows;

    const W: [f32; 12] = [1.0, 0.0, 2.0, 1.0, 10.0, 20.0, -1.0, 0.0, 5.0, 5.0, 30.0, 40.0];

    #[test]
    fn by_hand() {
        let w = Matrix::new(6, 2, Rows::F32(&W)).unwrap();
        let x = Columns::F32(&[3.0, 4.0]);
        let mut y = [0.0; 2];
        matvec_rows(w, &[1, 3], x, &mut y);
        assert_eq!(y, [10.0, -3.0]);
        axpy_rows(w, &[0, 5], &[2.0, 1.0], &mut y);
        assert_eq!(y, [42.0, 37.0]);

        // Gates 3 and −3: ReLU closes the second; 3 · (2·3 + 4) · (10, 20).
        let relu = GluActivation { act: Activation::Relu, shift: 0.0 };
        let (mut gate, mut y) = ([0.0; 2], [1.0, 1.0]);
        sparse_ffn(Neurons::GateUpDown(w), relu, &[0, 1], x, &mut gate, &mut y);
        assert_eq!((gate, y), ([3.0, -3.0], [301.0, 601.0]));
        // Neuron 1 of three: up (10, 20)·x = 110, down (−1, 0), gate 2 as given.
        let (mut gate, mut y) = ([2.0], [0.0; 2]);
        sparse_ffn(Neurons::UpDown(w), relu, &[1], x, &mut gate, &mut y);
        assert_eq!((gate, y), ([2.0], [-220.0, 0.0]));
        // Rows 1 and 4 of six neurons without gates: 3² · (2, 1) + 0 · (5, 5).
        let relu2 = GluActivation { act: Activation::Relu2, shift: 0.0 };
        let (mut up, mut y) = ([3.0, -1.0], [1.0; 2]);
        sparse_ffn(Neurons::Down(w), relu2, &[1, 4], x, &mut up, &mut y);
        assert_eq!(y, [19.0, 10.0]);
    }

    #[test]
    fn no_rows_change_nothing() {
        let w = Matrix::new(6, 2, Rows::F32(&W)).unwrap();
        let mut y = [7.0, 8.0];
        axpy_rows(w, &[], &[], &mut y);
        let act = GluActivation { act: Activation::Silu, shift: 0.0 };
        sparse_ffn(Neurons::UpDown(w), act, &[], Columns::F32(&[1.0, 1.0]), &mut [], &mut y);
        assert_eq!(y, [7.0, 8.0]);
    }

    #[test]
    #[should_panic(expected = "strictly increasing")]
    fn a_row_twice_is_refused() {
        check_rows(&[1, 1], 4, 2);
    }

    #[test]
    #[should_panic(expected = "past the last")]
    fn a_row_too_far_is_refused() {
        check_rows(&[1, 4], 4, 2);
    }
}
