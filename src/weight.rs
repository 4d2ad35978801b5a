//! A weight matrix held once, in its own format, shared by every clone of a model.

mod convert;
mod fit;
mod prepared;
mod stack;

use crate::{buffer::Buffer, mapped_file::MappedFile};
use candle_core::{DType, Device, Error, Result, Tensor, bail, quantized::QTensor};
use candle_sparse_core::{Format, Matrix};
pub(crate) use convert::with_cpu_storage;
use convert::{Gather, convert, gather_rows, room, write_rows};
pub use fit::Conversions;
pub(crate) use prepared::{Activations, Compute, Prepared};
use rayon::prelude::*;
pub(crate) use stack::{ROW_STEP, Stack, split_columns};
use std::{borrow::Cow, ops::Range, sync::Arc};

/// A matrix `[rows, cols]` in one [`Format`], immutable and cheap to clone.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_sparse::{Format, Weight};
///
/// let dense = Tensor::ones((4, 64), candle_core::DType::F32, &Device::Cpu)?;
/// let weight = Weight::from_tensor(&dense, Format::Q8_0)?;
/// assert_eq!((weight.rows(), weight.cols(), weight.format()), (4, 64, Format::Q8_0));
/// // Per 32 elements 32 bytes and a scale of 2.
/// assert_eq!(weight.bytes(), 4 * 2 * 34);
/// // A clone is the same memory.
/// assert!(weight.clone().shares_memory(&weight));
/// assert_eq!(weight.dequantize()?.dims(), [4, 64]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Weight {
    rows: usize,
    cols: usize,
    format: Format,
    data: Arc<Memory>,
}

/// Where the bytes of a weight lie.
///
/// ```
/// use candle_sparse::{Format, Weight, buffer::Buffer, weight::Memory};
///
/// let mut buffer = Buffer::zeroed(8)?;
/// buffer.bytes_mut()[..4].copy_from_slice(&2_f32.to_le_bytes());
/// let weight = Weight::from_memory(1, 2, Format::F32, Memory::Buffer(buffer))?;
/// assert_eq!(weight.dequantize()?.to_vec2::<f32>()?, [[2.0, 0.0]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
#[non_exhaustive]
pub enum Memory {
    /// Memory of our own, in huge pages.
    Buffer(Buffer),
    /// A part of a file.
    File(Arc<MappedFile>, Range<usize>),
    /// A tensor that candle loaded.
    Tensor(Arc<QTensor>),
}

impl Memory {
    fn bytes(&self) -> Result<&[u8]> {
        match self {
            Self::Buffer(buffer) => Ok(buffer.bytes()),
            Self::File(file, range) => match file.bytes().get(range.clone()) {
                Some(bytes) => Ok(bytes),
                None => bail!("weight: bytes {range:?} are past the end of {}", file.path().display()),
            },
            Self::Tensor(tensor) => match tensor.data()? {
                Cow::Borrowed(bytes) => Ok(bytes),
                Cow::Owned(_) => bail!("weight: a tensor on the CPU is needed"),
            },
        }
    }
}

/// Rows `[rows, cols]` from which a weight, or a part of one, is made.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_sparse::{Format, weight::Part};
///
/// let part = Part::from(Tensor::zeros((8, 96), DType::F32, &Device::Cpu)?);
/// assert_eq!((part.format(), part.bytes()), (Some(Format::F32), 8 * 96 * 4));
/// // Rows of 96 elements are whole blocks of 32, but not of 256.
/// assert_eq!(part.fitting(Format::Q8_0, 96), Format::Q8_0);
/// assert_ne!(part.fitting(Format::Q6K, 96), Format::Q6K);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Part {
    /// In F32, F16 or BF16.
    Tensor(Tensor),
    /// In a format already.
    Weight(Weight),
}

impl From<Tensor> for Part {
    fn from(tensor: Tensor) -> Self {
        Self::Tensor(tensor)
    }
}

impl From<Weight> for Part {
    fn from(weight: Weight) -> Self {
        Self::Weight(weight)
    }
}

impl Part {
    fn check(&self, shape: [usize; 2]) -> Result<()> {
        match self {
            Self::Tensor(t) if t.dims() != shape => {
                bail!("weight: shape {:?}, expected {shape:?}", t.dims())
            }
            Self::Weight(w) if [w.rows, w.cols] != shape => {
                bail!("weight: shape {:?}, expected {shape:?}", [w.rows, w.cols])
            }
            _ => Ok(()),
        }
    }
}

/// The format that keeps the elements of a candle dtype as they are; `None` where there is none.
///
/// ```
/// use candle_core::DType;
/// use candle_sparse::{Format, weight::format_of};
///
/// assert_eq!(format_of(DType::BF16), Some(Format::BF16));
/// assert_eq!(format_of(DType::U8), None);
/// ```
#[must_use]
pub fn format_of(dtype: DType) -> Option<Format> {
    match dtype {
        DType::F32 => Some(Format::F32),
        DType::F16 => Some(Format::F16),
        DType::BF16 => Some(Format::BF16),
        _ => None,
    }
}

/// The candle dtype of a format that is not quantised; `None` for one that is.
///
/// ```
/// use candle_core::DType;
/// use candle_sparse::{Format, weight::dtype_of};
///
/// assert_eq!(dtype_of(Format::F16), Some(DType::F16));
/// assert_eq!(dtype_of(Format::Q8_0), None);
/// ```
#[must_use]
pub fn dtype_of(format: Format) -> Option<DType> {
    match format {
        Format::F32 => Some(DType::F32),
        Format::F16 => Some(DType::F16),
        Format::BF16 => Some(DType::BF16),
        _ => None,
    }
}

impl Weight {
    /// A matrix whose rows are those of several parts `[rows_i, cols]`, one below the other.
    ///
    /// Parts are asked for one at a time and dropped before the next, so peak memory is the matrix and one part.
    /// Rows that are no whole number of blocks take another format: [`Part::fitting`].
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_sparse::{Format, Weight};
    ///
    /// // Two rows of zeros above three of ones.
    /// let qkv = Weight::stacked(Format::F16, 4, &[2, 3], |i| {
    ///     let rows = [2, 3][i];
    ///     Tensor::full(i as f32, (rows, 4), &Device::Cpu)
    /// })?;
    /// assert_eq!((qkv.rows(), qkv.cols()), (5, 4));
    /// assert_eq!(qkv.dequantize()?.sum_all()?.to_scalar::<f32>()?, 12.0);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// A part fails to load, has another shape or a dtype other than F32, F16, BF16, or lies on another device.
    pub fn stacked<P: Into<Part>>(
        format: Format,
        cols: usize,
        parts: &[usize],
        mut part: impl FnMut(usize) -> Result<P>,
    ) -> Result<Self> {
        let rows: usize = parts.iter().sum();
        let mut start = 0;
        let mut made: Option<(Format, Buffer)> = None;
        for (i, &n) in parts.iter().enumerate() {
            // Read before anything is allocated for it: a shape that the file does not have costs no memory.
            let part = part(i)?.into();
            part.check([n, cols])?;
            let (format, buffer) = match &mut made {
                Some(made) => made,
                None => made.insert(room(format, rows, cols, &part)?),
            };
            let row_bytes = format.row_bytes(cols);
            let place = &mut buffer.bytes_mut()[start * row_bytes..(start + n) * row_bytes];
            write_rows(&part, *format, place)?;
            start += n;
        }
        let (format, buffer) = made.map_or_else(|| Ok((format, Buffer::zeroed(0)?)), Ok::<_, Error>)?;
        Ok(Self { rows, cols, format, data: Arc::new(Memory::Buffer(buffer)) })
    }

    /// A matrix from one tensor `[rows, cols]`, in the given format.
    ///
    /// # Errors
    /// As [`Self::stacked`].
    pub fn from_tensor(t: &Tensor, format: Format) -> Result<Self> {
        let (rows, cols) = t.dims2()?;
        Self::stacked(format, cols, &[rows], |_| Ok(t.clone()))
    }

    /// A matrix whose row `i · parts + j` is row `order[i]` of part `j`: rows that are read together lie together.
    ///
    /// Parts `[order.len(), cols]` are asked for one at a time, as in [`Self::stacked`].
    ///
    /// ```
    /// use candle_sparse::{Format, Weight};
    ///
    /// let up = Weight::from_f32(Format::F32, 2, &[1.0, 1.0, 2.0, 2.0])?;
    /// let down = Weight::from_f32(Format::F32, 2, &[-1.0, -1.0, -2.0, -2.0])?;
    /// // The second neuron first.
    /// let pairs = Weight::interleaved(Format::F32, 2, 2, &[1, 0], |part| Ok([&up, &down][part].clone()))?;
    /// let first_column = pairs.dequantize()?.narrow(1, 0, 1)?.flatten_all()?;
    /// assert_eq!(first_column.to_vec1::<f32>()?, [2.0, -2.0, 1.0, -1.0]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Self::stacked`]; also an `order` past the last row.
    pub fn interleaved<P: Into<Part>>(
        format: Format,
        cols: usize,
        parts: usize,
        order: &[u32],
        mut part: impl FnMut(usize) -> Result<P>,
    ) -> Result<Self> {
        let n = order.len();
        if let Some(row) = order.iter().find(|&&row| row as usize >= n) {
            bail!("weight: row {row} asked for, there are {n}");
        }
        let mut made: Option<(Format, Buffer)> = None;
        for i in 0..parts {
            let part = part(i)?.into();
            part.check([n, cols])?;
            let (format, buffer) = match &mut made {
                Some(made) => made,
                None => made.insert(room(format, n * parts, cols, &part)?),
            };
            let len = n * parts * format.row_bytes(cols);
            gather_rows(&part, *format, Gather { order, parts, part: i }, &mut buffer.bytes_mut()[..len])?;
        }
        let (format, buffer) = made.map_or_else(|| Ok((format, Buffer::zeroed(0)?)), Ok::<_, Error>)?;
        Ok(Self { rows: n * parts, cols, format, data: Arc::new(Memory::Buffer(buffer)) })
    }

    /// A matrix over bytes that are there already, in ggml's layout; copied where they are not aligned for the format.
    ///
    /// # Errors
    /// Another number of bytes than `rows · cols` elements take, or rows that are no whole number of blocks.
    pub fn from_memory(rows: usize, cols: usize, format: Format, memory: Memory) -> Result<Self> {
        let bytes = memory.bytes()?;
        let expected = rows.checked_mul(format.row_bytes(cols));
        if !cols.is_multiple_of(format.block_len()) || expected.is_none_or(|n| n > bytes.len()) {
            bail!("weight: {} bytes are no {rows} rows of {cols} in {}", bytes.len(), format.name());
        }
        let bytes = &bytes[..rows * format.row_bytes(cols)];
        let data = if Matrix::from_bytes(rows, cols, format, bytes).is_ok() {
            memory
        } else {
            let mut copy = Buffer::zeroed(bytes.len())?;
            copy.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
            Memory::Buffer(copy)
        };
        Ok(Self { rows, cols, format, data: Arc::new(data) })
    }

    /// A matrix `[values.len() / cols, cols]` from its elements; rows must be whole blocks of `format`.
    ///
    /// # Errors
    /// Another number of elements than whole rows, or the system has not the memory.
    pub fn from_f32(format: Format, cols: usize, values: &[f32]) -> Result<Self> {
        if cols == 0 || !values.len().is_multiple_of(cols) || !cols.is_multiple_of(format.block_len()) {
            bail!("weight: {} elements are no rows of {cols} in {}", values.len(), format.name());
        }
        let rows = values.len() / cols;
        let mut data = Buffer::zeroed(rows * format.row_bytes(cols))?;
        convert(values, cols, format, &mut data.bytes_mut()[..rows * format.row_bytes(cols)])?;
        Ok(Self { rows, cols, format, data: Arc::new(Memory::Buffer(data)) })
    }

    /// The same numbers in another format, or in the one that its rows [fit](Part::fitting); itself where it has that already.
    ///
    /// Cost: the bytes of the new rows, and `4 · rows · cols` while it is made.
    ///
    /// # Errors
    /// There is no memory for them.
    pub fn to_format(&self, format: Format) -> Result<Self> {
        match Part::Weight(self.clone()).fitting(format, self.cols) {
            format if format == self.format => Ok(self.clone()),
            format => Self::from_tensor(&self.dequantize()?, format),
        }
    }

    /// Number of rows: the outputs of a product with it.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns: the inputs of a product with it.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the elements are stored.
    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.rows * self.format.row_bytes(self.cols)
    }

    /// Whether both are the same matrix in memory, as a head that is the embedding.
    #[must_use]
    pub fn shares_memory(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.data, &other.data)
    }

    /// The matrix, borrowed.
    ///
    /// # Panics
    /// Never: shape and alignment were checked when the weight was made, and what holds the bytes never changes.
    #[must_use]
    pub fn matrix(&self) -> Matrix<'_> {
        Matrix::from_bytes(self.rows, self.cols, self.format, self.as_bytes())
            .expect("shape and alignment were checked when the weight was made")
    }

    /// The elements as a tensor `[rows, cols]` in F32.
    ///
    /// Cost: all bytes are read once, `4 · rows · cols` bytes are written.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn dequantize(&self) -> Result<Tensor> {
        let (matrix, mut values) = (self.matrix(), vec![0.0; self.rows * self.cols]);
        if self.cols > 0 {
            let rows = values.par_chunks_exact_mut(self.cols).enumerate();
            rows.for_each(|(i, row)| matrix.dequantize_row(i, row));
        }
        Tensor::from_vec(values, (self.rows, self.cols), &Device::Cpu)
    }

    /// The elements in ggml's layout, row after row.
    ///
    /// # Panics
    /// Never, see [`Self::matrix`].
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.data.bytes().expect("the bytes were there when the weight was made")[..self.bytes()]
    }

    /// Whether the elements lie in a mapped file.
    #[must_use]
    pub fn is_mapped(&self) -> bool {
        matches!(&*self.data, Memory::File(..))
    }

    /// Gives pages of a mapped file back, where the weight lies in one and will not be read soon.
    pub fn release(&self) {
        if let Memory::File(file, range) = &*self.data {
            file.release(range.clone());
        }
    }
}
