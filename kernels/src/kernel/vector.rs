//! Dot product and axpy of f32 vectors.

use super::padded;
use crate::isa::{Isa, Kernel};

/// [`candle_sparse_core::KernelSet::dot`].
pub(crate) struct Dot<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) y: &'a [f32],
}

impl Kernel for Dot<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> f32 {
        dot(isa, self.x, self.y)
    }
}

#[inline(always)]
pub(super) fn dot<I: Isa>(isa: I, x: &[f32], y: &[f32]) -> f32 {
    assert_eq!(x.len(), y.len(), "dot: lengths differ");
    let ((xs, x_rest), (ys, y_rest)) = (x.as_chunks::<32>(), y.as_chunks::<32>());
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

/// [`candle_sparse_core::KernelSet::axpy`].
pub(crate) struct Axpy<'a> {
    pub(crate) alpha: f32,
    pub(crate) x: &'a [f32],
    pub(crate) y: &'a mut [f32],
}

impl Kernel for Axpy<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { alpha, x, y } = self;
        assert_eq!(x.len(), y.len(), "axpy: lengths differ");
        let ((xs, x_rest), (ys, y_rest)) = (x.as_chunks::<32>(), y.as_chunks_mut::<32>());
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
}
