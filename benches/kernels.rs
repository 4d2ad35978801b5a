//! One group per kernel and format, one row per level: bytes of weights per second on one thread, from the L2 cache.
//!
//! `cargo bench --bench kernels -- matvec/q8_0` runs a part. What memory allows is measured by `decode-speed`, not here.
#![allow(missing_docs, reason = "criterion's macros make the entry points")]
#![allow(clippy::print_stderr, reason = "a bench is read where it runs")]

use candle_core::{Device, Result, Tensor};
use candle_sparse::{Format, Weight};
use candle_sparse_core::{Activation, ActivationGroup, Columns, KernelSet};
use candle_sparse_kernels::Kernels;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;

/// Rows and columns of a matrix that stays in a cache of 1 MiB in every format but F32.
const SHAPE: (usize, usize) = (128, 2048);

fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * 0.7).sin()).collect()
}

fn weight(format: Format) -> Result<Weight> {
    let (rows, cols) = SHAPE;
    Weight::from_tensor(&Tensor::from_vec(numbers(rows * cols), (rows, cols), &Device::Cpu)?, format)
}

fn products(c: &mut Criterion) -> Result<()> {
    let (rows, cols) = SHAPE;
    for format in Format::ALL {
        let w = weight(format)?;
        for columns in [1, 8] {
            let name = if columns == 1 { "matvec" } else { "matmul-8" };
            let mut group = c.benchmark_group(format!("{name}/{}", format.name()));
            group.throughput(Throughput::Bytes(w.bytes() as u64));
            let x = numbers(columns * cols);
            for kernels in Kernels::available() {
                let per_column = ActivationGroup::count(cols);
                let mut groups = vec![ActivationGroup::ZERO; columns * per_column];
                for (x, groups) in x.chunks(cols).zip(groups.chunks_mut(per_column)) {
                    kernels.quantize(x, groups);
                }
                let mut y = vec![0.0; columns * rows];
                group.bench_function(kernels.level().name(), |b| {
                    b.iter(|| {
                        let mut y: Vec<&mut [f32]> = y.chunks_exact_mut(rows).collect();
                        let quantized = Columns::Quantized(&groups);
                        let x = if format.is_quantized() { quantized } else { Columns::F32(&x) };
                        kernels.matmul(w.matrix(), black_box(x), &mut y);
                    });
                });
            }
        }
        let rows_of_all: Vec<u32> = (0..rows as u32).collect();
        let mut group = c.benchmark_group(format!("axpy_rows/{}", format.name()));
        group.throughput(Throughput::Bytes(w.bytes() as u64));
        let a = numbers(rows);
        for kernels in Kernels::available() {
            let mut y = vec![0.0; cols];
            group.bench_function(kernels.level().name(), |b| {
                b.iter(|| kernels.axpy_rows(w.matrix(), &rows_of_all, black_box(&a), &mut y));
            });
        }
        group.finish();
        let mut group = c.benchmark_group(format!("matmul_t/{}", format.name()));
        group.throughput(Throughput::Bytes(w.bytes() as u64));
        let a = numbers(rows);
        for kernels in Kernels::available() {
            let mut y = vec![0.0; cols];
            group.bench_function(kernels.level().name(), |b| {
                b.iter(|| kernels.matmul_t(w.matrix(), &[black_box(&a)], &mut [&mut y]));
            });
        }
    }
    Ok(())
}

fn vectors(c: &mut Criterion) {
    const N: usize = 4096;
    let (x, w) = (numbers(N), numbers(N));
    let mut run = |name: &str, f: &dyn Fn(&Kernels, &mut [f32])| {
        let mut group = c.benchmark_group(name);
        group.throughput(Throughput::Elements(N as u64));
        for kernels in Kernels::available() {
            let mut y = w.clone();
            group.bench_function(kernels.level().name(), |b| {
                b.iter(|| {
                    y.copy_from_slice(&w);
                    f(&kernels, black_box(&mut y));
                });
            });
        }
    };
    run("dot", &|k, y| {
        black_box(k.dot(&x, y));
    });
    run("axpy", &|k, y| k.axpy(0.5, &x, y));
    run("rms_norm", &|k, y| k.rms_norm(&x, &w, 1e-5, y));
    run("softmax", &|k, y| k.softmax(y));
    run("gated-silu", &|k, y| k.gated(Activation::Silu, 0.0, &x, y));
    run("gated-relu", &|k, y| k.gated(Activation::Relu, 0.0, &x, y));
}

fn all(c: &mut Criterion) {
    if let Err(e) = products(c) {
        eprintln!("matrix kernels were not measured: {e}");
    }
    vectors(c);
}

criterion_group!(benches, all);
criterion_main!(benches);
