//! 256 elements in groups, each with a small integer scale and minimum: what `Q2_K`, `Q4_K` and `Q5_K` share.

use super::{SUPER_BLOCK_LEN, f16_to_f32, poison, search};
use half::f16;

/// `d · scales[j] · q − dmin · mins[j]` for the elements of group `j` of `S`.
pub(super) struct Groups<const S: usize> {
    pub(super) d: f16,
    pub(super) dmin: f16,
    pub(super) scales: [u8; S],
    pub(super) mins: [u8; S],
}

impl<const S: usize> Groups<S> {
    /// Fits a grid of `top` steps to each group, then rounds scales and minima to 0..=`unit` parts of the largest.
    pub(super) fn fit(x: &[f32; SUPER_BLOCK_LEN], top: i32, unit: u8) -> Self {
        let mut fits = [(0.0, 0.0); S];
        for (fit, x) in fits.iter_mut().zip(x.chunks_exact(SUPER_BLOCK_LEN / S)) {
            *fit = search::offset(x, top);
        }
        let (d, scales) = parts(fits.map(|f| f.0), unit);
        let (dmin, mins) = parts(fits.map(|f| f.1), unit);
        Self { d: f16::from_f32(d + poison(x)), dmin: f16::from_f32(dmin), scales, mins }
    }

    /// Step and minimum of group `j`.
    fn grid(&self, j: usize) -> (f32, f32) {
        let (d, dmin) = (f16_to_f32(self.d.to_bits()), f16_to_f32(self.dmin.to_bits()));
        (d * f32::from(self.scales[j]), dmin * f32::from(self.mins[j]))
    }

    /// The nearest points of the rounded grid, so that only the range, not the fit, suffers from its rounding.
    pub(super) fn quants(&self, x: &[f32; SUPER_BLOCK_LEN], top: i32) -> [u8; SUPER_BLOCK_LEN] {
        let mut out = [0; SUPER_BLOCK_LEN];
        for (e, (q, v)) in out.iter_mut().zip(x).enumerate() {
            let (d, min) = self.grid(e * S / SUPER_BLOCK_LEN);
            if d != 0.0 {
                *q = search::nearest((v + min) / d).clamp(0, top) as u8;
            }
        }
        out
    }

    /// Writes the 256 elements.
    pub(super) fn values(&self, q: &[u8; SUPER_BLOCK_LEN], out: &mut [f32; SUPER_BLOCK_LEN]) {
        let len = SUPER_BLOCK_LEN / S;
        for (j, (out, q)) in out.chunks_exact_mut(len).zip(q.chunks_exact(len)).enumerate() {
            let (d, min) = self.grid(j);
            out.iter_mut().zip(q).for_each(|(o, &q)| *o = d * f32::from(q) - min);
        }
    }
}

/// `(d, parts)` with `v ≈ d · part`, `part` in 0..=`unit`; NaN, from sums that underflow, counts as 0.
fn parts<const S: usize>(v: [f32; S], unit: u8) -> (f32, [u8; S]) {
    let max = v.iter().fold(0.0, |max, &v| if v > max { v } else { max });
    let inverse = if max > 0.0 { f32::from(unit) / max } else { 0.0 };
    (max / f32::from(unit), v.map(|v| search::nearest(inverse * v).min(i32::from(unit)) as u8))
}

/// Eight scales and eight minima of six bits in twelve bytes, as `Q4_K` and `Q5_K` have them.
///
/// Bytes 0..4 and 4..8 hold scales and minima 0..4, and in their upper two bits those of 4..8; bytes 8..12 hold the
/// lower four bits of those.
pub(super) fn pack_scales(scales: &[u8; 8], mins: &[u8; 8]) -> [u8; 12] {
    let mut out = [0; 12];
    for j in 0..4 {
        out[j] = scales[j] | ((scales[j + 4] >> 4) << 6);
        out[j + 4] = mins[j] | ((mins[j + 4] >> 4) << 6);
        out[j + 8] = (scales[j + 4] & 0x0f) | ((mins[j + 4] & 0x0f) << 4);
    }
    out
}

/// `(scales, minima)`, the inverse of [`pack_scales`].
#[inline]
pub(super) fn unpack_scales(bytes: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let (mut scales, mut mins) = ([0; 8], [0; 8]);
    for j in 0..4 {
        (scales[j], mins[j]) = (bytes[j] & 63, bytes[j + 4] & 63);
        scales[j + 4] = (bytes[j + 8] & 0x0f) | ((bytes[j] >> 6) << 4);
        mins[j + 4] = (bytes[j + 8] >> 4) | ((bytes[j + 4] >> 6) << 4);
    }
    (scales, mins)
}
