//! Asking for memory before it is needed.

use crate::isa::Isa;
use candle_sparse_core::{Matrix, Rows};

const LINE: usize = 64;

/// Asks for every cache line of a matrix.
#[inline(always)]
pub(crate) fn prefetch<I: Isa>(isa: I, w: Matrix<'_>) {
    match w.data() {
        Rows::F32(d) => lines(isa, d),
        Rows::F16(d) => lines(isa, d),
        Rows::BF16(d) => lines(isa, d),
        Rows::Q8_0(d) => lines(isa, d),
        Rows::Q6K(d) => lines(isa, d),
        Rows::Q5_1(d) => lines(isa, d),
        Rows::Q5_0(d) => lines(isa, d),
        Rows::Q5K(d) => lines(isa, d),
        Rows::Q4_1(d) => lines(isa, d),
        Rows::Q4_0(d) => lines(isa, d),
        Rows::Q4K(d) => lines(isa, d),
        Rows::Q3K(d) => lines(isa, d),
        Rows::Q2K(d) => lines(isa, d),
    }
}

#[inline(always)]
fn lines<I: Isa, T>(isa: I, data: &[T]) {
    for byte in (0..size_of_val(data)).step_by(LINE) {
        isa.prefetch(data, byte);
    }
}
