//! Weighted sums of rows: attention's values, and every neuron-major projection.
//!
//! ```text
//! few results:  for each unit of 32 columns of the matrix:
//!                   for each group of results:            (32 × results sums stay in registers)
//!                       for each row: sums += weight · unit
//! many:         for each panel of rows and columns:       (as f32 in the L1 cache)
//!                   for each group of results, for each unit or two: the same
//! ```
//!
//! Rows are added in order, each with one multiply-add, so a result does not depend on the others computed with it.

use super::{
    elements::{Elements, LONGEST},
    matmul::RowShape,
    padded,
    prefetch::Ahead,
    units::Units,
};
use crate::isa::Isa;
use candle_sparse_core::{
    BLOCK_LEN, BlockQ4_0, BlockQ4_1, BlockQ8_0, Matrix, Rows, kernel::matmul::check_matmul_t,
};
use half::{bf16, f16};

/// See [`candle_sparse_core::KernelSet::matmul_t`].
#[inline(always)]
pub(crate) fn matmul_t<I: Isa>(isa: I, w: Matrix<'_>, a: &[&[f32]], y: &mut [&mut [f32]]) {
    check_matmul_t(&w, a, y);
    let shape = RowShape { len: w.row_blocks(), stride: w.stride() };
    let nothing = Ahead::NOTHING;
    match w.data() {
        Rows::F32(d) => units::<I, f32, false>(isa, d, shape, w.cols(), a, y, nothing),
        Rows::F16(d) => units::<I, f16, false>(isa, d, shape, w.cols(), a, y, nothing),
        Rows::BF16(d) => units::<I, bf16, false>(isa, d, shape, w.cols(), a, y, nothing),
        Rows::Q8_0(d) => units::<I, BlockQ8_0, false>(isa, d, shape, w.cols(), a, y, nothing),
        Rows::Q4_0(d) => units::<I, BlockQ4_0, false>(isa, d, shape, w.cols(), a, y, nothing),
        Rows::Q6K(d) => panels(isa, d, shape, w.cols() / BLOCK_LEN, a, y),
        Rows::Q5_1(d) => panels(isa, d, shape, w.cols() / BLOCK_LEN, a, y),
        Rows::Q5_0(d) => panels(isa, d, shape, w.cols() / BLOCK_LEN, a, y),
        Rows::Q5K(d) => panels(isa, d, shape, w.cols() / BLOCK_LEN, a, y),
        Rows::Q4_1(d) => units::<I, BlockQ4_1, false>(isa, d, shape, w.cols(), a, y, nothing),
        Rows::Q4K(d) => panels(isa, d, shape, w.cols() / BLOCK_LEN, a, y),
        Rows::Q3K(d) => panels(isa, d, shape, w.cols() / BLOCK_LEN, a, y),
        Rows::Q2K(d) => panels(isa, d, shape, w.cols() / BLOCK_LEN, a, y),
    }
}

/// Whether [`matmul_t_before`] has this format: floats.
///
/// Rows of blocks are so few lines that a burst does no harm, and a question in each of them costs a tenth (Zen 5).
pub(crate) fn has_before(w: Matrix<'_>) -> bool {
    !w.format().is_quantized()
}

/// [`matmul_t`] of floats, asking for the memory of another matrix meanwhile.
#[inline(always)]
pub(crate) fn matmul_t_before<I: Isa>(
    isa: I,
    w: Matrix<'_>,
    a: &[&[f32]],
    y: &mut [&mut [f32]],
    next: Option<Matrix<'_>>,
) {
    check_matmul_t(&w, a, y);
    let shape = RowShape { len: w.row_blocks(), stride: w.stride() };
    let ahead = Ahead::new(w.rows() * w.cols().div_ceil(BLOCK_LEN), next);
    match w.data() {
        Rows::F32(d) => units::<I, f32, true>(isa, d, shape, w.cols(), a, y, ahead),
        Rows::F16(d) => units::<I, f16, true>(isa, d, shape, w.cols(), a, y, ahead),
        Rows::BF16(d) => units::<I, bf16, true>(isa, d, shape, w.cols(), a, y, ahead),
        _ => unreachable!("only asked for where `has_before`"),
    }
}

/// More results than so many times the columns of a pass are worth a conversion of all elements.
const FEW: usize = 2;

#[inline(always)]
fn units<I: Isa, T: Units + Elements, const AHEAD: bool>(
    isa: I,
    w: &[T],
    shape: RowShape,
    cols: usize,
    a: &[&[f32]],
    y: &mut [&mut [f32]],
    ahead: Ahead<'_>,
) {
    if w.is_empty() || a.is_empty() {
        return;
    }
    // Few results are bound by memory, and a conversion costs nothing; for many it would be done again and again.
    let many = y.len() > FEW * I::COLUMNS_T;
    if many {
        ahead.all(isa);
        panels::<I, T>(isa, w, shape, cols / BLOCK_LEN, a, y);
    }
    for k in (if many { cols / BLOCK_LEN * BLOCK_LEN } else { 0 }..cols).step_by(BLOCK_LEN) {
        let ahead = ahead.after(k / BLOCK_LEN * a[0].len());
        if k + BLOCK_LEN <= cols {
            unit_of_all::<I, T, true, AHEAD>(isa, w, shape, a, y, k, ahead);
        } else {
            unit_of_all::<I, T, false, AHEAD>(isa, w, shape, a, y, k, ahead);
        }
    }
}

/// Part of a matrix as f32, in the L1 cache.
type Panel = [[[f32; BLOCK_LEN]; PANEL_UNITS]; PANEL_ROWS];
const PANEL_ROWS: usize = 32;
const PANEL_UNITS: usize = LONGEST;

/// The whole units of all results.
#[inline(always)]
fn panels<I: Isa, T: Elements>(
    isa: I,
    w: &[T],
    shape: RowShape,
    units: usize,
    a: &[&[f32]],
    y: &mut [&mut [f32]],
) {
    let mut panel: Panel = [[[0.0; BLOCK_LEN]; PANEL_UNITS]; PANEL_ROWS];
    let rows = a.first().map_or(0, |a| a.len());
    for first in (0..units).step_by(PANEL_UNITS) {
        let n = PANEL_UNITS.min(units - first);
        for start in (0..rows).step_by(PANEL_ROWS) {
            let panel = &mut panel[..PANEL_ROWS.min(rows - start)];
            for (r, out) in panel.iter_mut().enumerate() {
                T::write(isa, shape.row(w, start + r), first, &mut out[..n]);
            }
            panel_of_all(isa, panel, n, start, a, first, y);
        }
    }
}

/// The first `n` units of a panel, whose rows begin at `start` and whose units at `first`, for all results.
#[inline(always)]
fn panel_of_all<I: Isa>(
    isa: I,
    panel: &[[[f32; BLOCK_LEN]; PANEL_UNITS]],
    n: usize,
    start: usize,
    a: &[&[f32]],
    first: usize,
    y: &mut [&mut [f32]],
) {
    // As many sums as hide the latency of the multiply-adds and registers hold.
    let wide = if I::LANES == 16 { 2 } else { 1 };
    let mut c = 0;
    while c < y.len() {
        let width = (y.len() - c).min(4.min(I::COLUMNS_T));
        let (a, y) = (&a[c..c + width], &mut y[c..c + width]);
        let mut u = 0;
        while u < n {
            let k = (first + u) * BLOCK_LEN;
            match (width, wide.min(n - u)) {
                (4, 2) => tile::<I, 4, 2>(isa, panel, u, start, a, y, k),
                (4, _) => tile::<I, 4, 1>(isa, panel, u, start, a, y, k),
                (3, _) => tile::<I, 3, 1>(isa, panel, u, start, a, y, k),
                (2, _) => tile::<I, 2, 1>(isa, panel, u, start, a, y, k),
                _ => tile::<I, 1, 1>(isa, panel, u, start, a, y, k),
            }
            u += if width == 4 { wide.min(n - u) } else { 1 };
        }
        c += width;
    }
}

/// Columns `k .. k + 32 · U` of `C` results: what the units from `u` on of a panel add to them.
#[inline(always)]
fn tile<I: Isa, const C: usize, const U: usize>(
    isa: I,
    panel: &[[[f32; BLOCK_LEN]; PANEL_UNITS]],
    u: usize,
    start: usize,
    a: &[&[f32]],
    y: &mut [&mut [f32]],
    k: usize,
) {
    let mut acc = [[[isa.splat(0.0); 8]; U]; C];
    let mut weights = [&a[0][start..start + panel.len()]; C];
    for c in 0..C {
        weights[c] = &a[c][start..start + panel.len()];
        let y = y[c][k..k + U * BLOCK_LEN].as_chunks().0;
        for j in 0..U {
            for i in 0..32 / I::LANES {
                acc[c][j][i] = isa.load(&y[j], i);
            }
        }
    }
    for (r, row) in panel.iter().enumerate() {
        for j in 0..U {
            for i in 0..32 / I::LANES {
                let v = isa.load(&row[u + j], i);
                for c in 0..C {
                    acc[c][j][i] = isa.mul_add(isa.splat(weights[c][r]), v, acc[c][j][i]);
                }
            }
        }
    }
    for c in 0..C {
        let y = y[c][k..k + U * BLOCK_LEN].as_chunks_mut().0;
        for j in 0..U {
            for i in 0..32 / I::LANES {
                isa.store(acc[c][j][i], &mut y[j], i);
            }
        }
    }
}

#[inline(always)]
fn unit_of_all<I: Isa, T: Units, const WHOLE: bool, const AHEAD: bool>(
    isa: I,
    w: &[T],
    shape: RowShape,
    a: &[&[f32]],
    y: &mut [&mut [f32]],
    k: usize,
    mut ahead: Ahead<'_>,
) {
    let mut c = 0;
    while c < y.len() {
        let left = y.len() - c;
        let width = if I::COLUMNS_T == 8 && left >= 8 { 8 } else { left.min(4.min(I::COLUMNS_T)) };
        let (a, y) = (&a[c..c + width], &mut y[c..c + width]);
        match width {
            8 if I::COLUMNS_T == 8 => unit::<I, T, 8, WHOLE, AHEAD>(isa, w, shape, a, y, k, ahead),
            1 => unit::<I, T, 1, WHOLE, AHEAD>(isa, w, shape, a, y, k, ahead),
            2 => unit::<I, T, 2, WHOLE, AHEAD>(isa, w, shape, a, y, k, ahead),
            3 => unit::<I, T, 3, WHOLE, AHEAD>(isa, w, shape, a, y, k, ahead),
            _ => unit::<I, T, 4, WHOLE, AHEAD>(isa, w, shape, a, y, k, ahead),
        }
        // Once is enough.
        ahead = Ahead::NOTHING;
        c += width;
    }
}

/// Rows whose weights are copied together: to ask for the bounds of many columns in each row takes as long as the products.
const ROWS: usize = 16;

/// Columns `k .. k + 32` of `C` results.
#[inline(always)]
fn unit<I: Isa, T: Units, const C: usize, const WHOLE: bool, const AHEAD: bool>(
    isa: I,
    w: &[T],
    shape: RowShape,
    a: &[&[f32]],
    y: &mut [&mut [f32]],
    k: usize,
    ahead: Ahead<'_>,
) {
    // The widest unit has eight vectors of four lanes; a level with wider vectors leaves the rest unused.
    let mut acc = [[isa.splat(0.0); 8]; C];
    for c in 0..C {
        let block = if WHOLE { of_columns(y[c], k) } else { &padded(&y[c][k..], 0.0) };
        for i in 0..32 / I::LANES {
            acc[c][i] = isa.load(block, i);
        }
    }
    if C <= 2 {
        for (r, row) in w.chunks(shape.stride).enumerate() {
            if AHEAD {
                ahead.row(isa, r);
            }
            let mut weights = [0.0; C];
            for c in 0..C {
                weights[c] = a[c][r];
            }
            add_row::<I, T, C, WHOLE>(isa, &row[..shape.len], k, weights, &mut acc);
        }
    } else {
        for start in (0..a[0].len()).step_by(ROWS) {
            let mut weights = [[0.0; ROWS]; C];
            for c in 0..C {
                let a = &a[c][start..];
                if a.len() >= ROWS {
                    weights[c].copy_from_slice(&a[..ROWS]);
                } else {
                    weights[c][..a.len()].copy_from_slice(a);
                }
            }
            for (r, row) in w[start * shape.stride..].chunks(shape.stride).take(ROWS).enumerate() {
                if AHEAD {
                    ahead.row(isa, start + r);
                }
                let mut of_row = [0.0; C];
                for c in 0..C {
                    of_row[c] = weights[c][r];
                }
                add_row::<I, T, C, WHOLE>(isa, &row[..shape.len], k, of_row, &mut acc);
            }
        }
    }
    for c in 0..C {
        let mut block = [0.0; BLOCK_LEN];
        let out = if WHOLE { of_columns_mut(y[c], k) } else { &mut block };
        for i in 0..32 / I::LANES {
            isa.store(acc[c][i], out, i);
        }
        if !WHOLE {
            let rest = &mut y[c][k..];
            rest.copy_from_slice(&block[..rest.len()]);
        }
    }
}

/// `acc[c] += weights[c] ·` the unit at column `k` of a row.
#[inline(always)]
fn add_row<I: Isa, T: Units, const C: usize, const WHOLE: bool>(
    isa: I,
    row: &[T],
    k: usize,
    weights: [f32; C],
    acc: &mut [[I::V; 8]; C],
) {
    let unit = if WHOLE { &T::units(row)[k / BLOCK_LEN] } else { &T::last(row) };
    for i in 0..32 / I::LANES {
        let v = T::value(isa, unit, i);
        for c in 0..C {
            acc[c][i] = isa.mul_add(isa.splat(weights[c]), v, acc[c][i]);
        }
    }
}

#[inline(always)]
fn of_columns(y: &[f32], k: usize) -> &[f32; BLOCK_LEN] {
    y[k..].first_chunk().expect("the unit is whole")
}

#[inline(always)]
fn of_columns_mut(y: &mut [f32], k: usize) -> &mut [f32; BLOCK_LEN] {
    y[k..].first_chunk_mut().expect("the unit is whole")
}
