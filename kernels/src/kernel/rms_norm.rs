//! Root-mean-square normalisation.

use super::vector::dot;
use crate::isa::{Isa, Kernel};

/// [`candle_sparse_core::KernelSet::rms_norm`].
pub(crate) struct RmsNorm<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) weight: &'a [f32],
    pub(crate) eps: f32,
    pub(crate) y: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { x, weight, eps, y } = self;
        assert!(x.len() == weight.len() && x.len() == y.len(), "rms_norm: lengths differ");
        if x.is_empty() {
            return;
        }
        let mean = dot(isa, x, x) / x.len() as f32;
        let scale = 1.0 / (mean + eps).sqrt();
        let (ws, w_rest) = weight.as_chunks::<32>();
        let ((xs, x_rest), (ys, y_rest)) = (x.as_chunks::<32>(), y.as_chunks_mut::<32>());
        for ((x, w), y) in xs.iter().zip(ws).zip(ys) {
            for i in 0..32 / I::LANES {
                let scaled = isa.mul(isa.load(x, i), isa.splat(scale));
                isa.store(isa.mul(scaled, isa.load(w, i)), y, i);
            }
        }
        for ((x, w), y) in x_rest.iter().zip(w_rest).zip(y_rest) {
            *y = x * scale * w;
        }
    }
}
