//! The format that rows take where they cannot take the one asked for.

use super::{Part, format_of};
use candle_sparse_core::Format;
use std::collections::BTreeMap;

impl Part {
    /// How the rows are stored; `None`: in a dtype that weights do not have.
    #[must_use]
    pub fn format(&self) -> Option<Format> {
        match self {
            Self::Tensor(t) => format_of(t.dtype()),
            Self::Weight(w) => Some(w.format()),
        }
    }

    /// Bytes of the rows as they are stored.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match self {
            Self::Tensor(t) => t.elem_count() * t.dtype().size_in_bytes(),
            Self::Weight(w) => w.bytes(),
        }
    }

    /// The format that rows of `cols` elements take where `wanted` is asked for: `wanted`, if they are whole blocks of it. Else the
    /// widest that fits and is no wider than `wanted` (the narrowest that fits, if all are wider), unless the rows are
    /// stored in no more bits already: then they stay as they are, and so do rows that fit no block.
    #[must_use]
    pub fn fitting(&self, wanted: Format, cols: usize) -> Format {
        let fits = |format: &Format| cols.is_multiple_of(format.block_len());
        if fits(&wanted) {
            return wanted;
        }
        let stored = self.format().unwrap_or(Format::F16);
        // Widest first.
        let mut blocks = Format::ALL.into_iter().filter(|f| f.is_quantized() && fits(f));
        let narrowest = blocks.clone().next_back();
        match blocks.find(|f| bits(*f) <= bits(wanted)).or(narrowest) {
            Some(format) if bits(format) < bits(stored) => format,
            _ => stored,
        }
    }
}

/// Bits of a number of elements that every format has whole blocks of.
fn bits(format: Format) -> usize {
    format.row_bytes(candle_sparse_core::SUPER_BLOCK_LEN)
}

/// Counts what became of the matrices of a model for which a format was asked, and says it to the user.
///
/// ```
/// use candle_sparse::{Format, weight::Conversions};
///
/// let mut conversions = Conversions::default();
/// // Four matrices with rows of 100 elements: no whole blocks, so they stayed as they were.
/// conversions.note(Format::Q8_0, 4, 100, 8_000, Format::F16, 8_000);
/// let notices = conversions.notices(Format::Q8_0);
/// assert!(notices[0].contains("4 matrices of 100 columns"), "{notices:?}");
/// ```
#[derive(Clone, Debug, Default)]
pub struct Conversions {
    /// How many did not take it, by columns and what they are in.
    others: BTreeMap<(usize, &'static str), usize>,
    before: usize,
    after: usize,
}

impl Conversions {
    /// Notes `matrices` of `cols` columns that took `before` bytes and are `after` bytes in `got` now.
    pub fn note(
        &mut self,
        wanted: Format,
        matrices: usize,
        cols: usize,
        before: usize,
        got: Format,
        after: usize,
    ) {
        if got != wanted {
            *self.others.entry((cols, got.name())).or_default() += matrices;
        }
        self.before += before;
        self.after += after;
    }

    /// At most one line on rows that do not fit, and one on a format that makes a model larger.
    #[must_use]
    pub fn notices(&self, wanted: Format) -> Vec<String> {
        let mut notices = Vec::new();
        if !self.others.is_empty() {
            let one = |((cols, got), n): (&(usize, &str), &usize)| {
                let s = if *n == 1 { "matrix" } else { "matrices" };
                format!("{n} {s} of {cols} columns in {got}")
            };
            let all: Vec<_> = self.others.iter().map(one).collect();
            let (wanted, block) = (wanted.name(), wanted.block_len());
            notices
                .push(format!("columns are no multiple of {block}, as {wanted} needs: {}", all.join(", ")));
        }
        if self.after > self.before {
            let [before, after] = [self.before, self.after].map(|bytes| bytes as f64 / 1e6);
            let wanted = wanted.name();
            notices.push(format!(
                "{wanted} makes the weights larger, not better: {after:.1} MB, where {before:.1} MB are stored"
            ));
        }
        notices
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Weight;
    use candle_core::{DType, Device, Tensor};

    #[test]
    fn rows_that_are_no_whole_blocks_take_no_wider_format() {
        use Format::{BF16, F16, F32, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
        let tensor =
            |cols: usize, dtype| -> Part { Tensor::zeros((2, cols), dtype, &Device::Cpu).unwrap().into() };
        let stored = |format, cols: usize| -> Part {
            Weight::from_f32(format, cols, &vec![0.5; cols]).unwrap().into()
        };
        for (part, cols, wanted, expected) in [
            (tensor(256, DType::F32), 256, Q4K, Q4K),
            (tensor(64, DType::F32), 64, Q8_0, Q8_0),
            (tensor(64, DType::F32), 64, Q6K, Q5_1),
            (tensor(64, DType::F32), 64, Q5K, Q5_0),
            (tensor(64, DType::F32), 64, Q4K, Q4_0),
            (tensor(64, DType::F16), 64, Q3K, Q4_0),
            (tensor(64, DType::BF16), 64, Q2K, Q4_0),
            // No block fits: as it is stored.
            (tensor(172, DType::F32), 172, Q4K, F32),
            (tensor(172, DType::BF16), 172, Q8_0, BF16),
            (tensor(172, DType::F16), 172, F32, F32),
            // What is stored in less stays.
            (stored(Q4_0, 64), 64, Q6K, Q4_0),
            (stored(Q4_0, 64), 64, Q4K, Q4_0),
            (stored(Q4_1, 64), 64, Q4K, Q4_0),
            (stored(Q4_1, 64), 64, Q5K, Q4_1),
            (stored(Q5_1, 64), 64, Q6K, Q5_1),
            (stored(Q8_0, 64), 64, Q3K, Q4_0),
            // What fits is as asked, larger or not.
            (stored(Q4_0, 64), 64, Q8_0, Q8_0),
            (stored(F16, 64), 64, F32, F32),
        ] {
            assert_eq!(part.fitting(wanted, cols), expected, "{:?} {cols} {wanted:?}", part.format());
        }
    }

    #[test]
    fn notices_are_summed_up() {
        let mut all = Conversions::default();
        for _ in 0..3 {
            all.note(Format::Q4K, 1, 64, 1000, Format::Q4_0, 500);
        }
        all.note(Format::Q4K, 1, 172, 1000, Format::F32, 1000);
        all.note(Format::Q4K, 7, 256, 1000, Format::Q4K, 100);
        let line = "columns are no multiple of 256, as q4_k needs: 3 matrices of 64 columns in q4_0, 1 matrix of 172 \
                    columns in f32";
        assert_eq!(all.notices(Format::Q4K), [line]);
        let mut grown = Conversions::default();
        grown.note(Format::Q8_0, 1, 64, 1_000_000, Format::Q8_0, 2_000_000);
        assert_eq!(
            grown.notices(Format::Q8_0),
            ["q8_0 makes the weights larger, not better: 2.0 MB, where 1.0 MB are stored"]
        );
    }
}
