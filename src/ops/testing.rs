//! What the tests of several ops need.

use crate::Weight;
use candle_core::{D, Device, Result, Tensor};
use candle_sparse_core::Activation;

/// Numbers of standard deviation 1 that depend on the shape only: a failure comes back.
pub(super) fn noise(dims: &[usize]) -> Tensor {
    let n: usize = dims.iter().product();
    let value = |i: u64| {
        let h = ((i + 1) ^ (n as u64) << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let h = (h ^ (h >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((h >> 40) as f32 / (1 << 24) as f32 - 0.5) * 12_f32.sqrt()
    };
    Tensor::from_vec((0..n as u64).map(value).collect::<Vec<_>>(), dims, &Device::Cpu).unwrap()
}

/// The numbers that a weight really holds.
pub(super) fn dequantized(w: &Weight) -> Tensor {
    let mut rows = vec![0.0; w.rows() * w.cols()];
    for (r, row) in rows.chunks_exact_mut(w.cols()).enumerate() {
        w.matrix().dequantize_row(r, row);
    }
    Tensor::from_vec(rows, (w.rows(), w.cols()), &Device::Cpu).unwrap()
}

/// `act(g) · u` in plain tensor ops.
pub(super) fn gated(act: Activation, g: &Tensor, u: &Tensor) -> Result<Tensor> {
    let activated = match act {
        Activation::Silu => g.silu()?,
        Activation::Gelu => g.gelu_erf()?,
        Activation::GeluPytorchTanh => g.gelu()?,
        Activation::Relu => g.relu()?,
        Activation::Relu2 => g.relu()?.sqr()?,
        Activation::FatRelu { threshold } => g.ge(threshold)?.where_cond(g, &g.zeros_like()?)?,
        Activation::DRelu => return g.relu()? * u.relu()?,
    };
    activated * u
}

/// `‖a − b‖ / ‖b‖`
pub(super) fn relative_error(a: &Tensor, b: &Tensor) -> f32 {
    let norm = |t: &Tensor| t.flatten_all()?.sqr()?.sum(D::Minus1)?.sqrt()?.to_scalar::<f32>();
    norm(&(a - b).unwrap()).unwrap() / norm(b).unwrap().max(1e-20)
}
