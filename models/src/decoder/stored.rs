//! Weights that are held in the form in which they are stored: those of a GGUF file.

use candle_core::{DType, Device, Result, Shape, Tensor, bail};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use candle_sparse::Weight;
use std::{collections::HashMap, sync::Arc};

/// Tensors by their Hugging Face names, each in its own format.
///
/// As a backend of `VarBuilder` it gives their elements as floats, for code that reads tensors: calibration, fingerprints.
#[derive(Clone, Debug)]
pub struct Stored {
    /// For messages.
    origin: String,
    tensors: HashMap<String, (Weight, Shape)>,
}

impl Stored {
    /// Tensors that came from `origin`, a file perhaps.
    #[must_use]
    pub fn new(origin: impl Into<String>) -> Self {
        Self { origin: origin.into(), tensors: HashMap::new() }
    }

    /// Adds a tensor of one or two dimensions; one dimension is a matrix of one row.
    pub fn insert(&mut self, name: impl Into<String>, weight: Weight, dims: &[usize]) {
        self.tensors.insert(name.into(), (weight, Shape::from(dims)));
    }

    /// Whether there is such a tensor.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor as it is stored.
    ///
    /// # Errors
    /// There is none of this name, or it has another shape.
    pub fn weight(&self, name: &str, dims: &[usize]) -> Result<&Weight> {
        let Some((weight, shape)) = self.tensors.get(name) else {
            bail!("{}: tensor {name} is missing", self.origin)
        };
        if shape.dims() != dims {
            bail!("{}: tensor {name} has shape {shape:?}, the model needs {dims:?}", self.origin);
        }
        Ok(weight)
    }

    /// All tensors, in no order.
    pub fn weights(&self) -> impl Iterator<Item = (&str, &Weight)> {
        self.tensors.iter().map(|(name, (weight, _))| (name.as_str(), weight))
    }

    /// The tensors as a `VarBuilder` that gives floats.
    #[must_use]
    pub fn var_builder(self: &Arc<Self>) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(Floats(Arc::clone(self))), DType::F32, Device::Cpu)
    }
}

struct Floats(Arc<Stored>);

impl SimpleBackend for Floats {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        self.0.weight(name, shape.dims())?;
        self.get_unchecked(name, dtype, device)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let Some((weight, shape)) = self.0.tensors.get(name) else {
            bail!("{}: tensor {name} is missing", self.0.origin)
        };
        let tensor = weight.dequantize()?.reshape(shape)?;
        // What was read once as floats is held in another form from here on, or not needed again.
        weight.release();
        tensor.to_dtype(dtype)?.to_device(device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.contains(name)
    }
}
