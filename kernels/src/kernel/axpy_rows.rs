//! Adding some rows of a matrix to a vector, each with its factor.
//!
//! ```text
//! for four rows at a time: for each unit of 32 columns: y += Σ factor · unit       (y stays in L1)
//! ```
//!
//! Each row is added with one multiply-add per element, in order: the cut into fours changes no bit. Rarer formats go
//! through their elements, one row at a time.

use super::{Lines, matmul::ask, padded};
use crate::{
    format::{
        Element, RowsKernel, RowsOf,
        elements::LONGEST,
        units::{Factors, RUN, Summand},
    },
    isa::Isa,
};
use candle_sparse_core::BLOCK_LEN;

/// Rows added in one pass over `y`.
pub(super) const TOGETHER: usize = 4;

/// Room for the factors of as many rows.
pub(super) type Room = Lines<[Factors; TOGETHER]>;
pub(super) const ROOM: Room = Lines([[[0.0; 32]; RUN / 8]; TOGETHER]);

/// [`candle_sparse_core::KernelSet::axpy_rows`].
pub(crate) struct AxpyRows<'a> {
    pub(crate) rows: &'a [u32],
    pub(crate) a: &'a [f32],
    pub(crate) y: &'a mut [f32],
}

impl RowsKernel for AxpyRows<'_> {
    #[inline(always)]
    fn run<I: Isa, T: Element>(self, isa: I, w: RowsOf<'_, T>) {
        let Some(last) = self.rows.len().checked_sub(1) else { return };
        let distance = w.ahead().next_multiple_of(TOGETHER);
        let at = |i: usize| w.row(self.rows[i.min(last)] as usize);
        let mut room = ROOM;
        for (four, a) in self.a.chunks(TOGETHER).enumerate() {
            let first = four * TOGETHER;
            T::add_rows(isa, Together::new(a, &mut room, |i| at(first + i), distance), self.y);
        }
    }
}

/// Up to [`TOGETHER`] rows to be added, and as many others to be asked for meanwhile.
pub(crate) struct Together<'a, T> {
    rows: [&'a [T]; TOGETHER],
    ahead: [&'a [T]; TOGETHER],
    a: &'a [f32],
    room: &'a mut Room,
}

impl<'a, T> Together<'a, T> {
    /// The rows `at(0)`, `at(1)`, … with the factors `a`, asking for those `distance` further on.
    #[inline(always)]
    pub(super) fn new(
        a: &'a [f32],
        room: &'a mut Room,
        at: impl Fn(usize) -> &'a [T],
        distance: usize,
    ) -> Self {
        let (mut rows, mut ahead) = ([at(0); TOGETHER], [at(distance); TOGETHER]);
        for i in 1..TOGETHER {
            (rows[i], ahead[i]) = (at(i), at(i + distance));
        }
        Self { rows, ahead, a, room }
    }
}

/// [`Element::add_rows`] of formats with units.
#[inline(always)]
pub(crate) fn by_units<I: Isa, T: Summand>(
    isa: I,
    Together { rows, ahead, a, room }: Together<'_, T>,
    y: &mut [f32],
) {
    if let &[a, b, c, d] = a {
        add_together(isa, rows, [a, b, c, d], ahead, room, y);
    } else {
        for (i, &a) in a.iter().enumerate() {
            add_together(isa, [rows[i]], [a], [ahead[i]], room, y);
        }
    }
}

/// [`Element::add_rows`] of other formats.
#[inline(always)]
pub(crate) fn by_elements<I: Isa, T: Element>(isa: I, rows: Together<'_, T>, y: &mut [f32]) {
    let bytes = size_of_val(rows.rows[0]) / y.len().div_ceil(BLOCK_LEN * LONGEST).max(1);
    let mut values = Lines([[0.0; BLOCK_LEN]; LONGEST]);
    for (i, &a) in rows.a.iter().enumerate() {
        for (k, y) in y.as_chunks_mut::<BLOCK_LEN>().0.chunks_mut(LONGEST).enumerate() {
            ask(rows.ahead[i], k * bytes, bytes);
            T::write(isa, rows.rows[i], k * LONGEST, &mut values.0[..y.len()]);
            for (v, y) in values.0.iter().zip(y) {
                for i in 0..32 / I::LANES {
                    isa.store(isa.mul_add(isa.load(v, i), isa.splat(a), isa.load(y, i)), y, i);
                }
            }
        }
    }
}

/// `y += Σ_r a[r] · rows[r]`, row after row.
#[inline(always)]
fn add_together<I: Isa, T: Summand, const R: usize>(
    isa: I,
    rows: [&[T]; R],
    a: [f32; R],
    ahead: [&[T]; R],
    room: &mut Room,
    y: &mut [f32],
) {
    let mut units = [T::vectors(rows[0]); R];
    let (blocks, rest) = y.as_chunks_mut::<BLOCK_LEN>();
    // Loops, for the reason said in `matmul.rs`.
    for r in 0..R {
        units[r] = &T::vectors(rows[r])[..blocks.len()];
    }
    for (run, blocks) in blocks.chunks_mut(RUN).enumerate() {
        let first = run * RUN;
        let mut of_run = units;
        for r in 0..R {
            of_run[r] = &units[r][first..first + blocks.len()];
        }
        add_run::<I, T, R>(isa, of_run, a, (ahead, first), room, blocks);
    }
    if T::RESTS && !rest.is_empty() {
        let mut block = [padded(rest, 0.0)];
        let units: [[T::Vectors; 1]; R] = core::array::from_fn(|r| [T::rest(rows[r])]);
        let units: [&[T::Vectors]; R] = core::array::from_fn(|r| &units[r][..]);
        add_run::<I, T, R>(isa, units, a, (ahead, blocks.len()), room, &mut block);
        rest.copy_from_slice(&block[0][..rest.len()]);
    }
}

/// At most [`RUN`] units of each row, those from `first` on of `ahead`. Factors of small blocks are computed before, several
/// at a time: one by one they take as long as the products.
#[inline(always)]
fn add_run<I: Isa, T: Summand, const R: usize>(
    isa: I,
    units: [&[T::Vectors]; R],
    a: [f32; R],
    (ahead, first): ([&[T]; R], usize),
    room: &mut Room,
    y: &mut [[f32; 32]],
) {
    let mut alpha = [isa.splat(0.0); R];
    for r in 0..R {
        alpha[r] = isa.splat(a[r] * T::STEP);
        T::factors(isa, units[r], a[r] * T::STEP, &mut room.0[r]);
    }
    for (k, y) in y.iter_mut().enumerate().take(RUN) {
        // As many units as a cache line has in one go.
        let (bytes, per_line) = (size_of::<T::Vectors>(), (64 / size_of::<T::Vectors>()).max(1));
        if k.is_multiple_of(per_line) {
            for r in 0..R {
                ask(ahead[r], (first + k) * bytes, per_line * bytes);
            }
        }
        let mut factors = alpha;
        for r in 0..R {
            factors[r] = T::factor(isa, &units[r][k], alpha[r], &room.0[r], k);
        }
        for i in 0..32 / I::LANES {
            let mut sum = isa.load(y, i);
            for r in 0..R {
                sum = isa.mul_add(T::vector(isa, &units[r][k], i), factors[r], sum);
            }
            isa.store(sum, y, i);
        }
    }
}
