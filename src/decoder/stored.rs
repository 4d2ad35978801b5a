//! Weights that are held in the form in which they are stored: those of a GGUF file.

use crate::Weight;
use candle_core::{DType, Device, Result, Shape, Tensor, bail};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use candle_sparse_core::Format;
use core::fmt;
use std::{collections::HashMap, sync::Arc};

/// Tensors by their Hugging Face names, each in its own format.
///
/// As a backend of `VarBuilder` it gives their elements as floats, for code that reads tensors: calibration, fingerprints.
///
/// ```
/// use candle_sparse::{Format, Weight, decoder::Stored};
///
/// let mut stored = Stored::new("an example");
/// let head = Weight::from_f32(Format::F16, 2, &[1.0, 2.0, 3.0, 4.0])?;
/// stored.insert("lm_head.weight", head, &[2, 2]);
/// assert_eq!(stored.format("lm_head.weight")?, Format::F16);
/// assert!(stored.weight("lm_head.weight", &[4, 1]).is_err());
/// // As floats, for code that reads tensors.
/// let vb = std::sync::Arc::new(stored).var_builder();
/// assert_eq!(vb.get((2, 2), "lm_head.weight")?.to_vec2::<f32>()?, [[1.0, 2.0], [3.0, 4.0]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Stored {
    /// For messages.
    origin: String,
    /// Tensors are meant to lie in a mapped file.
    pub(crate) mapped: bool,
    tensors: HashMap<String, (Held, Shape)>,
}

/// A tensor that is in memory, or one that is read each time it is needed, so that what is made of it is the only copy.
///
/// ```
/// use candle_sparse::{Format, Weight, decoder::Held};
///
/// let held = Held::elsewhere(Format::F32, || Weight::from_f32(Format::F32, 2, &[1.0, 2.0]));
/// // Each call reads it anew.
/// assert!(!held.weight()?.shares_memory(&held.weight()?));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone)]
pub enum Held {
    /// In memory or in a mapped file.
    Here(Weight),
    /// In a file.
    Elsewhere(Format, Arc<dyn Fn() -> Result<Weight> + Send + Sync>),
}

impl Held {
    /// A tensor of a format that `read` reads.
    pub fn elsewhere(format: Format, read: impl Fn() -> Result<Weight> + Send + Sync + 'static) -> Self {
        Self::Elsewhere(format, Arc::new(read))
    }

    /// The tensor, read where it is not in memory.
    ///
    /// # Errors
    /// Those of reading it.
    pub fn weight(&self) -> Result<Weight> {
        match self {
            Self::Here(weight) => Ok(weight.clone()),
            Self::Elsewhere(_, read) => read(),
        }
    }

    fn format(&self) -> Format {
        match self {
            Self::Here(weight) => weight.format(),
            Self::Elsewhere(format, _) => *format,
        }
    }
}

impl From<Weight> for Held {
    fn from(weight: Weight) -> Self {
        Self::Here(weight)
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Here(weight) => f.debug_tuple("Here").field(weight).finish(),
            Self::Elsewhere(format, _) => f.debug_tuple("Elsewhere").field(format).finish_non_exhaustive(),
        }
    }
}

impl Stored {
    /// Tensors that came from `origin`, a file perhaps.
    #[must_use]
    pub fn new(origin: impl Into<String>) -> Self {
        Self { origin: origin.into(), mapped: false, tensors: HashMap::new() }
    }

    /// What it was made with.
    #[must_use]
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// The same with a note that the file is mapped: tensors that had to be copied are then worth a notice to the user.
    #[must_use]
    pub fn with_mapped(self, mapped: bool) -> Self {
        Self { mapped, ..self }
    }

    /// Adds a tensor of one or two dimensions `dims`; one of one dimension is held as a matrix of one row.
    pub fn insert(&mut self, name: impl Into<String>, tensor: impl Into<Held>, dims: &[usize]) {
        self.tensors.insert(name.into(), (tensor.into(), Shape::from(dims)));
    }

    /// Whether there is such a tensor.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    fn held(&self, name: &str) -> Result<&(Held, Shape)> {
        match self.tensors.get(name) {
            Some(held) => Ok(held),
            None => bail!("{}: tensor {name} is missing", self.origin),
        }
    }

    /// The tensor as it is stored; read anew where it is not in memory.
    ///
    /// # Errors
    /// There is none of this name, it has another shape, or it cannot be read.
    pub fn weight(&self, name: &str, dims: &[usize]) -> Result<Weight> {
        let (held, shape) = self.held(name)?;
        if shape.dims() != dims {
            bail!("{}: tensor {name} has shape {shape:?}, the model needs {dims:?}", self.origin);
        }
        held.weight()
    }

    /// The format in which a tensor is stored.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn format(&self, name: &str) -> Result<Format> {
        self.held(name).map(|(held, _)| held.format())
    }

    /// Gives pages of a mapped file back that will not be read soon.
    pub(crate) fn release(&self, name: &str) {
        if let Some((Held::Here(weight), _)) = self.tensors.get(name) {
            weight.release();
        }
    }

    /// How many tensors of a mapped file do not lie where they can be used in place, and so were copied.
    pub(crate) fn copied(&self) -> usize {
        let copied = |held: &Held| matches!(held, Held::Here(weight) if !weight.is_mapped());
        if self.mapped { self.tensors.values().filter(|(held, _)| copied(held)).count() } else { 0 }
    }

    /// All tensors, in no order; read anew where they are not in memory.
    pub fn weights(&self) -> impl Iterator<Item = (&str, Result<Weight>)> {
        self.tensors.iter().map(|(name, (held, _))| (name.as_str(), held.weight()))
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
        let weight = self.0.weight(name, shape.dims())?;
        floats(&weight, &shape, dtype, device)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let (held, shape) = self.0.held(name)?;
        floats(&held.weight()?, shape, dtype, device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.contains(name)
    }
}

fn floats(weight: &Weight, shape: &Shape, dtype: DType, device: &Device) -> Result<Tensor> {
    let tensor = weight.dequantize()?.reshape(shape)?;
    // What was read once as floats is held in another form from here on, or not needed again.
    weight.release();
    tensor.to_dtype(dtype)?.to_device(device)
}
