//! Products with the upper halves of a matrix, and rows made whole of both.

use crate::{
    format::{
        ActivationGroup, BLOCK_LEN, BlockQ8_0, BlockQ8_0Upper, GROUP_LEN, f16_to_f32,
        q8_0_halves::LowerHalves,
    },
    kernel::sparse_ffn::check_rows,
};
use bytemuck::{Pod, Zeroable};
use half::f16;

/// Blocks of a group.
pub const UPPER_BLOCKS: usize = GROUP_LEN / BLOCK_LEN;

/// The upper halves of a matrix `[rows, 128 · row_groups]`, row after row, four blocks together. Whole lines of nibbles, and
/// scales apart, are what vectors read fastest.
#[derive(Clone, Copy, Debug)]
pub struct Upper<'a> {
    /// Groups of a row.
    pub row_groups: usize,
    /// The nibbles of [`BlockQ8_0Upper::qs`] of four blocks.
    pub qs: &'a [[u8; 64]],
    /// Their scales.
    pub d: &'a [[f16; UPPER_BLOCKS]],
}

/// A matrix `[rows, 32 · row_blocks]` in `Q8_0`, in halves. Rows of the upper ones may be longer: what follows is no part of
/// the matrix.
#[derive(Clone, Copy, Debug)]
pub struct Halves<'a> {
    /// Upper halves.
    pub upper: Upper<'a>,
    /// Blocks of a row of lower halves.
    pub row_blocks: usize,
    /// Lower halves, row after row.
    pub lower: &'a [LowerHalves],
}

/// An [`ActivationGroup`] in the form that upper halves are multiplied with.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct UpperColumn {
    /// As in the group.
    pub qs: [[i8; 64]; 2],
    /// 16 times the scale of each lane's block.
    pub d: [f32; 16],
    /// What a nibble of 0 and the middle of the lower half make of each lane, `−(128 − 7.5) · d · Σ q`.
    pub centre: [f32; 16],
}

impl UpperColumn {
    /// All zero.
    pub const ZERO: Self = Self { qs: [[0; 64]; 2], d: [0.0; 16], centre: [0.0; 16] };
}

impl From<&ActivationGroup> for UpperColumn {
    fn from(x: &ActivationGroup) -> Self {
        let centre = core::array::from_fn(|l| 120.5 * x.d[l] * x.neg_sums[l] as f32);
        Self { qs: x.qs, d: x.d.map(|d| 16.0 * d), centre }
    }
}

impl<'a> Upper<'a> {
    /// Block `i` of a row.
    ///
    /// # Panics
    /// There is no such block.
    #[inline(always)]
    #[must_use]
    pub fn block(&self, row: usize, i: usize) -> BlockQ8_0Upper {
        let group = row * self.row_groups + i / UPPER_BLOCKS;
        let (qs, d) = (&self.qs[group].as_chunks().0, &self.d[group]);
        BlockQ8_0Upper { d: d[i % UPPER_BLOCKS], qs: qs[i % UPPER_BLOCKS] }
    }

    /// The rows of a range.
    ///
    /// # Panics
    /// The range ends past the last row.
    #[must_use]
    pub fn slice_rows(&self, rows: core::ops::Range<usize>) -> Self {
        let groups = rows.start * self.row_groups..rows.end * self.row_groups;
        Self { qs: &self.qs[groups.clone()], d: &self.d[groups], ..*self }
    }
}

/// Panics unless the operands of [`matvec_upper`] fit together; every implementation calls it once at its head.
///
/// # Panics
/// As said.
pub fn check_matvec_upper(w: &Upper<'_>, x: &[UpperColumn], y: &[f32]) {
    assert!(w.row_groups > 0, "matvec_upper: rows are empty");
    assert_eq!(w.qs.len(), w.d.len(), "matvec_upper: as many scales as nibbles");
    assert_eq!(w.qs.len(), y.len() * w.row_groups, "matvec_upper: as many results as rows");
    assert_eq!(x.len(), w.row_groups, "matvec_upper: takes one column");
}

/// Panics unless the operands of [`join_rows`] fit together; every implementation calls it once at its head.
///
/// # Panics
/// As said.
pub fn check_join_rows(w: &Halves<'_>, rows: &[u32], out: &[BlockQ8_0]) {
    let count = w.lower.len() / w.row_blocks.max(1);
    let fits = w.row_blocks > 0 && w.upper.row_groups * UPPER_BLOCKS >= w.row_blocks;
    assert!(fits, "join_rows: upper rows are too short");
    let groups = count * w.upper.row_groups;
    assert_eq!([w.upper.qs.len(), w.upper.d.len()], [groups; 2], "join_rows: halves differ in rows");
    assert_eq!(out.len(), rows.len() * w.row_blocks, "join_rows: out is not [rows, row_blocks]");
    check_rows(rows, count, rows.len());
}

/// `y[r] = Σ_k upper[r, k] · x[k]`; see [`crate::KernelSet::matvec_upper`].
///
/// # Panics
/// Shapes do not fit ([`check_matvec_upper`]).
pub fn matvec_upper(w: Upper<'_>, x: &[UpperColumn], y: &mut [f32]) {
    check_matvec_upper(&w, x, y);
    for (r, y) in y.iter_mut().enumerate() {
        *y = 0.0;
        for i in 0..w.row_groups * UPPER_BLOCKS {
            let (block, x, b) = (w.block(r, i), &x[i / UPPER_BLOCKS], i % UPPER_BLOCKS);
            let halves = x.qs[0][16 * b..16 * b + 16].iter().zip(&x.qs[1][16 * b..16 * b + 16]);
            let products = block.qs.iter().zip(halves).map(|(u, (low, high))| {
                i32::from(u & 0x0f) * i32::from(*low) + i32::from(u >> 4) * i32::from(*high)
            });
            let centre: f32 = x.centre[4 * b..4 * b + 4].iter().sum();
            *y += f16_to_f32(block.d.to_bits()) * (x.d[4 * b] * products.sum::<i32>() as f32 + centre);
        }
    }
}

/// Row `i` of `out` is row `rows[i]`; see [`crate::KernelSet::join_rows`].
///
/// # Panics
/// Shapes do not fit ([`check_join_rows`]).
pub fn join_rows(w: Halves<'_>, rows: &[u32], out: &mut [BlockQ8_0]) {
    check_join_rows(&w, rows, out);
    for (&r, out) in rows.iter().zip(out.chunks_exact_mut(w.row_blocks)) {
        let lower = &w.lower[r as usize * w.row_blocks..];
        for (i, (out, lower)) in out.iter_mut().zip(lower).enumerate() {
            *out = w.upper.block(r as usize, i).join(lower);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        // Two rows of a group, of whose blocks only the last is not zero; in the second row it is 3 · (16 + 7.5) everywhere.
        let nibbles = |u: u8| [u | u << 4; 64];
        let scales = |d: f32| [f16::ZERO, f16::ZERO, f16::ZERO, f16::from_f32(d)];
        let (qs, d) = ([nibbles(8), nibbles(9)], [scales(1.0), scales(3.0)]);
        let mut x = [0.0; BLOCK_LEN];
        (x[0], x[31]) = (127.0, -25.0);
        // A lone block comes last in its group.
        let column = [UpperColumn::from(&ActivationGroup::quantize(&[x]))];
        let (upper, mut y) = (Upper { row_groups: 1, qs: &qs, d: &d }, [0.0; 2]);
        matvec_upper(upper, &column, &mut y);
        assert_eq!(y, [102.0 * 7.5, 102.0 * 3.0 * 23.5]);
        let lower = [[0x21; 16]; 8];
        let mut out = [BlockQ8_0 { d: f16::ZERO, qs: [0; 32] }; 4];
        join_rows(Halves { upper, row_blocks: 4, lower: &lower }, &[1], &mut out);
        assert_eq!((out[3].qs[0], out[3].qs[31], out[3].d.to_f32()), (16 + 1, 16 + 2, 3.0));
    }
}
