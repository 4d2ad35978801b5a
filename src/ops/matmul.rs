//! A projection by a [`Weight`] as a candle op.

use super::rows::{like, on, rows};
use crate::{Weight, weight::Prepared};
use candle_core::{Module, Result, Tensor};

/// `x · Wᵀ` for `x` `[.., cols]` in F32, F16 or BF16 and `w` `[rows, cols]` in any format, giving `[.., rows]` in the dtype of
/// `x`.
///
/// Cost: `rows · cols` multiply-adds per row of `x`; the weight's bytes are read once.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_sparse::{Format, Weight, ops::matmul};
///
/// let w = Weight::from_f32(Format::F32, 2, &[1.0, 2.0, 3.0, 4.0])?;
/// let x = Tensor::new(&[[1.0_f32, 10.0]], &Device::Cpu)?;
/// assert_eq!(matmul(&x, &w)?.to_vec2::<f32>()?, [[21.0, 43.0]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// `x` is of another dtype, not on the CPU, empty, not finite, or its last dimension is not `cols`.
pub fn matmul(x: &Tensor, w: &Weight) -> Result<Tensor> {
    let values = rows("candle-sparse-matmul", x, w.cols())
        .map_err(|e| e.context(format!("the weight is {:?}", [w.rows(), w.cols()])))?;
    let n = values.len() / w.cols();
    let mut y = vec![0.0; n * w.rows()];
    w.matmul(on()?, &values, &mut Prepared::default(), &mut y);
    like(x, y, w.rows())
}

/// `y = x · Wᵀ + b`, a drop-in for `candle_nn::Linear` without gradient: `weight` in any format, on all threads.
///
/// ```
/// use candle_core::{Device, Module, Tensor};
/// use candle_sparse::{Format, Weight, ops::Linear};
///
/// let weight = Weight::from_f32(Format::F16, 2, &[1.0, 2.0, 3.0, 4.0])?;
/// let linear = Linear::new(weight, Some(Tensor::new(&[0.5_f32, -0.5], &Device::Cpu)?));
/// let x = Tensor::new(&[[1.0_f32, 10.0]], &Device::Cpu)?;
/// assert_eq!(linear.forward(&x)?.to_vec2::<f32>()?, [[21.5, 42.5]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
}

impl Linear {
    /// A projection by `weight` `[out, in]` and an optional bias `[out]`.
    #[must_use]
    pub fn new(weight: Weight, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = matmul(x, &self.weight)?;
        self.bias.as_ref().map_or(Ok(y.clone()), |b| y.broadcast_add(&b.to_dtype(y.dtype())?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{dequantized, noise};
    use candle_core::{DType, Device};
    use candle_sparse_core::Format;

    /// The same in plain tensor ops, on the weights the format really holds.
    fn matmul_slow(x: &Tensor, w: &Weight) -> Tensor {
        x.broadcast_matmul(&dequantized(w).t().unwrap()).unwrap()
    }

    #[test]
    fn equals_its_slow_twin_in_every_format_and_batch() {
        for (rows, cols) in [(7, 32), (129, 96), (40, 576), (5, 512)] {
            let dense = noise(&[rows, cols]);
            for format in Format::ALL.into_iter().filter(|f| cols.is_multiple_of(f.block_len())) {
                let w = Weight::from_tensor(&dense, format).unwrap();
                assert_eq!(w.bytes(), rows * format.row_bytes(cols));
                for batch in [1, 2, 5, 33] {
                    let x = noise(&[1, batch, cols]);
                    let (got, want) = (matmul(&x, &w).unwrap(), matmul_slow(&x, &w));
                    let diff = (&got - &want).unwrap().abs().unwrap().max_all().unwrap();
                    // Quantised formats round x to steps of max|x| / 127: a random walk over cols products.
                    let steps = if format.is_quantized() { 4.0 / 127.0 } else { 1e-5 };
                    let bound = steps * (cols as f32).sqrt();
                    let diff = diff.to_scalar::<f32>().unwrap();
                    assert!(diff <= bound, "{format:?} {rows}x{cols} batch {batch}: {diff} > {bound}");
                }
            }
        }
    }

    #[test]
    fn wrong_input_is_named() {
        let w = Weight::from_tensor(&Tensor::zeros((4, 32), DType::F32, &Device::Cpu).unwrap(), Format::F16);
        let w = w.unwrap();
        let x = Tensor::zeros((1, 31), DType::F32, &Device::Cpu).unwrap();
        let err = matmul(&x, &w).unwrap_err().to_string();
        assert!(err.contains("[1, 31]") && err.contains("[4, 32]"), "{err}");
        assert!(matmul(&x.to_dtype(DType::F16).unwrap(), &w).is_err());
    }

    #[test]
    fn half_precision_comes_back_in_its_dtype() {
        let w = Weight::from_tensor(&noise(&[40, 64]), Format::F16).unwrap();
        for dtype in [DType::F16, DType::BF16] {
            let x = noise(&[3, 64]).to_dtype(dtype).unwrap();
            let want = matmul(&x.to_dtype(DType::F32).unwrap(), &w).unwrap().to_dtype(dtype).unwrap();
            let got = matmul(&x, &w).unwrap();
            assert_eq!(got.dtype(), dtype);
            let diff = (got - want).unwrap().to_dtype(DType::F32).unwrap().abs().unwrap();
            assert_eq!(diff.max_all().unwrap().to_scalar::<f32>().unwrap(), 0.0);
        }
    }

    #[test]
    fn linear_adds_its_bias() {
        let w = Weight::from_tensor(&Tensor::ones((2, 4), DType::F32, &Device::Cpu).unwrap(), Format::F32);
        let bias = Tensor::new(&[1.0_f32, -1.0], &Device::Cpu).unwrap();
        let x = Tensor::ones((3, 4), DType::F32, &Device::Cpu).unwrap();
        let y = Linear::new(w.unwrap(), Some(bias)).forward(&x).unwrap();
        assert_eq!(y.to_vec2::<f32>().unwrap(), [[5.0, 3.0]; 3]);
    }
}
