//! The activations of the FFN.

use super::special;
use crate::config::Activation;

/// `y[i] = act(gate[i] − gate_shift) · y[i]`, where `y` enters holding *up*, or ones for an FFN without a gate.
///
/// # Panics
/// The lengths differ.
pub fn gated(act: Activation, gate_shift: f32, gate: &[f32], y: &mut [f32]) {
    assert_eq!(gate.len(), y.len(), "gated: lengths differ");
    for (&g, y) in gate.iter().zip(y) {
        *y = apply(act, g - gate_shift, *y);
    }
}

/// `act(g) · u` for one neuron.
#[must_use]
pub fn apply(act: Activation, g: f32, u: f32) -> f32 {
    match act {
        Activation::Silu => silu(g) * u,
        Activation::Gelu => gelu(g) * u,
        Activation::GeluPytorchTanh => gelu_tanh(g) * u,
        Activation::Relu => relu(g) * u,
        Activation::Relu2 => relu(g) * relu(g) * u,
        Activation::FatRelu { threshold } => (if g <= threshold { 0.0 } else { g }) * u,
        Activation::DRelu => relu(g) * relu(u),
    }
}

/// `max(x, 0)`, but NaN stays NaN.
fn relu(x: f32) -> f32 {
    if x < 0.0 { 0.0 } else { x }
}

/// `x / (1 + e^−x)`, for negative `x` as `x e^x / (1 + e^x)` so that the left tail keeps its digits.
fn silu(x: f32) -> f32 {
    let x = clamp_low(x, -200.0);
    let e = libm::expf(-x.abs());
    (if x < 0.0 { x * e } else { x }) / (1.0 + e)
}

fn gelu(x: f32) -> f32 {
    let x = clamp_low(x, -50.0);
    // erfc keeps the digits of the left tail that 1 + erf cancels.
    0.5 * x * special::erfc(-x * core::f32::consts::FRAC_1_SQRT_2)
}

fn gelu_tanh(x: f32) -> f32 {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    let x = clamp_low(x, -50.0);
    // 0.5·(1 + tanh z) = 1 / (1 + e^−2z), which keeps the digits of the left tail.
    let z = SQRT_2_OVER_PI * (x + 0.044_715 * x * x * x);
    x / (1.0 + libm::expf(-2.0 * z))
}

/// Past `low` the activations are 0 in f32; without the clamp −∞ would give −∞ · 0. NaN stays NaN.
fn clamp_low(x: f32, low: f32) -> f32 {
    if x < low { low } else { x }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Activation; 7] = [
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluPytorchTanh,
        Activation::Relu,
        Activation::Relu2,
        Activation::FatRelu { threshold: 0.5 },
        Activation::DRelu,
    ];

    /// The error function by its series for small arguments, by a continued fraction for large ones.
    fn erfc(x: f64) -> f64 {
        if x.abs() < 3.0 {
            let (mut term, mut sum) = (x, x);
            for n in 1..200 {
                let n = f64::from(n);
                term *= -x * x / n;
                sum += term / (2.0 * n + 1.0);
            }
            return 1.0 - 2.0 / core::f64::consts::PI.sqrt() * sum;
        }
        let a = x.abs();
        let mut t = a;
        for n in (1..200).rev() {
            t = a + f64::from(n) / 2.0 / t;
        }
        let tail = (-a * a).exp() / (t * core::f64::consts::PI.sqrt());
        if x > 0.0 { tail } else { 2.0 - tail }
    }

    fn reference(act: Activation, g: f64, u: f64) -> f64 {
        let relu = |v: f64| v.max(0.0);
        match act {
            Activation::Silu => g / (1.0 + (-g).exp()) * u,
            Activation::Gelu => 0.5 * g * erfc(-g / core::f64::consts::SQRT_2) * u,
            Activation::GeluPytorchTanh => {
                let z = (2.0 / core::f64::consts::PI).sqrt() * (g + 0.044715 * g * g * g);
                g / (1.0 + (-2.0 * z).exp()) * u
            }
            Activation::Relu => relu(g) * u,
            Activation::Relu2 => relu(g) * relu(g) * u,
            Activation::FatRelu { threshold } => (if g <= f64::from(threshold) { 0.0 } else { g }) * u,
            Activation::DRelu => relu(g) * relu(u),
        }
    }

    #[test]
    fn agree_with_f64_over_the_whole_range() {
        for act in ALL {
            let mut bits = 0_u32;
            while bits < u32::MAX - 70_000 {
                bits += 65_537;
                let g = f32::from_bits(bits);
                if !g.is_finite() || g.abs() > 1e18 {
                    continue;
                }
                let (got, want) = (f64::from(apply(act, g, 0.75)), reference(act, f64::from(g), 0.75));
                // The exponent of the left tail carries the error of its argument: |z|·ε relative.
                let z = f64::from(g.abs()).clamp(1.0, 20.0);
                let bound = want.abs() * z * z * f64::from(f32::EPSILON) * 2.0 + 1e-37;
                assert!((got - want).abs() <= bound, "{act:?} at {g}: {got} {want}");
            }
        }
    }

    #[test]
    fn limits_and_nan() {
        for act in ALL {
            assert_eq!(apply(act, f32::NEG_INFINITY, 1.0), 0.0, "{act:?}");
            assert_eq!(apply(act, f32::INFINITY, 1.0), f32::INFINITY, "{act:?}");
            assert!(apply(act, f32::NAN, 1.0).is_nan(), "{act:?}");
        }
    }

    /// As `torch.nn.functional.threshold`, with which ProSparse trains.
    #[test]
    fn fatrelu_shuts_its_threshold_itself() {
        let act = Activation::FatRelu { threshold: 0.5 };
        let open = 0.5_f32.next_up();
        assert_eq!([0.5, open, -1.0].map(|g| apply(act, g, 2.0)), [0.0, 2.0 * open, 0.0]);
    }
}
