//! What each weight format is to the kernels: its products, and its elements as f32.
//!
//! A format is a type, its methods generic over [`Isa`]. Sums of rows read its units as vectors of f32 where it has such
//! ([`units`]), else they go through its elements, which are written to memory first.

#[macro_use]
pub(crate) mod elements;
#[macro_use]
mod products;
mod blocks;
mod few;
#[macro_use]
mod words;
#[macro_use]
mod floats;
pub(crate) mod operand;
pub(crate) mod packed;
mod paired;
mod panel;
mod super_blocks;
mod tile;
pub(crate) mod units;

use crate::{
    arch::Token,
    isa::{Isa, Kernel},
    kernel::{
        axpy_rows::{self, Together},
        matmul_t::{self, MatmulT},
    },
};
use candle_sparse_core::{BLOCK_LEN, Format, Matrix, Rows};
use operand::Operand;
use packed::{MatmulPacked, PackColumns, Pays, packed_len};
use paired::{Paired, Rounded};
use words::Factors;

/// An element type of a matrix: a number or a block.
pub(crate) trait Element: Operand {
    /// Writes as many units of a row as `out` holds, from unit `first` on, both whole blocks.
    fn write<I: Isa>(isa: I, row: &[Self], first: usize, out: &mut [[f32; BLOCK_LEN]]);

    /// `y += Σ_i a[i] · rows[i]`, in order.
    #[inline(always)]
    fn add_rows<I: Isa>(isa: I, rows: Together<'_, Self>, y: &mut [f32]) {
        axpy_rows::by_elements(isa, rows, y);
    }

    /// `y[c] += Σ_r a[c][r] · row[r]`; there is a row and a result.
    #[inline(always)]
    fn sum_rows<I: Isa>(isa: I, rows: RowsOf<'_, Self>, sums: MatmulT<'_, '_>) {
        matmul_t::by_elements(isa, rows, sums);
    }
}

/// The rows of a matrix of one format.
#[derive(Clone, Copy)]
pub(crate) struct RowsOf<'a, T> {
    elements: &'a [T],
    len: usize,
    stride: usize,
}

impl<'a, T: Copy> RowsOf<'a, T> {
    /// The rows of `w`, whose elements are these.
    #[inline(always)]
    fn new(w: Matrix<'a>, elements: &'a [T]) -> Self {
        Self { elements, len: w.row_blocks(), stride: w.stride() }
    }

    #[inline(always)]
    pub(crate) fn row(self, r: usize) -> &'a [T] {
        &self.elements[r * self.stride..r * self.stride + self.len]
    }

    /// All rows, in order.
    #[inline(always)]
    pub(crate) fn in_order(self) -> impl Iterator<Item = &'a [T]> {
        self.elements.chunks(self.stride).map(move |row| &row[..self.len])
    }

    #[inline(always)]
    pub(crate) fn is_empty(&self) -> bool {
        self.elements.is_empty()
    }

    #[inline(always)]
    pub(crate) fn elements(self) -> &'a [T] {
        self.elements
    }

    #[inline(always)]
    pub(crate) fn stride(self) -> usize {
        self.stride
    }

    #[inline(always)]
    pub(crate) fn row_bytes(self) -> usize {
        self.len * size_of::<T>()
    }

    /// The row to ask for while row `r` of `count` is read in order. Hardware that prefetches by itself gives an Intel core
    /// three quarters of what it could read (`benches/record/2026-11-29-xeon.md`).
    #[inline(always)]
    pub(crate) fn row_ahead(self, r: usize, count: usize) -> &'a [T] {
        self.row((r + self.ahead()).min(count - 1))
    }

    /// How many rows before its use a row is to be asked for.
    #[inline(always)]
    pub(crate) fn ahead(self) -> usize {
        // Between what was too little for rows of Q4_0 (2 KiB) and too much for rows of F16 (16 KiB) on Zen 5.
        const BYTES: usize = 6 * 1024;
        BYTES.div_ceil(self.row_bytes().max(1))
    }
}

/// A kernel body over rows of any format.
pub(crate) trait RowsKernel {
    fn run<I: Isa, T: Element>(self, isa: I, rows: RowsOf<'_, T>);
}

/// A body and its rows.
struct Of<'a, T, K> {
    rows: RowsOf<'a, T>,
    kernel: K,
}

impl<T: Element, K: RowsKernel> Kernel for Of<'_, T, K> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        self.kernel.run(isa, self.rows);
    }
}

impl Token {
    /// Runs a body with the instruction set, in a function for the format of `w`.
    pub(crate) fn run_rows<K: RowsKernel>(self, w: Matrix<'_>, kernel: K) {
        let kernel = match w.data() {
            Rows::BF16(elements) => {
                let rows = RowsOf::new(w, elements);
                match self.run_pairs(Of { rows: rows.paired(), kernel }) {
                    Ok(()) => return,
                    Err(Of { kernel, .. }) => kernel,
                }
            }
            _ => kernel,
        };
        macro_rules! by_format {
            ($($format:ident)*) => {
                match w.data() {
                    $(Rows::$format(elements) => {
                        let rows = RowsOf::new(w, elements);
                        self.run(Of { rows, kernel });
                    })*
                }
            };
        }
        by_format!(F32 F16 BF16 Q8_0 Q6K Q5_1 Q5_0 Q5K Q4_1 Q4_0 Q4K Q3K Q2K);
    }

    /// Words of [`packed::TOGETHER`] of so many columns for matrices of a format, where it pays to pack them.
    pub(crate) fn packed_len(self, format: Format, columns: usize, elements: usize) -> Option<usize> {
        let len = match format {
            Format::BF16 if self.multiplies_pairs() => packed_len::<Rounded>(elements),
            Format::F32 | Format::F16 | Format::BF16 => packed_len::<f32>(elements),
            _ => return None,
        };
        self.run(Pays { columns, elements }).then_some(len)
    }

    /// Packs columns for matrices of a format of floats.
    pub(crate) fn pack(self, format: Format, elements: usize, x: &[f32], out: &mut [f32]) {
        let out = match format {
            Format::BF16 => match self.run_pairs(PackColumns { x: Paired::column(x), elements, out }) {
                Ok(()) => return,
                Err(PackColumns { out, .. }) => out,
            },
            _ => out,
        };
        self.run(PackColumns { x, elements, out });
    }

    /// Rows of floats times columns that are packed for them.
    pub(crate) fn matmul_packed(self, w: Matrix<'_>, x: &[f32], y: &mut [&mut [f32]]) {
        match w.data() {
            Rows::F32(elements) => self.run(MatmulPacked { rows: RowsOf::new(w, elements), x, y }),
            Rows::F16(elements) => self.run(MatmulPacked { rows: RowsOf::new(w, elements), x, y }),
            Rows::BF16(elements) => {
                let rows = RowsOf::new(w, elements);
                if let Err(MatmulPacked { x, y, .. }) =
                    self.run_pairs(MatmulPacked { rows: rows.paired(), x, y })
                {
                    self.run(MatmulPacked { rows, x, y });
                }
            }
            _ => unreachable!("columns are packed for floats alone"),
        }
    }
}
