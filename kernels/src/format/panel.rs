//! Thirty-two rows of blocks times several columns, with the bits of [`super::products::dot`].
//!
//! ```text
//! for each thirty-two rows:                      (unpacked, four rows side by side)
//!     for each 8 columns:
//!         for each sixteen blocks:               (in the L1 cache, and so are the columns' sums)
//!             for each column, or two of them:   (integer sums of 32 rows stay in registers)
//!                 sum += row bytes · column bytes
//!                 acc[class] += t · d
//! ```
//!
//! Lane `4b + r` of a vector belongs to block `b` of row `r`. A column's bytes are spread over the rows, so no sum is ever taken
//! across lanes, and what a block costs to unpack is paid once for all columns. Rows of a panel are read side by side, which
//! the hardware does not see coming: the next panel is asked for, in the order of its memory.

mod multiply;

use super::{
    RowsOf, few,
    products::{Block, Kind, MOST_PLANES, dot, last},
};
use crate::{
    isa::{Isa, Kernel},
    kernel::matmul::ask,
};
use bytemuck::Zeroable;
use candle_sparse_core::ActivationGroup;
use core::marker::PhantomData;
use multiply::{Multiply, NO_SUMS, write};

/// Rows of a panel: as many as bring back what unpacking costs, while their sums stay in registers.
const ROWS: usize = 32;
const FOURS: usize = ROWS / 4;
/// Columns whose sums stay in the L1 cache, 16 KiB of them, beside 18 KiB of unpacked blocks.
const COLUMNS: usize = 8;
/// Bytes of columns that stay in the L2 cache while all rows are multiplied with them, and columns at least: fewer would not
/// bring back what unpacking costs.
const BLOCK_BYTES: usize = 384 * 1024;
const LEAST_BLOCK: usize = 64;

/// Columns that panels do not pay for.
const FEW: usize = 2;

/// A group of four rows: of each half the bytes `4t..4t + 4` of each block and row.
type Quants = [[[i8; 64]; 4]; 2];

/// Sixteen blocks of each row of a panel: of each group, for each four rows, their bytes and the numbers of their blocks.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Chunk {
    quants: [[Quants; FOURS]; 4],
    planes: [[[[f32; 16]; FOURS]; 4]; MOST_PLANES],
}

const NO_CHUNK: Chunk =
    Chunk { quants: [[[[[0; 64]; 4]; 2]; FOURS]; 4], planes: [[[[0.0; 16]; FOURS]; 4]; MOST_PLANES] };

/// Where the groups of a part of a row begin, how many there are, and how many units they are. A part is sixteen blocks; where
/// none are left, a unit, and at last what is no whole unit.
#[derive(Clone, Copy)]
struct Part {
    unit: usize,
    units: usize,
    group: usize,
    groups: usize,
}

/// All rows times several columns.
#[inline(always)]
pub(super) fn matmul<I: Isa, T: Block<N>, const N: usize>(
    isa: I,
    rows: RowsOf<'_, T>,
    x: &[ActivationGroup],
    y: &mut [&mut [f32]],
) {
    let per_column = x.len() / y.len().max(1);
    if few::pays::<I>(y.len(), size_of_val(x)) {
        return few::matmul::<I, T, N>(isa, rows, x, per_column, y);
    }
    if y.len() <= FEW {
        // Row after row, as one column is: what is read in order costs less than what is unpacked once.
        let count = y.first().map_or(0, |y| y.len());
        for r in 0..count {
            let (row, ahead) = (rows.row(r), rows.row_ahead(r, count));
            for (x, y) in x.chunks_exact(per_column).zip(y.iter_mut()) {
                y[r] = dot::<I, T, N>(isa, row, x, ahead);
            }
        }
        return;
    }
    let block = (BLOCK_BYTES / (per_column * size_of::<ActivationGroup>()).max(1)).max(LEAST_BLOCK);
    let block = block.next_multiple_of(COLUMNS);
    for (x, y) in x.chunks((block * per_column).max(1)).zip(y.chunks_mut(block)) {
        columns::<I, T, N>(isa, rows, x, per_column, y);
    }
}

/// All rows times columns that fit a cache.
#[inline(always)]
fn columns<I: Isa, T: Block<N>, const N: usize>(
    isa: I,
    rows: RowsOf<'_, T>,
    x: &[ActivationGroup],
    per_column: usize,
    y: &mut [&mut [f32]],
) {
    let (n, count) = (y.len(), y.first().map_or(0, |y| y.len()));
    let parts = parts::<T, N>(rows.row(0).len(), per_column);
    // A few columns are done with a chunk at once; more come back to it.
    let keep = n > COLUMNS;
    let mut chunks = vec![NO_CHUNK; if keep { parts.len() } else { 1 }];
    let mut sums = [NO_SUMS; COLUMNS];
    for start in (0..count).step_by(ROWS) {
        let panel = Panel { rows, start, end: count.min(start + ROWS) };
        for (&part, out) in parts.iter().zip(&mut chunks).take(if keep { parts.len() } else { 0 }) {
            isa.leaf(Unpack::<T, N> { panel, part, out });
        }
        let groups = n.div_ceil(COLUMNS);
        for (c, (x, y)) in x.chunks(COLUMNS * per_column).zip(y.chunks_mut(COLUMNS)).enumerate() {
            // A whole chunk begins all sums.
            let whole = parts.first().is_some_and(|p| p.groups == 4);
            if !whole {
                sums.fill(NO_SUMS);
            }
            for (i, &part) in parts.iter().enumerate() {
                let chunk = &mut chunks[if keep { i } else { 0 }];
                if !keep {
                    isa.leaf(Unpack::<T, N> { panel, part, out: chunk });
                }
                let kind = PhantomData::<T::Kind>;
                let first = whole && i == 0;
                let next = panel.next::<N>(part, [c, groups]);
                isa.leaf(Multiply { chunk, part, x, per_column, first, next, sums: &mut sums, kind });
            }
            for (sums, y) in sums.iter().zip(y.iter_mut()) {
                write(isa, sums, &mut y[start..panel.end]);
            }
        }
    }
}

/// The parts of a row of some blocks.
fn parts<T: Block<N>, const N: usize>(blocks: usize, per_column: usize) -> Vec<Part> {
    let (whole, per_chunk) = (blocks / N, 4 / T::GROUPS);
    let mut parts = Vec::with_capacity(whole.div_ceil(per_chunk) + 4);
    let mut unit = 0;
    while unit < whole {
        let units = if whole - unit >= per_chunk { per_chunk } else { 1 };
        parts.push(Part { unit, units, group: unit * T::GROUPS, groups: units * T::GROUPS });
        unit += units;
    }
    if !blocks.is_multiple_of(N) {
        parts.push(Part { unit, units: 1, group: per_column - 1, groups: 1 });
    }
    parts
}

/// Rows `start..end`.
#[derive(Clone, Copy)]
struct Panel<'a, T> {
    rows: RowsOf<'a, T>,
    start: usize,
    end: usize,
}

/// Memory that is read later.
#[derive(Clone, Copy)]
struct Next {
    address: usize,
    bytes: usize,
}

/// Makes a chunk of a part of rows.
struct Unpack<'a, T, const N: usize> {
    panel: Panel<'a, T>,
    part: Part,
    out: &'a mut Chunk,
}

impl<T: Block<N>, const N: usize> Kernel for Unpack<'_, T, N> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { panel, part: Part { unit, units, .. }, out } = self;
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
                panel.ask_for_next::<N>(FOURS * unit + k * units + i);
                four::<I, T, N, 0>(isa, w, out, i * T::GROUPS, k);
                if T::GROUPS == 2 {
                    four::<I, T, N, 1>(isa, w, out, i * T::GROUPS + 1, k);
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
    /// Asks for half as much of the next panel as a unit of four rows takes, the `i`-th such part. Little at a time: a burst waits
    /// for the memory, and nothing is computed meanwhile.
    #[inline(always)]
    fn ask_for_next<const N: usize>(self, i: usize) {
        let row = self.rows.row(self.start);
        if self.rows.stride() == row.len() {
            let bytes = 2 * N * size_of::<T>();
            ask(row, ROWS * size_of_val(row) + i * bytes, bytes);
        }
    }

    /// The other half of the next panel, of which the `c`-th of `n` products with a part asks for a share.
    #[inline(always)]
    fn next<const N: usize>(self, part: Part, [c, n]: [usize; 2]) -> Next {
        let row = self.rows.row(self.start);
        if self.rows.stride() != row.len() {
            return Next { address: 0, bytes: 0 };
        }
        let unit = ROWS / 2 * N * size_of::<T>();
        let share = (part.units * unit).div_ceil(n);
        let half = (ROWS + ROWS / 2) * size_of_val(row);
        Next { address: row.as_ptr().addr().wrapping_add(half + part.unit * unit + c * share), bytes: share }
    }
}

/// Group `G` of a unit of four rows, which is group `g` of the chunk.
#[inline(always)]
fn four<I: Isa, T: Block<N>, const N: usize, const G: usize>(
    isa: I,
    w: [&[T; N]; 4],
    out: &mut Chunk,
    g: usize,
    k: usize,
) {
    let quants = &mut out.quants[g][k];
    macro_rules! vectors {
        ($($v:literal)*) => {$(
            let rows = [
                T::quants::<I, G, $v>(isa, w[0]), T::quants::<I, G, $v>(isa, w[1]),
                T::quants::<I, G, $v>(isa, w[2]), T::quants::<I, G, $v>(isa, w[3]),
            ];
            for h in 0..2 {
                let turned = isa.turn([rows[0][h], rows[1][h], rows[2][h], rows[3][h]]);
                for t in 0..4 {
                    isa.store_bytes(turned[t], &mut quants[h][t], $v);
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
            isa.store(turned[v], &mut out.planes[p][g][k], v);
        }
    }
}
