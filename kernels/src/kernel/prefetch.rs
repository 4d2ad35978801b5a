//! Asking for memory before it is needed.

use crate::isa::Isa;
use candle_sparse_core::Matrix;

const LINE: usize = 64;

/// Memory to be asked for line by line, in step with a loop over rows: a burst would fill the buffers of pending misses.
#[derive(Clone, Copy)]
pub(crate) struct Ahead<'a> {
    /// Bytes, and lines of them per row.
    of: [(&'a [u8], usize); 2],
}

impl<'a> Ahead<'a> {
    pub(crate) const NOTHING: Ahead<'static> = Ahead { of: [(&[], 0); 2] };

    /// What is read after a matrix of so many rows.
    #[inline(always)]
    pub(crate) fn new(rows: usize, next: [Option<Matrix<'a>>; 2]) -> Self {
        let lines = |bytes: &[u8]| bytes.len().div_ceil(LINE).div_ceil(rows.max(1));
        let of = next.map(|w| w.map_or(&[][..], |w| w.data().bytes()));
        Self { of: of.map(|bytes| (bytes, lines(bytes))) }
    }

    /// Asks for what belongs to row `r`.
    #[inline(always)]
    pub(crate) fn row<I: Isa>(self, isa: I, r: usize) {
        for (bytes, lines) in self.of {
            for line in r * lines..(r + 1) * lines {
                if line * LINE < bytes.len() {
                    isa.prefetch(bytes, line * LINE);
                }
            }
        }
    }
}

/// Asks for every cache line of a matrix.
#[inline(always)]
pub(crate) fn prefetch<I: Isa>(isa: I, w: Matrix<'_>) {
    let bytes = w.data().bytes();
    for byte in (0..bytes.len()).step_by(LINE) {
        isa.prefetch(bytes, byte);
    }
}
