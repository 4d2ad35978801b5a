//! Borrowed matrices of any format, and the columns they are multiplied with.

use crate::{
    error::Error,
    format::{
        ActivationGroup, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K,
        BlockQ6K, BlockQ8_0, Format, f16_to_f32,
    },
};
use core::ops::Range;
use half::{bf16, f16};

/// The list of formats, each with its element and how one is read: nothing else tells their arms apart.
macro_rules! rows {
    ($($format:ident: $element:ty, $read:expr;)*) => {
        /// The elements of a matrix, row after row.
        #[derive(Clone, Copy, Debug)]
        pub enum Rows<'a> {
            $(#[doc = concat!("[`Format::", stringify!($format), "`]")] $format(&'a [$element]),)*
        }

        impl<'a> Rows<'a> {
            pub(crate) fn from_bytes(format: Format, bytes: &'a [u8]) -> Result<Self, bytemuck::PodCastError> {
                Ok(match format {
                    $(Format::$format => Self::$format(bytemuck::try_cast_slice(bytes)?),)*
                })
            }

            /// How the elements are stored.
            #[must_use]
            pub fn format(self) -> Format {
                match self {
                    $(Self::$format(_) => Format::$format,)*
                }
            }

            /// The elements as bytes.
            #[must_use]
            pub fn bytes(self) -> &'a [u8] {
                match self {
                    $(Self::$format(d) => bytemuck::cast_slice(d),)*
                }
            }

            pub(crate) fn blocks(self) -> usize {
                match self {
                    $(Self::$format(d) => d.len(),)*
                }
            }

            pub(crate) fn slice(self, blocks: Range<usize>) -> Self {
                match self {
                    $(Self::$format(d) => Self::$format(&d[blocks]),)*
                }
            }

            /// Calls `f` with the elements of each block of some rows of a matrix whose rows are `row_blocks` blocks long and begin
            /// every `stride` blocks: with the row's place in `rows`, its block's first element, and the block's elements.
            pub(crate) fn for_each_block(
                self,
                (stride, row_blocks): (usize, usize),
                rows: &mut dyn Iterator<Item = usize>,
                f: &mut dyn FnMut(usize, usize, &[f32]),
            ) {
                match self {
                    $(Self::$format(d) => each(d, (stride, row_blocks), rows, $read, f),)*
                }
            }

            /// Writes all elements as f32.
            ///
            /// # Panics
            /// `out` has another number of elements.
            pub fn dequantize(self, out: &mut [f32]) {
                let len = self.blocks() * self.format().block_len();
                assert_eq!(out.len(), len, "dequantize: out has the wrong length");
                match self {
                    $(Self::$format(d) => read(d, out, $read),)*
                }
            }
        }
    };
}

rows! {
    F32: f32, |v, [o]: &mut [f32; 1]| *o = *v;
    F16: f16, |v, [o]: &mut [f32; 1]| *o = f16_to_f32(v.to_bits());
    BF16: bf16, |v, [o]: &mut [f32; 1]| *o = v.to_f32();
    Q8_0: BlockQ8_0, BlockQ8_0::dequantize;
    Q6K: BlockQ6K, BlockQ6K::dequantize;
    Q5_1: BlockQ5_1, BlockQ5_1::dequantize;
    Q5_0: BlockQ5_0, BlockQ5_0::dequantize;
    Q5K: BlockQ5K, BlockQ5K::dequantize;
    Q4_1: BlockQ4_1, BlockQ4_1::dequantize;
    Q4_0: BlockQ4_0, BlockQ4_0::dequantize;
    Q4K: BlockQ4K, BlockQ4K::dequantize;
    Q3K: BlockQ3K, BlockQ3K::dequantize;
    Q2K: BlockQ2K, BlockQ2K::dequantize;
}

/// Apart for each format, as [`read`] is; `dyn`, because of every caller for every format it would be a tenth of a small
/// device's code.
#[inline(never)]
fn each<B, const N: usize>(
    blocks: &[B],
    (stride, row_blocks): (usize, usize),
    rows: &mut dyn Iterator<Item = usize>,
    dequantize: impl Fn(&B, &mut [f32; N]),
    f: &mut dyn FnMut(usize, usize, &[f32]),
) {
    let mut values = [0.0; N];
    for (i, r) in rows.enumerate() {
        for (k, block) in blocks[r * stride..r * stride + row_blocks].iter().enumerate() {
            dequantize(block, &mut values);
            f(i, k * N, &values);
        }
    }
}

/// A function for each format: all in one they need more stack than LLVM's code for Xtensa can reach.
#[inline(never)]
fn read<B, const N: usize>(blocks: &[B], out: &mut [f32], dequantize: impl Fn(&B, &mut [f32; N])) {
    out.as_chunks_mut().0.iter_mut().zip(blocks).for_each(|(o, b)| dequantize(b, o));
}

/// A matrix `[rows, cols]`; its rows follow one another, or are every n-th row of a larger one ([`Self::every`]).
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    rows: usize,
    cols: usize,
    stride: usize,
    data: Rows<'a>,
}

impl<'a> Matrix<'a> {
    /// A matrix over `data`.
    ///
    /// # Errors
    /// `cols` is no multiple of the block length, or `data` has not `rows · cols` elements.
    pub fn new(rows: usize, cols: usize, data: Rows<'a>) -> Result<Self, Error> {
        let block = data.format().block_len();
        let matrix = Self { rows, cols, stride: cols / block, data };
        if !cols.is_multiple_of(block) {
            return Err(Error::BlockMultiple { cols, block });
        }
        let expected = rows.checked_mul(cols / block).ok_or(Error::TooLarge("matrix"))?;
        if data.blocks() != expected {
            return Err(Error::Length { what: "matrix", expected, got: data.blocks() });
        }
        Ok(matrix)
    }

    /// A matrix of no rows and no columns.
    #[must_use]
    pub const fn empty() -> Self {
        Self { rows: 0, cols: 0, stride: 0, data: Rows::F32(&[]) }
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
        let data = Rows::from_bytes(format, bytes).map_err(bad)?;
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

    /// The elements: row `r` begins at block `r · stride`.
    #[must_use]
    pub fn data(&self) -> Rows<'a> {
        self.data
    }

    /// Blocks (elements of formats without blocks) from one row's begin to the next's.
    #[must_use]
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Blocks (elements of formats without blocks) of a row.
    #[must_use]
    pub fn row_blocks(&self) -> usize {
        self.cols / self.format().block_len()
    }

    /// How the elements are stored.
    #[must_use]
    pub fn format(&self) -> Format {
        self.data.format()
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
        let start = range.start * self.stride;
        let len = range.len().checked_sub(1).map_or(0, |before| before * self.stride + self.row_blocks());
        Self { rows: range.len(), data: self.data.slice(start..start + len), ..*self }
    }

    /// Rows `first`, `first + step`, … as a matrix of its own: one kind of row where several lie side by side.
    ///
    /// # Panics
    /// `step` is 0.
    #[must_use]
    pub fn every(&self, first: usize, step: usize) -> Self {
        let rows = self.rows.saturating_sub(first).div_ceil(step);
        let last = if rows == 0 { first } else { first + (rows - 1) * step + 1 };
        Self { rows, stride: self.stride * step, ..self.slice_rows(first.min(last)..last) }
    }

    /// Writes row `row` as f32 (an embedding look-up).
    ///
    /// # Panics
    /// `row` is not below [`Self::rows`], or `out` has not [`Self::cols`] elements.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        self.slice_rows(row..row + 1).data.dequantize(out);
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

impl<'a> Columns<'a> {
    /// Column `c` of several of `cols` elements.
    ///
    /// # Panics
    /// There is no such column.
    #[must_use]
    pub fn column(&self, c: usize, cols: usize) -> Self {
        match *self {
            Self::F32(x) => Self::F32(&x[c * cols..(c + 1) * cols]),
            Self::Quantized(x) => {
                let n = ActivationGroup::count(cols);
                Self::Quantized(&x[c * n..(c + 1) * n])
            }
        }
    }

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
