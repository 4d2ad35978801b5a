//! A projection by a [`Weight`] as a candle op.

use crate::{
    Threads, Weight,
    core::ActivationGroup,
    kernels::Kernels,
    weight::{On, with_cpu_storage},
};
use candle_core::{CpuStorage, CustomOp1, DType, Error, Layout, Module, Result, Shape, Tensor, bail};

struct Matmul<'a>(&'a Weight);

impl CustomOp1 for Matmul<'_> {
    fn name(&self) -> &'static str {
        "candle-sparse-matmul"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let w = self.0;
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("{}: x must be contiguous, call .contiguous() first", self.name());
        };
        let x = &storage.as_slice::<f32>()?[start..end];
        let mut dims = layout.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = w.rows();
        }
        let kernels = Kernels::get().map_err(Error::wrap)?;
        let on = On { kernels, threads: Threads::default() };
        let rows = x.len() / w.cols();
        let groups = if w.format().is_quantized() { rows * ActivationGroup::count(w.cols()) } else { 0 };
        let mut y = vec![0.0; rows * w.rows()];
        w.matmul(on, x, &mut vec![ActivationGroup::ZERO; groups], &mut y);
        Ok((CpuStorage::F32(y), Shape::from(dims)))
    }
}

/// `x · Wᵀ` for `x` `[.., cols]` F32 and `w` `[rows, cols]` in any format, giving `[.., rows]`.
///
/// Cost: `rows · cols` multiply-adds per row of `x`; the weight's bytes are read once.
///
/// # Errors
/// `x` is not F32, not on the CPU, empty, or its last dimension is not `cols`.
pub fn matmul(x: &Tensor, w: &Weight) -> Result<Tensor> {
    if x.dtype() != DType::F32 || x.dims().last() != Some(&w.cols()) || x.elem_count() == 0 {
        bail!(
            "candle-sparse-matmul: x is {:?} {:?}, the weight {:?} needs F32 [.., {}]",
            x.dtype(),
            x.dims(),
            [w.rows(), w.cols()],
            w.cols()
        );
    }
    // Names the device in the error where it is not the CPU.
    with_cpu_storage(x, |_, _| Ok(()))?;
    x.contiguous()?.apply_op1_no_bwd(&Matmul(w))
}

/// A drop-in for `candle_nn::Linear` without gradient: any format, all threads.
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
        self.bias.as_ref().map_or(Ok(y.clone()), |b| y.broadcast_add(b))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        core::Format,
        ops::testing::{dequantized, noise},
    };
    use candle_core::Device;

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
    fn linear_adds_its_bias() {
        let w = Weight::from_tensor(&Tensor::ones((2, 4), DType::F32, &Device::Cpu).unwrap(), Format::F32);
        let bias = Tensor::new(&[1.0_f32, -1.0], &Device::Cpu).unwrap();
        let x = Tensor::ones((3, 4), DType::F32, &Device::Cpu).unwrap();
        let y = Linear::new(w.unwrap(), Some(bias)).forward(&x).unwrap();
        assert_eq!(y.to_vec2::<f32>().unwrap(), [[5.0, 3.0]; 3]);
    }
}
