//! Vectors as tensors of a file.

use candle_core::{Device, Result, Tensor, WithDType};
use candle_nn::VarBuilder;
use std::collections::HashMap;

pub(super) fn put<T: WithDType>(
    out: &mut HashMap<String, Tensor>,
    name: &str,
    v: &[T],
    dims: &[usize],
) -> Result<()> {
    out.insert(name.to_string(), Tensor::from_slice(v, dims, &Device::Cpu)?);
    Ok(())
}

pub(super) fn vector<T: WithDType>(vb: &VarBuilder<'_>, name: &str) -> Result<Vec<T>> {
    vb.get_unchecked_dtype(name, T::DTYPE)?.flatten_all()?.to_vec1()
}
