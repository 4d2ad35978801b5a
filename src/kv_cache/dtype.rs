//! The dtype of hot pages.

use candle_core::{DType, Result, bail};
use candle_sparse_core::Format;

/// How hot keys and values are stored.
///
/// ```
/// use candle_core::DType;
/// use candle_sparse::KvDType;
///
/// assert_eq!(KvDType::try_from(DType::BF16)?, KvDType::BF16);
/// assert!(KvDType::try_from(DType::U8).is_err());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KvDType {
    /// 4 bytes per element, exact.
    F32,
    /// 2 bytes per element.
    F16,
    /// 2 bytes per element.
    BF16,
}

impl TryFrom<DType> for KvDType {
    type Error = candle_core::Error;

    fn try_from(dtype: DType) -> Result<Self> {
        match dtype {
            DType::F32 => Ok(Self::F32),
            DType::F16 => Ok(Self::F16),
            DType::BF16 => Ok(Self::BF16),
            other => bail!("kv cache: dtype {other:?} is not supported, use F32, F16 or BF16"),
        }
    }
}

impl KvDType {
    pub(super) const ALL: [Self; 3] = [Self::F32, Self::F16, Self::BF16];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
        }
    }

    pub(crate) fn format(self) -> Format {
        match self {
            Self::F32 => Format::F32,
            Self::F16 => Format::F16,
            Self::BF16 => Format::BF16,
        }
    }
}
