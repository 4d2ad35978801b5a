//! Weight formats: how a row of numbers lies in memory.
//!
//! Bytes equal ggml's (little endian), so files interchange:
//! <https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h>.

pub mod activation;
pub mod f16;
pub mod q4_0;
pub mod q8_0;

pub use activation::{ActivationGroup, GROUP_LEN};
pub use f16::f16_to_f32;
pub use q4_0::BlockQ4_0;
pub use q8_0::BlockQ8_0;

/// Elements in a block of a quantised format, and the unit in which kernels walk along a row.
pub const BLOCK_LEN: usize = 32;

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
    /// 32 nibbles and one f16 scale: 4.5 bits per element
    Q4_0,
}

impl Format {
    /// Every format, widest first.
    pub const ALL: [Self; 5] = [Self::F32, Self::F16, Self::BF16, Self::Q8_0, Self::Q4_0];

    /// Elements per block; a row is a whole number of blocks.
    #[must_use]
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q8_0 | Self::Q4_0 => BLOCK_LEN,
        }
    }

    /// Bytes per block.
    #[must_use]
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q8_0 => size_of::<BlockQ8_0>(),
            Self::Q4_0 => size_of::<BlockQ4_0>(),
        }
    }

    /// Bytes of a row of `cols` elements; `cols` is a multiple of [`Self::block_len`].
    #[must_use]
    pub const fn row_bytes(self, cols: usize) -> usize {
        cols / self.block_len() * self.block_bytes()
    }

    /// Whether products are taken in integers, so that the other operand must be quantised too.
    #[must_use]
    pub const fn is_quantized(self) -> bool {
        matches!(self, Self::Q8_0 | Self::Q4_0)
    }

    /// The name used on command lines: `f32 f16 bf16 q8_0 q4_0`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
        }
    }

    /// The format of that name, if there is one.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|f| f.name().eq_ignore_ascii_case(name))
    }
}

/// NaN if any element is not finite, else 0; added to a scale, it keeps garbage from being rounded to plausible numbers.
fn poison(x: &[f32; BLOCK_LEN]) -> f32 {
    x.iter().map(|v| v * 0.0).sum()
}
