//! Products with some rows: equal to dense ones bit for bit, to the scalar definition within rounding.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use candle_sparse_core::{Activation, BLOCK_LEN, Format, GluActivation, KernelSet, Neurons, Scalar};
use candle_sparse_kernels::Kernels;
use common::{Stored, bound, column, numbers, quantized};

/// Neurons of the test matrices.
const COUNT: usize = 23;

/// Every length up to two units and one more, and where a K-quant fits, two of its blocks.
fn lengths() -> impl Iterator<Item = usize> {
    let longest = if cfg!(miri) { 33 } else { 8 * BLOCK_LEN + 1 };
    (1..=longest).chain([288, 512])
}

/// Nothing, one row, runs, gaps, everything.
fn sets(count: usize) -> Vec<Vec<u32>> {
    let n = count as u32;
    let some = |keep: &dyn Fn(u32) -> bool| (0..n).filter(|&r| keep(r)).collect();
    vec![vec![], vec![n - 1], some(&|r| r % 3 == 1), some(&|r| r / 5 % 2 == 0), some(&|_| true)]
}

fn cases(mut f: impl FnMut(&Kernels, Format, usize)) {
    for kernels in Kernels::available() {
        for cols in lengths() {
            for format in Format::ALL.into_iter().filter(|f| cols.is_multiple_of(f.block_len())) {
                f(&kernels, format, cols);
            }
        }
    }
}

#[test]
fn rows_have_the_bits_of_the_dense_product() {
    cases(|kernels, format, cols| {
        let stored = Stored::new(format, &numbers(COUNT * cols, 1));
        let (w, x) = (stored.matrix(COUNT, cols), numbers(cols, 2));
        let groups = if format.is_quantized() { quantized(&x, cols) } else { Vec::new() };
        let x = column(format, &x, &groups);
        let mut dense = [0.0; COUNT];
        kernels.matmul(w, x, &mut [&mut dense]);
        for rows in sets(COUNT) {
            let mut y = vec![f32::NAN; rows.len()];
            kernels.matvec_rows(w, &rows, x, &mut y);
            for (&r, y) in rows.iter().zip(&y) {
                let same = y.to_bits() == dense[r as usize].to_bits();
                assert!(same, "{} {format:?} {cols} columns, row {r} of {rows:?}", kernels.level());
            }
        }
    });
}

#[test]
fn every_third_row_is_a_matrix_of_its_own() {
    cases(|kernels, format, cols| {
        let values = numbers(COUNT * cols, 12);
        let all = Stored::new(format, &values);
        let picked: Vec<f32> = values.chunks(cols).skip(1).step_by(3).flatten().copied().collect();
        let rows = picked.len() / cols;
        let stored = Stored::new(format, &picked);
        let (strided, plain) = (all.matrix(COUNT, cols).every(1, 3), stored.matrix(rows, cols));
        assert_eq!(strided.rows(), rows);
        let (level, n) = (kernels.level(), 5);
        let x = numbers(n * cols, 13);
        let groups = if format.is_quantized() { quantized(&x, cols) } else { Vec::new() };
        let products = |w, n: usize| {
            let per_column = groups.len() / 5;
            let x = column(format, &x[..n * cols], &groups[..n * per_column]);
            let mut y = vec![vec![0.0; rows]; n];
            kernels.matmul(w, x, &mut y.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>());
            y
        };
        for n in [1, 2, n] {
            assert_eq!(products(strided, n), products(plain, n), "{level} {format:?} {cols} x {n}");
        }
        let sums = |w| {
            let (a, mut y) = (numbers(rows, 14), vec![0.0; cols]);
            kernels.matmul_t(w, &[&a], &mut [&mut y]);
            kernels.axpy_rows(w, &[0, rows as u32 - 1], &a[..2], &mut y);
            y
        };
        assert_eq!(sums(strided), sums(plain), "{level} {format:?} {cols}");
    });
}

#[test]
fn axpy_rows_agrees_with_scalar_and_does_not_depend_on_the_cut() {
    cases(|kernels, format, cols| {
        let stored = Stored::new(format, &numbers(COUNT * cols, 3));
        let w = stored.matrix(COUNT, cols);
        for rows in sets(COUNT) {
            let a = numbers(rows.len(), 4);
            let start = numbers(cols, 5);
            let (mut got, mut want, mut cut) = (start.clone(), start.clone(), start);
            kernels.axpy_rows(w, &rows, &a, &mut got);
            Scalar.axpy_rows(w, &rows, &a, &mut want);
            for (&row, &a) in rows.iter().zip(&a) {
                kernels.axpy_rows(w, &[row], &[a], &mut cut);
            }
            let level = kernels.level();
            // At most rows + 1 terms, each of magnitude below 1.3 (a coarse format overshoots).
            let bound = bound(rows.len() + 1, (rows.len() + 1) as f32 * 1.3);
            for ((g, v), c) in got.iter().zip(&want).zip(&cut) {
                assert!((g - v).abs() <= bound, "{level} {format:?} {cols} columns, {rows:?}: {g} {v}");
                assert_eq!(g.to_bits(), c.to_bits(), "{level} {format:?} {cols} columns, {rows:?}");
            }
        }
    });
}

#[test]
fn sparse_ffn_is_its_three_steps() {
    let acts = [Activation::Silu, Activation::Relu, Activation::Gelu];
    cases(|kernels, format, cols| {
        let act = GluActivation { act: acts[cols % 3], shift: if cols % 2 == 0 { 0.0 } else { 0.1 } };
        let stored = Stored::new(format, &numbers(3 * COUNT * cols, 6));
        let x = numbers(cols, 7);
        let groups = if format.is_quantized() { quantized(&x, cols) } else { Vec::new() };
        let x = column(format, &x, &groups);
        let (level, three) = (kernels.level(), stored.matrix(3 * COUNT, cols));
        let (two, one) = (stored.matrix(2 * COUNT, cols), stored.matrix(COUNT, cols));
        for active in sets(COUNT) {
            for w in [Neurons::GateUpDown(three), Neurons::UpDown(two), Neurons::Down(one)] {
                let per = w.rows_per_neuron() as u32;
                let rows = |at: u32| active.iter().map(|n| n * per + at).collect::<Vec<_>>();
                let mut gate = numbers(active.len(), 8);
                let (mut got_gate, mut a) = (gate.clone(), vec![1.0; active.len()]);
                if per == 3 {
                    kernels.matvec_rows(w.matrix(), &rows(0), x, &mut gate);
                }
                if per >= 2 {
                    kernels.matvec_rows(w.matrix(), &rows(per - 2), x, &mut a);
                }
                kernels.gated(act.act, act.shift, &gate, &mut a);
                let (mut got, mut want) = (numbers(cols, 9), numbers(cols, 9));
                kernels.axpy_rows(w.matrix(), &rows(per - 1), &a, &mut want);
                kernels.sparse_ffn(w, act, &active, x, &mut got_gate, &mut got);
                assert_eq!(got_gate, gate, "{level} {format:?} {cols} columns");
                assert_eq!(got, want, "{level} {format:?} {cols} columns, {active:?}");
            }
        }
    });
}

#[test]
fn the_order_of_neurons_in_memory_changes_only_the_rounding() {
    let (cols, act) = (96, GluActivation { act: Activation::Silu, shift: 0.0 });
    let (values, x) = (numbers(3 * COUNT * cols, 10), numbers(cols, 11));
    let groups = quantized(&x, cols);
    let active: Vec<u32> = (0..COUNT as u32).collect();
    for kernels in Kernels::available() {
        for format in Format::ALL.into_iter().filter(|f| cols.is_multiple_of(f.block_len())) {
            let x = column(format, &x, &groups);
            let run = |values: &[f32]| {
                let stored = Stored::new(format, values);
                let (mut gate, mut y) = (vec![0.0; COUNT], vec![0.0; cols]);
                let w = Neurons::GateUpDown(stored.matrix(3 * COUNT, cols));
                kernels.sparse_ffn(w, act, &active, x, &mut gate, &mut y);
                y
            };
            let reversed: Vec<f32> = values.rchunks_exact(3 * cols).flatten().copied().collect();
            for (a, b) in run(&values).iter().zip(run(&reversed)) {
                // Gates and ups stay below 0.6 · 96 / 3 each; 23 terms.
                assert!((a - b).abs() <= bound(COUNT, COUNT as f32 * 400.0), "{format:?}: {a} {b}");
            }
        }
    }
}
