//! Products with matrices that lie one below the other, each in its own format.

use super::{Activations, Compute, Prepared, Weight};
use crate::threads::ranges;
use candle_core::{Result, bail};
use candle_sparse_core::{Format, Matrix};
use candle_sparse_kernels::Kernels;
use std::ops::Range;

/// Tasks get whole panels of the kernels, which are 32 rows high.
pub(crate) const ROW_STEP: usize = 32;

/// A matrix `[rows, cols]` whose rows are those of one or more weights, so that one hand-over serves all of them.
///
/// A checkpoint in one float dtype makes one weight of q, k and v; a GGUF keeps its own three, which may differ in format.
#[derive(Clone, Debug)]
pub(crate) struct Stack {
    weights: Vec<Weight>,
    rows: usize,
    cols: usize,
}

impl From<Weight> for Stack {
    fn from(weight: Weight) -> Self {
        Self { rows: weight.rows(), cols: weight.cols(), weights: vec![weight] }
    }
}

impl Stack {
    /// The rows of `weights`, one below the other.
    ///
    /// # Errors
    /// They differ in columns, or there is none.
    pub(crate) fn new(weights: Vec<Weight>) -> Result<Self> {
        let Some(first) = weights.first() else { bail!("stack: no matrix is given") };
        let cols = first.cols();
        if let Some(other) = weights.iter().find(|w| w.cols() != cols) {
            bail!("stack: matrices of {cols} and of {} columns", other.cols());
        }
        Ok(Self { rows: weights.iter().map(Weight::rows).sum(), cols, weights })
    }

    /// The same numbers in another format.
    ///
    /// # Errors
    /// As [`Weight::to_format`].
    pub(crate) fn to_format(&self, format: Format) -> Result<Self> {
        Self::new(self.weights.iter().map(|w| w.to_format(format)).collect::<Result<_>>()?)
    }

    /// Rows.
    #[must_use]
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    #[must_use]
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Some rows, which must lie in one weight.
    ///
    /// # Errors
    /// They do not.
    pub(crate) fn part(&self, rows: Range<usize>) -> Result<Matrix<'_>> {
        let mut first = 0;
        for weight in &self.weights {
            let end = first + weight.rows();
            if first <= rows.start && rows.end <= end {
                return Ok(weight.matrix().slice_rows(rows.start - first..rows.end - first));
            }
            first = end;
        }
        bail!("stack: rows {rows:?} do not lie in one of its matrices")
    }

    /// Bytes held.
    #[must_use]
    pub(crate) fn bytes(&self) -> usize {
        self.weights.iter().map(Weight::bytes).sum()
    }

    /// How the elements are stored.
    pub(crate) fn formats(&self) -> impl Iterator<Item = Format> + Clone {
        self.weights.iter().map(Weight::format)
    }

    /// `y[c][r − rows.start] = Σ_k w[r, k] · x[c, k]` for some rows, on the calling thread.
    ///
    /// # Panics
    /// Rows past the end, or shapes that do not fit.
    pub(crate) fn multiply(
        &self,
        kernels: &Kernels,
        rows: Range<usize>,
        x: Activations<'_>,
        y: &mut [&mut [f32]],
    ) {
        multiply(&self.weights, kernels, rows, x, y);
    }

    /// `y[c][r] = Σ_k w[r, k] · x[c, k]` for the rows of `x` `[n, cols]`, into `y` `[n, rows]`, over all threads.
    ///
    /// For one column nothing is allocated once `prepared` has room. Cost: `n · rows · cols` multiply-adds; the weights are read
    /// once per call, or per [`Compute::at_once`] columns.
    ///
    /// # Panics
    /// Shapes do not fit.
    pub(crate) fn matmul(&self, on: Compute<'_>, x: &[f32], prepared: &mut Prepared, y: &mut [f32]) {
        matmul(&self.weights, on, x, prepared, y);
    }
}

impl Weight {
    /// As [`Stack::matmul`], for one matrix.
    ///
    /// # Panics
    /// Shapes do not fit.
    pub(crate) fn matmul(&self, on: Compute<'_>, x: &[f32], prepared: &mut Prepared, y: &mut [f32]) {
        matmul(std::slice::from_ref(self), on, x, prepared, y);
    }
}

fn multiply(
    weights: &[Weight],
    kernels: &Kernels,
    rows: Range<usize>,
    x: Activations<'_>,
    y: &mut [&mut [f32]],
) {
    let (mut start, mut done) = (0, 0);
    for w in weights {
        let r = rows.start.max(start)..rows.end.min(start + w.rows());
        if r.start < r.end {
            let matrix = w.matrix().slice_rows(r.start - start..r.end - start);
            let part = done..done + r.len();
            match y {
                _ if r.len() == rows.len() => return x.multiply(kernels, matrix, y),
                // A lone column, as in decode, must not allocate.
                [y] => x.multiply(kernels, matrix, &mut [&mut y[part]]),
                _ => {
                    let mut y: Vec<_> = y.iter_mut().map(|y| &mut y[part.clone()]).collect();
                    x.multiply(kernels, matrix, &mut y);
                }
            }
            done += r.len();
        }
        start += w.rows();
    }
}

fn matmul(weights: &[Weight], on: Compute<'_>, x: &[f32], prepared: &mut Prepared, y: &mut [f32]) {
    let cols = weights[0].cols();
    let rows: usize = weights.iter().map(Weight::rows).sum();
    let n = x.len() / cols.max(1);
    assert_eq!(y.len(), n * rows, "matmul: y is not [n, rows]");
    let formats = weights.iter().map(Weight::format);
    let part = on.at_once(formats.clone(), cols, n);
    if part < n {
        let parts = x.chunks(part * cols).zip(y.chunks_mut((part * rows).max(1)));
        return parts.for_each(|(x, y)| matmul(weights, on, x, prepared, y));
    }
    let x = on.input(formats, cols, x, prepared);
    let bytes: usize = weights.iter().map(Weight::bytes).sum();
    let tasks = on.threads.tasks(rows.div_ceil(ROW_STEP), n * bytes);
    if n == 1 {
        let mut rest = y;
        let tasks = ranges(rows, tasks, ROW_STEP).map(|r| {
            let (part, tail) = core::mem::take(&mut rest).split_at_mut(r.len());
            rest = tail;
            (r, part)
        });
        on.threads.for_each(tasks, |(r, y)| multiply(weights, on.kernels, r, x, &mut [y]));
    } else {
        let ranges: Vec<_> = ranges(rows, tasks, ROW_STEP).collect();
        let parts = split_columns(y, rows, ranges.iter().map(ExactSizeIterator::len));
        on.threads.for_each(ranges.into_iter().zip(parts), |(r, mut y)| {
            multiply(weights, on.kernels, r, x, &mut y);
        });
    }
}

/// `y` `[n, width]` cut along its rows: item `i` holds, for each of the `n` rows, the next `widths[i]` elements.
pub(crate) fn split_columns(
    y: &mut [f32],
    width: usize,
    widths: impl Iterator<Item = usize> + Clone,
) -> Vec<Vec<&mut [f32]>> {
    let n = y.len() / width.max(1);
    let mut parts: Vec<Vec<&mut [f32]>> = widths.clone().map(|_| Vec::with_capacity(n)).collect();
    for mut row in y.chunks_exact_mut(width.max(1)) {
        for (part, w) in parts.iter_mut().zip(widths.clone()) {
            let (head, tail) = row.split_at_mut(w);
            part.push(head);
            row = tail;
        }
    }
    parts
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::threads::Threads;

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 31 + seed * 17) % 211) as f32 / 64.0 - 1.6).collect()
    }

    /// Every column as it is alone, whatever the memory held before: formats that are packed, are not, and are quantised; more
    /// columns than are packed at once.
    #[test]
    fn many_columns_have_the_bits_of_lone_ones_in_a_stack_of_formats() {
        let on = Compute { kernels: Kernels::get().unwrap(), threads: Threads::default() };
        let stack = |formats: &[Format], rows, cols| {
            let weight = |(i, &f)| Weight::from_f32(f, cols, &numbers(rows * cols, i)).unwrap();
            Stack::new(formats.iter().enumerate().map(weight).collect()).unwrap()
        };
        let mixed = stack(&[Format::F16, Format::BF16, Format::Q8_0, Format::F16], 70, 288);
        let wide = stack(&[Format::F32], 3, 8192);
        let mut prepared = Prepared::default();
        for (stack, n) in [(&mixed, 130), (&wide, 520), (&mixed, 49), (&mixed, 3)] {
            let (rows, cols) = (stack.rows(), stack.cols());
            let x = numbers(n * cols, n);
            let (mut all, mut alone) = (vec![f32::NAN; n * rows], vec![f32::NAN; n * rows]);
            stack.matmul(on, &x, &mut prepared, &mut all);
            for (x, y) in x.chunks(cols).zip(alone.chunks_mut(rows)) {
                stack.matmul(on, x, &mut Prepared::default(), y);
            }
            let bits = |y: &[f32]| y.iter().map(|y| y.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&all), bits(&alone), "{n} columns");
        }
    }
}
