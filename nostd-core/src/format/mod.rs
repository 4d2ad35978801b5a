//! Weight formats: how a row of numbers lies in memory.
//!
//! Bytes equal ggml's (little endian), so files interchange:
//! <https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h>.

pub mod activation;
pub mod f16;
mod planes;
pub mod q2_k;
pub mod q3_k;
pub mod q4_0;
pub mod q4_1;
pub mod q4_k;
pub mod q5_0;
pub mod q5_1;
pub mod q5_k;
pub mod q6_k;
pub mod q8_0;
mod search;
mod super_block;

pub use activation::{ActivationGroup, GROUP_LEN};
pub use f16::f16_to_f32;
pub use q2_k::BlockQ2K;
pub use q3_k::BlockQ3K;
pub use q4_0::BlockQ4_0;
pub use q4_1::BlockQ4_1;
pub use q4_k::BlockQ4K;
pub use q5_0::BlockQ5_0;
pub use q5_1::BlockQ5_1;
pub use q5_k::BlockQ5K;
pub use q6_k::BlockQ6K;
pub use q8_0::BlockQ8_0;

use bytemuck::NoUninit;
use half::bf16;

/// Elements in a block of a simple quantised format, and the unit in which kernels walk along a row.
pub const BLOCK_LEN: usize = 32;

/// Elements in a block of a K-quant.
pub const SUPER_BLOCK_LEN: usize = 256;

/// How the elements of a matrix are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// IEEE binary32
    F32,
    /// IEEE binary16
    F16,
    /// bfloat16: the upper half of a binary32
    BF16,
    /// 32 signed bytes and one f16 scale: 8.5 bits per element
    Q8_0,
    /// 256 numbers of six bits, scales of eight: 6.5625 bits per element
    Q6K,
    /// 32 numbers of five bits, f16 scale and minimum: 6 bits per element
    Q5_1,
    /// 32 numbers of five bits and one f16 scale: 5.5 bits per element
    Q5_0,
    /// 256 numbers of five bits, scales and minima of six: 5.5 bits per element
    Q5K,
    /// 32 nibbles, f16 scale and minimum: 5 bits per element
    Q4_1,
    /// 32 nibbles and one f16 scale: 4.5 bits per element
    Q4_0,
    /// 256 nibbles, scales and minima of six bits: 4.5 bits per element
    Q4K,
    /// 256 numbers of three bits, scales of six: 3.4375 bits per element
    Q3K,
    /// 256 numbers of two bits, scales and minima of four: 2.625 bits per element
    Q2K,
}

impl Format {
    /// Every format, widest first.
    pub const ALL: [Self; 13] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q8_0,
        Self::Q6K,
        Self::Q5_1,
        Self::Q5_0,
        Self::Q5K,
        Self::Q4_1,
        Self::Q4_0,
        Self::Q4K,
        Self::Q3K,
        Self::Q2K,
    ];

    /// Name, elements and bytes per block.
    const fn layout(self) -> (&'static str, usize, usize) {
        match self {
            Self::F32 => ("f32", 1, 4),
            Self::F16 => ("f16", 1, 2),
            Self::BF16 => ("bf16", 1, 2),
            Self::Q8_0 => ("q8_0", BLOCK_LEN, size_of::<BlockQ8_0>()),
            Self::Q6K => ("q6_k", SUPER_BLOCK_LEN, size_of::<BlockQ6K>()),
            Self::Q5_1 => ("q5_1", BLOCK_LEN, size_of::<BlockQ5_1>()),
            Self::Q5_0 => ("q5_0", BLOCK_LEN, size_of::<BlockQ5_0>()),
            Self::Q5K => ("q5_k", SUPER_BLOCK_LEN, size_of::<BlockQ5K>()),
            Self::Q4_1 => ("q4_1", BLOCK_LEN, size_of::<BlockQ4_1>()),
            Self::Q4_0 => ("q4_0", BLOCK_LEN, size_of::<BlockQ4_0>()),
            Self::Q4K => ("q4_k", SUPER_BLOCK_LEN, size_of::<BlockQ4K>()),
            Self::Q3K => ("q3_k", SUPER_BLOCK_LEN, size_of::<BlockQ3K>()),
            Self::Q2K => ("q2_k", SUPER_BLOCK_LEN, size_of::<BlockQ2K>()),
        }
    }

    /// Elements per block; a row is a whole number of blocks.
    #[must_use]
    pub const fn block_len(self) -> usize {
        self.layout().1
    }

    /// Bytes per block.
    #[must_use]
    pub const fn block_bytes(self) -> usize {
        self.layout().2
    }

    /// Bytes of a row of `cols` elements; `cols` is a multiple of [`Self::block_len`].
    #[must_use]
    pub const fn row_bytes(self, cols: usize) -> usize {
        cols / self.block_len() * self.block_bytes()
    }

    /// Whether products are taken in integers, so that the other operand must be quantised too.
    #[must_use]
    pub const fn is_quantized(self) -> bool {
        self.block_len() > 1
    }

    /// The name used on command lines: `f32 f16 bf16 q8_0 q6_k` and so on.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.layout().0
    }

    /// The format of that name, if there is one.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|f| f.name().eq_ignore_ascii_case(name))
    }

    /// Writes `x` as bytes of this format.
    ///
    /// # Panics
    /// `x` is no whole number of blocks, or `out` has not exactly their bytes.
    pub fn quantize(self, x: &[f32], out: &mut [u8]) {
        assert!(x.len().is_multiple_of(self.block_len()), "quantize: {} elements for {self:?}", x.len());
        assert_eq!(out.len(), self.row_bytes(x.len()), "quantize: out has the wrong length");
        match self {
            Self::F32 => out.copy_from_slice(bytemuck::cast_slice(x)),
            Self::F16 => write(x, out, |[v]: &[f32; 1]| half::f16::from_f32(*v)),
            Self::BF16 => write(x, out, |[v]: &[f32; 1]| bf16::from_f32(*v)),
            Self::Q8_0 => write(x, out, BlockQ8_0::quantize),
            Self::Q6K => write(x, out, BlockQ6K::quantize),
            Self::Q5_1 => write(x, out, BlockQ5_1::quantize),
            Self::Q5_0 => write(x, out, BlockQ5_0::quantize),
            Self::Q5K => write(x, out, BlockQ5K::quantize),
            Self::Q4_1 => write(x, out, BlockQ4_1::quantize),
            Self::Q4_0 => write(x, out, BlockQ4_0::quantize),
            Self::Q4K => write(x, out, BlockQ4K::quantize),
            Self::Q3K => write(x, out, BlockQ3K::quantize),
            Self::Q2K => write(x, out, BlockQ2K::quantize),
        }
    }
}

/// Block by block through bytes: `out` need not be aligned.
fn write<B: NoUninit, const N: usize>(x: &[f32], out: &mut [u8], quantize: impl Fn(&[f32; N]) -> B) {
    for (out, x) in out.chunks_exact_mut(size_of::<B>()).zip(x.as_chunks().0) {
        out.copy_from_slice(bytemuck::bytes_of(&quantize(x)));
    }
}

/// NaN if any element is not finite, else −0; added to a scale, it keeps garbage from being rounded to plausible numbers
/// and leaves every other scale as it is, −0 too.
fn poison(x: &[f32]) -> f32 {
    // In lanes: one chain of sums waits for each of them.
    let (mut lanes, (eights, rest)) = ([-0.0_f32; 8], x.as_chunks::<8>());
    for eight in eights {
        lanes.iter_mut().zip(eight).for_each(|(lane, v)| *lane -= (v * 0.0).abs());
    }
    let rest = rest.iter().map(|v| -(v * 0.0).abs());
    lanes.into_iter().chain(rest).fold(-0.0, |sum, v| sum + v)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Matrix;
    use std::{vec, vec::Vec};

    /// Quantises and reads back.
    fn there_and_back(format: Format, x: &[f32]) -> Vec<f32> {
        // Words, because blocks want the alignment of f16.
        let mut words = vec![0_u32; format.row_bytes(x.len()).div_ceil(4)];
        let bytes = &mut bytemuck::cast_slice_mut(&mut words)[..format.row_bytes(x.len())];
        format.quantize(x, bytes);
        let mut out = vec![0.0; x.len()];
        Matrix::from_bytes(1, x.len(), format, bytes).unwrap().dequantize_row(0, &mut out);
        out
    }

    /// The step of a grid over −1..1, and how far a number may be from its nearest point, in steps.
    ///
    /// Where the extreme is the lowest of an even number of points, its negative lies one step past the highest.
    const GRIDS: [(Format, f32, f32); 10] = [
        (Format::Q8_0, 1.0 / 127.0, 0.5),
        (Format::Q6K, 1.0 / 32.0, 1.0),
        (Format::Q5_1, 2.0 / 31.0, 0.5),
        (Format::Q5_0, 1.0 / 16.0, 1.0),
        (Format::Q5K, 2.0 / 31.0, 0.5),
        (Format::Q4_1, 2.0 / 15.0, 0.5),
        (Format::Q4_0, 1.0 / 8.0, 1.0),
        (Format::Q4K, 2.0 / 15.0, 0.5),
        (Format::Q3K, 1.0 / 4.0, 1.0),
        (Format::Q2K, 2.0 / 3.0, 0.5),
    ];

    #[test]
    fn error_is_that_of_a_grid() {
        let x: Vec<f32> = (0..64 * SUPER_BLOCK_LEN as u32)
            .map(|i| {
                let h = i.wrapping_mul(0x9e37_79b9);
                let h = (h ^ (h >> 15)).wrapping_mul(0x85eb_ca6b);
                ((h ^ (h >> 13)) >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect();
        for (format, step, furthest) in GRIDS {
            let y = there_and_back(format, &x);
            let errors = x.iter().zip(&y).map(|(x, y)| (x - y).abs());
            let worst = errors.clone().fold(0.0, f32::max);
            let rms = libm::sqrtf(errors.map(|e| e * e).sum::<f32>() / x.len() as f32);
            // Rounding a scale to six bits moves point 31 by at most 31/126 steps, and the minimum by half of that.
            assert!(worst <= step * (furthest + 0.4), "{format:?}: {worst}");
            // Rounding to a grid is uniform noise of step/√12; the numbers past the highest point add little.
            assert!(rms <= step / libm::sqrtf(12.0) * 1.1, "{format:?}: {rms}");
        }
    }

    #[test]
    fn a_number_that_is_not_finite_poisons_its_block() {
        for format in Format::ALL.into_iter().filter(|f| f.is_quantized()) {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = [0.25; SUPER_BLOCK_LEN];
                x[9] = bad;
                let block = &there_and_back(format, &x)[..format.block_len()];
                assert!(block.iter().all(|v| v.is_nan()), "{format:?} {bad}: {block:?}");
            }
        }
    }

    #[test]
    fn names_are_read_back() {
        for format in Format::ALL {
            assert_eq!(Format::from_name(format.name()), Some(format));
        }
        assert_eq!(Format::from_name("Q4_K"), Some(Format::Q4K));
        assert_eq!(Format::from_name("q4"), None);
    }
}
