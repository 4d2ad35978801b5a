//! Rows of numbers times many columns, with the bits of one row times one column.
//!
//! ```text
//! for each few columns:                              (packed once for all rows, whoever multiplies them)
//! for each panel of rows, or for some of them:       (packed: a number of each row side by side, class by class)
//!     for all columns, or as many as a cache holds:
//!         for each panel of those rows, each few of those columns:
//!             for each class l of 32:                (what both have of it is in the L1 cache)
//!                 for k = l (mod 32):                (a sum for each row and column stays in a register)
//!                     acc[c][r] += w[r][k] · x[c][k]
//!                 merge acc with those of the classes before, as a lone row's lanes are added up
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
/// Where a class lies among the others, which are in the order in which halves first are added up: the bits of its number from
/// last to first.
const PLACES: [usize; CLASSES] = {
    let mut places = [0; CLASSES];
    let mut class = 0;
    while class < CLASSES {
        places[class] = (class as u32).reverse_bits() as usize >> 27;
        class += 1;
    }
    places
};
/// Sums of 1, 2, 4, 8 and 16 classes that wait for as many others, and of all.
const LEVELS: usize = 6;
/// Columns that are packed together: a multiple of four, and of what every instruction set multiplies at once.
pub(crate) const TOGETHER: usize = 12;
/// Bytes of packed columns that stay in the L3 cache, for all threads: they are gone through for each panel of rows.
const CACHED_BYTES: usize = 6 * 1024 * 1024;
/// Where columns take more: bytes of rows that are packed before the columns are gone through.
const ROW_BYTES: usize = 3 * 1024 * 1024;
/// Bytes of such columns that are gone through for each panel of those rows.
const COLUMN_BYTES: usize = 512 * 1024;

/// Units of a row that are packed before the next rows'.
const UNITS: usize = 4;

/// Numbers from the beginning of a class to that of the next: not a power of two, for which a cache has few places.
fn class_len(steps: usize, width: usize) -> usize {
    steps * width + 16
}

/// Whether so many columns of so many elements are better off here than in tiles.
///
/// With AVX-512 (a Xeon) 32 columns take as long, 48 0.75 to 1.0 of the time; with AVX2, whose tiles have half the registers,
/// 10 as long, 12 0.8 and 24 0.6 (a Zen 2). Short columns are merged more than multiplied.
pub(super) struct Pays {
    pub(super) columns: usize,
    pub(super) elements: usize,
}

impl Kernel for Pays {
    type Output = bool;

    #[inline(always)]
    fn run<I: Isa>(self, _: I) -> bool {
        let least = if I::LANES == 8 { 12 } else { 48 };
        self.columns >= least && self.elements >= 8 * CLASSES
    }
}

/// Words that [`TOGETHER`] columns of so many elements become.
pub(super) fn packed_len<T: Words>(elements: usize) -> usize {
    CLASSES * class_len(steps::<T>(elements), TOGETHER)
}

/// Units of so many elements.
fn steps<T: Words>(elements: usize) -> usize {
    elements.div_ceil(size_of::<T::Unit>() / size_of::<T>())
}

/// Packs columns of `elements` numbers, [`TOGETHER`] to a piece of `out`.
pub(super) struct PackColumns<'a, T> {
    pub(super) x: &'a [T],
    pub(super) elements: usize,
    pub(super) out: &'a mut [f32],
}

impl<T: Words> Kernel for PackColumns<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { x, elements, out } = self;
        for (x, out) in x.chunks(TOGETHER * elements).zip(out.chunks_mut(packed_len::<T>(elements))) {
            let columns = RowsOf { elements: x, len: elements, stride: elements };
            isa.leaf(Pack { rows: columns, first: 0, end: x.len() / elements, width: TOGETHER, out });
        }
    }
}

/// All rows times several packed columns.
pub(super) struct MatmulPacked<'a, 'y, T> {
    pub(super) rows: RowsOf<'a, T>,
    pub(super) x: &'a [f32],
    pub(super) y: &'a mut [&'y mut [f32]],
}

impl<T: Factors> Kernel for MatmulPacked<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        // As many sums as registers hold, beside a vector of rows or two and a number of a column.
        match I::LANES {
            16 => self.tiles::<I, 2, 12, 1>(isa),
            8 => self.tiles::<I, 2, 6, 2>(isa),
            _ => self.tiles::<I, 4, 6, 2>(isa),
        }
    }
}

impl<T: Factors> MatmulPacked<'_, '_, T> {
    /// In tiles of `V` vectors of rows and `C` columns, `P` of which are a piece.
    #[inline(always)]
    fn tiles<I: Isa, const V: usize, const C: usize, const P: usize>(self, isa: I) {
        let Self { rows, x, y } = self;
        let count = y.first().map_or(0, |y| y.len());
        let (steps, height) = (steps::<T>(rows.len), V * I::LANES);
        let (panel, piece) = (CLASSES * class_len(steps, height), packed_len::<T>(rows.len));
        let cached = size_of_val(x) <= CACHED_BYTES;
        let (row_bytes, column_bytes) = if cached { (0, CACHED_BYTES) } else { (ROW_BYTES, COLUMN_BYTES) };
        let panels = (row_bytes / size_of::<f32>() / panel).clamp(1, count.div_ceil(height));
        let pieces = (column_bytes / size_of::<f32>() / piece).max(1);
        let mut packed = vec![0.0; panels * panel];
        let mut waiting = [[[[0.0; 32]; C]; P]; LEVELS];
        for start in (0..count).step_by(panels * height) {
            let firsts = (start..count.min(start + panels * height)).step_by(height);
            for (first, out) in firsts.clone().zip(packed.chunks_mut(panel)) {
                isa.leaf(Pack { rows, first, end: count.min(first + height), width: height, out });
            }
            for (x, y) in x.chunks(pieces * piece).zip(y.chunks_mut(pieces * TOGETHER)) {
                for (first, rows) in firsts.clone().zip(packed.chunks(panel)) {
                    let r = first..count.min(first + height);
                    for (columns, y) in x.chunks(piece).zip(y.chunks_mut(TOGETHER)) {
                        for y in y.iter() {
                            ask(&y[r.clone()], 0, size_of_val(&y[r.clone()]));
                        }
                        let tile = Tile { rows, columns, steps, parts: y.len().div_ceil(C) };
                        isa.leaf(Multiply::<T, V, C, P> { tile, waiting: &mut waiting, of: PhantomData });
                        for (y, sums) in y.iter_mut().zip(waiting[LEVELS - 1].as_flattened()) {
                            for (y, sum) in y[r.clone()].iter_mut().zip(sums) {
                                *y = sum + 0.0;
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Sums of each column of `P` tiles.
type Sums<const C: usize, const P: usize> = [[[f32; 32]; C]; P];

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
                out[PLACES[16 * half + 4 * j + t] * of_class..][..4].copy_from_slice(&turned[t][j]);
            }
        }
    }
}

/// A panel of rows and as many parts of a piece of columns as are wanted, of `steps` elements in each class.
#[derive(Clone, Copy)]
struct Tile<'a> {
    rows: &'a [f32],
    columns: &'a [f32],
    steps: usize,
    parts: usize,
}

/// The sums of a panel and a piece, in tiles of `V` vectors of rows and `C` columns: the last of what waits.
struct Multiply<'a, T, const V: usize, const C: usize, const P: usize> {
    tile: Tile<'a>,
    waiting: &'a mut [Sums<C, P>; LEVELS],
    of: PhantomData<T>,
}

impl<T: Factors, const V: usize, const C: usize, const P: usize> Kernel for Multiply<'_, T, V, C, P> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { tile: Tile { rows, columns, steps, parts }, waiting, .. } = self;
        let height = V * I::LANES;
        let rows = rows.chunks_exact(class_len(steps, height));
        let columns = columns.chunks_exact(class_len(steps, TOGETHER));
        for (i, (w, x)) in rows.zip(columns).enumerate() {
            let (w, x) = (&w[..steps * height], &x[..steps * TOGETHER]);
            for part in 0..parts.min(P) {
                let mut acc = [[isa.splat(0.0); C]; V];
                for (w, x) in w.chunks_exact(height).zip(x.chunks_exact(TOGETHER)) {
                    add::<I, T, V, C>(isa, &mut acc, w, &x[part * C..]);
                }
                merge(isa, acc, i, part, waiting);
            }
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
fn merge<I: Isa, const V: usize, const C: usize, const P: usize>(
    isa: I,
    mut acc: [[I::V; C]; V],
    i: usize,
    part: usize,
    waiting: &mut [Sums<C, P>; LEVELS],
) {
    let level = (!i).trailing_zeros() as usize;
    for sums in &waiting[..level] {
        for v in 0..V {
            for c in 0..C {
                acc[v][c] = isa.add(isa.load(&sums[part][c], v), acc[v][c]);
            }
        }
    }
    for v in 0..V {
        for c in 0..C {
            isa.store(acc[v][c], &mut waiting[level][part][c], v);
        }
    }
}
