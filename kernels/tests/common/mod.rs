//! Numbers and matrices that tests share.
#![allow(dead_code, reason = "each test uses a part")]

use candle_sparse_core::{ActivationGroup, Columns, Format, Matrix};
use candle_sparse_kernels::Kernels;
use half::bf16;

/// Numbers in −1..1 from a fixed hash.
pub(crate) fn numbers(n: usize, seed: u32) -> Vec<f32> {
    (0..n as u32)
        .map(|i| {
            let mut h = i.wrapping_mul(2_654_435_761) ^ seed.wrapping_mul(0x9e37_79b9);
            h = (h ^ (h >> 15)).wrapping_mul(0x85eb_ca6b);
            h ^= h >> 13;
            (h >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// Owned rows of one format.
pub(crate) struct Stored {
    pub(crate) format: Format,
    /// Their bytes in words, which have the alignment that blocks want.
    pub(crate) words: Vec<u32>,
}

impl Stored {
    pub(crate) fn new(format: Format, x: &[f32]) -> Self {
        let len = format.row_bytes(x.len());
        let mut words = vec![0; len.div_ceil(4)];
        format.quantize(x, &mut bytemuck::cast_slice_mut(&mut words)[..len]);
        Self { format, words }
    }

    pub(crate) fn matrix(&self, rows: usize, cols: usize) -> Matrix<'_> {
        let bytes = &bytemuck::cast_slice(&self.words)[..rows * self.format.row_bytes(cols)];
        Matrix::from_bytes(rows, cols, self.format, bytes).unwrap()
    }
}

/// Columns of `cols` elements, for quantised matrices.
pub(crate) fn quantized(x: &[f32], cols: usize) -> Vec<ActivationGroup> {
    x.chunks(cols).flat_map(|x| x.as_chunks().0.chunks(4).map(ActivationGroup::quantize)).collect()
}

/// Both sides round a sum of `n` products: each errs by at most n·ε·Σ|products|.
pub(crate) fn bound(n: usize, size: f32) -> f32 {
    2.0 * (n as f32 + 2.0) * f32::EPSILON * size + f32::MIN_POSITIVE
}

/// One column in the form that `format` is multiplied with.
pub(crate) fn column<'a>(format: Format, x: &'a [f32], groups: &'a [ActivationGroup]) -> Columns<'a> {
    if format.is_quantized() { Columns::Quantized(groups) } else { Columns::F32(x) }
}

/// A column of numbers as a level multiplies `format` with it.
pub(crate) fn as_multiplied(kernels: &Kernels, format: Format, x: &[f32]) -> Vec<f32> {
    let is_rounded = format == Format::BF16 && !kernels.level().is_exact();
    x.iter().map(|&x| if is_rounded { bf16::from_f32(x).to_f32() } else { x }).collect()
}
