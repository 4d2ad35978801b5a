//! A weight matrix that is filled in element by element.

use candle_core::{Device, Result, Tensor};

pub struct Matrix {
    rows: usize,
    cols: usize,
    elements: Vec<f32>,
}

impl Matrix {
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self { rows, cols, elements: vec![0.0; rows * cols] }
    }

    pub fn set(&mut self, row: usize, col: usize, value: f32) {
        assert!(row < self.rows && col < self.cols, "({row}, {col}) of {} × {}", self.rows, self.cols);
        self.elements[row * self.cols + col] = value;
    }

    /// Writes `values` into a row from column `col` on.
    pub fn set_row(&mut self, row: usize, col: usize, values: &[f32]) {
        values.iter().enumerate().for_each(|(i, v)| self.set(row, col + i, *v));
    }

    /// Copies `len` elements from `col` on to rows from `row` on, times `scale`.
    pub fn copy(&mut self, row: usize, col: usize, len: usize, scale: f32) {
        (0..len).for_each(|i| self.set(row + i, col + i, scale));
    }

    pub fn into_tensor(self) -> Result<Tensor> {
        Tensor::from_vec(self.elements, (self.rows, self.cols), &Device::Cpu)
    }
}
