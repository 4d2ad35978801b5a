//! `Q6_K`: 256 numbers of six bits, a signed byte as scale per 16.

use super::{SUPER_BLOCK_LEN, f16_to_f32, planes, poison, search};
use bytemuck::{Pod, Zeroable};
use half::f16;

const GROUPS: usize = SUPER_BLOCK_LEN / search::GROUP;

/// 256 elements `d · scale · (q − 32)`, `q` in 0..=63; of each 128 elements, byte `j` of 64 holds elements `j` and
/// `j + 64` in its nibbles, and byte `j` of 32 the upper bits of elements `j + 32k`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ6K {
    /// Lower four bits.
    pub ql: [u8; SUPER_BLOCK_LEN / 2],
    /// Upper two bits.
    pub qh: [u8; SUPER_BLOCK_LEN / 4],
    /// Scales per 16 elements.
    pub scales: [i8; GROUPS],
    /// Scale of the scales.
    pub d: f16,
}

const _: () = assert!(size_of::<BlockQ6K>() == 210);

impl BlockQ6K {
    /// A least-squares scale per 16 elements, weighted by their squares (`quantize_row_q6_K` of candle).
    #[must_use]
    pub fn quantize(x: &[f32; SUPER_BLOCK_LEN]) -> Self {
        let (mut fits, mut q) = ([0.0; GROUPS], [0; SUPER_BLOCK_LEN]);
        let groups = x.as_chunks().0.iter().zip(q.as_chunks_mut::<{ search::GROUP }>().0);
        for (fit, (x, q)) in fits.iter_mut().zip(groups) {
            let (scale, l) = search::symmetric(x, 32, 3, |w, l| w * l as f32 * l as f32);
            (*fit, *q) = (scale, l.map(|l| (l + 32) as u8));
        }
        let inverse = -128.0 / search::extreme(&fits);
        let mut block = Self::zeroed();
        block.d = f16::from_f32(1.0 / inverse + poison(x));
        block.scales = fits.map(|s| search::nearest(inverse * s).min(127) as i8);
        let steps = block.steps();
        for (e, (q, v)) in q.iter_mut().zip(x).enumerate() {
            let d = steps[e / search::GROUP];
            // A group whose scale rounds to 0 keeps the quants of its search: they count for nothing.
            if d != 0.0 {
                *q = (search::nearest(v / d).clamp(-32, 31) + 32) as u8;
            }
        }
        planes::pack::<4, 64>(&q, &mut block.ql);
        planes::pack::<2, 32>(&q.map(|q| q >> 4), &mut block.qh);
        block
    }

    /// The quants as signed bytes in element order, −32..=31.
    #[inline]
    #[must_use]
    pub fn unpack(&self) -> [i8; SUPER_BLOCK_LEN] {
        let mut out = [0; SUPER_BLOCK_LEN];
        planes::unpack::<4, 64>(&self.ql, 0, &mut out);
        planes::unpack::<2, 32>(&self.qh, 4, &mut out);
        out.map(|q| q as i8 - 32)
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
        self.scales.map(|s| d * f32::from(s))
    }
}
