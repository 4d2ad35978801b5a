//! Rows of numbers times many columns, with the bits of one row times one column.
//!
//! ```text
//! for each panel of rows:                        (a number of each row side by side, class by class)
//!     for each few columns:                      (packed alike, once for all rows)
//!         for each class l of 32:                (what both have of it is in the L1 cache)
//!             for k = l (mod 32):                (a sum for each row and column stays in a register)
//!                 acc[c][r] += w[r][k] · x[c][k]
//!             merge acc with those of the classes before, as a lone row's lanes are added up
//! ```
//!
//! Nothing is added across lanes, and a number that was loaded is used for all rows or all columns of a tile: multiply-adds are
//! the bound. `tile.rs` is for few columns, which would not bring back what packing costs.

use super::{
    RowsOf,
    words::{Factors, Words},
};
use crate::{
    isa::{Isa, Kernel},
    kernel::matmul::ask,
};
use bytemuck::{must_cast_mut, must_cast_ref};
use core::marker::PhantomData;

/// Words of a unit: lanes of a lone row, and so classes of its elements.
const CLASSES: usize = 32;
/// Classes in the order in which halves first are added up: the bits of a number from last to first.
const ORDER: [usize; CLASSES] = {
    let mut order = [0; CLASSES];
    let mut i = 0;
    while i < CLASSES {
        order[i] = (i as u32).reverse_bits() as usize >> 27;
        i += 1;
    }
    order
};
/// Sums of 1, 2, 4, 8 and 16 classes that wait for as many others, and of all.
const LEVELS: usize = 6;
/// Bytes of packed columns at once. They are gone through once for each panel of rows.
const COLUMN_BYTES: usize = 2 * 1024 * 1024;

/// Units of a row that are packed before the next rows'.
const UNITS: usize = 4;

/// Numbers from the beginning of a class to that of the next: not a power of two, for which a cache has few places.
fn class_len(steps: usize, width: usize) -> usize {
    steps * width + 16
}

/// Whether so many columns of so many elements are better off here than in tiles. Measured on a Xeon with AVX-512 and with AVX2:
/// 32 columns take as long, 48 0.75 to 1.0 of the time, 512 0.55 to 0.85; short columns are merged more than multiplied.
pub(super) fn pays(columns: usize, elements: usize) -> bool {
    columns >= 48 && elements >= 8 * CLASSES
}

/// All rows times several columns.
#[inline(always)]
pub(super) fn matmul<I: Isa, T: Factors>(isa: I, rows: RowsOf<'_, T>, x: &[f32], y: &mut [&mut [f32]]) {
    // As many sums as registers hold, beside a vector of rows or two and a number of a column.
    match I::LANES {
        16 => columns::<I, T, 2, 12>(isa, rows, x, y),
        8 => columns::<I, T, 2, 6>(isa, rows, x, y),
        _ => columns::<I, T, 4, 6>(isa, rows, x, y),
    }
}

/// In tiles of `V` vectors of rows and `C` columns.
#[inline(always)]
fn columns<I: Isa, T: Factors, const V: usize, const C: usize>(
    isa: I,
    rows: RowsOf<'_, T>,
    x: &[f32],
    y: &mut [&mut [f32]],
) {
    let (count, cols) = (y.first().map_or(0, |y| y.len()), x.len() / y.len().max(1));
    let numbers = size_of::<T::Unit>() / size_of::<T>();
    let (steps, height, width) = (cols.div_ceil(numbers), V * I::LANES, C.next_multiple_of(4));
    let of_tile = CLASSES * class_len(steps, width);
    let tiles = (COLUMN_BYTES / (of_tile * size_of::<f32>()).max(1)).clamp(1, y.len().div_ceil(C));
    let mut packed_rows = vec![0.0; CLASSES * class_len(steps, height)];
    let mut packed_columns = vec![0.0; tiles * of_tile];
    let mut waiting = [[[[0.0; 16]; C]; V]; LEVELS];
    for (x, y) in x.chunks((tiles * C * cols).max(1)).zip(y.chunks_mut(tiles * C)) {
        for (x, out) in x.chunks((C * cols).max(1)).zip(packed_columns.chunks_mut(of_tile)) {
            let columns = RowsOf { elements: T::column(x), len: cols, stride: cols };
            isa.leaf(Pack { rows: columns, first: 0, end: x.len() / cols, width, out });
        }
        for first in (0..count).step_by(height) {
            let end = count.min(first + height);
            isa.leaf(Pack { rows, first, end, width: height, out: &mut packed_rows });
            for (x, y) in packed_columns.chunks(of_tile).zip(y.chunks_mut(C)) {
                let tile = Tile { rows: &packed_rows, columns: x, steps, width };
                for y in y.iter() {
                    ask(&y[first..end], 0, size_of_val(&y[first..end]));
                }
                isa.leaf(Multiply::<T, V, C> { tile, waiting: &mut waiting, of: PhantomData });
                for (c, y) in y.iter_mut().enumerate() {
                    let sums = waiting[LEVELS - 1].iter().flat_map(|of_vector| &of_vector[c][..I::LANES]);
                    for (y, sum) in y[first..end].iter_mut().zip(sums) {
                        *y = sum + 0.0;
                    }
                }
            }
        }
    }
}

/// Rows `first..end` as `out[class][k / 32][row]` with room for `width` rows, a multiple of four.
struct Pack<'a, T> {
    rows: RowsOf<'a, T>,
    first: usize,
    end: usize,
    width: usize,
    out: &'a mut [f32],
}

impl<T: Words> Kernel for Pack<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { rows, first, end, width, out } = self;
        let of_class = out.len() / CLASSES;
        let numbers = size_of::<T::Unit>() / size_of::<T>();
        let whole = T::units(rows.row(first)).len();
        // A few units of all rows after each other: what is written then stays in the L1 cache until its lines are complete.
        for units in (0..rows.len.div_ceil(numbers)).step_by(UNITS) {
            for at in (0..end - first).step_by(4) {
                // A row that is not there is packed as the last one, and forgotten.
                let row = |r: usize| rows.row((first + at + r).min(end - 1));
                let four = [row(0), row(1), row(2), row(3)];
                let of = [T::units(four[0]), T::units(four[1]), T::units(four[2]), T::units(four[3])];
                for unit in units..whole.min(units + UNITS) {
                    let w = [&of[0][unit], &of[1][unit], &of[2][unit], &of[3][unit]];
                    pack_four::<I, T>(isa, w, &mut out[unit * width + at..], of_class);
                }
                if whole < units + UNITS
                    && let [Some(a), Some(b), Some(c), Some(d)] =
                        [T::rest(four[0]), T::rest(four[1]), T::rest(four[2]), T::rest(four[3])]
                {
                    pack_four::<I, T>(isa, [&a, &b, &c, &d], &mut out[whole * width + at..], of_class);
                }
            }
        }
    }
}

/// Of a unit of four rows: word `l` of all four to `out[l · of_class..][..4]`.
#[inline(always)]
fn pack_four<I: Isa, T: Words>(isa: I, w: [&T::Unit; 4], out: &mut [f32], of_class: usize) {
    let mut wide = [[[0.0_f32; 16]; 2]; 4];
    for r in 0..4 {
        for i in 0..32 / I::LANES {
            isa.store(T::word(isa, w[r], i), must_cast_mut::<_, [f32; 32]>(&mut wide[r]), i);
        }
    }
    for half in 0..2 {
        let mut turned = [[[0.0_f32; 4]; 4]; 4];
        for v in 0..16 / I::LANES {
            let rows = [
                isa.load_bytes(must_cast_ref(&wide[0][half]), v),
                isa.load_bytes(must_cast_ref(&wide[1][half]), v),
                isa.load_bytes(must_cast_ref(&wide[2][half]), v),
                isa.load_bytes(must_cast_ref(&wide[3][half]), v),
            ];
            let of = isa.turn(rows);
            for t in 0..4 {
                isa.store_bytes(of[t], must_cast_mut(&mut turned[t]), v);
            }
        }
        for t in 0..4 {
            for j in 0..4 {
                out[(16 * half + 4 * j + t) * of_class..][..4].copy_from_slice(&turned[t][j]);
            }
        }
    }
}

/// Packed rows and columns of `steps` elements in each class; a column's room is `width` wide.
#[derive(Clone, Copy)]
struct Tile<'a> {
    rows: &'a [f32],
    columns: &'a [f32],
    steps: usize,
    width: usize,
}

/// The sums of a tile of `V` vectors of rows and `C` columns, the last of what waits.
struct Multiply<'a, T, const V: usize, const C: usize> {
    tile: Tile<'a>,
    waiting: &'a mut [[[[f32; 16]; C]; V]; LEVELS],
    of: PhantomData<T>,
}

impl<T: Factors, const V: usize, const C: usize> Kernel for Multiply<'_, T, V, C> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { tile: Tile { rows, columns, steps, width }, waiting, .. } = self;
        let height = V * I::LANES;
        for (i, class) in ORDER.into_iter().enumerate() {
            let w = &rows[class * class_len(steps, height)..][..steps * height];
            let x = &columns[class * class_len(steps, width)..][..steps * width];
            let mut acc = [[isa.splat(0.0); C]; V];
            for (w, x) in w.chunks_exact(height).zip(x.chunks_exact(width)) {
                add::<I, T, V, C>(isa, &mut acc, w, x);
            }
            merge(isa, acc, i, waiting);
        }
    }
}

/// `acc[v][c] += w[v] · x[c]`
#[inline(always)]
fn add<I: Isa, T: Factors, const V: usize, const C: usize>(
    isa: I,
    acc: &mut [[I::V; C]; V],
    w: &[f32],
    x: &[f32],
) {
    let (Some(x), Some(w)) = (x.first_chunk::<C>(), vectors::<I, V>(isa, w)) else { return };
    for c in 0..C {
        let x = isa.splat(x[c]);
        for v in 0..V {
            acc[v][c] = T::add(isa, w[v], x, acc[v][c]);
        }
    }
}

#[inline(always)]
fn vectors<I: Isa, const V: usize>(isa: I, w: &[f32]) -> Option<[I::V; V]> {
    let mut of = [isa.splat(0.0); V];
    for v in 0..V {
        of[v] = match I::LANES {
            16 => isa.load(w.as_chunks::<16>().0.get(v)?, 0),
            8 => isa.load(w.as_chunks::<8>().0.get(v)?, 0),
            _ => isa.load(w.as_chunks::<4>().0.get(v)?, 0),
        };
    }
    Some(of)
}

/// Adds the sums of the `i`-th class to what waits for them: one class to one, two to two and so on.
#[inline(always)]
fn merge<I: Isa, const V: usize, const C: usize>(
    isa: I,
    mut acc: [[I::V; C]; V],
    i: usize,
    waiting: &mut [[[[f32; 16]; C]; V]; LEVELS],
) {
    let level = (!i).trailing_zeros() as usize;
    for sums in &waiting[..level] {
        for v in 0..V {
            for c in 0..C {
                acc[v][c] = isa.add(isa.load(&sums[v][c], 0), acc[v][c]);
            }
        }
    }
    for v in 0..V {
        for c in 0..C {
            isa.store(acc[v][c], &mut waiting[level][v][c], 0);
        }
    }
}
