//! How fast this machine streams memory right now.

use anyhow::Result;
use candle_sparse::{Threads, buffer::Buffer};
use candle_sparse_core::KernelSet;
use candle_sparse_kernels::Kernels;
use rayon::{ThreadPool, ThreadPoolBuilder, prelude::*};
use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Instant,
};

/// Far more than any cache.
const BYTES: usize = 1 << 30;
/// Elements of a task, so many that handing it over does not count.
const CHUNK: usize = 256 * 1024;

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
    pub(crate) fn gb_per_s(&mut self) -> f64 {
        let words: &[f32] = bytemuck::cast_slice(self.buffer.bytes());
        // Keeps the sums alive.
        let sink = AtomicU32::new(0);
        let start = Instant::now();
        self.threads.install(|| {
            words.par_chunks(CHUNK).for_each(|c| {
                sink.fetch_xor(self.kernels.dot(c, c).to_bits(), Ordering::Relaxed);
            });
        });
        std::hint::black_box(sink.load(Ordering::Relaxed));
        BYTES as f64 / start.elapsed().as_secs_f64() / 1e9
    }
}
