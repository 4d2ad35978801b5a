//! `Q5_1`: 32 numbers of five bits with a scale and a minimum.

use super::{BLOCK_LEN, f16_to_f32, poison, q5_0, search};
use bytemuck::{Pod, Zeroable};
use half::f16;

/// 32 elements `d · q + m`, `q` in 0..=31; bits as in `Q5_0`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ5_1 {
    /// Scale.
    pub d: f16,
    /// Minimum.
    pub m: f16,
    /// Fifth bits.
    pub qh: [u8; BLOCK_LEN / 8],
    /// Lower four bits.
    pub qs: [u8; BLOCK_LEN / 2],
}

const _: () = assert!(size_of::<BlockQ5_1>() == 24);

impl BlockQ5_1 {
    /// 32 equidistant numbers from the least to the largest element (`quantize_row_q5_1_ref` of ggml).
    #[must_use]
    pub fn quantize(x: &[f32; BLOCK_LEN]) -> Self {
        let (d, m, q) = search::between(x, 31);
        let (qh, qs) = q5_0::pack(&q);
        Self { d: f16::from_f32(d + poison(x)), m: f16::from_f32(m), qh, qs }
    }

    /// The quants in element order, 0..=31.
    #[inline]
    #[must_use]
    pub fn unpack(&self) -> [u8; BLOCK_LEN] {
        q5_0::unpack(&self.qh, &self.qs)
    }

    /// Writes the 32 elements.
    pub fn dequantize(&self, out: &mut [f32; BLOCK_LEN]) {
        let (d, m) = (f16_to_f32(self.d.to_bits()), f16_to_f32(self.m.to_bits()));
        for (o, q) in out.iter_mut().zip(self.unpack()) {
            *o = d * f32::from(q) + m;
        }
    }
}
