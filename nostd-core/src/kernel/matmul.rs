//! Products of a matrix of any format with a few columns.

use crate::{
    format::{ActivationGroup, BLOCK_LEN, SUPER_BLOCK_LEN, f16_to_f32},
    matrix::{Columns, Matrix, Rows},
};

/// Panics unless the operands of [`matmul`] fit together; every implementation calls it once at its head.
///
/// # Panics
/// Wrong form of `x` for the format of `w`, wrong number of columns, or a wrong length in `y`.
pub fn check_matmul(w: &Matrix<'_>, x: &Columns<'_>, y: &[&mut [f32]]) {
    assert!(x.fits(w.format()), "matmul: columns are in the wrong form for {:?}", w.format());
    assert_eq!(x.count(w.cols()), y.len(), "matmul: as many results as columns");
    assert!(y.iter().all(|y| y.len() == w.rows()), "matmul: a result has not {} rows", w.rows());
}

/// Panics unless the operands of [`matmul_t`] fit together; every implementation calls it once at its head.
///
/// # Panics
/// `a` and `y` differ in number, or a length is wrong.
pub fn check_matmul_t(w: &Matrix<'_>, a: &[&[f32]], y: &[&mut [f32]]) {
    assert_eq!(a.len(), y.len(), "matmul_t: as many results as columns");
    assert!(a.iter().all(|a| a.len() == w.rows()), "matmul_t: a column has not {} rows", w.rows());
    assert!(y.iter().all(|y| y.len() == w.cols()), "matmul_t: a result has not {} columns", w.cols());
}

/// `y[c][r] = Σ_k w[r, k] · x[c, k]`; see [`crate::KernelSet::matmul`].
///
/// # Panics
/// Shapes do not fit ([`check_matmul`]).
pub fn matmul(w: Matrix<'_>, x: Columns<'_>, y: &mut [&mut [f32]]) {
    check_matmul(&w, &x, y);
    for (c, y) in y.iter_mut().enumerate() {
        products(w, x.column(c, w.cols()), 0..w.rows(), y);
    }
}

/// `y[i] = Σ_k w[rows[i], k] · x[k]` for one column.
pub(super) fn products(
    w: Matrix<'_>,
    x: Columns<'_>,
    rows: impl Iterator<Item = usize> + Clone,
    y: &mut [f32],
) {
    match x {
        Columns::F32(x) => {
            rows.zip(y).for_each(|(r, y)| *y = dot_float(w.slice_rows(r..r + 1).data(), x));
        }
        Columns::Quantized(x) => {
            // What a sum of nothing is.
            y.fill(-0.0);
            let n = w.cols() / BLOCK_LEN;
            for first in (0..n).step_by(TOGETHER) {
                let x = Unpacked::new(x, n, first);
                add_products(w, &x, rows.clone(), y);
            }
        }
    }
}

fn dot_float(row: Rows<'_>, x: &[f32]) -> f32 {
    match row {
        Rows::F32(w) => w.iter().zip(x).map(|(w, x)| w * x).sum(),
        Rows::F16(w) => w.iter().zip(x).map(|(w, x)| f16_to_f32(w.to_bits()) * x).sum(),
        Rows::BF16(w) => w.iter().zip(x).map(|(w, x)| w.to_f32() * x).sum(),
        _ => f32::NAN,
    }
}

/// Blocks of a column that all rows are multiplied with before the next ones are unpacked.
const TOGETHER: usize = SUPER_BLOCK_LEN / BLOCK_LEN;

/// Blocks of a column in element order, unpacked once for all rows.
struct Unpacked {
    /// The first block.
    first: usize,
    n: usize,
    blocks: [(f32, [i16; BLOCK_LEN]); TOGETHER],
}

impl Unpacked {
    /// Up to [`TOGETHER`] blocks of a column of `n` from block `first` on.
    fn new(x: &[ActivationGroup], n: usize, first: usize) -> Self {
        let mut blocks = [(0.0, [0; BLOCK_LEN]); TOGETHER];
        let end = n.min(first + TOGETHER);
        for (block, i) in blocks.iter_mut().zip(first..end) {
            let (group, b) = ActivationGroup::place(i, n);
            let (d, _, qs) = x[group].block(b);
            *block = (d, qs.map(i16::from));
        }
        Self { first, n: end - first, blocks }
    }

    fn blocks(&self) -> &[(f32, [i16; BLOCK_LEN])] {
        &self.blocks[..self.n]
    }
}

/// Adds the part of each row's product that some blocks make.
fn add_products(w: Matrix<'_>, x: &Unpacked, mut rows: impl Iterator<Item = usize>, y: &mut [f32]) {
    match w.data() {
        Rows::Q8_0(blocks) => add_integer_products(blocks, w.stride(), x, rows, y, |w, d, x| {
            f16_to_f32(w.d.to_bits()) * d * dot_i8(&w.qs, x)
        }),
        Rows::Q4_0(blocks) => add_integer_products(blocks, w.stride(), x, rows, y, |w, d, x| {
            f16_to_f32(w.d.to_bits()) * d * dot_i8(&w.unpack(), x)
        }),
        data => {
            let len = data.format().block_len() / BLOCK_LEN;
            let data = data.slice(x.first / len..data.blocks());
            data.for_each_block((w.stride(), x.n / len), &mut rows, &mut |i, k, values| {
                let blocks = x.blocks()[k / BLOCK_LEN..].iter().zip(values.as_chunks::<BLOCK_LEN>().0);
                for ((d, qs), values) in blocks {
                    y[i] += d * values.iter().zip(qs).map(|(w, q)| w * f32::from(*q)).sum::<f32>();
                }
            });
        }
    }
}

fn add_integer_products<B>(
    w: &[B],
    stride: usize,
    x: &Unpacked,
    rows: impl Iterator<Item = usize>,
    y: &mut [f32],
    product: impl Fn(&B, f32, &[i16; BLOCK_LEN]) -> f32,
) {
    for (r, y) in rows.zip(y) {
        let start = r * stride + x.first;
        let mut sum = *y;
        for (w, (d, x)) in w[start..start + x.n].iter().zip(x.blocks()) {
            sum += product(w, *d, x);
        }
        *y = sum;
    }
}

/// Exact: at most 32 · 128 · 127, which f32 holds.
fn dot_i8(a: &[i8; BLOCK_LEN], b: &[i16; BLOCK_LEN]) -> f32 {
    a.iter().zip(b).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum::<i32>() as f32
}

/// `y[c][k] += Σ_r a[c][r] · w[r, k]`; see [`crate::KernelSet::matmul_t`].
///
/// # Panics
/// Shapes do not fit ([`check_matmul_t`]).
pub fn matmul_t(w: Matrix<'_>, a: &[&[f32]], y: &mut [&mut [f32]]) {
    check_matmul_t(&w, a, y);
    add_rows(w, 0..w.rows(), |i, c| a[c][i], y);
}

/// `y[c][k] += Σ_i a(i, c) · w[rows[i], k]`, added in their order; each element is read once for all columns.
pub(super) fn add_rows(
    w: Matrix<'_>,
    mut rows: impl Iterator<Item = usize>,
    a: impl Fn(usize, usize) -> f32,
    y: &mut [&mut [f32]],
) {
    let mut add = |i: usize, k: usize, values: &[f32]| {
        for (c, y) in y.iter_mut().enumerate() {
            add_scaled(a(i, c), values, &mut y[k..k + values.len()]);
        }
    };
    let stride = w.stride();
    match w.data() {
        Rows::F32(d) => {
            rows.enumerate().for_each(|(i, r)| add(i, 0, &d[r * stride..r * stride + w.cols()]));
        }
        data @ (Rows::F16(_) | Rows::BF16(_)) => {
            let mut values = [0.0; BLOCK_LEN];
            for (i, r) in rows.enumerate() {
                for k in (0..w.cols()).step_by(BLOCK_LEN) {
                    let values = &mut values[..BLOCK_LEN.min(w.cols() - k)];
                    let start = r * stride + k;
                    data.slice(start..start + values.len()).dequantize(values);
                    add(i, k, values);
                }
            }
        }
        data => data.for_each_block((stride, w.row_blocks()), &mut rows, &mut add),
    }
}

/// `y += a · x`, in arrays of a block: a compiler makes vectors of those.
#[inline]
fn add_scaled(a: f32, x: &[f32], y: &mut [f32]) {
    let ((xs, x), (ys, y)) = (x.as_chunks::<BLOCK_LEN>(), y.as_chunks_mut::<BLOCK_LEN>());
    for (x, y) in xs.iter().zip(ys) {
        for k in 0..BLOCK_LEN {
            y[k] += a * x[k];
        }
    }
    x.iter().zip(y).for_each(|(x, y)| *y += a * x);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Format;
    use std::{vec, vec::Vec};

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        (0..n as u32)
            .map(|i| {
                let h = (i + 1).wrapping_mul(2_654_435_761).wrapping_add(seed.wrapping_mul(40_503));
                (h >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    #[test]
    fn by_hand() {
        let w = Matrix::new(2, 3, Rows::F32(&[1.0, 2.0, 3.0, -1.0, 0.0, 4.0])).unwrap();
        let (mut y0, mut y1) = ([0.0; 2], [0.0; 2]);
        matmul(w, Columns::F32(&[1.0, 1.0, 1.0, 0.0, 2.0, 1.0]), &mut [&mut y0, &mut y1]);
        assert_eq!((y0, y1), ([6.0, 3.0], [7.0, 4.0]));
        let mut y = [10.0, 0.0, 0.0];
        matmul_t(w, &[&[2.0, 1.0]], &mut [&mut y]);
        assert_eq!(y, [11.0, 4.0, 10.0]);
    }

    #[test]
    fn every_format_agrees_with_its_dequantised_f64_product() {
        for (format, cols) in Format::ALL.into_iter().flat_map(|f| [(f, 512_usize), (f, 288), (f, 32)]) {
            if !cols.is_multiple_of(format.block_len()) {
                continue;
            }
            let rows = 5;
            let (wf, x) = (numbers(rows * cols, 1), numbers(cols, 2));
            let xq: Vec<_> = x.as_chunks().0.chunks(4).map(ActivationGroup::quantize).collect();
            let len = format.row_bytes(wf.len());
            let mut words = vec![0_u32; len.div_ceil(4)];
            let bytes = &mut bytemuck::cast_slice_mut(&mut words)[..len];
            format.quantize(&wf, bytes);
            let w = Matrix::from_bytes(rows, cols, format, bytes).unwrap();
            let quantized = w.format().is_quantized();
            let columns = if quantized { Columns::Quantized(&xq) } else { Columns::F32(&x) };
            let mut y = vec![0.0; rows];
            matmul(w, columns, &mut [&mut y]);
            for (r, &got) in y.iter().enumerate() {
                let mut row = vec![0.0; cols];
                w.dequantize_row(r, &mut row);
                let (mut want, mut size) = (0.0_f64, 0.0_f64);
                for k in 0..cols {
                    let (group, b) = ActivationGroup::place(k / BLOCK_LEN, cols / BLOCK_LEN);
                    let (d, _, qs) = xq[group].block(b);
                    let xk = if quantized { d * f32::from(qs[k % BLOCK_LEN]) } else { x[k] };
                    want += f64::from(row[k]) * f64::from(xk);
                    size += (f64::from(row[k]) * f64::from(xk)).abs();
                }
                // A sum of n rounded terms errs by at most n·ε·Σ|terms|.
                let bound = cols as f64 * f64::from(f32::EPSILON) * size;
                assert!((f64::from(got) - want).abs() <= bound, "{:?} row {r}: {got} {want}", w.format());
            }
        }
    }

    #[test]
    #[should_panic(expected = "wrong form")]
    fn float_columns_for_a_quantised_matrix_are_refused() {
        let q = [crate::BlockQ8_0::quantize(&[1.0; 32])];
        let w = Matrix::new(1, 32, Rows::Q8_0(&q)).unwrap();
        matmul(w, Columns::F32(&[0.0; 32]), &mut [&mut [0.0]]);
    }
}
