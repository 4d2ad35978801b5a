//! ggml's types of tensors: numbers in files, names of candle's, formats of ours.

use candle_core::quantized::GgmlDType;
use candle_sparse::Format;

/// The format of a ggml type, by its number in a file.
pub(super) fn by_number(ggml_type: u32) -> Option<Format> {
    Some(match ggml_type {
        0 => Format::F32,
        1 => Format::F16,
        2 => Format::Q4_0,
        3 => Format::Q4_1,
        6 => Format::Q5_0,
        7 => Format::Q5_1,
        8 => Format::Q8_0,
        10 => Format::Q2K,
        11 => Format::Q3K,
        12 => Format::Q4K,
        13 => Format::Q5K,
        14 => Format::Q6K,
        30 => Format::BF16,
        _ => return None,
    })
}

/// Names of types that files in the wild have and we do not read.
pub(super) fn name_of_unknown(ggml_type: u32) -> &'static str {
    match ggml_type {
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => "unknown here",
    }
}

/// The type by which ggml, and candle, name a format.
///
/// ```
/// use candle_core::quantized::GgmlDType;
/// use candle_sparse_models::{Format, gguf::ggml_type};
///
/// assert_eq!(ggml_type(Format::Q4K), GgmlDType::Q4K);
/// ```
#[must_use]
pub fn ggml_type(format: Format) -> GgmlDType {
    match format {
        Format::F32 => GgmlDType::F32,
        Format::F16 => GgmlDType::F16,
        Format::BF16 => GgmlDType::BF16,
        Format::Q8_0 => GgmlDType::Q8_0,
        Format::Q6K => GgmlDType::Q6K,
        Format::Q5_1 => GgmlDType::Q5_1,
        Format::Q5_0 => GgmlDType::Q5_0,
        Format::Q5K => GgmlDType::Q5K,
        Format::Q4_1 => GgmlDType::Q4_1,
        Format::Q4_0 => GgmlDType::Q4_0,
        Format::Q4K => GgmlDType::Q4K,
        Format::Q3K => GgmlDType::Q3K,
        Format::Q2K => GgmlDType::Q2K,
    }
}

/// Our name of candle's name of a ggml type.
pub(crate) fn format(dtype: GgmlDType) -> Option<Format> {
    Format::ALL.into_iter().find(|f| ggml_type(*f) == dtype)
}
