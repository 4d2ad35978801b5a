//! What is remembered of a text: its second moments, and some of its tokens.

use candle_core::{Device, Result, Tensor, bail};

/// `Σ x·xᵀ` over all inputs of an FFN.
#[derive(Clone, Debug)]
pub(super) struct Moments {
    size: usize,
    rows: u64,
    sum: Vec<f32>,
}

impl Moments {
    /// Of no inputs of `size` elements. Memory: `size²` f32.
    #[must_use]
    pub(super) fn new(size: usize) -> Self {
        Self { size, rows: 0, sum: vec![0.0; size * size] }
    }

    /// Adds inputs `[n, size]`. Cost: `n · size²` multiply-adds.
    ///
    /// # Errors
    /// An element is not finite.
    pub(super) fn add(&mut self, x: &[f32]) -> Result<()> {
        check_finite(x)?;
        let x = Tensor::from_slice(x, (x.len() / self.size, self.size), &Device::Cpu)?;
        let products = x.t()?.contiguous()?.matmul(&x)?.flatten_all()?.to_vec1::<f32>()?;
        self.sum.iter_mut().zip(products).for_each(|(s, p)| *s += p);
        self.rows += x.dim(0)? as u64;
        Ok(())
    }

    /// Inputs seen.
    #[must_use]
    pub(super) fn rows(&self) -> u64 {
        self.rows
    }

    /// `E[xxᵀ]` plus a ridge of `1e-5` of its mean diagonal, row-major `[size, size]`.
    pub(super) fn mean(&self) -> Vec<f64> {
        let n = self.rows.max(1) as f64;
        let mut mean: Vec<f64> = self.sum.iter().map(|&s| f64::from(s) / n).collect();
        let diagonal = |i: usize| i * (self.size + 1);
        let trace: f64 = (0..self.size).map(|i| mean[diagonal(i)]).sum();
        let ridge = 1e-5 * trace / self.size as f64 + f64::MIN_POSITIVE;
        (0..self.size).for_each(|i| mean[diagonal(i)] += ridge);
        mean
    }
}

/// A bounded number of inputs, evenly spaced over all that were seen.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    size: usize,
    most: usize,
    every: usize,
    seen: usize,
    kept: Vec<f32>,
}

impl Sample {
    /// Of at most `most` inputs (2 or more) of `size` elements.
    #[must_use]
    pub(super) fn new(size: usize, most: usize) -> Self {
        Self { size, most: most.max(2), every: 1, seen: 0, kept: Vec::new() }
    }

    /// Looks at inputs `[n, size]`.
    ///
    /// # Errors
    /// An element is not finite.
    pub(super) fn add(&mut self, x: &[f32]) -> Result<()> {
        check_finite(x)?;
        for row in x.chunks_exact(self.size) {
            if self.seen.is_multiple_of(self.every) {
                if self.rows() == self.most {
                    self.thin();
                }
                if self.seen.is_multiple_of(self.every) {
                    self.kept.extend_from_slice(row);
                }
            }
            self.seen += 1;
        }
        Ok(())
    }

    /// Keeps every other input.
    fn thin(&mut self) {
        self.every *= 2;
        let kept: Vec<f32> = self.kept.chunks_exact(self.size).step_by(2).flatten().copied().collect();
        self.kept = kept;
    }

    /// Inputs kept.
    #[must_use]
    pub(super) fn rows(&self) -> usize {
        self.kept.len() / self.size
    }

    pub(super) fn tensor(&self) -> Result<Tensor> {
        Tensor::from_slice(&self.kept, (self.rows(), self.size), &Device::Cpu)
    }
}

fn check_finite(x: &[f32]) -> Result<()> {
    // One NaN or infinity makes the sum of x · 0 a NaN.
    if x.iter().map(|v| v * 0.0).sum::<f32>().is_nan() {
        bail!("calibrate: an input of an FFN is not finite: the checkpoint or the text is broken");
    }
    Ok(())
}
