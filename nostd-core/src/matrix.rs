//! Borrowed matrices of any format, and the columns they are multiplied with.

use crate::{
    error::Error,
    format::{ActivationGroup, BlockQ4_0, BlockQ8_0, Format, f16_to_f32},
};
use core::ops::Range;
use half::{bf16, f16};

/// The elements of a matrix, row after row.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// [`Format::F32`]
    F32(&'a [f32]),
    /// [`Format::F16`]
    F16(&'a [f16]),
    /// [`Format::BF16`]
    BF16(&'a [bf16]),
    /// [`Format::Q8_0`]
    Q8_0(&'a [BlockQ8_0]),
    /// [`Format::Q4_0`]
    Q4_0(&'a [BlockQ4_0]),
}

impl Rows<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(d) => d.len(),
            Self::F16(d) => d.len(),
            Self::BF16(d) => d.len(),
            Self::Q8_0(d) => d.len(),
            Self::Q4_0(d) => d.len(),
        }
    }
}

/// A matrix `[rows, cols]`, contiguous row after row.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    rows: usize,
    cols: usize,
    data: Rows<'a>,
}

impl<'a> Matrix<'a> {
    /// A matrix over `data`.
    ///
    /// # Errors
    /// `cols` is no multiple of the block length, or `data` has not `rows · cols` elements.
    pub fn new(rows: usize, cols: usize, data: Rows<'a>) -> Result<Self, Error> {
        let matrix = Self { rows, cols, data };
        let block = matrix.format().block_len();
        if !cols.is_multiple_of(block) {
            return Err(Error::BlockMultiple { cols, block });
        }
        let expected = rows.checked_mul(cols / block).ok_or(Error::TooLarge("matrix"))?;
        if data.len() != expected {
            return Err(Error::Length { what: "matrix", expected, got: data.len() });
        }
        Ok(matrix)
    }

    /// A matrix over bytes (little endian, as in a file or in flash).
    ///
    /// # Errors
    /// As [`Self::new`]; also bytes that are not aligned for the format.
    pub fn from_bytes(rows: usize, cols: usize, format: Format, bytes: &'a [u8]) -> Result<Self, Error> {
        let bad = |_| Error::Length {
            what: "matrix bytes (or their alignment)",
            expected: rows.saturating_mul(format.row_bytes(cols)),
            got: bytes.len(),
        };
        let data = match format {
            Format::F32 => Rows::F32(bytemuck::try_cast_slice(bytes).map_err(bad)?),
            Format::F16 => Rows::F16(bytemuck::try_cast_slice(bytes).map_err(bad)?),
            Format::BF16 => Rows::BF16(bytemuck::try_cast_slice(bytes).map_err(bad)?),
            Format::Q8_0 => Rows::Q8_0(bytemuck::try_cast_slice(bytes).map_err(bad)?),
            Format::Q4_0 => Rows::Q4_0(bytemuck::try_cast_slice(bytes).map_err(bad)?),
        };
        Self::new(rows, cols, data)
    }

    /// Rows, the length of a product with a column.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns, the length of a row.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The elements.
    #[must_use]
    pub fn data(&self) -> Rows<'a> {
        self.data
    }

    /// How the elements are stored.
    #[must_use]
    pub fn format(&self) -> Format {
        match self.data {
            Rows::F32(_) => Format::F32,
            Rows::F16(_) => Format::F16,
            Rows::BF16(_) => Format::BF16,
            Rows::Q8_0(_) => Format::Q8_0,
            Rows::Q4_0(_) => Format::Q4_0,
        }
    }

    /// Bytes of the elements.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.rows * self.format().row_bytes(self.cols)
    }

    /// The rows of a range as a matrix of its own.
    ///
    /// # Panics
    /// The range ends past the last row.
    #[must_use]
    pub fn slice_rows(&self, range: Range<usize>) -> Self {
        let per_row = self.cols / self.format().block_len();
        let r = range.start * per_row..range.end * per_row;
        let data = match self.data {
            Rows::F32(d) => Rows::F32(&d[r]),
            Rows::F16(d) => Rows::F16(&d[r]),
            Rows::BF16(d) => Rows::BF16(&d[r]),
            Rows::Q8_0(d) => Rows::Q8_0(&d[r]),
            Rows::Q4_0(d) => Rows::Q4_0(&d[r]),
        };
        Self { rows: range.len(), cols: self.cols, data }
    }

    /// Writes row `row` as f32 (an embedding look-up).
    ///
    /// # Panics
    /// `row` is not below [`Self::rows`], or `out` has not [`Self::cols`] elements.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "dequantize_row: out has the wrong length");
        match self.slice_rows(row..row + 1).data {
            Rows::F32(d) => out.copy_from_slice(d),
            Rows::F16(d) => out.iter_mut().zip(d).for_each(|(o, v)| *o = f16_to_f32(v.to_bits())),
            Rows::BF16(d) => out.iter_mut().zip(d).for_each(|(o, v)| *o = v.to_f32()),
            Rows::Q8_0(d) => {
                out.as_chunks_mut().0.iter_mut().zip(d).for_each(|(o, b)| b.dequantize(o));
            }
            Rows::Q4_0(d) => {
                out.as_chunks_mut().0.iter_mut().zip(d).for_each(|(o, b)| b.dequantize(o));
            }
        }
    }
}

/// Columns `[n, cols]` (column after column) in the form a matrix' format is multiplied with.
#[derive(Clone, Copy, Debug)]
pub enum Columns<'a> {
    /// For F32, F16 and BF16 matrices.
    F32(&'a [f32]),
    /// For quantised matrices; each column begins with a new group.
    Quantized(&'a [ActivationGroup]),
}

impl Columns<'_> {
    /// How many columns of `cols` elements these are.
    ///
    /// # Panics
    /// The elements are no whole number of columns.
    #[must_use]
    pub fn count(&self, cols: usize) -> usize {
        let (len, column) = match self {
            Self::F32(x) => (x.len(), cols),
            Self::Quantized(x) => (x.len(), ActivationGroup::count(cols)),
        };
        assert!(column > 0 && len % column == 0, "columns: {len} is no multiple of {column}");
        len / column
    }

    /// Whether this is the form that `format` is multiplied with.
    #[must_use]
    pub fn fits(&self, format: Format) -> bool {
        matches!(self, Self::Quantized(_)) == format.is_quantized()
    }
}
