//! Adding some rows of a matrix to a vector, each with its factor.
//!
//! ```text
//! for four rows at a time: for each unit of 32 columns: y += Σ factor · unit       (y stays in L1)
//! ```
//!
//! Each row is added with one multiply-add per element, in order: the cut into fours changes no bit. Rarer formats go
//! through their elements, one row at a time.

use super::{
    elements::{Elements, LONGEST},
    matmul::{RowShape, ask},
    padded,
    units::{Factors, RUN, Summand},
};
use crate::isa::Isa;
use candle_sparse_core::{
    BLOCK_LEN, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K,
    BlockQ8_0, Matrix, Rows, kernel::sparse_ffn::check_axpy_rows,
};
use half::{bf16, f16};

/// Rows added in one pass over `y`.
pub(super) const TOGETHER: usize = 4;

/// Room for the factors of as many rows.
pub(super) type Room = [Factors; TOGETHER];
pub(super) const ROOM: Room = [[[0.0; 32]; RUN / 8]; TOGETHER];

/// See [`candle_sparse_core::KernelSet::axpy_rows`].
#[inline(always)]
pub(crate) fn axpy_rows<I: Isa>(isa: I, w: Matrix<'_>, rows: &[u32], a: &[f32], y: &mut [f32]) {
    check_axpy_rows(&w, rows, a, y);
    let shape = RowShape { len: w.row_blocks(), stride: w.stride() };
    match w.data() {
        Rows::F32(w) => all::<I, f32>(isa, w, shape, rows, a, y),
        Rows::F16(w) => all::<I, f16>(isa, w, shape, rows, a, y),
        Rows::BF16(w) => all::<I, bf16>(isa, w, shape, rows, a, y),
        Rows::Q8_0(w) => all::<I, BlockQ8_0>(isa, w, shape, rows, a, y),
        Rows::Q6K(w) => all::<I, BlockQ6K>(isa, w, shape, rows, a, y),
        Rows::Q5_1(w) => all::<I, BlockQ5_1>(isa, w, shape, rows, a, y),
        Rows::Q5_0(w) => all::<I, BlockQ5_0>(isa, w, shape, rows, a, y),
        Rows::Q5K(w) => all::<I, BlockQ5K>(isa, w, shape, rows, a, y),
        Rows::Q4_1(w) => all::<I, BlockQ4_1>(isa, w, shape, rows, a, y),
        Rows::Q4_0(w) => all::<I, BlockQ4_0>(isa, w, shape, rows, a, y),
        Rows::Q4K(w) => all::<I, BlockQ4K>(isa, w, shape, rows, a, y),
        Rows::Q3K(w) => all::<I, BlockQ3K>(isa, w, shape, rows, a, y),
        Rows::Q2K(w) => all::<I, BlockQ2K>(isa, w, shape, rows, a, y),
    }
}

/// An element type whose rows can be added up.
pub(super) trait Addend: Sized {
    /// `y += Σ_i a[i] · rows[i]` of at most [`TOGETHER`] rows, in order; asks for as many other rows meanwhile.
    fn add_rows<I: Isa>(
        isa: I,
        rows: &[&[Self]],
        a: &[f32],
        ahead: &[&[Self]],
        room: &mut Room,
        y: &mut [f32],
    );
}

macro_rules! by_units {
    ($($t:ty)*) => {$(
        impl Addend for $t {
            #[inline(always)]
            fn add_rows<I: Isa>(
                isa: I,
                rows: &[&[Self]],
                a: &[f32],
                ahead: &[&[Self]],
                room: &mut Room,
                y: &mut [f32],
            ) {
                if let (&[p, q, r, s], &[a, b, c, d], &[t, u, v, w]) = (rows, a, ahead) {
                    add_together(isa, [p, q, r, s], [a, b, c, d], [t, u, v, w], room, y);
                } else {
                    for (i, (&row, &a)) in rows.iter().zip(a).enumerate() {
                        add_together(isa, [row], [a], [ahead[i]], room, y);
                    }
                }
            }
        }
    )*};
}

by_units!(f32 f16 bf16 BlockQ8_0 BlockQ4_0);

macro_rules! by_values {
    ($($t:ty)*) => {$(
        impl Addend for $t {
            #[inline(always)]
            fn add_rows<I: Isa>(
                isa: I,
                rows: &[&[Self]],
                a: &[f32],
                ahead: &[&[Self]],
                _: &mut Room,
                y: &mut [f32],
            ) {
                for (i, (row, &a)) in rows.iter().zip(a).enumerate() {
                    by_values(isa, row, a, ahead[i], y);
                }
            }
        }
    )*};
}

by_values!(BlockQ6K BlockQ5_1 BlockQ5_0 BlockQ5K BlockQ4_1 BlockQ4K BlockQ3K BlockQ2K);

#[inline(always)]
fn all<I: Isa, T: Addend>(isa: I, w: &[T], shape: RowShape, rows: &[u32], a: &[f32], y: &mut [f32]) {
    let Some(last) = rows.len().checked_sub(1) else { return };
    let distance = shape.ahead::<T>().next_multiple_of(TOGETHER);
    let at = |i: usize| shape.row(w, rows[i.min(last)] as usize);
    let mut room = ROOM;
    for (four, a) in a.chunks(TOGETHER).enumerate() {
        let first = four * TOGETHER;
        let (mut rows, mut ahead) = ([at(first); TOGETHER], [at(first + distance); TOGETHER]);
        for i in 1..TOGETHER {
            (rows[i], ahead[i]) = (at(first + i), at(first + i + distance));
        }
        T::add_rows(isa, &rows[..a.len()], a, &ahead, &mut room, y);
    }
}

#[inline(always)]
fn by_values<I: Isa, T: Elements>(isa: I, row: &[T], a: f32, ahead: &[T], y: &mut [f32]) {
    let mut values = [[0.0; BLOCK_LEN]; LONGEST];
    let bytes = size_of_val(row) / y.len().div_ceil(BLOCK_LEN * LONGEST).max(1);
    for (k, y) in y.as_chunks_mut().0.chunks_mut(LONGEST).enumerate() {
        ask(isa, ahead, k * bytes, bytes);
        T::write(isa, row, k * LONGEST, &mut values[..y.len()]);
        for (v, y) in values.iter().zip(y) {
            for i in 0..32 / I::LANES {
                isa.store(isa.mul_add(isa.load(v, i), isa.splat(a), isa.load(y, i)), y, i);
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
    let mut units = [T::units(rows[0]); R];
    let (blocks, rest) = y.as_chunks_mut::<BLOCK_LEN>();
    // Loops, for the reason said in `matmul.rs`.
    for r in 0..R {
        units[r] = &T::units(rows[r])[..blocks.len()];
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
        let units: [[T::Unit; 1]; R] = core::array::from_fn(|r| [T::last(rows[r])]);
        let units: [&[T::Unit]; R] = core::array::from_fn(|r| &units[r][..]);
        add_run::<I, T, R>(isa, units, a, (ahead, blocks.len()), room, &mut block);
        rest.copy_from_slice(&block[0][..rest.len()]);
    }
}

/// At most [`RUN`] units of each row, those from `first` on of `ahead`. Factors of small blocks are computed before, several
/// at a time: one by one they take as long as the products.
#[inline(always)]
fn add_run<I: Isa, T: Summand, const R: usize>(
    isa: I,
    units: [&[T::Unit]; R],
    a: [f32; R],
    (ahead, first): ([&[T]; R], usize),
    room: &mut Room,
    y: &mut [[f32; 32]],
) {
    let mut alpha = [isa.splat(0.0); R];
    for r in 0..R {
        alpha[r] = isa.splat(a[r] * T::STEP);
        T::factors(isa, units[r], a[r] * T::STEP, &mut room[r]);
    }
    for (k, y) in y.iter_mut().enumerate().take(RUN) {
        // As many units as a cache line has in one go.
        let (bytes, per_line) = (size_of::<T::Unit>(), (64 / size_of::<T::Unit>()).max(1));
        if k.is_multiple_of(per_line) {
            for r in 0..R {
                ask(isa, ahead[r], (first + k) * bytes, per_line * bytes);
            }
        }
        let mut factors = alpha;
        for r in 0..R {
            factors[r] = T::factor(isa, &units[r][k], alpha[r], &room[r], k);
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
