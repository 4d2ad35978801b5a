//! Root-mean-square normalisation.

use crate::isa::Isa;

/// See [`candle_sparse_core::kernel::rms_norm::rms_norm`].
#[inline(always)]
pub(crate) fn rms_norm<I: Isa>(isa: I, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == y.len(), "rms_norm: lengths differ");
    if x.is_empty() {
        return;
    }
    let mean = super::vector::dot(isa, x, x) / x.len() as f32;
    let scale = 1.0 / (mean + eps).sqrt();
    let (ws, w_rest) = weight.as_chunks();
    let ((xs, x_rest), (ys, y_rest)) = (x.as_chunks(), y.as_chunks_mut());
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
