//! Rows and columns as words of 32 bits, of which 32 are multiplied at a time.

use crate::isa::Isa;
use std::borrow::Cow;

/// Numbers that are multiplied as words: one f32 or two BF16s.
pub(super) trait Words: Copy {
    /// As many numbers as 32 words hold.
    type Unit: Copy;

    /// The whole units of a row.
    fn units(row: &[Self]) -> &[Self::Unit];
    /// What follows them, filled up with zeros; `None` where nothing does.
    fn rest(row: &[Self]) -> Option<Self::Unit>;
    /// Vector `i` of the words.
    fn word<I: Isa>(isa: I, unit: &Self::Unit, i: usize) -> I::V;
}

/// Numbers of a matrix that are multiplied as words.
pub(super) trait Factors: Words {
    /// The numbers of a column, as they are given.
    type Column: Words;
    /// The same words, for many rows.
    type Prepared: Words;

    fn column(x: &[f32]) -> &[Self::Column];
    fn prepared<I: Isa>(isa: I, x: &[f32]) -> Cow<'_, [Self::Prepared]>;
    /// `acc + w · x`, word by word.
    fn add<I: Isa>(isa: I, w: I::V, x: I::V, acc: I::V) -> I::V;
}

/// [`Words`] of a type of which a unit has `$n`.
macro_rules! words {
    ($t:ty, $n:literal, $zero:expr, |$isa:ident, $unit:ident, $i:ident| $word:expr) => {
        impl $crate::format::words::Words for $t {
            type Unit = [Self; $n];

            #[inline(always)]
            fn units(row: &[Self]) -> &[[Self; $n]] {
                row.as_chunks().0
            }

            #[inline(always)]
            fn rest(row: &[Self]) -> Option<[Self; $n]> {
                let rest = row.as_chunks::<$n>().1;
                // First, or a unit of zeros is made for each row that has no rest.
                if rest.is_empty() {
                    return None;
                }
                let mut unit = [$zero; $n];
                unit[..rest.len()].copy_from_slice(rest);
                Some(unit)
            }

            #[inline(always)]
            fn word<I: Isa>($isa: I, $unit: &[Self; $n], $i: usize) -> I::V {
                $word
            }
        }
    };
}
