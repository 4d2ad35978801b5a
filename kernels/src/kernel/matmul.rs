//! Rows of a matrix times a few columns: matvec, attention scores, matmul.
//!
//! ```text
//! one column:  for each row: four sums take the units in turn
//! several:     for each panel of rows that fits the L2 cache:
//!                  for each group of up to four columns:         (the columns stay in L1)
//!                      for four rows at a time:                  (4 × columns sums stay in registers)
//!                          sum += row unit · column unit
//! ```
//!
//! 1. One column is bound by memory: rows are read strictly one after the other, because four interleaved streams lose
//!    the hardware prefetcher (quantised rows fell to a third of the bandwidth). Four sums hide the latency of the
//!    multiply-adds. A few columns that need no panel read rows in the same order.
//! 2. Several columns are bound by arithmetic: a tile has one sum per row and column, whatever its size.
//! 3. So a value does not depend on which rows, or how many, are computed together: sparse and dense give the same bits.
//!    Nor on which columns, as long as a call has more than one.
//! 4. A rest of a row that is no whole unit is copied into a zero-padded unit, or is the last blocks before its end.
//!
//! In the assembly of an inner loop (those with `vpdpbusd`, `vpmaddubsw`, `sdot`) there must be no `call` and no branch to a
//! panic: of the parts that are computed from constants nothing but loads, one shift and one mask per 64 bytes of fields may
//! be left. LLVM may stop inlining `array::map` and `from_fn`, and with them whatever intrinsics their closures hold: bodies
//! and `arch/` use loops, literals and `#[inline(always)]` functions instead.

use crate::{
    arch::prefetch,
    format::{Element, RowsKernel, RowsOf, operand::Operand},
    isa::Isa,
};
use candle_sparse_core::Columns;

const ROWS: usize = 4;
/// A quarter of the smallest common L2, so that a panel survives the columns streaming past it.
const PANEL_BYTES: usize = 128 * 1024;

/// [`candle_sparse_core::KernelSet::matmul`] with one column.
pub(crate) struct Matvec<'a> {
    pub(crate) x: Columns<'a>,
    pub(crate) y: &'a mut [f32],
}

impl RowsKernel for Matvec<'_> {
    #[inline(always)]
    fn run<I: Isa, T: Element>(self, isa: I, rows: RowsOf<'_, T>) {
        if self.y.is_empty() {
            return;
        }
        let x = T::columns(self.x);
        for (y, row) in self.y.iter_mut().zip(rows.from(0)) {
            *y = stream::<I, T, false>(isa, row, x, row);
        }
    }
}

/// [`candle_sparse_core::KernelSet::matmul`] with several columns.
pub(crate) struct Matmul<'a, 'y> {
    pub(crate) x: Columns<'a>,
    pub(crate) y: &'a mut [&'y mut [f32]],
}

impl RowsKernel for Matmul<'_, '_> {
    #[inline(always)]
    fn run<I: Isa, T: Element>(self, isa: I, rows: RowsOf<'_, T>) {
        let (x, n) = (T::columns(self.x), self.y.len());
        let count = self.y.first().map_or(0, |y| y.len());
        if count == 0 {
            return;
        }
        let per_column = x.len() / n;
        // A single group of columns reads every row once: nothing to keep in cache, and rows are read in order.
        let read_once = n <= I::COLUMNS;
        let panel =
            if read_once { count } else { (PANEL_BYTES / rows.row_bytes().max(1) / ROWS * ROWS).max(ROWS) };
        for start in (0..count).step_by(panel) {
            let end = (start + panel).min(count);
            for (x, y) in x.chunks(per_column * I::COLUMNS).zip(self.y.chunks_mut(I::COLUMNS)) {
                let part = Part { start, end, read_once };
                match y.len() {
                    1 => group::<I, T, 1>(isa, rows, x, y, part),
                    2 => group::<I, T, 2>(isa, rows, x, y, part),
                    3 => group::<I, T, 3>(isa, rows, x, y, part),
                    _ if I::COLUMNS == 4 => group::<I, T, 4>(isa, rows, x, y, part),
                    _ => unreachable!("a group has at most `COLUMNS` columns"),
                }
            }
        }
    }
}

/// Some rows of a product.
#[derive(Clone, Copy)]
struct Part {
    start: usize,
    end: usize,
    read_once: bool,
}

/// Some rows times `C` columns.
#[inline(always)]
fn group<I: Isa, T: Operand, const C: usize>(
    isa: I,
    rows: RowsOf<'_, T>,
    x: &[T::Column],
    y: &mut [&mut [f32]],
    Part { start, end, read_once }: Part,
) {
    let per_column = x.len() / C;
    let mut columns = [x; C];
    for c in 0..C {
        columns[c] = &x[c * per_column..(c + 1) * per_column];
    }
    let row = |r: usize| rows.row(r);
    let mut r = start;
    // Fewer columns than a tile holds are rare: not worth the code of their own tiles.
    if C == I::COLUMNS && !read_once {
        while r + ROWS <= end {
            let sums = tile::<I, T, ROWS, C>(isa, [row(r), row(r + 1), row(r + 2), row(r + 3)], columns);
            for c in 0..C {
                for i in 0..ROWS {
                    y[c][r + i] = sums[i][c];
                }
            }
            r += ROWS;
        }
    }
    while r < end {
        let sums = tile::<I, T, 1, C>(isa, [row(r)], columns);
        for c in 0..C {
            y[c][r] = sums[0][c];
        }
        r += 1;
    }
}

/// Asks for some bytes of a row from `start` on.
#[inline(always)]
pub(super) fn ask<T>(row: &[T], start: usize, bytes: usize) {
    for line in 0..bytes.div_ceil(64) {
        prefetch(row, start + 64 * line);
    }
}

/// One row times one column; if `AHEAD`, asks for another row meanwhile.
#[inline(always)]
pub(super) fn stream<I: Isa, T: Operand, const AHEAD: bool>(
    isa: I,
    w: &[T],
    x: &[T::Column],
    ahead: &[T],
) -> f32 {
    const SUMS: usize = 4;
    let mut acc = [[[isa.splat(0.0)]]; SUMS];
    let ws = T::units(w);
    let xs = &T::column_units(x)[..ws.len()];
    let (w4, w_few) = ws.as_chunks::<SUMS>();
    let (x4, x_few) = xs.as_chunks::<SUMS>();
    for (k, (w, x)) in w4.iter().zip(x4).enumerate() {
        if AHEAD {
            ask(ahead, k * size_of_val(w), size_of_val(w));
        }
        for j in 0..SUMS {
            T::add(isa, &mut acc[j], [&w[j]], [&x[j]]);
        }
    }
    for (w, x) in w_few.iter().zip(x_few) {
        T::add(isa, &mut acc[0], [w], [x]);
    }
    let (mut room, mut column_room) = (None, None);
    if let Some(w) = T::last(w, &mut room) {
        T::add(isa, &mut acc[1], [w], [T::last_of_column(x, &mut column_room)]);
    }
    let pair = |i: usize, j: usize| isa.add(acc[i][0][0], acc[j][0][0]);
    isa.reduce_add(isa.add(pair(0, 1), pair(2, 3)))
}

#[inline(always)]
fn tile<I: Isa, T: Operand, const R: usize, const C: usize>(
    isa: I,
    w: [&[T]; R],
    x: [&[T::Column]; C],
) -> [[f32; C]; R] {
    let mut acc = [[isa.splat(0.0); C]; R];
    let n = T::units(w[0]).len();
    let (mut ws, mut xs) = ([T::units(w[0]); R], [T::column_units(x[0]); C]);
    for r in 0..R {
        ws[r] = &T::units(w[r])[..n];
    }
    for c in 0..C {
        xs[c] = &T::column_units(x[c])[..n];
    }
    for k in 0..n {
        let (mut w, mut x) = ([&ws[0][k]; R], [&xs[0][k]; C]);
        for r in 1..R {
            w[r] = &ws[r][k];
        }
        for c in 1..C {
            x[c] = &xs[c][k];
        }
        T::add(isa, &mut acc, w, x);
    }
    add_last::<I, T, R, C>(isa, &mut acc, w, x);
    let mut sums = [[0.0; C]; R];
    for r in 0..R {
        for c in 0..C {
            sums[r][c] = isa.reduce_add(acc[r][c]);
        }
    }
    sums
}

/// `acc += w · x` for the rest of the rows that is no whole unit, if there is one.
#[inline(always)]
fn add_last<I: Isa, T: Operand, const R: usize, const C: usize>(
    isa: I,
    acc: &mut [[I::V; C]; R],
    w: [&[T]; R],
    x: [&[T::Column]; C],
) {
    let mut rooms = [None; R];
    let mut r = 0..R;
    let lasts = rooms.each_mut().map(|room| T::last(w[r.next().unwrap_or(0)], room));
    if let Some(first) = lasts[0] {
        let mut rooms = [None; C];
        let mut c = 0..C;
        let xs = rooms.each_mut().map(|room| T::last_of_column(x[c.next().unwrap_or(0)], room));
        T::add(isa, acc, lasts.map(|w| w.unwrap_or(first)), xs);
    }
}
