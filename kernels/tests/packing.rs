//! Columns that are packed once for all rows, at every level this CPU has.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use candle_sparse_core::{Columns, Format, KernelSet, Matrix};
use candle_sparse_kernels::{Kernels, Level, PackedColumns, Packing};
use common::{Stored, numbers};
use std::panic::{AssertUnwindSafe, catch_unwind};

fn product(kernels: &Kernels, w: Matrix<'_>, x: &[f32], n: usize) -> Vec<Vec<f32>> {
    let mut y = vec![vec![f32::NAN; w.rows()]; n];
    let mut slices: Vec<&mut [f32]> = y.iter_mut().map(Vec::as_mut_slice).collect();
    kernels.matmul(w, Columns::F32(x), &mut slices);
    y
}

/// Columns that were packed once serve all rows of a matrix, whichever pieces they were packed in.
#[test]
#[cfg_attr(miri, ignore = "too much work")]
fn packed_columns_give_the_bits_of_plain_ones() {
    let mut packed = 0;
    for kernels in Kernels::available() {
        for format in Format::ALL {
            // More rows and columns than are packed, and gone through, at once.
            for (rows, cols, n) in [(37, 256_usize, 48), (5, 307, 530), (300, 4096 + 256, 800), (70, 512, 61)]
            {
                let cols = cols.next_multiple_of(format.block_len());
                let Some(packing) = kernels.packing(format, n, cols) else { continue };
                packed += 1;
                let stored = Stored::new(format, &numbers(rows * cols, 5));
                let (w, x) = (stored.matrix(rows, cols), numbers(n * cols, 6));
                let plain = product(&kernels, w, &x, n);
                let mut words = vec![f32::NAN; packing.words(n)];
                let pieces = x.chunks(3 * Packing::COLUMNS * cols);
                for (x, words) in pieces.zip(words.chunks_mut(packing.words(3 * Packing::COLUMNS))) {
                    let _: PackedColumns<'_> = kernels.pack(packing, x, words);
                }
                let columns = PackedColumns::new(packing, n, &words);
                let mut y = vec![vec![f32::NAN; rows]; n];
                for cut in [0..rows / 3, rows / 3..rows] {
                    let mut y: Vec<&mut [f32]> = y.iter_mut().map(|y| &mut y[cut.clone()]).collect();
                    kernels.matmul_packed(w.slice_rows(cut), columns, &mut y);
                }
                for (c, (y, plain)) in y.iter().zip(&plain).enumerate() {
                    let lone = product(&kernels, w, &x[c * cols..(c + 1) * cols], 1).remove(0);
                    for (r, ((y, plain), lone)) in y.iter().zip(plain).zip(&lone).enumerate() {
                        let level = kernels.level();
                        assert_eq!(
                            y.to_bits(),
                            plain.to_bits(),
                            "{level} {format:?} {rows}x{cols} [{r},{c}]"
                        );
                        assert_eq!(y.to_bits(), lone.to_bits(), "{level} {format:?} {rows}x{cols} [{r},{c}]");
                    }
                }
            }
        }
    }
    let levels = Kernels::available().filter(|k| k.level() != Level::Scalar).count();
    assert_eq!(packed, 4 * 3 * levels, "F32, F16 and BF16 of every level but the scalar one");
}

/// Words of another packing are refused, not multiplied.
#[test]
fn packed_columns_of_another_format_are_refused() {
    let Some(kernels) = Kernels::available().find(|k| k.level() != Level::Scalar) else { return };
    let packing = kernels.packing(Format::F32, 48, 256).unwrap();
    let (x, mut words) = (numbers(48 * 256, 1), vec![0.0; packing.words(48)]);
    let columns = kernels.pack(packing, &x, &mut words);
    let stored = Stored::new(Format::F16, &numbers(2 * 256, 2));
    let mut y = vec![[0.0; 2]; 48];
    let mut y: Vec<&mut [f32]> = y.iter_mut().map(|y| &mut y[..]).collect();
    let refused = AssertUnwindSafe(|| kernels.matmul_packed(stored.matrix(2, 256), columns, &mut y));
    assert!(catch_unwind(refused).is_err());
    // Nothing times nothing is nothing.
    let none = PackedColumns::new(packing, 0, &[]);
    kernels.matmul_packed(Stored::new(Format::F32, &numbers(2 * 256, 2)).matrix(2, 256), none, &mut []);
    // Parts are of about one size, and hold what they may, or a piece.
    let bytes = 4 * packing.words(512);
    assert_eq!(
        (packing.part(512, bytes), packing.part(512, bytes - 1), packing.part(512, 1)),
        (516, 264, 12)
    );
    assert!(
        kernels.packing(Format::F32, 8, 256).is_none() && kernels.packing(Format::Q8_0, 48, 256).is_none()
    );
}
