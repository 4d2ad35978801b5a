//! `Q3_K`: 256 numbers of three bits, a scale of six bits per 16.

use super::{SUPER_BLOCK_LEN, f16_to_f32, planes, poison, search};
use bytemuck::{Pod, Zeroable};
use half::f16;

const GROUPS: usize = SUPER_BLOCK_LEN / search::GROUP;

/// 256 elements `d · (scale − 32) · (q − 4)`, `q` in 0..=7; low bits as in `Q2_K`, the third bit of element `32k + j` is
/// bit `k` of `hmask[j]`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ3K {
    /// Third bits.
    pub hmask: [u8; SUPER_BLOCK_LEN / 8],
    /// Lower two bits.
    pub qs: [u8; SUPER_BLOCK_LEN / 4],
    /// Scales: the lower four bits in bytes 0..8, the upper two in bytes 8..12.
    pub scales: [u8; 12],
    /// Scale of the scales.
    pub d: f16,
}

const _: () = assert!(size_of::<BlockQ3K>() == 110);

impl BlockQ3K {
    /// A least-squares scale per 16 elements, weighted by their squares (`quantize_row_q3_K` of candle).
    #[must_use]
    pub fn quantize(x: &[f32; SUPER_BLOCK_LEN]) -> Self {
        let groups = x.as_chunks().0;
        let fits: [f32; GROUPS] =
            core::array::from_fn(|j| search::symmetric(&groups[j], 4, 0, |w, l| w * (l * l) as f32).0);
        let max = search::extreme(&fits);
        let inverse = if max == 0.0 { 0.0 } else { -32.0 / max };
        let d = if max == 0.0 { 0.0 } else { 1.0 / inverse };
        let mut block = Self::zeroed();
        block.d = f16::from_f32(d + poison(x));
        if max != 0.0 {
            let scales = fits.map(|s| (search::nearest(inverse * s).clamp(-32, 31) + 32) as u8);
            planes::pack::<4, 8>(&scales, &mut block.scales[..8]);
            planes::pack::<2, 4>(&scales.map(|s| s >> 4), &mut block.scales[8..]);
        }
        let mut q = [0; SUPER_BLOCK_LEN];
        let steps = block.steps();
        for (e, (q, v)) in q.iter_mut().zip(x).enumerate() {
            let d = steps[e / search::GROUP];
            if d != 0.0 {
                *q = (search::nearest(v / d).clamp(-4, 3) + 4) as u8;
            }
        }
        planes::pack::<2, 32>(&q, &mut block.qs);
        planes::pack::<1, 32>(&q.map(|q| q >> 2), &mut block.hmask);
        block
    }

    /// The scales per 16 elements, −32..=31.
    #[inline]
    #[must_use]
    pub fn unpack_scales(&self) -> [i8; GROUPS] {
        let mut out = [0; GROUPS];
        planes::unpack::<4, 8>(&self.scales[..8], 0, &mut out);
        planes::unpack::<2, 4>(&self.scales[8..], 4, &mut out);
        out.map(|s| s as i8 - 32)
    }

    /// The quants as signed bytes in element order, −4..=3.
    #[inline]
    #[must_use]
    pub fn unpack(&self) -> [i8; SUPER_BLOCK_LEN] {
        let mut out = [0; SUPER_BLOCK_LEN];
        planes::unpack::<2, 32>(&self.qs, 0, &mut out);
        planes::unpack::<1, 32>(&self.hmask, 2, &mut out);
        out.map(|q| q as i8 - 4)
    }

    /// Writes the 256 elements.
    pub fn dequantize(&self, out: &mut [f32; SUPER_BLOCK_LEN]) {
        let (steps, q) = (self.steps(), self.unpack());
        for (e, (o, q)) in out.iter_mut().zip(q).enumerate() {
            *o = steps[e / search::GROUP] * f32::from(q);
        }
    }

    fn steps(&self) -> [f32; GROUPS] {
        let d = f16_to_f32(self.d.to_bits());
        self.unpack_scales().map(|s| d * f32::from(s))
    }
}
