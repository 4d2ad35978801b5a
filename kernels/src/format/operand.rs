//! Products of a format with columns.

use super::RowsOf;
use crate::isa::Isa;
use candle_sparse_core::Columns;

/// An element type of a matrix and what it is multiplied with.
pub(crate) trait Operand: Copy {
    /// Element type of a column.
    type Column: Copy;

    /// Columns in the form that this format is multiplied with.
    fn columns(x: Columns<'_>) -> &[Self::Column];
    /// One row times one column; asks for a row to come meanwhile.
    fn dot<I: Isa>(isa: I, row: &[Self], x: &[Self::Column], ahead: &[Self]) -> f32;
    /// All rows times several columns, with the bits of [`Self::dot`].
    fn matmul<I: Isa>(isa: I, rows: RowsOf<'_, Self>, x: &[Self::Column], y: &mut [&mut [f32]]);
}
