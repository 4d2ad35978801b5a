//! Every level this CPU has, every small length and start offset, extremes, against the scalar definition.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

#[path = "every_level/block_bytes.rs"]
mod block_bytes;

use candle_sparse_core::{
    Activation, ActivationGroup, BLOCK_LEN, BlockQ4_0, BlockQ8_0, Columns, Format, KernelSet, Matrix, Rows,
    Scalar,
};
use candle_sparse_kernels::Kernels;
use common::{Stored, as_multiplied, bound, numbers, quantized};
use half::{bf16, f16};

/// Two units of four rows and one more element: every tail and every tile width occurs.
const LONGEST: usize = if cfg!(miri) { 35 } else { 2 * 4 * BLOCK_LEN + 1 };

fn product<K: KernelSet>(
    k: &K,
    w: Matrix<'_>,
    x: &[f32],
    groups: &[ActivationGroup],
    n: usize,
) -> Vec<Vec<f32>> {
    let columns = if w.format().is_quantized() { Columns::Quantized(groups) } else { Columns::F32(x) };
    let mut y = vec![vec![f32::NAN; w.rows()]; n];
    let mut slices: Vec<&mut [f32]> = y.iter_mut().map(Vec::as_mut_slice).collect();
    k.matmul(w, columns, &mut slices);
    y
}

fn sizes() -> impl Iterator<Item = (usize, usize, usize)> {
    let all = (0..=LONGEST).map(|cols| (5, cols.max(1), 1));
    let shapes = [(0, 32, 2), (1, 32, 1), (3, 64, 2), (4, 96, 3), (7, 172, 4), (9, 48, 5), (13, 160, 9)];
    all.chain(shapes)
}

#[test]
fn matmul_agrees_with_scalar_at_every_length() {
    for kernels in Kernels::available() {
        for (rows, cols, n) in sizes() {
            for format in Format::ALL.into_iter().filter(|f| cols.is_multiple_of(f.block_len())) {
                let stored = Stored::new(format, &numbers(rows * cols, 1));
                let (w, x) = (stored.matrix(rows, cols), numbers(n * cols, 2));
                let groups = quantized(&x, cols);
                let got = product(&kernels, w, &x, &groups, n);
                let x = as_multiplied(&kernels, format, &x);
                let want = product(&Scalar, w, &x, &groups, n);
                for (c, (got, want)) in got.iter().zip(&want).enumerate() {
                    for (r, (g, v)) in got.iter().zip(want).enumerate() {
                        let mut row = vec![0.0; cols];
                        w.dequantize_row(r, &mut row);
                        let size = row.iter().zip(&x[c * cols..]).map(|(a, b)| (a * b).abs()).sum::<f32>();
                        let level = kernels.level();
                        let bound = bound(cols, size * 1.02);
                        assert!(
                            (g - v).abs() <= bound,
                            "{level} {format:?} {rows}x{cols} [{r},{c}]: {g} {v}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_alone_has_the_same_bits_as_among_others() {
    let rows = 101;
    for kernels in Kernels::available() {
        for format in Format::ALL {
            // A rest of a tile of units, unless blocks are as long as a tile.
            let cols = (4 * 96 + 32_usize).next_multiple_of(format.block_len());
            let stored = Stored::new(format, &numbers(rows * cols, 3));
            for n in [1, 2, 3, 7] {
                let (w, x) = (stored.matrix(rows, cols), numbers(n * cols, 4));
                let groups = quantized(&x, cols);
                let all = product(&kernels, w, &x, &groups, n);
                for r in [0, 1, 2, 3, 50, 99, 100] {
                    let alone = product(&kernels, w.slice_rows(r..r + 1), &x, &groups, n);
                    for (all, alone) in all.iter().zip(&alone) {
                        let level = kernels.level();
                        assert_eq!(
                            alone[0].to_bits(),
                            all[r].to_bits(),
                            "{level} {format:?}, {n} columns, row {r}"
                        );
                    }
                }
            }
        }
    }
}

/// A batch answers as its columns alone do: no sum depends on how many there are.
#[test]
fn every_column_has_the_bits_of_a_lone_one() {
    let widths: Vec<usize> = if cfg!(miri) { vec![3] } else { (2..10).chain([16, 33, 65, 131]).collect() };
    for kernels in Kernels::available() {
        for (rows, cols) in [
            (1, 32_usize),
            (5, 39),
            (16, 96),
            (19, 160),
            (21, 299),
            (37, 512),
            (18, 1312),
            (33, 2048 + 256),
            (67, 299),
        ] {
            for format in Format::ALL {
                let cols = cols.next_multiple_of(format.block_len());
                let mut values = numbers(rows * cols, 21);
                // Small and large rows, and zeros.
                values.chunks_mut(cols).enumerate().for_each(|(r, row)| match r % 5 {
                    1 => row.iter_mut().for_each(|v| *v *= 1e-30),
                    2 => row.iter_mut().for_each(|v| *v *= 1e4),
                    3 => row.fill(-0.0),
                    _ => (),
                });
                let stored = Stored::new(format, &values);
                let w = stored.matrix(rows, cols);
                let most = *widths.last().unwrap();
                let mut x = numbers(most * cols, 22);
                x.chunks_mut(cols).enumerate().for_each(|(c, x)| match c % 7 {
                    2 => x.iter_mut().for_each(|v| *v *= 1e-30),
                    3 => x.iter_mut().for_each(|v| *v *= 1e30),
                    4 => x.fill(0.0),
                    5 => x[cols / 2] = f32::INFINITY,
                    _ => (),
                });
                let groups = quantized(&x, cols);
                let per_column = groups.len() / most;
                let lone: Vec<_> = (0..most)
                    .map(|c| {
                        let groups = &groups[c * per_column..(c + 1) * per_column];
                        product(&kernels, w, &x[c * cols..(c + 1) * cols], groups, 1).remove(0)
                    })
                    .collect();
                for &n in &widths {
                    let all = product(&kernels, w, &x[..n * cols], &groups[..n * per_column], n);
                    for (c, (all, lone)) in all.iter().zip(&lone).enumerate() {
                        for (r, (a, b)) in all.iter().zip(lone).enumerate() {
                            let same = a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
                            let level = kernels.level();
                            assert!(same, "{level} {format:?} {rows}x{cols}, {n} columns [{r},{c}]: {a} {b}");
                        }
                    }
                }
            }
        }
    }
}

/// A group whose last block holds `qs` with scale 1.
fn group(qs: &[i8; 32]) -> ActivationGroup {
    let mut group = ActivationGroup::ZERO;
    group.set_block(3, 1.0, qs);
    group
}

#[test]
fn extreme_quants_are_exact() {
    for kernels in Kernels::available() {
        for w in [-128, -127, -1, 0, 1, 127] {
            for x in [-127, -1, 0, 1, 127] {
                let weights = [BlockQ8_0 { d: f16::ONE, qs: [w; 32] }];
                let column = [group(&[x; 32])];
                let matrix = Matrix::new(1, 32, Rows::Q8_0(&weights)).unwrap();
                let got = product(&kernels, matrix, &[], &column, 1)[0][0];
                let want = 32 * i32::from(w) * i32::from(x);
                assert_eq!(got, want as f32, "{} {w} {x}", kernels.level());
            }
        }
        for nibbles in [0x00, 0x0f, 0xf0, 0xff, 0x88] {
            let weights = [BlockQ4_0 { d: f16::ONE, qs: [nibbles; 16] }];
            let column = [group(&core::array::from_fn(|j| if j % 3 == 0 { -127 } else { 127 }))];
            let matrix = Matrix::new(1, 32, Rows::Q4_0(&weights)).unwrap();
            let (got, want) =
                (product(&kernels, matrix, &[], &column, 1), product(&Scalar, matrix, &[], &column, 1));
            assert_eq!(got, want, "{} {nibbles:#x}", kernels.level());
        }
    }
}

#[test]
fn half_precision_loads_every_value_exactly() {
    for kernels in Kernels::available() {
        for start in (0..1 << 16).step_by(if cfg!(miri) { 8192 } else { 32 }) {
            let bits: Vec<u16> = (start..start + 32).map(|b| b as u16).collect();
            let halves: Vec<f16> = bits.iter().map(|&b| f16::from_bits(b)).collect();
            let brains: Vec<bf16> = bits.iter().map(|&b| bf16::from_bits(b)).collect();
            for rows in [Rows::F16(&halves), Rows::BF16(&brains)] {
                let w = Matrix::new(1, 32, rows).unwrap();
                let mut want = [0.0; 32];
                w.dequantize_row(0, &mut want);
                let mut got = [-0.0; 32];
                kernels.matmul_t(w, &[&[1.0]], &mut [&mut got]);
                for (g, v) in got.iter().zip(want) {
                    let same = g.to_bits() == (v + -0.0).to_bits() || (g.is_nan() && v.is_nan());
                    assert!(same, "{} {start:#x}: {g} {v}", kernels.level());
                }
            }
        }
    }
}

#[test]
fn matmul_t_agrees_with_scalar_at_every_length() {
    for kernels in Kernels::available() {
        for (rows, cols, n) in sizes() {
            for format in Format::ALL.into_iter().filter(|f| cols.is_multiple_of(f.block_len())) {
                let stored = Stored::new(format, &numbers(rows * cols, 5));
                let w = stored.matrix(rows, cols);
                let weights = numbers(n * rows, 6);
                let a: Vec<&[f32]> = (0..n).map(|c| &weights[c * rows..(c + 1) * rows]).collect();
                let run = |k: &dyn Fn(&mut [&mut [f32]])| {
                    let mut y = vec![numbers(cols, 7); n];
                    k(&mut y.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>());
                    y
                };
                let got = run(&|y| kernels.matmul_t(w, &a, y));
                let before = run(&|y| kernels.matmul_t_before(w, &a, y, Some(w)));
                let want = run(&|y| Scalar.matmul_t(w, &a, y));
                assert_eq!(got, before, "{} {format:?}: asking for memory changes nothing", kernels.level());
                for (g, v) in got.iter().flatten().zip(want.iter().flatten()) {
                    let level = kernels.level();
                    // At most rows + 1 terms, each of magnitude below 1.1.
                    let bound = bound(rows + 1, (rows + 1) as f32 * 1.1);
                    assert!((g - v).abs() <= bound, "{level} {format:?} {rows}x{cols}: {g} {v}");
                }
            }
        }
    }
}

#[test]
fn a_sum_of_rows_alone_has_the_same_bits_as_among_others() {
    // More rows than a panel, and more results than are computed without one.
    let (rows, n) = (if cfg!(miri) { 2 } else { 70 }, 11);
    for kernels in Kernels::available() {
        for format in Format::ALL {
            let cols = if format.block_len() == 1 { 7 * BLOCK_LEN + 5 } else { 7 * BLOCK_LEN }
                .next_multiple_of(format.block_len());
            let stored = Stored::new(format, &numbers(2 * rows * cols, 14));
            let w = stored.matrix(2 * rows, cols).every(1, 2);
            let weights = numbers(n * rows, 15);
            let a: Vec<&[f32]> = weights.chunks(rows).collect();
            let mut y = vec![numbers(cols, 16); n];
            kernels.matmul_t(w, &a, &mut y.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>());
            for (y, a) in y.iter().zip(a) {
                let mut alone = numbers(cols, 16);
                kernels.matmul_t(w, &[a], &mut [&mut alone]);
                assert_eq!(*y, alone, "{} {format:?}", kernels.level());
            }
        }
    }
}

#[test]
fn vectors_agree_with_scalar_at_every_length_and_offset() {
    for kernels in Kernels::available() {
        let level = kernels.level();
        for len in 0..=LONGEST {
            for offset in [0, 1, 3, 7] {
                let (x, w) = (&numbers(len + offset, 8)[offset..], &numbers(len + offset, 9)[offset..]);
                let size = x.iter().zip(w).map(|(a, b)| (a * b).abs()).sum::<f32>();
                let (got, want) = (kernels.dot(x, w), Scalar.dot(x, w));
                assert!((got - want).abs() <= bound(len, size), "{level} dot {len}: {got} {want}");

                let mut got = w.to_vec();
                let mut want = w.to_vec();
                kernels.axpy(0.7, x, &mut got);
                Scalar.axpy(0.7, x, &mut want);
                close(&got, &want, 2.0 * f32::EPSILON, "axpy");

                kernels.rms_norm(x, w, 1e-5, &mut got);
                Scalar.rms_norm(x, w, 1e-5, &mut want);
                close(&got, &want, (len as f32 + 8.0) * f32::EPSILON, "rms_norm");

                let (mut got, mut want) = (x.to_vec(), x.to_vec());
                kernels.softmax(&mut got);
                Scalar.softmax(&mut want);
                close(&got, &want, (len as f32 + 8.0) * f32::EPSILON, "softmax");

                for max_before in [f32::NEG_INFINITY, 0.5, 30.0] {
                    if len == 0 && max_before.is_infinite() {
                        continue;
                    }
                    let (mut got, mut want) = (x.to_vec(), x.to_vec());
                    let (g, v) =
                        (kernels.exp_sum(&mut got, max_before), Scalar.exp_sum(&mut want, max_before));
                    close(&got, &want, 4.0 * f32::EPSILON, "exp_sum");
                    assert_eq!(g.0, v.0, "{level} exp_sum {len}: the maximum is exact");
                    assert!((g.1 - v.1).abs() <= bound(len, v.1), "{level} exp_sum {len}: {} {}", g.1, v.1);
                }
            }
        }
    }
}

fn close(got: &[f32], want: &[f32], bound: f32, what: &str) {
    for (i, (g, v)) in got.iter().zip(want).enumerate() {
        assert!((g - v).abs() <= bound * v.abs().max(1.0), "{what}, len {}, [{i}]: {g} {v}", got.len());
    }
}

/// Distance in units in the last place, NaN equal to NaN.
fn ulp(a: f32, b: f32) -> u64 {
    if a.is_nan() && b.is_nan() {
        return 0;
    }
    let key = |v: f32| {
        let bits = i64::from(v.to_bits().cast_signed());
        if bits < 0 { i64::from(i32::MIN) - bits } else { bits }
    };
    key(a).abs_diff(key(b))
}

#[test]
fn activations_are_within_six_ulp_over_the_whole_range() {
    let step = if cfg!(miri) { 30_000_001 } else { 20_011 };
    let all: Vec<f32> = (0..u32::MAX).step_by(step).map(f32::from_bits).collect();
    let special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN, 1e-40, -1e-40];
    let gate: Vec<f32> = all.into_iter().chain(special).collect();
    for kernels in Kernels::available() {
        for act in [
            Activation::Silu,
            Activation::Gelu,
            Activation::GeluPytorchTanh,
            Activation::Relu,
            Activation::Relu2,
            Activation::FatRelu { threshold: 0.25 },
            Activation::DRelu,
        ] {
            let (mut got, mut want) = (vec![1.0; gate.len()], vec![1.0; gate.len()]);
            kernels.gated(act, 0.0, &gate, &mut got);
            Scalar.gated(act, 0.0, &gate, &mut want);
            for ((&g, &v), x) in got.iter().zip(&want).zip(&gate) {
                // Subnormal results carry an absolute, not a relative error.
                let tiny = (g - v).abs() < 1e-43;
                assert!(tiny || ulp(g, v) <= 6, "{} {act:?}({x}): {g} {v}", kernels.level());
            }
        }
    }
}

#[test]
fn gate_shift_and_tails_follow_scalar() {
    for kernels in Kernels::available() {
        for len in 0..=LONGEST {
            let (gate, up) = (numbers(len, 10), numbers(len, 11));
            let (mut got, mut want) = (up.clone(), up);
            kernels.gated(Activation::Relu, 0.25, &gate, &mut got);
            Scalar.gated(Activation::Relu, 0.25, &gate, &mut want);
            assert_eq!(got, want, "{} {len}", kernels.level());
        }
    }
}

#[test]
fn quantize_equals_scalar_bit_for_bit() {
    for kernels in Kernels::available() {
        for seed in 0..if cfg!(miri) { 2 } else { 200 } {
            let mut x = numbers(160, seed);
            x.iter_mut().for_each(|v| *v *= 2f32.powi(seed as i32 - 100));
            x[40] = 0.5 / 127.0;
            if seed % 5 == 0 {
                x[64 + seed as usize % 32] = [f32::NAN, f32::INFINITY, f32::MAX][seed as usize % 3];
            }
            let dirty =
                ActivationGroup { neg_sums: [[7; 4]; 3], ..ActivationGroup::quantize(&[[0.5; 32]; 4]) };
            for blocks in [4, 5, 1] {
                let (mut got, mut want) = ([dirty; 2], [dirty; 2]);
                let n = ActivationGroup::count(32 * blocks);
                kernels.quantize(&x[..32 * blocks], &mut got[..n]);
                Scalar.quantize(&x[..32 * blocks], &mut want[..n]);
                for (g, w) in got.iter().zip(&want) {
                    let same =
                        |(g, w): (&f32, &f32)| g.to_bits() == w.to_bits() || (g.is_nan() && w.is_nan());
                    assert!(g.d.iter().zip(&w.d).all(same), "{g:?} {w:?}");
                    assert_eq!((g.neg_sums, g.qs), (w.neg_sums, w.qs), "{}", kernels.level());
                }
            }
        }
    }
}

#[test]
fn infinities_and_nan_come_through_products() {
    for kernels in Kernels::available() {
        for (x, check) in [(f32::INFINITY, f32::is_infinite as fn(f32) -> bool), (f32::NAN, f32::is_nan)] {
            let mut column = vec![1.0; 40];
            column[33] = x;
            let w = vec![1.0; 40];
            let matrix = Matrix::new(1, 40, Rows::F32(&w)).unwrap();
            let got = product(&kernels, matrix, &column, &[], 1)[0][0];
            assert!(check(got), "{} {x}: {got}", kernels.level());
        }
    }
}
