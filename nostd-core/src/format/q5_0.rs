//! `Q5_0`: 32 numbers of five bits with one scale.

use super::{BLOCK_LEN, f16_to_f32, planes, poison, search};
use bytemuck::{Pod, Zeroable};
use half::f16;

/// 32 elements `d · (q − 16)`, `q` in 0..=31; nibbles as in `Q4_0`, the fifth bit of element `j` is bit `j` of `qh`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ5_0 {
    /// Scale.
    pub d: f16,
    /// Fifth bits.
    pub qh: [u8; BLOCK_LEN / 8],
    /// Lower four bits.
    pub qs: [u8; BLOCK_LEN / 2],
}

const _: () = assert!(size_of::<BlockQ5_0>() == 22);

impl BlockQ5_0 {
    /// Scale = the element of largest magnitude / −16, so that it is hit exactly (`quantize_row_q5_0_ref` of ggml).
    #[must_use]
    pub fn quantize(x: &[f32; BLOCK_LEN]) -> Self {
        let d = search::extreme(x) / -16.0;
        let id = if d == 0.0 { 0.0 } else { 1.0 / d };
        let (qh, qs) = pack(&x.map(|v| ((v * id + 16.5) as u8).min(31)));
        Self { d: f16::from_f32(d + poison(x)), qh, qs }
    }

    /// The quants as signed bytes in element order, −16..=15.
    #[inline]
    #[must_use]
    pub fn unpack(&self) -> [i8; BLOCK_LEN] {
        unpack(&self.qh, &self.qs).map(|q| q as i8 - 16)
    }

    /// Writes the 32 elements.
    pub fn dequantize(&self, out: &mut [f32; BLOCK_LEN]) {
        let d = f16_to_f32(self.d.to_bits());
        for (o, q) in out.iter_mut().zip(self.unpack()) {
            *o = d * f32::from(q);
        }
    }
}

/// Fifth bits and lower four bits.
pub(super) fn pack(q: &[u8; BLOCK_LEN]) -> ([u8; BLOCK_LEN / 8], [u8; BLOCK_LEN / 2]) {
    let (mut qh, mut qs) = ([0; BLOCK_LEN / 8], [0; BLOCK_LEN / 2]);
    planes::pack::<1, 1>(&q.map(|q| q >> 4), &mut qh);
    planes::pack::<4, 16>(q, &mut qs);
    (qh, qs)
}

/// The inverse of [`pack`].
#[inline]
pub(super) fn unpack(qh: &[u8; BLOCK_LEN / 8], qs: &[u8; BLOCK_LEN / 2]) -> [u8; BLOCK_LEN] {
    let mut out = [0; BLOCK_LEN];
    planes::unpack::<1, 1>(qh, 4, &mut out);
    planes::unpack::<4, 16>(qs, 0, &mut out);
    out
}
