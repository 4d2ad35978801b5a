//! What several columns cost in units of one, per format and level, from memory, on two threads: a table.
//!
//! `cargo bench -p candle-sparse-benches --bench batch -- q8_0 avx512 2048x5632` measures a part. Matrices of 256 MB and more
//! stand in for a model: each product reads another one. Medians of products that both threads begin together.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a bench is read where it runs")]

use candle_sparse::{Format, Weight, buffer::Buffer, weight::Memory};
use candle_sparse_core::{ActivationGroup, Columns, KernelSet, Matrix};
use candle_sparse_kernels::Kernels;
use std::{error::Error, sync::Barrier, time::Instant};

/// Rows and columns: q and gate of 135M, gate of 1.1B, gate of 7B.
const SHAPES: [(usize, usize); 4] = [(576, 576), (1536, 576), (5632, 2048), (11008, 4096)];
const FORMATS: [Format; 6] =
    [Format::Q8_0, Format::Q4_0, Format::Q4K, Format::Q6K, Format::F16, Format::BF16];
const WIDTHS: [usize; 8] = [1, 2, 4, 8, 16, 32, 64, 512];
const THREADS: usize = 2;
/// Bytes that no cache keeps.
const BYTES: usize = 256 << 20;

/// Columns in both forms.
struct Input {
    plain: Vec<f32>,
    groups: Vec<ActivationGroup>,
}

impl Input {
    fn new(kernels: &Kernels, n: usize, cols: usize) -> Self {
        let plain: Vec<f32> = (0..n * cols).map(|i| (i as f32 * 0.7).sin()).collect();
        let per_column = ActivationGroup::count(cols);
        let mut groups = vec![ActivationGroup::ZERO; n * per_column];
        for (x, groups) in plain.chunks(cols).zip(groups.chunks_mut(per_column)) {
            kernels.quantize(x, groups);
        }
        Self { plain, groups }
    }

    fn columns(&self, format: Format) -> Columns<'_> {
        if format.is_quantized() { Columns::Quantized(&self.groups) } else { Columns::F32(&self.plain) }
    }
}

/// Median seconds of some products, each thread with a share of the rows.
fn time(kernels: &Kernels, matrices: &[Weight], n: usize, products: usize) -> f64 {
    let (rows, cols, format) = (matrices[0].rows(), matrices[0].cols(), matrices[0].format());
    let input = Input::new(kernels, n, cols);
    let barrier = Barrier::new(THREADS);
    let of_thread = |t: usize| {
        let share = (rows / THREADS).next_multiple_of(32);
        let rows = (t * share).min(rows)..if t + 1 == THREADS { rows } else { (t + 1) * share };
        let mut y = vec![0.0; n * rows.len()];
        let mut times: Vec<f64> = (0..products)
            .map(|i| {
                let w: Matrix<'_> = matrices[i % matrices.len()].matrix().slice_rows(rows.clone());
                let mut y: Vec<&mut [f32]> = y.chunks_exact_mut(rows.len()).collect();
                barrier.wait();
                let start = Instant::now();
                kernels.matmul(w, input.columns(format), &mut y);
                start.elapsed().as_secs_f64()
            })
            .collect();
        times.sort_by(f64::total_cmp);
        times[products / 2]
    };
    let of_thread = &of_thread;
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..THREADS).map(|t| scope.spawn(move || of_thread(t))).collect();
        others.into_iter().filter_map(|t| t.join().ok()).fold(of_thread(0), f64::max)
    })
}

fn main() -> Result<(), Box<dyn Error>> {
    // As other benches do: everything once, briefly.
    let test = std::env::args().any(|a| a == "--test");
    let (bytes, products) = if test { (1, [2, 2]) } else { (BYTES, [60, 8]) };
    let products = |n: usize| products[usize::from(n >= 64)];
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let is_wanted = |kinds: &[String], name: &str| {
        let of_kind: Vec<_> = wanted.iter().filter(|w| kinds.contains(w)).collect();
        of_kind.is_empty() || of_kind.iter().any(|w| *w == name)
    };
    let shapes: Vec<String> = SHAPES.iter().map(|(rows, cols)| format!("{rows}x{cols}")).collect();
    let formats: Vec<String> = FORMATS.iter().map(|f| f.name().to_string()).collect();
    let levels: Vec<String> = Kernels::available().map(|k| k.level().name().to_string()).collect();
    if let Some(other) = wanted.iter().find(|w| ![&shapes, &formats, &levels].iter().any(|k| k.contains(w))) {
        return Err(format!("{other}: give some of {shapes:?} {formats:?} {levels:?}").into());
    }
    println!(
        "rows x cols, format, level: us of one column (GB/s); steps of {:?} columns; GMAC/s of the last",
        &WIDTHS[1..]
    );
    let shown = if test { 1 } else { SHAPES.len() };
    for (shape, &(rows, cols)) in
        shapes.iter().zip(&SHAPES).take(shown).filter(|(s, _)| is_wanted(&shapes, s))
    {
        for (name, &format) in formats.iter().zip(&FORMATS).filter(|(n, _)| is_wanted(&formats, n)) {
            if !cols.is_multiple_of(format.block_len()) {
                continue;
            }
            let values: Vec<f32> = (0..rows * cols).map(|i| (i as f32 * 1.3).sin()).collect();
            let one = Weight::from_f32(format, cols, &values)?;
            let mut matrices = Vec::new();
            for _ in 0..bytes.div_ceil(one.bytes()) {
                let mut copy = Buffer::zeroed(one.bytes())?;
                copy.bytes_mut()[..one.bytes()].copy_from_slice(one.as_bytes());
                matrices.push(Weight::from_memory(rows, cols, format, Memory::Buffer(copy))?);
            }
            for kernels in Kernels::available().filter(|k| is_wanted(&levels, k.level().name())) {
                let one_column = time(&kernels, &matrices, 1, products(1));
                let rate = one.bytes() as f64 / one_column / 1e9;
                print!("{shape} {name} {}: {:.1} us ({rate:.1}) |", kernels.level(), one_column * 1e6);
                let mut last = one_column;
                for n in &WIDTHS[1..] {
                    last = time(&kernels, &matrices, *n, products(*n));
                    print!(" {:.2}", last / one_column);
                }
                println!(" | {:.0}", (rows * cols * WIDTHS[WIDTHS.len() - 1]) as f64 / last / 1e9);
            }
        }
    }
    Ok(())
}
