//! `Q8_0`: 32 signed bytes with one scale.

use super::{BLOCK_LEN, f16_to_f32, poison, search};
use bytemuck::{Pod, Zeroable};
use half::f16;

/// 32 elements `d · qs[j]`; quantisers emit `qs` in −127..=127, files may hold −128.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ8_0 {
    /// Scale.
    pub d: f16,
    /// Quants.
    pub qs: [i8; BLOCK_LEN],
}

const _: () = assert!(size_of::<BlockQ8_0>() == 34);

impl BlockQ8_0 {
    /// Rounds to the nearest multiple of `d = max|x| / 127`, halves away from zero (`quantize_row_q8_0_ref` of ggml).
    #[must_use]
    pub fn quantize(x: &[f32; BLOCK_LEN]) -> Self {
        let d = max_abs(x) / 127.0;
        let id = if d == 0.0 { 0.0 } else { 1.0 / d };
        Self {
            d: f16::from_f32(d + poison(x)),
            qs: x.map(|v| search::nearest(v * id).clamp(-128, 127) as i8),
        }
    }

    /// Writes the 32 elements.
    pub fn dequantize(&self, out: &mut [f32; BLOCK_LEN]) {
        let d = f16_to_f32(self.d.to_bits());
        for (o, &q) in out.iter_mut().zip(&self.qs) {
            *o = d * f32::from(q);
        }
    }
}

fn max_abs(x: &[f32; BLOCK_LEN]) -> f32 {
    search::fold(x, 0.0, |m, v| v.abs().max(m))
}
