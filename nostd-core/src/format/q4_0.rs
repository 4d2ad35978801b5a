//! `Q4_0`: 32 nibbles with one scale.

use super::{BLOCK_LEN, f16_to_f32, poison, search};
use bytemuck::{Pod, Zeroable};
use half::f16;

/// 32 elements `d · (q − 8)`, `q` in 0..=15; the low nibble of byte `j` is element `j`, the high one element `j + 16`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ4_0 {
    /// Scale.
    pub d: f16,
    /// Quants.
    pub qs: [u8; BLOCK_LEN / 2],
}

const _: () = assert!(size_of::<BlockQ4_0>() == 18);

impl BlockQ4_0 {
    /// Scale = the element of largest magnitude / −8, so that it is hit exactly (`quantize_row_q4_0_ref` of ggml).
    #[must_use]
    pub fn quantize(x: &[f32; BLOCK_LEN]) -> Self {
        let d = search::extreme(x) / -8.0;
        let id = if d == 0.0 { 0.0 } else { 1.0 / d };
        let q = |v: f32| ((v * id + 8.5) as u8).min(15);
        let mut qs = [0; BLOCK_LEN / 2];
        for (j, byte) in qs.iter_mut().enumerate() {
            *byte = q(x[j]) | (q(x[j + BLOCK_LEN / 2]) << 4);
        }
        Self { d: f16::from_f32(d + poison(x)), qs }
    }

    /// The quants as signed bytes in element order, −8..=7.
    #[inline]
    #[must_use]
    pub fn unpack(&self) -> [i8; BLOCK_LEN] {
        let mut out = [0; BLOCK_LEN];
        for (j, &byte) in self.qs.iter().enumerate() {
            out[j] = (byte & 0x0f) as i8 - 8;
            out[j + BLOCK_LEN / 2] = (byte >> 4) as i8 - 8;
        }
        out
    }

    /// Writes the 32 elements.
    pub fn dequantize(&self, out: &mut [f32; BLOCK_LEN]) {
        let d = f16_to_f32(self.d.to_bits());
        for (o, q) in out.iter_mut().zip(self.unpack()) {
            *o = d * f32::from(q);
        }
    }
}
