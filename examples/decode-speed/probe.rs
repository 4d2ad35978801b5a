//! How fast this machine streams memory right now.

use anyhow::Result;
use candle_sparse::{Threads, buffer::Buffer, core::KernelSet, kernels::Kernels, threads::ranges};
use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Instant,
};

/// Far more than any cache.
const BYTES: usize = 1 << 30;
/// Elements that are summed in one go, so many that the call does not count.
const CHUNK: usize = 256 * 1024;

/// A buffer that is read over and over.
pub(crate) struct Probe {
    buffer: Buffer,
    kernels: &'static Kernels,
    threads: Threads,
}

impl Probe {
    pub(crate) fn new(threads: Threads) -> Result<Self> {
        let mut buffer = Buffer::zeroed(BYTES)?;
        // Untouched pages all alias one zero page and would be read from cache.
        buffer.bytes_mut().fill(1);
        Ok(Self { buffer, kernels: Kernels::get().map_err(anyhow::Error::msg)?, threads })
    }

    /// One pass over the buffer on all threads, in 10⁹ bytes per second.
    pub(crate) fn gb_per_s(&mut self) -> f64 {
        let words: &[f32] = bytemuck::cast_slice(self.buffer.bytes());
        // Keeps the sums alive.
        let sink = AtomicU32::new(0);
        let start = Instant::now();
        let tasks = ranges(words.len(), self.threads.count() * 8, CHUNK);
        self.threads.for_each(tasks, |r| {
            let sum: f32 = words[r].chunks(CHUNK).map(|c| self.kernels.dot(c, c)).sum();
            sink.fetch_xor(sum.to_bits(), Ordering::Relaxed);
        });
        std::hint::black_box(sink.load(Ordering::Relaxed));
        BYTES as f64 / start.elapsed().as_secs_f64() / 1e9
    }
}
