//! Row after row times a few columns, with the bits of [`super::products::dot`].
//!
//! ```text
//! for each row, as memory has them:
//!     for each sixteen blocks:          (unpacked once, into registers)
//!         for each column:
//!             acc[class] += t · d
//! ```
//!
//! Unpacking costs about two products. Panels (`panel.rs`) unpack dearer and multiply cheaper: they are for more columns. Rows are
//! read in order here, and the hardware sees them coming.

use super::{
    RowsOf,
    products::{
        Block, Group, Kind, Planes, add_blocks, last, planes_of, quants_of, sum_of_classes, sums_of,
        sums_of_blocks,
    },
};
use crate::{
    isa::{Isa, Kernel},
    kernel::matmul::ask,
};
use candle_sparse_core::ActivationGroup;
use core::marker::PhantomData;

/// Columns at most.
const MOST: usize = 4;
/// Bytes of columns that stay in the L1 cache while rows stream past them.
const MOST_BYTES: usize = 20 * 1024;

/// Whether so many columns of so many bytes are better off here than in panels. Unpacked blocks stay in registers where
/// those are wide; AVX2 and NEON would write them to memory, and gain nothing (measured on Zen 4).
pub(super) fn pays<I: Isa>(columns: usize, bytes: usize) -> bool {
    I::LANES == 16 && columns <= MOST && bytes <= MOST_BYTES
}

/// What the blocks of four groups of a column have one of, a lane each.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Numbers {
    d: [f32; 16],
    neg_sums: [[i32; 16]; 3],
}

impl Numbers {
    fn of(x: &[ActivationGroup; 4]) -> Self {
        let mut out = Self { d: [0.0; 16], neg_sums: [[0; 16]; 3] };
        for (g, x) in x.iter().enumerate() {
            out.d[4 * g..][..4].copy_from_slice(&x.d);
            for (out, sums) in out.neg_sums.iter_mut().zip(&x.neg_sums) {
                out[4 * g..][..4].copy_from_slice(sums);
            }
        }
        out
    }
}

/// All rows times at most [`MOST`] columns.
pub(super) fn matmul<I: Isa, T: Block<N>, const N: usize>(
    isa: I,
    rows: RowsOf<'_, T>,
    x: &[ActivationGroup],
    per_column: usize,
    y: &mut [&mut [f32]],
) {
    let numbers: Vec<_> =
        x.chunks_exact(per_column).flat_map(|x| x.as_chunks().0.iter().map(Numbers::of)).collect();
    isa.leaf(Few::<T, N> { rows, columns: Columns { x, numbers: &numbers, per_column }, y });
}

#[derive(Clone, Copy)]
struct Columns<'a> {
    x: &'a [ActivationGroup],
    numbers: &'a [Numbers],
    per_column: usize,
}

struct Few<'a, 'y, T, const N: usize> {
    rows: RowsOf<'a, T>,
    columns: Columns<'a>,
    y: &'a mut [&'y mut [f32]],
}

impl<T: Block<N>, const N: usize> Kernel for Few<'_, '_, T, N> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { rows, columns, y } = self;
        let count = y.first().map_or(0, |y| y.len());
        for r in 0..count {
            let mut acc = [[0.0; 16]; MOST];
            let acc = &mut acc[..y.len()];
            add_row::<I, T, N>(isa, acc, [rows.row(r), rows.row_ahead(r, count)], columns);
            for (acc, y) in acc.iter().zip(y.iter_mut()) {
                let mut sums = [isa.load(acc, 0); 4];
                for q in 1..16 / I::LANES {
                    sums[q] = isa.load(acc, q);
                }
                y[r] = sum_of_classes(isa, sums);
            }
        }
    }
}

/// `acc[c] += w · x[c]` for a row, a number for each class; asks for a row to come meanwhile.
#[inline(always)]
fn add_row<I: Isa, T: Block<N>, const N: usize>(
    isa: I,
    acc: &mut [[f32; 16]],
    [w, ahead]: [&[T]; 2],
    columns: Columns<'_>,
) {
    let Columns { x, numbers, per_column } = columns;
    let units = w.as_chunks::<N>().0;
    let chunks = units.chunks_exact(4 / T::GROUPS);
    let rest = chunks.remainder();
    let whole = (units.len() - rest.len()) * T::GROUPS;
    for (k, w) in chunks.enumerate() {
        ask(ahead, k * size_of_val(w), size_of_val(w));
        let w = Chunk::of::<T, N>(isa, w);
        for (c, acc) in acc.iter_mut().enumerate() {
            let Some(x) = x[c * per_column + 4 * k..].first_chunk() else { return };
            w.add(isa, acc, x, &numbers[c * (per_column / 4) + k]);
        }
    }
    for (i, w) in rest.iter().enumerate() {
        let at = whole + i * T::GROUPS;
        add_group::<I, T, N, 0>(isa, acc, w, x, [per_column, at]);
        if T::GROUPS == 2 {
            add_group::<I, T, N, 1>(isa, acc, w, x, [per_column, at + 1]);
        }
    }
    let mut room = None;
    if let Some(w) = last(w, &mut room) {
        add_group::<I, T, N, 0>(isa, acc, w, x, [per_column, per_column - 1]);
    }
}

/// Sixteen unpacked blocks of a row.
struct Chunk<I: Isa, K> {
    quants: [[I::B; 2]; 16],
    planes: [Planes<I>; 4],
    kind: PhantomData<K>,
}

impl<I: Isa, K: Kind> Chunk<I, K> {
    #[inline(always)]
    fn of<T: Block<N, Kind = K>, const N: usize>(isa: I, w: &[[T; N]]) -> Self {
        let mut quants = [quants_of::<I, T, N, 0, 0>(isa, w); 16];
        macro_rules! vector {
            ($g:literal, $v:literal) => {
                quants[$g * (16 / I::LANES) + $v] = quants_of::<I, T, N, $g, $v>(isa, w);
            };
        }
        each_vector!(I, vector);
        let mut planes = [planes_of::<I, T, N>(isa, w, 0); 4];
        for q in 1..16 / I::LANES {
            planes[q] = planes_of::<I, T, N>(isa, w, q);
        }
        Self { quants, planes, kind: PhantomData }
    }

    /// `acc += w · x`
    #[inline(always)]
    fn add(&self, isa: I, acc: &mut [f32; 16], x: &[ActivationGroup; 4], numbers: &Numbers) {
        let zero = isa.zero_sums();
        let per_group = 16 / I::LANES;
        let mut sums = [[zero; 16]; 2];
        for at in 0..4 * per_group {
            let (g, v) = (at / per_group, at % per_group);
            (sums[0][at], sums[1][at]) = sums_of::<I, K>(isa, self.quants[at], &x[g], v);
        }
        for q in 0..per_group {
            let both = sums_of_blocks::<I, K>(isa, &sums, q);
            let mut neg = [zero; 3];
            for i in 0..3 {
                neg[i] = isa.load_sums(&numbers.neg_sums[i], q);
            }
            let (sum, d) = (isa.load(acc, q), isa.load(&numbers.d, q));
            isa.store(add_blocks::<I, K>(isa, sum, &self.planes[q], both, neg, d), acc, q);
        }
    }
}

/// `acc[c] += w · x[c]` for group `G` of a unit alone, which is group `at` of each column.
#[inline(always)]
fn add_group<I: Isa, T: Block<N>, const N: usize, const G: usize>(
    isa: I,
    acc: &mut [[f32; 16]],
    w: &[T; N],
    x: &[ActivationGroup],
    [per_column, at]: [usize; 2],
) {
    let w = Group::<I, T::Kind>::of::<T, N, G>(isa, w);
    for (c, acc) in acc.iter_mut().enumerate() {
        let sum = w.add(isa, isa.load(acc, 0), &x[c * per_column + at]);
        isa.store(sum, acc, 0);
    }
}
