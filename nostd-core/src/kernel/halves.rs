//! Products with the upper halves of a matrix, and rows made whole of both.

use crate::{
    format::{ActivationGroup, BLOCK_LEN, BlockQ8_0, BlockQ8_0Upper, f16_to_f32, q8_0_halves::LowerHalves},
    kernel::sparse_ffn::check_rows,
};

/// The upper halves of a matrix `[rows, 32 · row_blocks]`, row after row.
#[derive(Clone, Copy, Debug)]
pub struct Upper<'a> {
    /// Blocks of a row.
    pub row_blocks: usize,
    /// Blocks of all rows.
    pub blocks: &'a [BlockQ8_0Upper],
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

/// Panics unless the operands of [`matvec_upper`] fit together; every implementation calls it once at its head.
///
/// # Panics
/// As said.
pub fn check_matvec_upper(w: &Upper<'_>, x: &[ActivationGroup], y: &[f32]) {
    assert!(w.row_blocks > 0, "matvec_upper: rows are empty");
    assert_eq!(w.blocks.len(), y.len() * w.row_blocks, "matvec_upper: as many results as rows");
    assert_eq!(x.len(), ActivationGroup::count(w.row_blocks * BLOCK_LEN), "matvec_upper: takes one column");
}

/// Panics unless the operands of [`join_rows`] fit together; every implementation calls it once at its head.
///
/// # Panics
/// As said.
pub fn check_join_rows(w: &Halves<'_>, rows: &[u32], out: &[BlockQ8_0]) {
    let count = w.lower.len() / w.row_blocks.max(1);
    assert!(w.row_blocks > 0 && w.upper.row_blocks >= w.row_blocks, "join_rows: upper rows are too short");
    assert_eq!(w.upper.blocks.len(), count * w.upper.row_blocks, "join_rows: halves differ in rows");
    assert_eq!(out.len(), rows.len() * w.row_blocks, "join_rows: out is not [rows, row_blocks]");
    check_rows(rows, count, rows.len());
}

/// `y[r] = Σ_k upper[r, k] · x[k]`; see [`crate::KernelSet::matvec_upper`].
///
/// # Panics
/// Shapes do not fit ([`check_matvec_upper`]).
pub fn matvec_upper(w: Upper<'_>, x: &[ActivationGroup], y: &mut [f32]) {
    check_matvec_upper(&w, x, y);
    for (row, y) in w.blocks.chunks_exact(w.row_blocks).zip(y) {
        *y = 0.0;
        for (i, w) in row.iter().enumerate() {
            let (group, b) = ActivationGroup::place(i, row.len());
            let (d, sum, qs) = x[group].block(b);
            let nibbles = w.qs.iter().map(|q| q & 0x0f).chain(w.qs.iter().map(|q| q >> 4));
            let product: i32 = nibbles.zip(qs).map(|(u, q)| i32::from(u) * i32::from(q)).sum();
            // Twice 16 · (u − 8) + 7.5, in integers.
            *y += f16_to_f32(w.d.to_bits()) * d * 0.5 * (32 * product - 241 * sum) as f32;
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
        let upper = &w.upper.blocks[r as usize * w.upper.row_blocks..];
        let lower = &w.lower[r as usize * w.row_blocks..];
        for ((out, upper), lower) in out.iter_mut().zip(upper).zip(lower) {
            *out = upper.join(lower);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;

    #[test]
    fn by_hand() {
        // Two rows of one block, in which the second is 3 · (16 + 7.5) in each element.
        let block = |u: u8, d: f32| BlockQ8_0Upper { d: f16::from_f32(d), qs: [u | u << 4; 16] };
        let blocks = [block(8, 1.0), block(9, 3.0)];
        let mut x = [0.0; BLOCK_LEN];
        (x[0], x[31]) = (127.0, -25.0);
        let groups = [ActivationGroup::quantize(&[x])];
        let mut y = [0.0; 2];
        matvec_upper(Upper { row_blocks: 1, blocks: &blocks }, &groups, &mut y);
        assert_eq!(y, [102.0 * 7.5, 102.0 * 3.0 * 23.5]);
        let halves = Halves {
            upper: Upper { row_blocks: 1, blocks: &blocks },
            row_blocks: 1,
            lower: &[[0x21; 16]; 2],
        };
        let mut out = [BlockQ8_0 { d: f16::ZERO, qs: [0; 32] }; 1];
        join_rows(halves, &[1], &mut out);
        assert_eq!((out[0].qs[0], out[0].qs[31], out[0].d.to_f32()), (16 + 1, 16 + 2, 3.0));
    }
}
