//! Products with some rows of a matrix, and the FFN of some neurons.
//!
//! ```text
//! for four active neurons at a time:
//!     for each: gate row · x, up row · x, asking for those rows of a neuron further on
//!     activation of the four
//!     y += Σ activation · down row of the four before, asking for down rows further on      (y stays in L1)
//! ```
//!
//! Asking ahead makes a gather faster than plain loads of the same rows: the hardware prefetcher starts anew at each run. It
//! has to keep step with the computation, a fixed number of bytes ahead (`RowShape::ahead`): bursts of whole rows fill the
//! buffers of pending misses, and a third less bandwidth was the result (Zen 5).
//!
//! A row's product is that of `matmul` with one column; each down row is added with one multiply-add per element, in
//! order. So a neuron computed in another set, or among all, has the same bits.

use super::{
    activation::gated,
    axpy_rows::{Addend, ROOM, TOGETHER},
    matmul::{Operand, RowShape, stream},
};
use crate::isa::Isa;
use candle_sparse_core::{
    BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0,
    Columns, Gate, Matrix, Neurons, Rows,
    kernel::sparse_ffn::{check_matvec_rows, check_sparse_ffn},
};
use half::{bf16, f16};

/// Calls `$f::<I, T>($isa, rows, column, …)` for the format of `$w`.
macro_rules! by_format {
    ($w:expr, $x:expr, $f:ident($isa:expr, $($arg:expr),*)) => {
        match ($w.data(), $x) {
            (Rows::F32(w), Columns::F32(x)) => $f::<I, f32>($isa, w, x, $($arg),*),
            (Rows::F16(w), Columns::F32(x)) => $f::<I, f16>($isa, w, x, $($arg),*),
            (Rows::BF16(w), Columns::F32(x)) => $f::<I, bf16>($isa, w, x, $($arg),*),
            (Rows::Q8_0(w), Columns::Quantized(x)) => $f::<I, BlockQ8_0>($isa, w, x, $($arg),*),
            (Rows::Q6K(w), Columns::Quantized(x)) => $f::<I, BlockQ6K>($isa, w, x, $($arg),*),
            (Rows::Q5_1(w), Columns::Quantized(x)) => $f::<I, BlockQ5_1>($isa, w, x, $($arg),*),
            (Rows::Q5_0(w), Columns::Quantized(x)) => $f::<I, BlockQ5_0>($isa, w, x, $($arg),*),
            (Rows::Q5K(w), Columns::Quantized(x)) => $f::<I, BlockQ5K>($isa, w, x, $($arg),*),
            (Rows::Q4_1(w), Columns::Quantized(x)) => $f::<I, BlockQ4_1>($isa, w, x, $($arg),*),
            (Rows::Q4_0(w), Columns::Quantized(x)) => $f::<I, BlockQ4_0>($isa, w, x, $($arg),*),
            (Rows::Q4K(w), Columns::Quantized(x)) => $f::<I, BlockQ4K>($isa, w, x, $($arg),*),
            (Rows::Q3K(w), Columns::Quantized(x)) => $f::<I, BlockQ3K>($isa, w, x, $($arg),*),
            (Rows::Q2K(w), Columns::Quantized(x)) => $f::<I, BlockQ2K>($isa, w, x, $($arg),*),
            _ => unreachable!("the check at the head compared format and column"),
        }
    };
}

/// See [`candle_sparse_core::KernelSet::matvec_rows`].
#[inline(always)]
pub(crate) fn matvec_rows<I: Isa>(isa: I, w: Matrix<'_>, rows: &[u32], x: Columns<'_>, y: &mut [f32]) {
    check_matvec_rows(&w, rows, &x, y);
    let shape = RowShape { len: w.row_blocks(), stride: w.stride() };
    by_format!(w, x, products(isa, shape, rows, y));
}

/// See [`candle_sparse_core::KernelSet::sparse_ffn`].
#[inline(always)]
pub(crate) fn sparse_ffn<I: Isa>(
    isa: I,
    w: Neurons<'_>,
    act: Gate,
    active: &[u32],
    x: Columns<'_>,
    gate: &mut [f32],
    y: &mut [f32],
) {
    check_sparse_ffn(&w, active, &x, gate, y);
    let (m, per_neuron) = (w.matrix(), w.rows_per_neuron());
    let shape = RowShape { len: m.row_blocks(), stride: m.stride() };
    by_format!(m, x, neurons(isa, shape, per_neuron, act, active, gate, y));
}

#[inline(always)]
fn products<I: Isa, T: Operand>(
    isa: I,
    w: &[T],
    x: &[T::Column],
    shape: RowShape,
    rows: &[u32],
    y: &mut [f32],
) {
    let Some(last) = rows.len().checked_sub(1) else { return };
    let distance = shape.ahead::<T>();
    let at = |i: usize| shape.row(w, rows[i.min(last)] as usize);
    for (i, y) in y.iter_mut().enumerate() {
        *y = stream::<I, T, true>(isa, at(i), x, at(i + distance));
    }
}

#[inline(always)]
fn neurons<I: Isa, T: Operand + Addend>(
    isa: I,
    w: &[T],
    x: &[T::Column],
    shape: RowShape,
    per_neuron: usize,
    act: Gate,
    active: &[u32],
    gate: &mut [f32],
    y: &mut [f32],
) {
    let n = active.len();
    let distance = shape.ahead::<T>();
    let down_distance = distance.next_multiple_of(TOGETHER);
    // The `back`-th row before the down row of a neuron.
    let at = |i: usize, back: usize| {
        shape.row(w, active[i.min(n - 1)] as usize * per_neuron + per_neuron - 1 - back)
    };
    let mut room = ROOM;
    let mut before = [0.0; TOGETHER];
    // A down row is added one turn after its neuron's products: what is in between, the activation of few neurons, is a long
    // chain of dependent instructions.
    for first in (0..n + TOGETHER).step_by(TOGETHER).take_while(|_| n > 0) {
        let (mut g, mut a) = ([0.0; TOGETHER], [0.0; TOGETHER]);
        for i in first..n.min(first + TOGETHER) {
            // One call for both rows: the code of a product is long.
            for back in (1..per_neuron).rev() {
                let product = stream::<I, T, true>(isa, at(i, back), x, at(i + distance, back));
                if back == 2 {
                    gate[i] = product;
                } else {
                    a[i - first] = product;
                }
            }
            g[i - first] = gate[i];
        }
        gated(isa, act.act, act.shift, &g, &mut a);
        if let Some(first) = first.checked_sub(TOGETHER) {
            let (mut rows, mut ahead) = ([at(first, 0); TOGETHER], [at(first + down_distance, 0); TOGETHER]);
            for i in 1..TOGETHER {
                (rows[i], ahead[i]) = (at(first + i, 0), at(first + i + down_distance, 0));
            }
            let n = TOGETHER.min(n - first);
            T::add_rows(isa, &rows[..n], &before[..n], &ahead, &mut room, y);
        }
        before = a;
    }
}
