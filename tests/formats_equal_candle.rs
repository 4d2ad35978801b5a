//! Every quantised format has candle's bytes, made from the same numbers, and candle's numbers, made from the same bytes.
#![allow(clippy::unwrap_used, reason = "tests")]

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor, ggml_file::qtensor_from_ggml},
};
use candle_sparse::Format;
use candle_sparse_core::Matrix;

const COLS: usize = 8 * 256;

const PAIRS: [(Format, GgmlDType); 10] = [
    (Format::Q8_0, GgmlDType::Q8_0),
    (Format::Q6K, GgmlDType::Q6K),
    (Format::Q5_1, GgmlDType::Q5_1),
    (Format::Q5_0, GgmlDType::Q5_0),
    (Format::Q5K, GgmlDType::Q5K),
    (Format::Q4_1, GgmlDType::Q4_1),
    (Format::Q4_0, GgmlDType::Q4_0),
    (Format::Q4K, GgmlDType::Q4K),
    (Format::Q3K, GgmlDType::Q3K),
    (Format::Q2K, GgmlDType::Q2K),
];

/// A fixed sequence of hashes.
fn bits(seed: u64) -> impl Iterator<Item = u64> {
    let mut state = seed;
    core::iter::repeat_with(move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let h = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let h = (h ^ (h >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        h ^ (h >> 31)
    })
}

/// Numbers in −1..1.
fn uniform(seed: u64) -> Vec<f32> {
    bits(seed).take(COLS).map(|h| (h >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// Nearly normal: the sum of six uniform numbers.
fn normal(seed: u64) -> Vec<f32> {
    let parts: Vec<_> = (0..6).map(|i| uniform(seed * 6 + i)).collect();
    (0..COLS).map(|e| parts.iter().map(|p| p[e]).sum()).collect()
}

fn kinds() -> Vec<(&'static str, Vec<f32>)> {
    let map = |f: &dyn Fn(usize, f32) -> f32| -> Vec<f32> {
        normal(99).into_iter().enumerate().map(|(e, v)| f(e, v)).collect()
    };
    let mut kinds = vec![
        ("zeros", vec![0.0; COLS]),
        ("constant", vec![0.37; COLS]),
        ("negative constant", vec![-12.5; COLS]),
        ("one element", map(&|e, _| if e == 700 { -3.0 } else { 0.0 })),
        ("huge element", map(&|e, v| if e % 256 == 77 { 1e4 } else { v })),
        ("huge negative element", map(&|e, v| if e % 256 == 200 { -3e6 } else { v })),
        ("outliers", map(&|e, v| if e % 61 == 0 { v * 50.0 } else { v })),
        ("positive", map(&|_, v| v.abs() + 0.01)),
        ("negative", map(&|_, v| -v.abs() - 0.01)),
        ("quiet groups", map(&|e, v| if e / 16 % 3 == 0 { v * 1e-4 } else { v })),
        ("silent groups", map(&|e, v| if e / 16 % 3 == 0 { 0.0 } else { v })),
        ("integers", map(&|_, v| (v * 4.0).round())),
        ("weights", map(&|_, v| v * 0.02)),
        ("subnormal scales", map(&|_, v| v * 1e-6)),
        ("vanishing scales", map(&|_, v| v * 1e-12)),
        ("underflowing squares", map(&|_, v| v * 1e-30)),
        ("subnormal", map(&|_, v| v * 1e-39)),
        ("positive subnormal", map(&|_, v| v.abs() * 1e-39)),
    ];
    kinds.extend((0..16).map(|seed| ("uniform", uniform(seed))));
    kinds.extend((0..16).map(|seed| ("normal", normal(seed))));
    kinds
}

fn ours(format: Format, x: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; format.row_bytes(x.len())];
    format.quantize(x, &mut bytes);
    bytes
}

fn our_numbers(format: Format, bytes: &[u8]) -> Vec<f32> {
    // Blocks hold f16 numbers: bytes in the middle of a vector need a copy that is aligned for them.
    let mut aligned = vec![0_u64; bytes.len().div_ceil(8)];
    let aligned = &mut bytemuck::cast_slice_mut(&mut aligned)[..bytes.len()];
    aligned.copy_from_slice(bytes);
    let mut out = vec![f32::NAN; COLS];
    Matrix::from_bytes(1, COLS, format, aligned).unwrap().dequantize_row(0, &mut out);
    out
}

fn assert_same_numbers(format: Format, bytes: &[u8], candle: &QTensor, what: &str) {
    let want = candle.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (e, (got, want)) in our_numbers(format, bytes).iter().zip(&want).enumerate() {
        assert_eq!(got.to_bits(), want.to_bits(), "{format:?} {what} [{e}]: {got} {want}");
    }
}

#[test]
fn quantised_bytes_and_their_numbers_are_candles() {
    let mut wrong = Vec::new();
    for (kind, x) in kinds() {
        let t = Tensor::new(x.as_slice(), &Device::Cpu).unwrap();
        for (format, dtype) in PAIRS {
            let candle = QTensor::quantize(&t, dtype).unwrap();
            let (got, want) = (ours(format, &x), candle.data().unwrap());
            let block = format.block_bytes();
            let differ = got.chunks(block).zip(want.chunks(block)).filter(|(g, w)| g != w).count();
            // A scale of 255 in candle overflows into the nibble of the minimum: other bytes, but 0 times either.
            if differ > 0 && (format, kind) != (Format::Q2K, "positive subnormal") {
                wrong.push(format!("{format:?} {kind}: {differ} of {} blocks", got.len() / block));
                continue;
            }
            assert_same_numbers(format, &got, &candle, kind);
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Where a block keeps its f16 numbers.
fn halves(format: Format) -> &'static [usize] {
    match format {
        Format::Q8_0 | Format::Q4_0 | Format::Q5_0 => &[0],
        Format::Q4_1 | Format::Q5_1 | Format::Q4K | Format::Q5K => &[0, 2],
        Format::Q6K => &[208],
        Format::Q3K => &[108],
        Format::Q2K => &[80, 82],
        Format::F32 | Format::F16 | Format::BF16 => &[],
    }
}

#[test]
fn any_bytes_are_candles_numbers() {
    for (format, dtype) in PAIRS {
        for seed in 0..32 {
            let mut bytes: Vec<u8> =
                bits(seed).take(format.row_bytes(COLS)).map(|h| (h >> 56) as u8).collect();
            for block in bytes.chunks_exact_mut(format.block_bytes()) {
                for &at in halves(format) {
                    // A cleared bit of the exponent keeps a scale finite.
                    block[at + 1] &= 0xfb;
                }
            }
            let candle = qtensor_from_ggml(dtype, &bytes, vec![1, COLS], &Device::Cpu).unwrap();
            assert_same_numbers(format, &bytes, &candle, "random bytes");
        }
    }
}
