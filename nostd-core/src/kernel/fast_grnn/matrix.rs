//! How a cell holds a matrix.

use crate::{
    error::Error,
    kernel::matmul,
    matrix::{Columns, Matrix},
};

/// A matrix `[rows, cols]` in the form in which a cell holds it: [`Matrix`] of floats, or [`Int8Rows`].
pub trait CellMatrix {
    /// `[rows, cols]`.
    fn shape(&self) -> [usize; 2];

    /// `y[r] = Σ_k w[r, k] · x[k]`. Cost: `rows · cols` multiply-adds.
    fn product(&self, x: &[f32], y: &mut [f32]);

    /// Bytes of its elements and scales.
    fn bytes(&self) -> usize;
}

impl CellMatrix for Matrix<'_> {
    fn shape(&self) -> [usize; 2] {
        [self.rows(), self.cols()]
    }

    /// # Panics
    /// A format of blocks, or wrong lengths.
    fn product(&self, x: &[f32], y: &mut [f32]) {
        matmul::matmul(*self, Columns::F32(x), &mut [y]);
    }

    fn bytes(&self) -> usize {
        Matrix::bytes(self)
    }
}

/// A matrix of bytes, each row with a scale: `w[r, k] = scales[r] · values[r, k]`.
#[derive(Clone, Copy, Debug)]
pub struct Int8Rows<'a> {
    scales: &'a [f32],
    values: &'a [i8],
}

impl<'a> Int8Rows<'a> {
    /// A matrix `[scales.len(), cols]`.
    ///
    /// # Errors
    /// `values` has not `scales.len() · cols` elements.
    pub fn new(cols: usize, scales: &'a [f32], values: &'a [i8]) -> Result<Self, Error> {
        let expected = scales.len().checked_mul(cols).ok_or(Error::TooLarge("matrix"))?;
        if values.len() != expected {
            return Err(Error::Length { what: "int8 matrix", expected, got: values.len() });
        }
        Ok(Self { scales, values })
    }

    /// Rounds `w` `[scales.len(), cols]`: `scales[r] = max|w[r]| / 127`, so each element errs by at most half a scale.
    ///
    /// # Panics
    /// `w` and `values` differ in length, or are no whole number of rows.
    pub fn quantize(w: &[f32], scales: &mut [f32], values: &mut [i8]) {
        assert_eq!(w.len(), values.len(), "int8: lengths differ");
        let cols = w.len() / scales.len().max(1);
        assert_eq!(w.len(), cols * scales.len(), "int8: no whole number of rows");
        let rows = w.chunks_exact(cols.max(1)).zip(values.chunks_exact_mut(cols.max(1)));
        for ((w, values), scale) in rows.zip(scales) {
            *scale = w.iter().fold(0.0_f32, |m, v| m.max(v.abs())) / 127.0;
            let inverse = if *scale > 0.0 { 1.0 / *scale } else { 0.0 };
            for (q, w) in values.iter_mut().zip(w) {
                *q = libm::roundf(w * inverse) as i8;
            }
        }
    }
}

impl CellMatrix for Int8Rows<'_> {
    fn shape(&self) -> [usize; 2] {
        [self.scales.len(), self.values.len() / self.scales.len().max(1)]
    }

    /// # Panics
    /// Wrong lengths.
    fn product(&self, x: &[f32], y: &mut [f32]) {
        assert_eq!([y.len(), x.len()], self.shape(), "int8: wrong lengths");
        let rows = self.values.chunks_exact(x.len().max(1)).zip(self.scales);
        for ((row, scale), y) in rows.zip(y) {
            *y = scale * row.iter().zip(x).map(|(&w, x)| f32::from(w) * x).sum::<f32>();
        }
    }

    fn bytes(&self) -> usize {
        self.values.len() + size_of_val(self.scales)
    }
}
