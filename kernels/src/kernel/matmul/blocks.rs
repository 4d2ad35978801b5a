//! Blocks of 32 in fours, and what all blocks share.

use super::Operand;
use crate::isa::Isa;
use candle_sparse_core::{
    ActivationGroup, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K,
    BlockQ6K, BlockQ8_0,
};

/// A block, `N` of which make a unit of one or two groups.
pub(super) trait Block<const N: usize>: Copy {
    /// Vector `V` of group `G` of a unit. Constants, because half of what is computed from them is constant then.
    fn vector<I: Isa, const G: usize, const V: usize>(isa: I, w: &[Self; N]) -> impl Vector<I>;
}

/// Weights in registers, ready for any number of columns.
pub(super) trait Vector<I: Isa> {
    /// The product with vector `i` of a group, but for the scales of the group.
    fn times(&self, isa: I, x: &ActivationGroup, i: usize) -> I::V;
}

macro_rules! block_operand {
    ($($t:ty: $n:literal blocks, groups $($g:literal)*;)*) => {$(
        impl Operand for $t {
            type Unit = [$t; $n];
            type Column = ActivationGroup;
            type ColumnUnit = [ActivationGroup; { [$($g),*].len() }];

            #[inline(always)]
            fn units(row: &[Self]) -> &[Self::Unit] {
                row.as_chunks().0
            }

            #[inline(always)]
            fn column_units(x: &[ActivationGroup]) -> &[Self::ColumnUnit] {
                x.as_chunks().0
            }

            #[inline(always)]
            fn last<'a>(row: &'a [Self], room: &'a mut Option<Self::Unit>) -> Option<&'a Self::Unit> {
                if row.as_chunks::<$n>().1.is_empty() {
                    return None;
                }
                // The column's last group is zero where there is no block, or one that was computed already.
                row.last_chunk().or_else(|| {
                    let room = room.insert([row[0]; $n]);
                    room[$n - row.len()..].copy_from_slice(row);
                    Some(room)
                })
            }

            #[inline(always)]
            fn last_of_column<'a>(
                x: &'a [ActivationGroup],
                room: &'a mut Option<Self::ColumnUnit>,
            ) -> &'a Self::ColumnUnit {
                x.last_chunk().unwrap_or_else(|| room.insert([ActivationGroup::ZERO; _]))
            }

            #[inline(always)]
            fn add<I: Isa, const R: usize, const C: usize>(
                isa: I,
                acc: &mut [[I::V; C]; R],
                w: [&Self::Unit; R],
                x: [&Self::ColumnUnit; C],
            ) {
                $(
                    let mut group = [&x[0][$g]; C];
                    for c in 1..C {
                        group[c] = &x[c][$g];
                    }
                    add_vector::<I, $t, $n, $g, 0, R, C>(isa, acc, w, group);
                    if I::LANES < 16 {
                        add_vector::<I, $t, $n, $g, 1, R, C>(isa, acc, w, group);
                    }
                    if I::LANES < 8 {
                        add_vector::<I, $t, $n, $g, 2, R, C>(isa, acc, w, group);
                        add_vector::<I, $t, $n, $g, 3, R, C>(isa, acc, w, group);
                    }
                )*
            }
        }
    )*};
}

block_operand! {
    BlockQ8_0: 4 blocks, groups 0;
    BlockQ6K: 1 blocks, groups 0 1;
    BlockQ5_1: 4 blocks, groups 0;
    BlockQ5_0: 4 blocks, groups 0;
    BlockQ5K: 1 blocks, groups 0 1;
    BlockQ4_1: 4 blocks, groups 0;
    BlockQ4_0: 4 blocks, groups 0;
    BlockQ4K: 1 blocks, groups 0 1;
    BlockQ3K: 1 blocks, groups 0 1;
    BlockQ2K: 1 blocks, groups 0 1;
}

#[inline(always)]
fn add_vector<
    I: Isa,
    T: Block<N>,
    const N: usize,
    const G: usize,
    const V: usize,
    const R: usize,
    const C: usize,
>(
    isa: I,
    acc: &mut [[I::V; C]; R],
    w: [&[T; N]; R],
    x: [&ActivationGroup; C],
) {
    for r in 0..R {
        let w = T::vector::<I, G, V>(isa, w[r]);
        for c in 0..C {
            acc[r][c] = isa.mul_add(w.times(isa, x[c], V), isa.load_lanes(&x[c].d, V), acc[r][c]);
        }
    }
}

/// An expression of each of four blocks. Not `map`, which LLVM stops inlining where there is much of it.
macro_rules! four {
    ($w:ident, |$b:ident| $e:expr) => {
        four!(@ $w $b $e, 0 1 2 3)
    };
    (@ $w:ident $b:ident $e:expr, $($i:literal)*) => {
        [$({ let $b = &$w[$i]; $e }),*]
    };
}

/// Both halves of vector `i`.
#[inline(always)]
pub(super) fn quants<I: Isa>(isa: I, x: &ActivationGroup, i: usize) -> [I::I; 2] {
    [isa.load_quants(&x.qs[0], i), isa.load_quants(&x.qs[1], i)]
}

/// `d · q`, `q` signed.
struct Signed<I: Isa> {
    q: [I::I; 2],
    d: I::V,
}

impl<I: Isa> Vector<I> for Signed<I> {
    #[inline(always)]
    fn times(&self, isa: I, x: &ActivationGroup, i: usize) -> I::V {
        let sums = isa.dot_i8(isa.start_i8(&x.neg_sums, i), self.q, quants(isa, x, i));
        isa.mul(self.d, isa.sums_to_f32(sums))
    }
}

/// `d · (q − 2^SHIFT)`.
struct Centred<I: Isa, const SHIFT: u32> {
    q: [I::I; 2],
    d: I::V,
}

impl<I: Isa, const SHIFT: u32> Vector<I> for Centred<I, SHIFT> {
    #[inline(always)]
    fn times(&self, isa: I, x: &ActivationGroup, i: usize) -> I::V {
        let sums = isa.dot_u6(isa.start_shifted::<SHIFT>(&x.neg_sums, i), self.q, quants(isa, x, i));
        isa.mul(self.d, isa.sums_to_f32(sums))
    }
}

/// `d · q − m`.
struct Above<I: Isa> {
    q: [I::I; 2],
    d: I::V,
    m: I::V,
}

impl<I: Isa> Vector<I> for Above<I> {
    #[inline(always)]
    fn times(&self, isa: I, x: &ActivationGroup, i: usize) -> I::V {
        let sums = isa.sums_to_f32(isa.dot_u6(isa.zero_sums(), self.q, quants(isa, x, i)));
        let neg_sums = isa.sums_to_f32(isa.start_shifted::<0>(&x.neg_sums, i));
        isa.mul_add(self.d, sums, isa.mul(self.m, neg_sums))
    }
}

impl Block<4> for BlockQ8_0 {
    #[inline(always)]
    fn vector<I: Isa, const G: usize, const V: usize>(isa: I, w: &[Self; 4]) -> impl Vector<I> {
        Signed { q: isa.q8_0(w, V), d: isa.scales(four!(w, |w| w.d), V) }
    }
}

impl Block<4> for BlockQ4_0 {
    #[inline(always)]
    fn vector<I: Isa, const G: usize, const V: usize>(isa: I, w: &[Self; 4]) -> impl Vector<I> {
        let q = nibbles(isa, four!(w, |w| &w.qs), V);
        Centred::<I, 3> { q, d: isa.scales(four!(w, |w| w.d), V) }
    }
}

impl Block<4> for BlockQ4_1 {
    #[inline(always)]
    fn vector<I: Isa, const G: usize, const V: usize>(isa: I, w: &[Self; 4]) -> impl Vector<I> {
        let q = nibbles(isa, four!(w, |w| &w.qs), V);
        Above { q, d: isa.scales(four!(w, |w| w.d), V), m: isa.scales(four!(w, |w| -w.m), V) }
    }
}

impl Block<4> for BlockQ5_0 {
    #[inline(always)]
    fn vector<I: Isa, const G: usize, const V: usize>(isa: I, w: &[Self; 4]) -> impl Vector<I> {
        let low = nibbles(isa, four!(w, |w| &w.qs), V);
        let q = or(isa, low, fifth_bits(isa, four!(w, |w| w.qh), V));
        Centred::<I, 4> { q, d: isa.scales(four!(w, |w| w.d), V) }
    }
}

impl Block<4> for BlockQ5_1 {
    #[inline(always)]
    fn vector<I: Isa, const G: usize, const V: usize>(isa: I, w: &[Self; 4]) -> impl Vector<I> {
        let low = nibbles(isa, four!(w, |w| &w.qs), V);
        let q = or(isa, low, fifth_bits(isa, four!(w, |w| w.qh), V));
        Above { q, d: isa.scales(four!(w, |w| w.d), V), m: isa.scales(four!(w, |w| -w.m), V) }
    }
}

#[inline(always)]
fn nibbles<I: Isa>(isa: I, qs: [&[u8; 16]; 4], i: usize) -> [I::I; 2] {
    [isa.fields(qs, [0; 4], 0x0f, i), isa.fields(qs, [-4; 4], 0x0f, i)]
}

#[inline(always)]
fn fifth_bits<I: Isa>(isa: I, qh: [[u8; 4]; 4], i: usize) -> [I::I; 2] {
    let low = four!(qh, |b| u16::from_le_bytes([b[0], b[1]]));
    let high = four!(qh, |b| u16::from_le_bytes([b[2], b[3]]));
    [isa.fifth_bits(low, i), isa.fifth_bits(high, i)]
}

#[inline(always)]
pub(super) fn or<I: Isa>(isa: I, a: [I::I; 2], b: [I::I; 2]) -> [I::I; 2] {
    [isa.or(a[0], b[0]), isa.or(a[1], b[1])]
}
