//! Products of a format with columns.

use crate::isa::Isa;
use candle_sparse_core::Columns;

/// An element type of a matrix and what it is multiplied with.
pub(crate) trait Operand: Copy {
    /// 32 elements, four blocks, or a super-block.
    type Unit: Copy;
    /// Element type of a column.
    type Column: Copy;
    /// As many elements of a column.
    type ColumnUnit: Copy;

    /// Columns in the form that this format is multiplied with.
    fn columns(x: Columns<'_>) -> &[Self::Column];
    fn units(row: &[Self]) -> &[Self::Unit];
    /// At least as many units as a row has.
    fn column_units(x: &[Self::Column]) -> &[Self::ColumnUnit];
    /// What follows the whole units of a row, as a unit.
    fn last<'a>(row: &'a [Self], room: &'a mut Option<Self::Unit>) -> Option<&'a Self::Unit>;
    /// What faces [`Self::last`].
    fn last_of_column<'a>(
        x: &'a [Self::Column],
        room: &'a mut Option<Self::ColumnUnit>,
    ) -> &'a Self::ColumnUnit;
    /// `acc[r][c] += w[r] · x[c]`, vector by vector.
    fn add<I: Isa, const R: usize, const C: usize>(
        isa: I,
        acc: &mut [[I::V; C]; R],
        w: [&Self::Unit; R],
        x: [&Self::ColumnUnit; C],
    );
}
