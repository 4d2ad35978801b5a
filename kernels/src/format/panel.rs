//! Sixteen rows of blocks times several columns, with the bits of [`super::products::dot`].
//!
//! ```text
//! for each sixteen rows, for each 64 columns:
//!     for each sixteen blocks:                   (unpacked into the L1 cache, four rows side by side)
//!         for each column, or two of them:       (sums of 16 rows stay in registers)
//!             sum += row bytes · column bytes
//!             acc[class] += t · d                (in the L1 cache)
//! ```
//!
//! Lane `4b + r` of a vector belongs to block `b` of row `r`. A column's bytes are spread over the rows, so no sum is ever taken
//! across lanes, and what a block costs to unpack is paid once for all columns. Rows of a panel are read side by side, which
//! the hardware does not see coming: the next panel is asked for, in the order of its memory.

use super::{
    RowsOf,
    products::{Block, Kind, MOST_PLANES, last},
};
use crate::{
    isa::{Isa, Kernel},
    kernel::matmul::ask,
};
use bytemuck::Zeroable;
use candle_sparse_core::ActivationGroup;
use core::marker::PhantomData;

/// Rows of a panel: as many as bring back what unpacking costs, while their sums stay in registers.
const ROWS: usize = 16;
const FOURS: usize = ROWS / 4;
/// Columns for which a panel is unpacked once; their sums are 64 KiB.
const COLUMNS: usize = 64;

/// A group of four rows: lanes, and numbers of blocks.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Four {
    /// Of each half the bytes `4t..4t + 4` of each block and row.
    quants: [[[i8; 64]; 4]; 2],
    planes: [[f32; 16]; MOST_PLANES],
}

/// Sums of a column: of each group of a chunk, for each four rows.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Sums([[[f32; 16]; FOURS]; 4]);

const NO_SUMS: Sums = Sums([[[0.0; 16]; FOURS]; 4]);

/// Sixteen blocks of each row of a panel.
type Chunk = [[Four; FOURS]; 4];

/// All rows times several columns.
#[inline(always)]
pub(super) fn matmul<I: Isa, T: Block<N>, const N: usize>(
    isa: I,
    rows: RowsOf<'_, T>,
    x: &[ActivationGroup],
    y: &mut [&mut [f32]],
) {
    let count = y.first().map_or(0, |y| y.len());
    let per_column = x.len() / y.len().max(1);
    let mut sums = vec![NO_SUMS; y.len().min(COLUMNS).next_multiple_of(2)];
    let mut chunk = [[Four { quants: [[[0; 64]; 4]; 2], planes: [[0.0; 16]; MOST_PLANES] }; FOURS]; 4];
    for start in (0..count).step_by(ROWS) {
        for (b, y) in y.chunks_mut(COLUMNS).enumerate() {
            let x = &x[b * COLUMNS * per_column..][..y.len() * per_column];
            let panel = Panel { rows, start, end: count.min(start + ROWS), ask: b == 0 };
            add_panel::<I, T, N>(isa, panel, x, per_column, &mut chunk, &mut sums[..y.len().next_multiple_of(2)]);
            for (sums, y) in sums.iter().zip(y.iter_mut()) {
                write(isa, sums, &mut y[start..panel.end]);
            }
        }
    }
}

/// Rows `start..end`.
#[derive(Clone, Copy)]
struct Panel<'a, T> {
    rows: RowsOf<'a, T>,
    start: usize,
    end: usize,
    ask: bool,
}

/// `sums = panel · x`.
#[inline(always)]
fn add_panel<I: Isa, T: Block<N>, const N: usize>(
    isa: I,
    panel: Panel<'_, T>,
    x: &[ActivationGroup],
    per_column: usize,
    chunk: &mut Chunk,
    sums: &mut [Sums],
) {
    sums.fill(NO_SUMS);
    let whole = panel.rows.row(panel.start).len() / N;
    let per_chunk = 4 / T::GROUPS;
    let mut unit = 0;
    while unit < whole {
        // Where no whole chunk is left, group by group: a class of the first four for each.
        let units = if whole - unit >= per_chunk { per_chunk } else { 1 };
        isa.leaf(Unpack::<T, N> { panel, unit, units, out: chunk });
        let (first, groups) = (unit * T::GROUPS, units * T::GROUPS);
        if units == per_chunk {
            multiply::<I, T::Kind>(isa, &chunk[..groups], x, per_column, first, sums);
        } else {
            for g in 0..groups {
                multiply::<I, T::Kind>(isa, &chunk[g..=g], x, per_column, first + g, sums);
            }
        }
        unit += units;
    }
    if !panel.rows.row(panel.start).len().is_multiple_of(N) {
        isa.leaf(Unpack::<T, N> { panel, unit: whole, units: 1, out: chunk });
        multiply::<I, T::Kind>(isa, &chunk[..1], x, per_column, per_column - 1, sums);
    }
}

/// Makes chunks of units.
struct Unpack<'a, T, const N: usize> {
    panel: Panel<'a, T>,
    unit: usize,
    units: usize,
    out: &'a mut Chunk,
}

impl<T: Block<N>, const N: usize> Kernel for Unpack<'_, T, N> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { panel, unit, units, out } = self;
        for k in 0..FOURS {
            let mut rooms = [None; 4];
            let [a, b, c, d] = &mut rooms;
            let first = panel.start + 4 * k;
            let rows = [
                panel.units(first, unit, units, a),
                panel.units(first + 1, unit, units, b),
                panel.units(first + 2, unit, units, c),
                panel.units(first + 3, unit, units, d),
            ];
            for i in 0..units.min(4) {
                let w = [&rows[0][i], &rows[1][i], &rows[2][i], &rows[3][i]];
                if panel.ask {
                    panel.ask_for_next::<N>(FOURS * unit + k * units + i);
                }
                four::<I, T, N, 0>(isa, w, &mut out[i * T::GROUPS][k]);
                if T::GROUPS == 2 {
                    four::<I, T, N, 1>(isa, w, &mut out[i * T::GROUPS + 1][k]);
                }
            }
        }
    }
}

impl<'a, T: Copy + Zeroable> Panel<'a, T> {
    /// Units of a row, or its last one; rows past the end are the last row.
    #[inline(always)]
    fn units<'b, const N: usize>(
        self,
        row: usize,
        unit: usize,
        units: usize,
        room: &'b mut Option<[T; N]>,
    ) -> &'b [[T; N]]
    where
        'a: 'b,
    {
        let row = self.rows.row(row.min(self.end - 1));
        match row.as_chunks().0.get(unit..unit + units) {
            Some(units) => units,
            None => last(row, room).map_or(&[], core::slice::from_ref),
        }
    }
}

impl<T: Copy> Panel<'_, T> {
    /// Asks for as much of the next panel as a unit of four rows takes, the `i`-th such part. Little at a time: a burst waits for
    /// the memory, and nothing is computed meanwhile.
    #[inline(always)]
    fn ask_for_next<const N: usize>(self, i: usize) {
        let row = self.rows.row(self.start);
        if self.rows.stride() == row.len() {
            let bytes = 4 * N * size_of::<T>();
            ask(row, ROWS * size_of_val(row) + i * bytes, bytes);
        }
    }
}

/// Group `G` of a unit of four rows.
#[inline(always)]
fn four<I: Isa, T: Block<N>, const N: usize, const G: usize>(isa: I, w: [&[T; N]; 4], out: &mut Four) {
    macro_rules! vectors {
        ($($v:literal)*) => {$(
            let rows = [
                T::quants::<I, G, $v>(isa, w[0]), T::quants::<I, G, $v>(isa, w[1]),
                T::quants::<I, G, $v>(isa, w[2]), T::quants::<I, G, $v>(isa, w[3]),
            ];
            for h in 0..2 {
                let turned = isa.turn([rows[0][h], rows[1][h], rows[2][h], rows[3][h]]);
                for t in 0..4 {
                    isa.store_bytes(turned[t], &mut out.quants[h][t], $v);
                }
            }
        )*};
    }
    vectors!(0);
    if I::LANES < 16 {
        vectors!(1);
    }
    if I::LANES < 8 {
        vectors!(2 3);
    }
    let mut planes = [T::planes(isa, w, [G; 4], 0); 4];
    for q in 1..16 / I::LANES {
        planes[q] = T::planes(isa, w, [G; 4], q);
    }
    for p in 0..T::Kind::PLANES {
        let turned = isa.turn_fours([planes[0][p], planes[1][p], planes[2][p], planes[3][p]]);
        for v in 0..16 / I::LANES {
            isa.store(turned[v], &mut out.planes[p], v);
        }
    }
}

/// `sums += chunk · x` for groups from `first` on of all columns.
#[inline(always)]
fn multiply<I: Isa, K: Kind>(
    isa: I,
    chunk: &[[Four; FOURS]],
    x: &[ActivationGroup],
    per_column: usize,
    first: usize,
    sums: &mut [Sums],
) {
    isa.leaf(Multiply::<K> { chunk, x, per_column, first, sums, kind: PhantomData });
}

struct Multiply<'a, K> {
    chunk: &'a [[Four; FOURS]],
    x: &'a [ActivationGroup],
    per_column: usize,
    first: usize,
    sums: &'a mut [Sums],
    kind: PhantomData<K>,
}

impl<K: Kind> Kernel for Multiply<'_, K> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { chunk, x, per_column, first, sums, .. } = self;
        let mut columns = x.chunks_exact(per_column);
        for sums in sums.as_chunks_mut::<2>().0 {
            let Some(a) = columns.next() else { return };
            let b = columns.next();
            let (a, b) = (&a[first..][..chunk.len()], b.map(|b| &b[first..][..chunk.len()]));
            let [sums_a, sums_b] = sums;
            for (g, four) in chunk.iter().enumerate() {
                if I::PAIRS {
                    let b = b.unwrap_or(a);
                    add_group::<I, K, 2>(isa, four, [&a[g], &b[g]], [&mut sums_a.0[g], &mut sums_b.0[g]]);
                } else {
                    add_group::<I, K, 1>(isa, four, [&a[g]], [&mut sums_a.0[g]]);
                    if let Some(b) = b {
                        add_group::<I, K, 1>(isa, four, [&b[g]], [&mut sums_b.0[g]]);
                    }
                }
            }
        }
    }
}

/// `acc += w · x` for a group of sixteen rows and `C` columns.
#[inline(always)]
fn add_group<I: Isa, K: Kind, const C: usize>(
    isa: I,
    w: &[Four; FOURS],
    x: [&ActivationGroup; C],
    acc: [&mut [[f32; 16]; FOURS]; C],
) {
    for v in 0..16 / I::LANES {
        let mut sums = [[[isa.zero_sums(); 2]; C]; FOURS];
        for h in 0..2 {
            let mut xs = [isa.spread(isa.load_bytes(&x[0].qs[h], v)); C];
            for c in 1..C {
                xs[c] = isa.spread(isa.load_bytes(&x[c].qs[h], v));
            }
            for k in 0..FOURS {
                let q = &w[k].quants[h];
                let q = [
                    isa.load_bytes(&q[0], v),
                    isa.load_bytes(&q[1], v),
                    isa.load_bytes(&q[2], v),
                    isa.load_bytes(&q[3], v),
                ];
                for c in 0..C {
                    let of = if K::SPLIT { h } else { 0 };
                    sums[k][c][of] = isa.dot_four(K::BITS, sums[k][c][of], q, xs[c]);
                }
            }
        }
        for c in 0..C {
            let neg = &x[c].neg_sums;
            let neg = [
                isa.spread_four_sums(&neg[0], v),
                isa.spread_four_sums(&neg[1], v),
                isa.spread_four_sums(&neg[2], v),
            ];
            let d = isa.spread_four(&x[c].d, v);
            for k in 0..FOURS {
                let mut planes = [isa.splat(0.0); MOST_PLANES];
                for p in 0..K::PLANES {
                    planes[p] = isa.load(&w[k].planes[p], v);
                }
                let t = K::times(isa, &planes, sums[k][c], neg);
                isa.store(isa.mul_add(t, d, isa.load(&acc[c][k], v)), &mut acc[c][k], v);
            }
        }
    }
}

/// The sums of some rows, in the order of [`super::products::dot`].
#[inline(always)]
fn write<I: Isa>(isa: I, sums: &Sums, y: &mut [f32]) {
    for (k, y) in y.chunks_mut(4).enumerate() {
        let mut all = [isa.splat(0.0); 4];
        for v in 0..16 / I::LANES {
            let s = &sums.0;
            let even = isa.add(isa.load(&s[0][k], v), isa.load(&s[2][k], v));
            all[v] = isa.add(even, isa.add(isa.load(&s[1][k], v), isa.load(&s[3][k], v)));
        }
        let rows = isa.sum_fours(all);
        for (y, sum) in y.iter_mut().zip(rows) {
            *y = sum + 0.0;
        }
    }
}
