//! Rows of numbers times several columns, with the bits of one row times one column.
//!
//! ```text
//! for each panel of rows, as f32 in the L2 cache:
//!     for each few columns, for each part of them that fits the L1 cache:
//!         for four rows, for each vector of a unit: (4 × columns sums stay in registers)
//!             sum += row · column
//! ```

use super::{RowsOf, floats::sum_lanes, units::Units};
use crate::{
    isa::{Isa, Kernel},
    kernel::padded,
};

/// Rows of a tile.
const ROWS: usize = 4;
/// Units of columns that stay in the L1 cache: 24 KiB of six columns.
const PART: usize = 32;
/// Bytes of a panel: a quarter of the smallest common L2.
const PANEL_BYTES: usize = 128 * 1024;

/// All rows times several columns.
#[inline(always)]
pub(super) fn matmul<I: Isa, T: Units>(isa: I, rows: RowsOf<'_, T>, x: &[f32], y: &mut [&mut [f32]]) {
    let (n, count) = (y.len(), y.first().map_or(0, |y| y.len()));
    let cols = x.len() / n.max(1);
    let units = cols.div_ceil(32).max(1);
    let height = (PANEL_BYTES / (units * 128) / ROWS * ROWS).max(ROWS);
    let mut panel = vec![[0.0; 32]; height.min(count.next_multiple_of(ROWS)) * units];
    // Columns whose last unit is no whole one are copied.
    let mut copies = Vec::new();
    if !cols.is_multiple_of(32) {
        copies = vec![[0.0; 32]; n * units];
        for (copy, x) in copies.chunks_exact_mut(units).zip(x.chunks_exact(cols)) {
            let (whole, rest) = x.as_chunks();
            copy[..whole.len()].copy_from_slice(whole);
            copy[whole.len()] = padded(rest, 0.0);
        }
    }
    let x = if copies.is_empty() { x.as_chunks().0 } else { &copies };
    for start in (0..count).step_by(height) {
        let end = count.min(start + height);
        for (r, out) in panel.chunks_exact_mut(units).enumerate() {
            unpack(isa, rows.row((start + r).min(end - 1)), out);
        }
        let panel = &panel[..(end - start).next_multiple_of(ROWS) * units];
        for (b, y) in y.chunks_mut(width::<I>()).enumerate() {
            let x = &x[b * width::<I>() * units..][..y.len() * units];
            match width::<I>() {
                6 => isa.leaf(Times::<6> { panel, units, x, y, start, end }),
                4 => isa.leaf(Times::<4> { panel, units, x, y, start, end }),
                _ => isa.leaf(Times::<3> { panel, units, x, y, start, end }),
            }
        }
    }
}

/// Columns of a tile: as many sums as registers hold beside a row and the columns.
const fn width<I: Isa>() -> usize {
    match I::LANES {
        16 => 6,
        8 => 3,
        _ => 4,
    }
}

#[inline(always)]
fn unpack<I: Isa, T: Units>(isa: I, row: &[T], out: &mut [[f32; 32]]) {
    let whole = T::vectors(row);
    T::write_units(isa, row, 0, &mut out[..whole.len()]);
    if let [rest] = &mut out[whole.len()..] {
        let unit = T::rest(row);
        for i in 0..32 / I::LANES {
            isa.store(T::value(isa, &unit, i), rest, i);
        }
    }
}

/// A panel times up to `C` columns.
struct Times<'a, 'y, const C: usize> {
    panel: &'a [[f32; 32]],
    units: usize,
    x: &'a [[f32; 32]],
    y: &'a mut [&'y mut [f32]],
    start: usize,
    end: usize,
}

impl<const C: usize> Kernel for Times<'_, '_, C> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { panel, units, x, y, start, end } = self;
        let fours = panel.chunks_exact(ROWS * units);
        let mut sums = vec![[[[0.0; 32]; C]; ROWS]; fours.len()];
        let mut columns = [x; C];
        for c in 0..C {
            // Columns that are not there are computed as the last one, and forgotten.
            columns[c] = &x[c.min(y.len() - 1) * units..][..units];
        }
        for first in (0..units).step_by(PART) {
            let n = PART.min(units - first);
            let mut xs = [x; C];
            for c in 0..C {
                xs[c] = &columns[c][first..first + n];
            }
            for (four, sums) in fours.clone().zip(&mut sums) {
                let row = |r: usize| &four[r * units + first..][..n];
                add::<I, C>(isa, [row(0), row(1), row(2), row(3)], xs, sums);
            }
        }
        for (r, sums) in sums.as_flattened().iter().enumerate().take(end - start) {
            for (c, y) in y.iter_mut().enumerate() {
                let mut acc = [isa.splat(0.0); 8];
                for i in 0..32 / I::LANES {
                    acc[i] = isa.load(&sums[c], i);
                }
                y[start + r] = isa.reduce_add(sum_lanes(isa, acc)) + 0.0;
            }
        }
    }
}

/// `sums[r][c] += w[r] · x[c]`, lane by lane.
#[inline(always)]
fn add<I: Isa, const C: usize>(
    isa: I,
    w: [&[[f32; 32]]; ROWS],
    x: [&[[f32; 32]]; C],
    sums: &mut [[[f32; 32]; C]; ROWS],
) {
    let n = w[0].len();
    let (mut w, mut x) = (w, x);
    for r in 0..ROWS {
        w[r] = &w[r][..n];
    }
    for c in 0..C {
        x[c] = &x[c][..n];
    }
    for i in 0..32 / I::LANES {
        let mut acc = [[isa.splat(0.0); C]; ROWS];
        for r in 0..ROWS {
            for c in 0..C {
                acc[r][c] = isa.load(&sums[r][c], i);
            }
        }
        for k in 0..n {
            let mut of_rows = [isa.load(&w[0][k], i); ROWS];
            for r in 1..ROWS {
                of_rows[r] = isa.load(&w[r][k], i);
            }
            for c in 0..C {
                let x = isa.load(&x[c][k], i);
                for r in 0..ROWS {
                    acc[r][c] = isa.mul_add(of_rows[r], x, acc[r][c]);
                }
            }
        }
        for r in 0..ROWS {
            for c in 0..C {
                isa.store(acc[r][c], &mut sums[r][c], i);
            }
        }
    }
}
