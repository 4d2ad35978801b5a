//! The gated activations of the FFN.

use super::{exp::exp, padded};
use crate::isa::Isa;
use candle_sparse_core::{Activation, kernel::activation::apply};

/// See [`candle_sparse_core::kernel::activation::gated`].
#[inline(always)]
pub(crate) fn gated<I: Isa>(isa: I, act: Activation, gate_shift: f32, gate: &[f32], y: &mut [f32]) {
    assert_eq!(gate.len(), y.len(), "gated: lengths differ");
    let zero = isa.splat(0.0);
    match act {
        Activation::Silu => each(isa, gate_shift, gate, y, |g, u| {
            // Past −200 the result is 0; without the clamp −∞ · 0 would be NaN.
            let g = isa.max(isa.splat(-200.0), g);
            let e = exp(isa, isa.sub(zero, isa.abs(g)));
            let top = isa.select_lt(g, zero, isa.mul(g, e), g);
            isa.mul(isa.div(top, isa.add(isa.splat(1.0), e)), u)
        }),
        Activation::Relu => each(isa, gate_shift, gate, y, |g, u| isa.mul(isa.max(zero, g), u)),
        Activation::Relu2 => each(isa, gate_shift, gate, y, |g, u| {
            let r = isa.max(zero, g);
            isa.mul(isa.mul(r, r), u)
        }),
        Activation::FatRelu { threshold } => {
            each(isa, gate_shift, gate, y, |g, u| {
                isa.mul(isa.select_lt(g, isa.splat(threshold), zero, g), u)
            });
        }
        Activation::DRelu => {
            each(isa, gate_shift, gate, y, |g, u| isa.mul(isa.max(zero, g), isa.max(zero, u)));
        }
        // Rare in Llama-shaped models, and erf has no short vector form.
        Activation::Gelu | Activation::GeluPytorchTanh => {
            for (&g, y) in gate.iter().zip(y) {
                *y = apply(act, g - gate_shift, *y);
            }
        }
    }
}

#[inline(always)]
fn each<I: Isa>(isa: I, shift: f32, gate: &[f32], y: &mut [f32], f: impl Fn(I::V, I::V) -> I::V) {
    let ((gs, g_rest), (ys, y_rest)) = (gate.as_chunks(), y.as_chunks_mut());
    let (g_tail, mut y_tail) = (padded(g_rest, 0.0), padded(y_rest, 0.0));
    for (g, y) in gs.iter().zip(ys.iter_mut()).chain([(&g_tail, &mut y_tail)]) {
        for i in 0..32 / I::LANES {
            let g = isa.sub(isa.load(g, i), isa.splat(shift));
            isa.store(f(g, isa.load(y, i)), y, i);
        }
    }
    y_rest.copy_from_slice(&y_tail[..y_rest.len()]);
}
