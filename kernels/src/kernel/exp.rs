//! e^x on vectors.

use crate::isa::Isa;

/// `e^x` within 2 ULP over the whole range, subnormal results included; NaN stays NaN.
///
/// `x = n·ln 2 + r` with `|r| ≤ ln 2 / 2`; a polynomial of degree 6 gives `e^r` (coefficients of Cephes' `expf`).
#[inline(always)]
pub(super) fn exp<I: Isa>(isa: I, x: I::V) -> I::V {
    let c = |v: f32| isa.splat(v);
    // Outside, the result is 0 or ∞ anyway; the operand order keeps NaN.
    let x = isa.min(c(90.0), isa.max(c(-105.0), x));
    let n = isa.round(isa.mul(x, c(core::f32::consts::LOG2_E)));
    let r = isa.mul_add(n, c(-0.693_359_4), x);
    let r = isa.mul_add(n, c(2.121_944_4e-4), r);
    let mut p = c(1.987_569_2e-4);
    for k in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = isa.mul_add(p, r, c(k));
    }
    let p = isa.add(isa.mul_add(isa.mul(p, r), r, r), c(1.0));
    isa.scale2(p, n)
}
