//! Dot product and axpy of f32 vectors.

use super::padded;
use crate::isa::Isa;

/// See [`candle_sparse_core::kernel::vector::dot`].
#[inline(always)]
pub(crate) fn dot<I: Isa>(isa: I, x: &[f32], y: &[f32]) -> f32 {
    assert_eq!(x.len(), y.len(), "dot: lengths differ");
    let ((xs, x_rest), (ys, y_rest)) = (x.as_chunks(), y.as_chunks());
    // A chain per vector of a block hides the latency of the multiply-adds; eight suit the narrowest vectors.
    let mut acc = [isa.splat(0.0); 8];
    for (x, y) in xs.iter().zip(ys) {
        for i in 0..32 / I::LANES {
            acc[i] = isa.mul_add(isa.load(x, i), isa.load(y, i), acc[i]);
        }
    }
    if !x_rest.is_empty() {
        let (x, y) = (padded(x_rest, 0.0), padded(y_rest, 0.0));
        for i in 0..32 / I::LANES {
            acc[i] = isa.mul_add(isa.load(&x, i), isa.load(&y, i), acc[i]);
        }
    }
    let mut sum = acc[0];
    for i in 1..32 / I::LANES {
        sum = isa.add(sum, acc[i]);
    }
    isa.reduce_add(sum)
}

/// See [`candle_sparse_core::kernel::vector::axpy`].
#[inline(always)]
pub(crate) fn axpy<I: Isa>(isa: I, alpha: f32, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "axpy: lengths differ");
    let ((xs, x_rest), (ys, y_rest)) = (x.as_chunks(), y.as_chunks_mut());
    for (x, y) in xs.iter().zip(ys) {
        for i in 0..32 / I::LANES {
            let sum = isa.mul_add(isa.splat(alpha), isa.load(x, i), isa.load(y, i));
            isa.store(sum, y, i);
        }
    }
    for (y, x) in y_rest.iter_mut().zip(x_rest) {
        *y = alpha.mul_add(*x, *y);
    }
}
