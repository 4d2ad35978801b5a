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
//! be left. LLVM stops inlining `array::map` and `from_fn`, and with them whatever intrinsics their closures hold, where a
//! function is as large as this one: bodies and `arch/` use loops, literals and `#[inline(always)]` functions instead.

mod blocks;
mod super_blocks;

use super::padded;
use crate::isa::Isa;
use candle_sparse_core::{
    BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0,
    Columns, Matrix, Rows, kernel::matmul::check_matmul,
};
use half::{bf16, f16};

const ROWS: usize = 4;
/// A quarter of the smallest common L2, so that a panel survives the columns streaming past it.
const PANEL_BYTES: usize = 128 * 1024;

/// See [`candle_sparse_core::KernelSet::matmul`].
#[inline(always)]
pub(crate) fn matmul<I: Isa>(isa: I, w: Matrix<'_>, x: Columns<'_>, y: &mut [&mut [f32]]) {
    check_matmul(&w, &x, y);
    // A single group of columns reads every row once: nothing to keep in cache.
    let panel = if y.len() <= I::COLUMNS {
        w.rows().max(1)
    } else {
        (PANEL_BYTES / w.format().row_bytes(w.cols()).max(1) / ROWS * ROWS).max(ROWS)
    };
    let shape = RowShape { len: w.row_blocks(), stride: w.stride() };
    match (w.data(), x) {
        (Rows::F32(w), Columns::F32(x)) => panels::<I, f32>(isa, w, shape, x, y, panel),
        (Rows::F16(w), Columns::F32(x)) => panels::<I, f16>(isa, w, shape, x, y, panel),
        (Rows::BF16(w), Columns::F32(x)) => panels::<I, bf16>(isa, w, shape, x, y, panel),
        (Rows::Q8_0(w), Columns::Quantized(x)) => panels::<I, BlockQ8_0>(isa, w, shape, x, y, panel),
        (Rows::Q6K(w), Columns::Quantized(x)) => panels::<I, BlockQ6K>(isa, w, shape, x, y, panel),
        (Rows::Q5_1(w), Columns::Quantized(x)) => panels::<I, BlockQ5_1>(isa, w, shape, x, y, panel),
        (Rows::Q5_0(w), Columns::Quantized(x)) => panels::<I, BlockQ5_0>(isa, w, shape, x, y, panel),
        (Rows::Q5K(w), Columns::Quantized(x)) => panels::<I, BlockQ5K>(isa, w, shape, x, y, panel),
        (Rows::Q4_1(w), Columns::Quantized(x)) => panels::<I, BlockQ4_1>(isa, w, shape, x, y, panel),
        (Rows::Q4_0(w), Columns::Quantized(x)) => panels::<I, BlockQ4_0>(isa, w, shape, x, y, panel),
        (Rows::Q4K(w), Columns::Quantized(x)) => panels::<I, BlockQ4K>(isa, w, shape, x, y, panel),
        (Rows::Q3K(w), Columns::Quantized(x)) => panels::<I, BlockQ3K>(isa, w, shape, x, y, panel),
        (Rows::Q2K(w), Columns::Quantized(x)) => panels::<I, BlockQ2K>(isa, w, shape, x, y, panel),
        _ => unreachable!("check_matmul compared format and columns"),
    }
}

/// Where the rows of a matrix lie, in elements or blocks.
#[derive(Clone, Copy)]
pub(super) struct RowShape {
    pub(super) len: usize,
    pub(super) stride: usize,
}

impl RowShape {
    #[inline(always)]
    pub(super) fn row<T>(self, w: &[T], r: usize) -> &[T] {
        &w[r * self.stride..r * self.stride + self.len]
    }

    /// How many rows before its use a gathered row is to be asked for.
    #[inline(always)]
    pub(super) fn ahead<T>(self) -> usize {
        // Between what was too little for rows of Q4_0 (2 KiB) and too much for rows of F16 (16 KiB) on Zen 5.
        const BYTES: usize = 6 * 1024;
        BYTES.div_ceil((self.len * size_of::<T>()).max(1))
    }
}

/// An element type of a matrix and what it is multiplied with.
pub(super) trait Operand: Copy {
    /// 32 elements, four blocks, or a super-block.
    type Unit: Copy;
    /// Element type of a column.
    type Column: Copy;
    /// As many elements of a column.
    type ColumnUnit: Copy;

    fn units(row: &[Self]) -> &[Self::Unit];
    /// At least as many units as a row has.
    fn column_units(x: &[Self::Column]) -> &[Self::ColumnUnit];
    /// What follows the whole units of a row, as a unit.
    fn last<'a>(row: &'a [Self], room: &'a mut Option<Self::Unit>) -> Option<&'a Self::Unit>;
    /// What faces [`Self::last`].
    fn last_of_column<'a>(
        x: &'a [Self::Column],
        room: &'a mut Option<Self::ColumnUnit>,
    ) -> &'a Self::ColumnUnit;
    /// `acc[r][c] += w[r] · x[c]`, vector by vector.
    fn add<I: Isa, const R: usize, const C: usize>(
        isa: I,
        acc: &mut [[I::V; C]; R],
        w: [&Self::Unit; R],
        x: [&Self::ColumnUnit; C],
    );
}

macro_rules! float_operand {
    ($t:ty, $zero:expr, $load:ident) => {
        impl Operand for $t {
            type Unit = [$t; 32];
            type Column = f32;
            type ColumnUnit = [f32; 32];

            #[inline(always)]
            fn units(row: &[Self]) -> &[Self::Unit] {
                row.as_chunks().0
            }

            #[inline(always)]
            fn column_units(x: &[f32]) -> &[[f32; 32]] {
                x.as_chunks().0
            }

            #[inline(always)]
            fn last<'a>(row: &'a [Self], room: &'a mut Option<Self::Unit>) -> Option<&'a Self::Unit> {
                let rest = row.as_chunks::<32>().1;
                (!rest.is_empty()).then(|| &*room.insert(padded(rest, $zero)))
            }

            #[inline(always)]
            fn last_of_column<'a>(x: &'a [f32], room: &'a mut Option<[f32; 32]>) -> &'a [f32; 32] {
                room.insert(padded(x.as_chunks::<32>().1, 0.0))
            }

            #[inline(always)]
            fn add<I: Isa, const R: usize, const C: usize>(
                isa: I,
                acc: &mut [[I::V; C]; R],
                w: [&Self::Unit; R],
                x: [&[f32; 32]; C],
            ) {
                for i in 0..32 / I::LANES {
                    let mut xs = [isa.splat(0.0); C];
                    for c in 0..C {
                        xs[c] = isa.load(x[c], i);
                    }
                    for r in 0..R {
                        let w = isa.$load(w[r], i);
                        for c in 0..C {
                            acc[r][c] = isa.mul_add(w, xs[c], acc[r][c]);
                        }
                    }
                }
            }
        }
    };
}

float_operand!(f32, 0.0, load);
float_operand!(f16, f16::ZERO, load_f16);
float_operand!(bf16, bf16::ZERO, load_bf16);

#[inline(always)]
fn panels<I: Isa, T: Operand>(
    isa: I,
    w: &[T],
    shape: RowShape,
    x: &[T::Column],
    y: &mut [&mut [f32]],
    panel: usize,
) {
    let (n, rows) = (y.len(), y.first().map_or(0, |y| y.len()));
    if n == 0 || rows == 0 {
        return;
    }
    let per_column = x.len() / n;
    if n == 1 {
        for (y, row) in y[0].iter_mut().zip(w.chunks(shape.stride)) {
            let row = &row[..shape.len];
            *y = stream::<I, T, false>(isa, row, x, row);
        }
        return;
    }
    // Rows that are read once are read in order.
    let read_once = n <= I::COLUMNS;
    for start in (0..rows).step_by(panel) {
        let end = (start + panel).min(rows);
        let mut c = 0;
        while c < n {
            let width = (n - c).min(I::COLUMNS);
            let (x, y) = (&x[c * per_column..(c + width) * per_column], &mut y[c..c + width]);
            match width {
                1 => group::<I, T, 1>(isa, w, shape, x, y, start, end, read_once),
                2 => group::<I, T, 2>(isa, w, shape, x, y, start, end, read_once),
                3 => group::<I, T, 3>(isa, w, shape, x, y, start, end, read_once),
                _ => group::<I, T, 4>(isa, w, shape, x, y, start, end, read_once),
            }
            c += width;
        }
    }
}

/// Rows `start..end` times `C` columns.
#[inline(always)]
fn group<I: Isa, T: Operand, const C: usize>(
    isa: I,
    w: &[T],
    shape: RowShape,
    x: &[T::Column],
    y: &mut [&mut [f32]],
    start: usize,
    end: usize,
    read_once: bool,
) {
    let per_column = x.len() / C;
    let columns: [&[T::Column]; C] = core::array::from_fn(|c| &x[c * per_column..(c + 1) * per_column]);
    let row = |r: usize| shape.row(w, r);
    let mut r = start;
    // Fewer columns than a tile holds are rare: not worth the code of their own tiles.
    let tiled = if read_once || C < I::COLUMNS { start } else { end };
    while r + ROWS <= tiled {
        let sums = tile::<I, T, ROWS, C>(isa, [row(r), row(r + 1), row(r + 2), row(r + 3)], columns);
        for c in 0..C {
            for i in 0..ROWS {
                y[c][r + i] = sums[i][c];
            }
        }
        r += ROWS;
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
pub(super) fn ask<I: Isa, T>(isa: I, row: &[T], start: usize, bytes: usize) {
    for line in 0..bytes.div_ceil(64) {
        isa.prefetch(row, start + 64 * line);
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
            ask(isa, ahead, k * size_of_val(w), size_of_val(w));
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
