//! Activations rounded to bytes, the other operand of every integer product.

use super::{BLOCK_LEN, poison};
use bytemuck::{Pod, Zeroable};

/// Elements in an [`ActivationGroup`].
pub const GROUP_LEN: usize = 128;
/// Blocks in an [`ActivationGroup`].
const BLOCKS: usize = GROUP_LEN / BLOCK_LEN;

/// Four blocks of 32 activations `d · q`, `q` in −127..=127, laid out for vectors of every width.
///
/// Bytes `16·b..16·b + 16` of a half belong to block `b`. Formats that keep two elements in a byte hold just these two halves, and
/// one vector of 64 bytes serves four blocks.
/// Where a column ends inside a group, the group holds its last blocks behind blocks of zeros: a kernel may then pair it
/// with the last four blocks of a row, some of them a second time, and needs no copy of the rest.
/// Lives only between two operations, so scales keep f32 precision.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct ActivationGroup {
    /// Quants: elements 0..16 of the four blocks, then elements 16..32 of the four.
    pub qs: [[i8; 64]; 2],
    /// Scale of each block.
    pub d: [f32; BLOCKS],
    /// `−Σ q` of each block, then of its first half and of its second half, which formats with an offset need.
    pub neg_sums: [[i32; BLOCKS]; 3],
}

const _: () = assert!(size_of::<ActivationGroup>() == 192);

impl ActivationGroup {
    /// All zero.
    pub const ZERO: Self = Self { qs: [[0; 64]; 2], d: [0.0; BLOCKS], neg_sums: [[0; BLOCKS]; 3] };

    /// How many groups `cols` elements take.
    #[must_use]
    pub const fn count(cols: usize) -> usize {
        cols.div_ceil(GROUP_LEN)
    }

    /// Rounds up to four blocks, each to the nearest multiple of its `d = max|x| / 127`, halves to even (the rounding SIMD
    /// units have); fewer blocks come last, behind zeros.
    ///
    /// A NaN or an infinity in a block makes every product with it NaN, so that it is seen and not rounded away.
    #[must_use]
    pub fn quantize(blocks: &[[f32; BLOCK_LEN]]) -> Self {
        let mut group = Self::ZERO;
        let blocks = &blocks[..blocks.len().min(BLOCKS)];
        for (b, x) in (BLOCKS - blocks.len()..).zip(blocks) {
            let bad = poison(x);
            let d = x.iter().fold(0.0_f32, |m, v| v.abs().max(m)) / 127.0 + bad;
            // 1/d of a subnormal d is infinite; such a block is zero beside any other number of the row.
            let id = if d >= f32::MIN_POSITIVE { 1.0 / d } else { 0.0 };
            group.set_block(b, d, &x.map(|v| libm::rintf(v * id) as i8));
        }
        group
    }

    /// Where block `i` of a column of `n` blocks stands: its group, and its place there.
    #[inline]
    #[must_use]
    pub const fn place(i: usize, n: usize) -> (usize, usize) {
        let group = i / BLOCKS;
        let missing = if group == n / BLOCKS { BLOCKS - n % BLOCKS } else { 0 };
        (group, i % BLOCKS + missing)
    }

    /// Stores scale, quants (in element order) and their sums of block `b`.
    ///
    /// # Panics
    /// `b` is not below 4.
    #[inline]
    pub fn set_block(&mut self, b: usize, d: f32, qs: &[i8; BLOCK_LEN]) {
        self.d[b] = d;
        for (half, qs) in qs.as_chunks::<{ BLOCK_LEN / 2 }>().0.iter().enumerate() {
            self.qs[half][16 * b..16 * b + 16].copy_from_slice(qs);
            self.neg_sums[1 + half][b] = -qs.iter().map(|&q| i32::from(q)).sum::<i32>();
        }
        self.neg_sums[0][b] = self.neg_sums[1][b] + self.neg_sums[2][b];
    }

    /// Scale, `Σ q` and quants in element order of block `b`.
    ///
    /// # Panics
    /// `b` is not below 4.
    #[inline]
    #[must_use]
    pub fn block(&self, b: usize) -> (f32, i32, [i8; BLOCK_LEN]) {
        let mut qs = [0; BLOCK_LEN];
        qs[..BLOCK_LEN / 2].copy_from_slice(&self.qs[0][16 * b..16 * b + 16]);
        qs[BLOCK_LEN / 2..].copy_from_slice(&self.qs[1][16 * b..16 * b + 16]);
        (self.d[b], -self.neg_sums[0][b], qs)
    }
}
