//! How fast this machine streams memory right now.

use anyhow::Result;
use candle_sparse::{Threads, buffer::Buffer};
use candle_sparse_core::{Columns, KernelSet, Matrix, Rows};
use candle_sparse_kernels::Kernels;
use rayon::{ThreadPool, ThreadPoolBuilder, prelude::*};
use std::time::Instant;

/// Far more than any cache.
const BYTES: usize = 1 << 30;
/// Elements of a row, and rows of a task: so many that handing it over does not count.
const ROW: usize = 4096;
const ROWS: usize = 64;

/// A buffer that is read over and over.
pub(crate) struct Probe {
    buffer: Buffer,
    kernels: &'static Kernels,
    threads: ThreadPool,
}

impl Probe {
    pub(crate) fn new(threads: Threads) -> Result<Self> {
        let mut buffer = Buffer::zeroed(BYTES)?;
        // Untouched pages all alias one zero page and would be read from cache.
        buffer.bytes_mut().fill(1);
        let threads = ThreadPoolBuilder::new().num_threads(threads.count()).build()?;
        Ok(Self { buffer, kernels: Kernels::get().map_err(anyhow::Error::msg)?, threads })
    }

    /// One pass over the buffer on all threads, in 10⁹ bytes per second.
    pub(crate) fn gb_per_s(&mut self) -> Result<f64> {
        let words: &[f32] = bytemuck::cast_slice(self.buffer.bytes());
        let x = [1.0; ROW];
        let start = Instant::now();
        // As a decode step reads its weights: rows times one column, asked for ahead.
        self.threads.install(|| {
            words.par_chunks_exact(ROWS * ROW).try_for_each(|words| {
                let (w, mut y) = (Matrix::new(ROWS, ROW, Rows::F32(words))?, [0.0; ROWS]);
                self.kernels.matmul(w, Columns::F32(&x), &mut [&mut y]);
                std::hint::black_box(&y);
                Ok::<(), candle_sparse_core::Error>(())
            })
        })?;
        Ok(BYTES as f64 / start.elapsed().as_secs_f64() / 1e9)
    }
}
