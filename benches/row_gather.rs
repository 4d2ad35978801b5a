//! What a gathered byte costs: the FFN of random neurons from memory, beside plain loads of the same rows and beside
//! reading everything in order. One line per format, share and mean run length; medians of rounds taken in turn.
//!
//! `cargo bench --bench row_gather` (GB/s of the rows' bytes, all threads, random weights). `-- --test` runs it once, small.

mod common;

use candle_sparse::{Format, Threads, buffer::Buffer};
use candle_sparse_core::{Activation, ActivationGroup, Columns, GluActivation, KernelSet, Matrix, Neurons};
use candle_sparse_kernels::Kernels;
use common::{median, random_set};
use rayon::prelude::*;
use std::{error::Error, hint::black_box, io::Write, time::Instant};

const HIDDEN: usize = 2048;
const GATE: GluActivation = GluActivation { act: Activation::Silu, shift: 0.0 };

/// Neurons in a buffer that no cache holds, and what they are multiplied with.
struct Ffn {
    format: Format,
    count: usize,
    rows: Buffer,
    x: Vec<f32>,
    groups: Vec<ActivationGroup>,
}

impl Ffn {
    fn new(format: Format, bytes: usize, kernels: &Kernels) -> Result<Self, Box<dyn Error>> {
        let row = format.row_bytes(HIDDEN);
        let count = bytes / row / 3;
        let mut rows = Buffer::zeroed(count * row * 3)?;
        let values: Vec<f32> = (0..HIDDEN).map(|i| (i as f32 * 0.7).sin()).collect();
        let mut one = vec![0; row];
        format.quantize(&values, &mut one);
        rows.bytes_mut().chunks_exact_mut(row).for_each(|r| r.copy_from_slice(&one));
        let mut groups = vec![ActivationGroup::ZERO; ActivationGroup::count(HIDDEN)];
        kernels.quantize(&values, &mut groups);
        Ok(Self { format, count, rows, x: values, groups })
    }

    fn neuron_bytes(&self) -> usize {
        3 * self.format.row_bytes(HIDDEN)
    }

    /// Seconds of the FFN of the active neurons.
    fn compute(&self, threads: Threads, kernels: &Kernels, active: &[u32]) -> Result<f64, Box<dyn Error>> {
        let m = Matrix::from_bytes(3 * self.count, HIDDEN, self.format, self.rows.bytes())?;
        let x =
            if self.format.is_quantized() { Columns::Quantized(&self.groups) } else { Columns::F32(&self.x) };
        let start = Instant::now();
        parts(threads, active).for_each(|part| {
            let (mut gate, mut y) = (vec![0.0; part.len()], vec![0.0; HIDDEN]);
            kernels.sparse_ffn(Neurons::GateUpDown(m), GATE, part, x, &mut gate, &mut y);
            black_box(y);
        });
        Ok(start.elapsed().as_secs_f64())
    }

    /// Seconds of loading the same bytes and adding them up.
    fn load(&self, threads: Threads, kernels: &Kernels, active: &[u32]) -> f64 {
        let words: &[f32] = bytemuck::cast_slice(self.rows.bytes());
        let n = self.neuron_bytes() / 4;
        let start = Instant::now();
        parts(threads, active).for_each(|part| {
            for run in part.chunk_by(|a, b| a + 1 == *b) {
                let first = run[0] as usize * n;
                let row = &words[first..first + run.len() * n];
                black_box(kernels.dot(row, row));
            }
        });
        start.elapsed().as_secs_f64()
    }
}

/// Eight tasks for each of rayon's threads, which are as many as candle's.
fn parts(threads: Threads, active: &[u32]) -> impl ParallelIterator<Item = &[u32]> {
    active.par_chunks(active.len().div_ceil(threads.count() * 8).max(1))
}

fn main() -> Result<(), Box<dyn Error>> {
    let test = std::env::args().any(|a| a == "--test");
    let (bytes, rounds) = if test { (4 << 20, 1) } else { (1 << 30, 7) };
    let (threads, kernels) = (Threads::default(), Kernels::get()?);
    let mut out = std::io::stdout();
    writeln!(out, "level {}, {} threads, neurons of 3 rows of {HIDDEN}", kernels.level(), threads.count())?;
    for format in [Format::F16, Format::Q8_0, Format::Q4_0] {
        let ffn = Ffn::new(format, bytes, kernels)?;
        let all: Vec<u32> = (0..ffn.count as u32).collect();
        for share in [0.1, 0.25, 0.5] {
            for run in [1.0, 4.0, 16.0, 64.0] {
                let active = random_set(ffn.count, share, run, 7);
                let mut gb_per_s = [const { Vec::new() }; 4];
                for _ in 0..rounds {
                    for (i, out) in gb_per_s.iter_mut().enumerate() {
                        let set = if i < 2 { &active } else { &all };
                        let seconds = match i % 2 {
                            0 => ffn.compute(threads, kernels, set)?,
                            _ => ffn.load(threads, kernels, set),
                        };
                        out.push((set.len() * ffn.neuron_bytes()) as f64 / seconds / 1e9);
                    }
                }
                let runs = active.chunk_by(|a, b| a + 1 == *b).count();
                let [sparse, loads, dense, stream] = gb_per_s.map(median);
                writeln!(
                    out,
                    "{:>5} {:3.0} % active, mean run {:5.1}: {sparse:5.1} GB/s, plain loads {loads:5.1} ({:.2} of them); \
                     all neurons {dense:5.1}, plain {stream:5.1}",
                    format.name(),
                    active.len() as f64 / ffn.count as f64 * 100.0,
                    active.len() as f64 / runs as f64,
                    sparse / loads
                )?;
            }
        }
    }
    Ok(())
}
