//! `Q4_K`: 256 nibbles, a scale and a minimum of six bits per 32.

use super::{
    SUPER_BLOCK_LEN, planes,
    super_block::{Groups, pack_scales, unpack_scales},
};
use bytemuck::{Pod, Zeroable};
use half::f16;

/// 256 elements `d · scale · q − dmin · min`, `q` in 0..=15; of each 64 elements, byte `j` of 32 holds element `j` in its
/// low nibble and element `j + 32` in its high one.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ4K {
    /// Scale of the scales.
    pub d: f16,
    /// Scale of the minima.
    pub dmin: f16,
    /// Scales and minima, see [`Self::unpack_scales`].
    pub scales: [u8; 12],
    /// Quants.
    pub qs: [u8; SUPER_BLOCK_LEN / 2],
}

const _: () = assert!(size_of::<BlockQ4K>() == 144);

impl BlockQ4K {
    /// A least-squares grid per 32 elements (`quantize_row_q4_K` of candle).
    #[must_use]
    pub fn quantize(x: &[f32; SUPER_BLOCK_LEN]) -> Self {
        let g = Groups::fit(x, 15, 63);
        let mut qs = [0; SUPER_BLOCK_LEN / 2];
        planes::pack::<4, 32>(&g.quants(x, 15), &mut qs);
        Self { d: g.d, dmin: g.dmin, scales: pack_scales(&g.scales, &g.mins), qs }
    }

    /// Scales and minima per 32 elements, 0..=63.
    #[inline]
    #[must_use]
    pub fn unpack_scales(&self) -> ([u8; 8], [u8; 8]) {
        unpack_scales(&self.scales)
    }

    /// The quants in element order, 0..=15.
    #[inline]
    #[must_use]
    pub fn unpack(&self) -> [u8; SUPER_BLOCK_LEN] {
        let mut out = [0; SUPER_BLOCK_LEN];
        planes::unpack::<4, 32>(&self.qs, 0, &mut out);
        out
    }

    /// Writes the 256 elements.
    pub fn dequantize(&self, out: &mut [f32; SUPER_BLOCK_LEN]) {
        let (scales, mins) = self.unpack_scales();
        Groups { d: self.d, dmin: self.dmin, scales, mins }.values(&self.unpack(), out);
    }
}
