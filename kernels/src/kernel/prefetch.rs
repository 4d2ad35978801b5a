//! Asking for memory before it is needed.

use crate::isa::Isa;
use candle_sparse_core::Matrix;

const LINE: usize = 64;

/// Memory to be asked for line by line, in step with a loop over rows: a burst would fill the buffers of pending misses.
#[derive(Clone, Copy)]
pub(crate) struct Ahead<'a> {
    bytes: &'a [u8],
    /// Lines per row.
    lines: usize,
    /// Rows that are done.
    done: usize,
}

impl<'a> Ahead<'a> {
    pub(crate) const NOTHING: Ahead<'static> = Ahead { bytes: &[], lines: 0, done: 0 };

    /// What is read after a loop over so many rows.
    #[inline(always)]
    pub(crate) fn new(rows: usize, next: Option<Matrix<'a>>) -> Self {
        let bytes = next.map_or(&[][..], |w| w.data().bytes());
        Self { bytes, lines: bytes.len().div_ceil(LINE).div_ceil(rows.max(1)), done: 0 }
    }

    /// After so many more rows.
    #[inline(always)]
    pub(crate) fn after(self, rows: usize) -> Self {
        Self { done: self.done + rows, ..self }
    }

    /// Asks for what belongs to row `r` of those to come.
    #[inline(always)]
    pub(crate) fn row<I: Isa>(self, isa: I, r: usize) {
        let first = (self.done + r) * self.lines;
        for line in first..first + self.lines {
            if line * LINE < self.bytes.len() {
                isa.prefetch(self.bytes, line * LINE);
            }
        }
    }

    /// Asks for all of it.
    #[inline(always)]
    pub(crate) fn all<I: Isa>(self, isa: I) {
        for byte in (0..self.bytes.len()).step_by(LINE) {
            isa.prefetch(self.bytes, byte);
        }
    }
}

/// Asks for every cache line of a matrix.
#[inline(always)]
pub(crate) fn prefetch<I: Isa>(isa: I, w: Matrix<'_>) {
    Ahead::new(1, Some(w)).all(isa);
}
