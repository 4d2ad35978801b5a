//! Rows that come in and go out of an op, in any float dtype.

use crate::{
    Threads,
    weight::{Compute, with_cpu_storage},
};
use candle_core::{DType, Device, Error, Result, Tensor, bail};
use candle_sparse_kernels::Kernels;

/// What ops run on.
pub(super) fn on() -> Result<Compute<'static>> {
    Ok(Compute { kernels: Kernels::get().map_err(Error::wrap)?, threads: Threads::default() })
}

/// The elements of a tensor in F32, F16 or BF16 on the CPU, as f32.
pub(super) fn floats(op: &str, name: &str, t: &Tensor) -> Result<Vec<f32>> {
    if !matches!(t.dtype(), DType::F32 | DType::F16 | DType::BF16) {
        bail!("{op}: {name} is {:?}, needed is F32, F16 or BF16", t.dtype());
    }
    // Names the device in the error where it is not the CPU.
    with_cpu_storage(t, |_, _| Ok(()))?;
    t.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

/// The elements of `x` `[.., width]`, which must be finite.
pub(super) fn rows(op: &str, x: &Tensor, width: usize) -> Result<Vec<f32>> {
    if x.dims().last() != Some(&width) || x.elem_count() == 0 {
        bail!("{op}: x is {:?} {:?}, needed is F32, F16 or BF16 [.., {width}]", x.dtype(), x.dims());
    }
    let values = floats(op, "x", x)?;
    match values.iter().position(|v| !v.is_finite()) {
        Some(i) => bail!("{op}: x[{i}] is {}: what comes before this op is not finite", values[i]),
        None => Ok(values),
    }
}

/// `y` in the dtype of `x`, and in its shape but for the last dimension.
pub(super) fn like(x: &Tensor, y: Vec<f32>, width: usize) -> Result<Tensor> {
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = width;
    }
    Tensor::from_vec(y, dims, &Device::Cpu)?.to_dtype(x.dtype())
}
