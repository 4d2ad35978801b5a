//! `Q8_0` in two halves: the upper four bits of each element for a first look, the lower four for rows that matter.

use super::{BLOCK_LEN, BlockQ8_0, f16_to_f32};
use bytemuck::{Pod, Zeroable};
use half::f16;

/// The upper halves of 32 elements with their scale: `d · (16 · (u − 8) + 7.5)`, in the middle of what the lower half may add.
///
/// The nibbles `u` lie as in `Q4_0`: the low one of byte `j` is element `j`, the high one `j + 16`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ8_0Upper {
    /// Scale.
    pub d: f16,
    /// Upper halves, 8 too large.
    pub qs: [u8; BLOCK_LEN / 2],
}

/// The lower halves of 32 elements, as the upper ones lie.
pub type LowerHalves = [u8; BLOCK_LEN / 2];

const _: () = assert!(size_of::<BlockQ8_0Upper>() + size_of::<LowerHalves>() == size_of::<BlockQ8_0>());

impl BlockQ8_0Upper {
    /// Both halves of a block.
    #[must_use]
    pub fn split(block: &BlockQ8_0) -> (Self, LowerHalves) {
        let (mut upper, mut lower) = ([0; BLOCK_LEN / 2], [0; BLOCK_LEN / 2]);
        for j in 0..BLOCK_LEN / 2 {
            let [a, b] = [j, j + BLOCK_LEN / 2].map(|i| block.qs[i].cast_unsigned() ^ 0x80);
            upper[j] = a >> 4 | b & 0xf0;
            lower[j] = a & 0x0f | b << 4;
        }
        (Self { d: block.d, qs: upper }, lower)
    }

    /// The block whose halves these are.
    #[inline(always)]
    #[must_use]
    pub fn join(&self, lower: &LowerHalves) -> BlockQ8_0 {
        let mut qs = [0; BLOCK_LEN];
        let (first, second) = qs.split_at_mut(BLOCK_LEN / 2);
        for j in 0..BLOCK_LEN / 2 {
            let (upper, lower) = (self.qs[j], lower[j]);
            first[j] = ((upper << 4 | lower & 0x0f) ^ 0x80).cast_signed();
            second[j] = ((upper & 0xf0 | lower >> 4) ^ 0x80).cast_signed();
        }
        BlockQ8_0 { d: self.d, qs }
    }

    /// The nearest to 32 numbers: `d = max|x| / 127.5`.
    #[must_use]
    pub fn quantize(x: &[f32; BLOCK_LEN]) -> Self {
        let d = f16::from_f32(x.iter().fold(0.0_f32, |m, v| v.abs().max(m)) / 127.5);
        let step = f16_to_f32(d.to_bits());
        let id = if step > 0.0 { 1.0 / step } else { 0.0 };
        let nearest = |v: f32| libm::rintf((v * id - 7.5) / 16.0 + 8.0).clamp(0.0, 15.0) as u8;
        Self { d, qs: core::array::from_fn(|j| nearest(x[j]) | nearest(x[j + BLOCK_LEN / 2]) << 4) }
    }

    /// Writes the 32 elements.
    pub fn dequantize(&self, out: &mut [f32; BLOCK_LEN]) {
        let d = f16_to_f32(self.d.to_bits());
        for (j, q) in self.qs.iter().enumerate() {
            let value = |u: u8| d * (16.0 * (f32::from(u) - 8.0) + 7.5);
            (out[j], out[j + BLOCK_LEN / 2]) = (value(q & 0x0f), value(q >> 4));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_of_every_byte_join_to_it_and_the_upper_one_is_in_the_middle() {
        for first in (-128..=127_i32).step_by(32) {
            let qs = core::array::from_fn(|j| (first + j as i32) as i8);
            let block = BlockQ8_0 { d: f16::from_f32(0.5), qs };
            let (upper, lower) = BlockQ8_0Upper::split(&block);
            assert_eq!(upper.join(&lower), block);
            let mut middle = [0.0; BLOCK_LEN];
            upper.dequantize(&mut middle);
            for (q, m) in qs.iter().zip(middle) {
                assert_eq!(m, 0.5 * (f32::from(*q).div_euclid(16.0) * 16.0 + 7.5), "{q}");
            }
        }
    }

    #[test]
    fn the_nearest_of_sixteen_points_is_taken() {
        let x: [f32; BLOCK_LEN] = core::array::from_fn(|i| (i as f32 - 16.0) * 7.5);
        let (block, mut y) = (BlockQ8_0Upper::quantize(&x), [0.0; BLOCK_LEN]);
        block.dequantize(&mut y);
        let d = f16_to_f32(block.d.to_bits());
        for (x, y) in x.iter().zip(y) {
            assert!((x - y).abs() <= 8.0 * d * 1.001, "{x} {y}");
        }
        assert_eq!(BlockQ8_0Upper::quantize(&[0.0; BLOCK_LEN]).d, f16::ZERO);
    }
}
