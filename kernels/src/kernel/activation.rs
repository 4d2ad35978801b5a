//! The activations of the FFN.

use super::{exp::exp, padded};
use crate::isa::{Isa, Kernel};
use candle_sparse_core::{Activation, kernel::activation::apply};

/// [`candle_sparse_core::KernelSet::gated`].
pub(crate) struct Gated<'a> {
    pub(crate) act: Activation,
    pub(crate) shift: f32,
    pub(crate) gate: &'a [f32],
    pub(crate) y: &'a mut [f32],
}

impl Kernel for Gated<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        gated(isa, self.act, self.shift, self.gate, self.y);
    }
}

#[inline(always)]
pub(super) fn gated<I: Isa>(isa: I, act: Activation, shift: f32, gate: &[f32], y: &mut [f32]) {
    assert_eq!(gate.len(), y.len(), "gated: lengths differ");
    match act {
        Activation::Silu => each::<I, Silu>(isa, shift, 0.0, gate, y),
        Activation::Relu => each::<I, Relu>(isa, shift, 0.0, gate, y),
        Activation::Relu2 => each::<I, Relu2>(isa, shift, 0.0, gate, y),
        // The first value that passes.
        Activation::FatRelu { threshold } => each::<I, FatRelu>(isa, shift, threshold.next_up(), gate, y),
        Activation::DRelu => each::<I, DRelu>(isa, shift, 0.0, gate, y),
        // Rare in Llama-shaped models, and erf has no short vector form.
        Activation::Gelu | Activation::GeluPytorchTanh => {
            for (&g, y) in gate.iter().zip(y) {
                *y = apply(act, g - shift, *y);
            }
        }
    }
}

/// A gated activation of vectors. A trait, for a closure or a function that is handed over would not be inlined, and its
/// intrinsics would become calls.
trait Function {
    fn apply<I: Isa>(isa: I, parameter: f32, g: I::V, u: I::V) -> I::V;
}

struct Silu;
struct Relu;
struct Relu2;
struct FatRelu;
struct DRelu;

impl Function for Silu {
    #[inline(always)]
    fn apply<I: Isa>(isa: I, _: f32, g: I::V, u: I::V) -> I::V {
        let zero = isa.splat(0.0);
        // Past −200 the result is 0; without the clamp −∞ · 0 would be NaN.
        let g = isa.max(isa.splat(-200.0), g);
        let e = exp(isa, isa.sub(zero, isa.abs(g)));
        let top = isa.select_lt(g, zero, isa.mul(g, e), g);
        isa.mul(isa.div(top, isa.add(isa.splat(1.0), e)), u)
    }
}

impl Function for Relu {
    #[inline(always)]
    fn apply<I: Isa>(isa: I, _: f32, g: I::V, u: I::V) -> I::V {
        isa.mul(isa.max(isa.splat(0.0), g), u)
    }
}

impl Function for Relu2 {
    #[inline(always)]
    fn apply<I: Isa>(isa: I, _: f32, g: I::V, u: I::V) -> I::V {
        let r = isa.max(isa.splat(0.0), g);
        isa.mul(isa.mul(r, r), u)
    }
}

impl Function for FatRelu {
    #[inline(always)]
    fn apply<I: Isa>(isa: I, least: f32, g: I::V, u: I::V) -> I::V {
        isa.mul(isa.select_lt(g, isa.splat(least), isa.splat(0.0), g), u)
    }
}

impl Function for DRelu {
    #[inline(always)]
    fn apply<I: Isa>(isa: I, _: f32, g: I::V, u: I::V) -> I::V {
        let zero = isa.splat(0.0);
        isa.mul(isa.max(zero, g), isa.max(zero, u))
    }
}

/// `y = F(gate − shift, y)`.
#[inline(always)]
fn each<I: Isa, F: Function>(isa: I, shift: f32, parameter: f32, gate: &[f32], y: &mut [f32]) {
    let ((gs, g_rest), (ys, y_rest)) = (gate.as_chunks::<32>(), y.as_chunks_mut::<32>());
    for (g, y) in gs.iter().zip(ys) {
        for i in 0..32 / I::LANES {
            let g = isa.sub(isa.load(g, i), isa.splat(shift));
            isa.store(F::apply(isa, parameter, g, isa.load(y, i)), y, i);
        }
    }
    if !y_rest.is_empty() {
        let (g, mut y) = (padded(g_rest, 0.0), padded(y_rest, 0.0));
        for i in 0..y_rest.len().div_ceil(I::LANES) {
            let g = isa.sub(isa.load(&g, i), isa.splat(shift));
            isa.store(F::apply(isa, parameter, g, isa.load(&y, i)), &mut y, i);
        }
        y_rest.copy_from_slice(&y[..y_rest.len()]);
    }
}
