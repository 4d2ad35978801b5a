//! `Q4_1`: 32 nibbles with a scale and a minimum.

use super::{BLOCK_LEN, f16_to_f32, planes, poison, search};
use bytemuck::{Pod, Zeroable};
use half::f16;

/// 32 elements `d · q + m`, `q` in 0..=15; the low nibble of byte `j` is element `j`, the high one element `j + 16`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ4_1 {
    /// Scale.
    pub d: f16,
    /// Minimum.
    pub m: f16,
    /// Quants.
    pub qs: [u8; BLOCK_LEN / 2],
}

const _: () = assert!(size_of::<BlockQ4_1>() == 20);

impl BlockQ4_1 {
    /// 16 equidistant numbers from the least to the largest element (`quantize_row_q4_1_ref` of ggml).
    #[must_use]
    pub fn quantize(x: &[f32; BLOCK_LEN]) -> Self {
        let (d, m, q) = search::between(x, 15);
        let mut qs = [0; BLOCK_LEN / 2];
        planes::pack::<4, 16>(&q, &mut qs);
        Self { d: f16::from_f32(d + poison(x)), m: f16::from_f32(m), qs }
    }

    /// The quants in element order, 0..=15.
    #[inline]
    #[must_use]
    pub fn unpack(&self) -> [u8; BLOCK_LEN] {
        let mut out = [0; BLOCK_LEN];
        planes::unpack::<4, 16>(&self.qs, 0, &mut out);
        out
    }

    /// Writes the 32 elements.
    pub fn dequantize(&self, out: &mut [f32; BLOCK_LEN]) {
        let (d, m) = (f16_to_f32(self.d.to_bits()), f16_to_f32(self.m.to_bits()));
        for (o, q) in out.iter_mut().zip(self.unpack()) {
            *o = d * f32::from(q) + m;
        }
    }
}
