//! `Q2_K`: 256 numbers of two bits, a scale and a minimum of four bits per 16.

use super::{SUPER_BLOCK_LEN, planes, super_block::Groups};
use bytemuck::{Pod, Zeroable};
use half::f16;

const GROUPS: usize = SUPER_BLOCK_LEN / 16;

/// 256 elements `d · scale · q − dmin · min`, `q` in 0..=3; element `128h + 32k + j` is in bits `2k` of `qs[32h + j]`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ2K {
    /// Per 16 elements: scale in the low nibble, minimum in the high one.
    pub scales: [u8; GROUPS],
    /// Quants.
    pub qs: [u8; SUPER_BLOCK_LEN / 4],
    /// Scale of the scales.
    pub d: f16,
    /// Scale of the minima.
    pub dmin: f16,
}

const _: () = assert!(size_of::<BlockQ2K>() == 84);

impl BlockQ2K {
    /// A least-squares grid per 16 elements (`quantize_row_q2_K` of candle).
    #[must_use]
    pub fn quantize(x: &[f32; SUPER_BLOCK_LEN]) -> Self {
        let g = Groups::<GROUPS>::fit(x, 3, 15);
        let mut qs = [0; SUPER_BLOCK_LEN / 4];
        planes::pack::<2, 32>(&g.quants(x, 3), &mut qs);
        let scales = core::array::from_fn(|j| g.scales[j] | (g.mins[j] << 4));
        Self { scales, qs, d: g.d, dmin: g.dmin }
    }

    /// The quants in element order, 0..=3.
    #[inline]
    #[must_use]
    pub fn unpack(&self) -> [u8; SUPER_BLOCK_LEN] {
        let mut out = [0; SUPER_BLOCK_LEN];
        planes::unpack::<2, 32>(&self.qs, 0, &mut out);
        out
    }

    /// Writes the 256 elements.
    pub fn dequantize(&self, out: &mut [f32; SUPER_BLOCK_LEN]) {
        let (scales, mins) = (self.scales.map(|s| s & 0x0f), self.scales.map(|s| s >> 4));
        Groups { d: self.d, dmin: self.dmin, scales, mins }.values(&self.unpack(), out);
    }
}
