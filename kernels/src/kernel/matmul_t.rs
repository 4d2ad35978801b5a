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

use super::{Lines, padded, prefetch::Ahead};
use crate::{
    format::{Element, RowsKernel, RowsOf, elements::LONGEST, units::Units},
    isa::{Isa, Kernel},
};
use candle_sparse_core::BLOCK_LEN;

/// [`candle_sparse_core::KernelSet::matmul_t`], asking for what is read next.
pub(crate) struct MatmulT<'a, 'y> {
    pub(crate) cols: usize,
    pub(crate) a: &'a [&'a [f32]],
    pub(crate) y: &'a mut [&'y mut [f32]],
    pub(crate) ahead: Ahead<'a>,
}

impl RowsKernel for MatmulT<'_, '_> {
    #[inline(always)]
    fn run<I: Isa, T: Element>(self, isa: I, rows: RowsOf<'_, T>) {
        if !rows.is_empty() && !self.a.is_empty() {
            T::sum_rows(isa, rows, self);
        }
    }
}

/// More results than so many times the columns of a pass are worth a conversion of all elements.
const FEW: usize = 2;

/// [`Element::sum_rows`] of formats with units; asks row by row if `IN_STEP`.
///
/// Rows of blocks are so few lines that a burst does no harm, and asking in each of them costs a tenth (Zen 5).
#[inline(always)]
pub(crate) fn by_units<I: Isa, T: Units + Element, const IN_STEP: bool>(
    isa: I,
    rows: RowsOf<'_, T>,
    sums: MatmulT<'_, '_>,
) {
    let whole = sums.cols / BLOCK_LEN * BLOCK_LEN;
    if T::RESTS && whole < sums.cols {
        for (a, y) in sums.a.iter().zip(sums.y.iter_mut()) {
            rest(isa, rows, a, &mut y[whole..]);
        }
    }
    // Few results are bound by memory, and a conversion costs nothing; for many it would be done again and again. Rows that do
    // not all begin at a unit have no list of units.
    let as_units = rows.stride().is_multiple_of(size_of::<T::Vectors>() / size_of::<T>());
    if sums.y.len() > FEW * I::COLUMNS_T || !as_units {
        by_elements(isa, rows, sums);
    } else if IN_STEP && !sums.ahead.is_nothing() {
        units::<I, T, true>(isa, rows, sums);
    } else {
        sums.ahead.all();
        units::<I, T, false>(isa, rows, sums);
    }
}

/// Part of a matrix as f32, in the L1 cache.
type Panel = [[[f32; BLOCK_LEN]; PANEL_UNITS]; PANEL_ROWS];
const PANEL_ROWS: usize = 32;
const PANEL_UNITS: usize = LONGEST;

/// The whole units of all results, through the elements of panels.
#[inline(always)]
pub(crate) fn by_elements<I: Isa, T: Element>(isa: I, w: RowsOf<'_, T>, sums: MatmulT<'_, '_>) {
    let MatmulT { cols, a, y, ahead } = sums;
    ahead.all();
    let mut panel: Lines<Panel> = Lines([[[0.0; BLOCK_LEN]; PANEL_UNITS]; PANEL_ROWS]);
    let (rows, units) = (a[0].len(), cols / BLOCK_LEN);
    for first in (0..units).step_by(PANEL_UNITS) {
        let n = PANEL_UNITS.min(units - first);
        for start in (0..rows).step_by(PANEL_ROWS) {
            let panel = &mut panel.0[..PANEL_ROWS.min(rows - start)];
            for (r, out) in panel.iter_mut().enumerate() {
                T::write(isa, w.row(start + r), first, &mut out[..n]);
            }
            isa.leaf(OfPanel { panel, n, start, a, first, y });
        }
    }
}

/// The first `n` units of a panel, whose rows begin at `start` and whose units at `first`, for all results.
struct OfPanel<'a, 'y> {
    panel: &'a [[[f32; BLOCK_LEN]; PANEL_UNITS]],
    n: usize,
    start: usize,
    a: &'a [&'a [f32]],
    first: usize,
    y: &'a mut [&'y mut [f32]],
}

impl Kernel for OfPanel<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { panel, n, start, a, first, y } = self;
        // As many sums as hide the latency of the multiply-adds and registers hold.
        let wide = if I::LANES == 16 { 2 } else { 1 };
        let most = 4.min(I::COLUMNS_T);
        for (a, y) in a.chunks(most).zip(y.chunks_mut(most)) {
            let mut u = 0;
            while u < n {
                let k = (first + u) * BLOCK_LEN;
                let pair = y.len() == 4 && wide == 2 && u + 2 <= n;
                match y.len() {
                    4 if I::COLUMNS_T >= 4 && pair => tile::<I, 4, 2>(isa, panel, u, start, a, y, k),
                    4 if I::COLUMNS_T >= 4 => tile::<I, 4, 1>(isa, panel, u, start, a, y, k),
                    3 if I::COLUMNS_T >= 3 => tile::<I, 3, 1>(isa, panel, u, start, a, y, k),
                    2 => tile::<I, 2, 1>(isa, panel, u, start, a, y, k),
                    _ => tile::<I, 1, 1>(isa, panel, u, start, a, y, k),
                }
                u += if pair { 2 } else { 1 };
            }
        }
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
        let y = y[c][k..k + U * BLOCK_LEN].as_chunks::<BLOCK_LEN>().0;
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
        let y = y[c][k..k + U * BLOCK_LEN].as_chunks_mut::<BLOCK_LEN>().0;
        for j in 0..U {
            for i in 0..32 / I::LANES {
                isa.store(acc[c][j][i], &mut y[j], i);
            }
        }
    }
}

/// All whole units, each for all results. Rows begin at a unit.
#[inline(always)]
fn units<I: Isa, T: Units, const AHEAD: bool>(isa: I, rows: RowsOf<'_, T>, sums: MatmulT<'_, '_>) {
    let MatmulT { cols, a, y, ahead } = sums;
    let per_row = rows.stride() * size_of::<T>() / size_of::<T::Vectors>();
    for k in 0..cols / BLOCK_LEN {
        // A list of units: to look for the bounds of each row would take as long as what is done with it.
        let units = || T::vectors(rows.elements())[k..].iter().step_by(per_row);
        let mut ahead = ahead.after(k * a[0].len());
        let mut c = 0;
        // Sixteen registers do not hold 32 sums of three columns beside what a block's numbers are made from: half of a unit
        // after the other then, for four columns.
        let halves = T::IN_HALVES && I::LANES == 8;
        let most = if halves { 4 } else { I::COLUMNS_T };
        while c < y.len() {
            let left = y.len() - c;
            let width = if most == 8 && left >= 8 { 8 } else { left.min(4.min(most)) };
            let (a, y) = (&a[c..c + width], &mut y[c..c + width]);
            match width {
                4 if halves => unit_in_halves::<I, T, 4>(isa, units(), a, y, k),
                3 if halves => unit_in_halves::<I, T, 3>(isa, units(), a, y, k),
                8 if most >= 8 => unit::<I, T, 8, 0, 32, AHEAD>(isa, units(), a, y, k, ahead),
                4 if most >= 4 => unit::<I, T, 4, 0, 32, AHEAD>(isa, units(), a, y, k, ahead),
                3 if most >= 3 => unit::<I, T, 3, 0, 32, AHEAD>(isa, units(), a, y, k, ahead),
                2 => unit::<I, T, 2, 0, 32, AHEAD>(isa, units(), a, y, k, ahead),
                _ => unit::<I, T, 1, 0, 32, AHEAD>(isa, units(), a, y, k, ahead),
            }
            // Once is enough.
            ahead = Ahead::NOTHING;
            c += width;
        }
    }
}

/// Rows whose weights are copied together: to ask for the bounds of many columns in each row takes as long as the products.
const ROWS: usize = 16;

/// [`unit()`] for the first half of its elements, then for the other.
#[inline(always)]
fn unit_in_halves<'a, I: Isa, T: Units<Vectors: 'a>, const C: usize>(
    isa: I,
    units: impl Iterator<Item = &'a T::Vectors> + Clone,
    a: &[&[f32]],
    y: &mut [&mut [f32]],
    k: usize,
) {
    unit::<I, T, C, 0, 16, false>(isa, units.clone(), a, y, k, Ahead::NOTHING);
    unit::<I, T, C, 16, 32, false>(isa, units, a, y, k, Ahead::NOTHING);
}

/// Elements `FROM..TO` of unit `k` of `C` results: what that unit of each row adds to them.
#[inline(always)]
fn unit<
    'a,
    I: Isa,
    T: Units<Vectors: 'a>,
    const C: usize,
    const FROM: usize,
    const TO: usize,
    const AHEAD: bool,
>(
    isa: I,
    mut units: impl Iterator<Item = &'a T::Vectors>,
    a: &[&[f32]],
    y: &mut [&mut [f32]],
    k: usize,
    ahead: Ahead<'_>,
) {
    // A unit has eight vectors of four lanes; a level with wider vectors leaves the rest unused.
    let mut acc = [[isa.splat(0.0); 8]; C];
    for c in 0..C {
        let block = &y[c].as_chunks::<BLOCK_LEN>().0[k];
        for i in FROM / I::LANES..TO / I::LANES {
            acc[c][i] = isa.load(block, i);
        }
    }
    for start in (0..a[0].len()).step_by(ROWS) {
        let n = ROWS.min(a[0].len() - start);
        let mut weights = Lines([[0.0; ROWS]; C]);
        for c in 0..C {
            let a = &a[c][start..start + n];
            match a.first_chunk() {
                Some(a) => weights.0[c] = *a,
                None => weights.0[c][..n].copy_from_slice(a),
            }
        }
        // The numbers come first: a unit that finds none would be lost.
        for (r, unit) in (0..n).zip(&mut units) {
            if AHEAD {
                ahead.row(start + r);
            }
            for i in FROM / I::LANES..TO / I::LANES {
                let v = T::value(isa, unit, i);
                for c in 0..C {
                    acc[c][i] = isa.mul_add(isa.splat(weights.0[c][r]), v, acc[c][i]);
                }
            }
        }
    }
    for c in 0..C {
        let block = &mut y[c].as_chunks_mut::<BLOCK_LEN>().0[k];
        for i in FROM / I::LANES..TO / I::LANES {
            isa.store(acc[c][i], block, i);
        }
    }
}

/// The columns of one result that are no whole unit.
#[inline(always)]
fn rest<I: Isa, T: Units>(isa: I, rows: RowsOf<'_, T>, a: &[f32], y: &mut [f32]) {
    let mut block = padded(y, 0.0);
    for (row, &a) in rows.in_order().zip(a) {
        let unit = T::rest(row);
        for i in 0..32 / I::LANES {
            let sum = isa.mul_add(isa.splat(a), T::value(isa, &unit, i), isa.load(&block, i));
            isa.store(sum, &mut block, i);
        }
    }
    y.copy_from_slice(&block[..y.len()]);
}
