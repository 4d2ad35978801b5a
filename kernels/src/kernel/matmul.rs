//! Rows of a matrix times one column, or several.
//!
//! One column is bound by memory: rows are read strictly one after the other, because interleaved streams lose the hardware
//! prefetcher (quantised rows fell to a third of the bandwidth), and rows to come are asked for meanwhile. Several columns
//! share what is read and unpacked (`format/panel.rs`; floats `format/tile.rs`, `format/packed.rs`). A value does not depend on which rows and columns
//! are computed together, nor on how many: sparse and dense, and batches of every width, give the same bits.
//!
//! In the assembly of an inner loop (those with `vpdpbusd`, `vpmaddubsw`, `sdot`) there must be no `call` and no branch to a
//! panic: of the parts that are computed from constants nothing but loads, one shift and one mask per 64 bytes of fields may
//! be left. LLVM may stop inlining `array::map` and `from_fn`, and with them whatever intrinsics their closures hold: bodies
//! and `arch/` use loops, literals and `#[inline(always)]` functions instead.

use crate::{
    arch::prefetch,
    format::{Element, RowsKernel, RowsOf},
    isa::Isa,
};
use candle_sparse_core::Columns;

/// [`candle_sparse_core::KernelSet::matmul`] with one column.
pub(crate) struct Matvec<'a> {
    pub(crate) x: Columns<'a>,
    pub(crate) y: &'a mut [f32],
}

impl RowsKernel for Matvec<'_> {
    #[inline(always)]
    fn run<I: Isa, T: Element>(self, isa: I, rows: RowsOf<'_, T>) {
        if self.y.is_empty() {
            return;
        }
        let (x, count) = (T::columns(self.x), self.y.len());
        for (r, (y, row)) in self.y.iter_mut().zip(rows.in_order()).enumerate() {
            *y = T::dot(isa, row, x, rows.row_ahead(r, count));
        }
    }
}

/// [`candle_sparse_core::KernelSet::matmul`] with several columns.
pub(crate) struct Matmul<'a, 'y> {
    pub(crate) x: Columns<'a>,
    pub(crate) y: &'a mut [&'y mut [f32]],
}

impl RowsKernel for Matmul<'_, '_> {
    #[inline(always)]
    fn run<I: Isa, T: Element>(self, isa: I, rows: RowsOf<'_, T>) {
        if self.y.first().is_some_and(|y| !y.is_empty()) {
            T::matmul(isa, rows, T::columns(self.x), self.y);
        }
    }
}

/// Asks for some bytes of a row from `start` on.
#[inline(always)]
pub(crate) fn ask<T>(row: &[T], start: usize, bytes: usize) {
    for line in 0..bytes.div_ceil(64) {
        prefetch(row, start + 64 * line);
    }
}
