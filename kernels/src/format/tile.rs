//! Rows of numbers times several columns, with the bits of one row times one column.
//!
//! ```text
//! for each panel of rows that fits the L2 cache:
//!     for each few columns:                           (the columns stay in the L1 cache)
//!         for a few rows, for two vectors of units:   (2 × rows × columns sums stay in registers)
//!             sum += row · column
//! ```

use super::{
    RowsOf,
    floats::sum_lanes,
    words::{Factors, Words},
};
use crate::{
    isa::{Isa, Kernel},
    kernel::matmul::ask,
};

/// A quarter of the smallest common L2, so that a panel survives the columns streaming past it.
const PANEL_BYTES: usize = 128 * 1024;

/// All rows times several columns.
#[inline(always)]
pub(super) fn matmul<I: Isa, T: Factors>(isa: I, rows: RowsOf<'_, T>, x: &[f32], y: &mut [&mut [f32]]) {
    let count = y.first().map_or(0, |y| y.len());
    let cols = x.len() / y.len().max(1);
    // As many sums as registers hold beside a vector of a row and the columns'.
    let (height, width) = if I::LANES == 8 { (2, 3) } else { (3, 4) };
    let panel = (PANEL_BYTES / rows.row_bytes().max(1) / height * height).max(height);
    let x = T::prepared(isa, x);
    for start in (0..count).step_by(panel) {
        let end = count.min(start + panel);
        let columns = x.chunks((width * cols).max(1)).zip(y.chunks_mut(width));
        for (i, (x, y)) in columns.enumerate() {
            let few = Few { rows, start, end, ask: i == 0, x, y };
            // Columns that are not there cost as much as others.
            match (I::LANES, few.y.len()) {
                (8, 1) => isa.leaf(Of::<T, 2, 1>(few)),
                (8, _) => isa.leaf(Of::<T, 2, 3>(few)),
                (_, 1 | 2) => isa.leaf(Of::<T, 3, 2>(few)),
                _ => isa.leaf(Of::<T, 3, 4>(few)),
            }
        }
    }
}

/// Some rows times at most as many columns as a tile has.
struct Few<'a, 'y, T: Factors> {
    rows: RowsOf<'a, T>,
    start: usize,
    end: usize,
    /// Whether the rows come from memory.
    ask: bool,
    x: &'a [T::Prepared],
    y: &'a mut [&'y mut [f32]],
}

/// In tiles of `R` rows and `C` columns.
struct Of<'a, 'y, T: Factors, const R: usize, const C: usize>(Few<'a, 'y, T>);

impl<T: Factors, const R: usize, const C: usize> Kernel for Of<'_, '_, T, R, C> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Few { rows, start, end, ask, x, y } = self.0;
        let cols = x.len() / y.len().max(1);
        // Rows and columns that are not there are computed as the last one, and forgotten.
        let mut columns = [x; C];
        for c in 0..C {
            columns[c] = &x[c.min(y.len() - 1) * cols..][..cols];
        }
        for first in (start..end).step_by(R) {
            let mut w = [rows.row(first); R];
            for r in 1..R {
                w[r] = rows.row((first + r).min(end - 1));
            }
            let sums = tile::<I, T, R, C>(isa, w, columns, ask.then_some(R * rows.stride() * size_of::<T>()));
            for (c, y) in y.iter_mut().enumerate() {
                for (y, sums) in y[first..end].iter_mut().zip(&sums) {
                    *y = sums[c];
                }
            }
        }
    }
}

/// Products of `R` rows with `C` columns; asks for rows so many bytes ahead.
#[inline(always)]
fn tile<I: Isa, T: Factors, const R: usize, const C: usize>(
    isa: I,
    w: [&[T]; R],
    x: [&[T::Prepared]; C],
    ahead: Option<usize>,
) -> [[f32; C]; R] {
    let n = T::units(w[0]).len();
    let (mut ws, mut xs) = ([T::units(w[0]); R], [T::Prepared::units(x[0]); C]);
    for r in 0..R {
        ws[r] = &T::units(w[r])[..n];
    }
    for c in 0..C {
        xs[c] = &T::Prepared::units(x[c])[..n];
    }
    let mut parts = [[[isa.splat(0.0); 8]; C]; R];
    for i in (0..32 / I::LANES).step_by(2) {
        let mut acc = [[[isa.splat(0.0); 2]; C]; R];
        for k in 0..n {
            let (mut w_k, mut x_k) = ([&ws[0][k]; R], [&xs[0][k]; C]);
            for r in 0..R {
                w_k[r] = &ws[r][k];
                if let (Some(bytes), 0) = (ahead, i) {
                    ask(w[r], bytes + k * size_of::<T::Unit>(), size_of::<T::Unit>());
                }
            }
            for c in 1..C {
                x_k[c] = &xs[c][k];
            }
            add::<I, T, R, C>(isa, &mut acc, w_k, x_k, i);
        }
        if let (Some(rest), Some(rest_x)) = (T::rest(w[0]), T::Prepared::rest(x[0])) {
            let (mut rest_w, mut rest_x) = ([rest; R], [rest_x; C]);
            for r in 1..R {
                rest_w[r] = T::rest(w[r]).unwrap_or(rest);
            }
            for c in 1..C {
                rest_x[c] = T::Prepared::rest(x[c]).unwrap_or(rest_x[0]);
            }
            add::<I, T, R, C>(isa, &mut acc, rest_w.each_ref(), rest_x.each_ref(), i);
        }
        for r in 0..R {
            for c in 0..C {
                [parts[r][c][i], parts[r][c][i + 1]] = acc[r][c];
            }
        }
    }
    let mut sums = [[0.0; C]; R];
    for r in 0..R {
        for c in 0..C {
            sums[r][c] = isa.reduce_add(sum_lanes(isa, parts[r][c])) + 0.0;
        }
    }
    sums
}

/// `acc[r][c] += w[r] · x[c]` for vectors `i` and `i + 1` of a unit.
#[inline(always)]
fn add<I: Isa, T: Factors, const R: usize, const C: usize>(
    isa: I,
    acc: &mut [[[I::V; 2]; C]; R],
    w: [&T::Unit; R],
    x: [&<T::Prepared as Words>::Unit; C],
    i: usize,
) {
    for j in 0..2 {
        let mut xs = [T::Prepared::word(isa, x[0], i + j); C];
        for c in 1..C {
            xs[c] = T::Prepared::word(isa, x[c], i + j);
        }
        for r in 0..R {
            let w = T::word(isa, w[r], i + j);
            for c in 0..C {
                acc[r][c][j] = T::add(isa, w, xs[c], acc[r][c][j]);
            }
        }
    }
}
