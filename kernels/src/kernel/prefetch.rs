//! Asking for memory before it is needed.

use crate::arch::prefetch;
use candle_sparse_core::{BLOCK_LEN, Matrix};

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

    /// What is read after the units of `w`.
    pub(crate) fn new(w: Matrix<'_>, next: Option<Matrix<'a>>) -> Self {
        let Some(bytes) = next.map(|w| w.data().bytes()) else { return Self::NOTHING };
        let rows = (w.rows() * (w.cols() / BLOCK_LEN)).max(1);
        Self { bytes, lines: bytes.len().div_ceil(LINE).div_ceil(rows), done: 0 }
    }

    #[inline(always)]
    pub(crate) fn is_nothing(self) -> bool {
        self.lines == 0
    }

    /// After so many more rows.
    #[inline(always)]
    pub(crate) fn after(self, rows: usize) -> Self {
        Self { done: self.done + rows, ..self }
    }

    /// Asks for what belongs to row `r` of those to come.
    #[inline(always)]
    pub(crate) fn row(self, r: usize) {
        let first = (self.done + r) * self.lines;
        let ask = |line: usize| {
            if line * LINE < self.bytes.len() {
                prefetch(self.bytes, line * LINE);
            }
        };
        // Most pages have a line or two for each row: a loop would cost more than what it asks for.
        match self.lines {
            1 => ask(first),
            2 => {
                ask(first);
                ask(first + 1);
            }
            lines => (first..first + lines).for_each(ask),
        }
    }

    /// Asks for all of it.
    #[inline(always)]
    pub(crate) fn all(self) {
        for byte in (0..self.bytes.len()).step_by(LINE) {
            prefetch(self.bytes, byte);
        }
    }
}
