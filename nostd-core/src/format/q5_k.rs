//! `Q5_K`: 256 numbers of five bits, a scale and a minimum of six bits per 32.

use super::{
    SUPER_BLOCK_LEN, planes,
    super_block::{Groups, pack_scales, unpack_scales},
};
use bytemuck::{Pod, Zeroable};
use half::f16;

/// 256 elements `d · scale · q − dmin · min`, `q` in 0..=31; nibbles as in `Q4_K`, the fifth bit of element `32k + j` is
/// bit `k` of `qh[j]`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ5K {
    /// Scale of the scales.
    pub d: f16,
    /// Scale of the minima.
    pub dmin: f16,
    /// Scales and minima, see [`Self::unpack_scales`].
    pub scales: [u8; 12],
    /// Fifth bits.
    pub qh: [u8; SUPER_BLOCK_LEN / 8],
    /// Lower four bits.
    pub qs: [u8; SUPER_BLOCK_LEN / 2],
}

const _: () = assert!(size_of::<BlockQ5K>() == 176);

impl BlockQ5K {
    /// A least-squares grid per 32 elements (`quantize_row_q5_K` of candle).
    #[must_use]
    pub fn quantize(x: &[f32; SUPER_BLOCK_LEN]) -> Self {
        let g = Groups::fit(x, 31, 63);
        let q = g.quants(x, 31);
        let (mut qh, mut qs) = ([0; SUPER_BLOCK_LEN / 8], [0; SUPER_BLOCK_LEN / 2]);
        planes::pack::<1, 32>(&q.map(|q| q >> 4), &mut qh);
        planes::pack::<4, 32>(&q, &mut qs);
        Self { d: g.d, dmin: g.dmin, scales: pack_scales(&g.scales, &g.mins), qh, qs }
    }

    /// Scales and minima per 32 elements, 0..=63.
    #[inline]
    #[must_use]
    pub fn unpack_scales(&self) -> ([u8; 8], [u8; 8]) {
        unpack_scales(&self.scales)
    }

    /// The quants in element order, 0..=31.
    #[inline]
    #[must_use]
    pub fn unpack(&self) -> [u8; SUPER_BLOCK_LEN] {
        let mut out = [0; SUPER_BLOCK_LEN];
        planes::unpack::<1, 32>(&self.qh, 4, &mut out);
        planes::unpack::<4, 32>(&self.qs, 0, &mut out);
        out
    }

    /// Writes the 256 elements.
    pub fn dequantize(&self, out: &mut [f32; SUPER_BLOCK_LEN]) {
        let (scales, mins) = self.unpack_scales();
        Groups { d: self.d, dmin: self.dmin, scales, mins }.values(&self.unpack(), out);
    }
}
