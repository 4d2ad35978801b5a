//! Products of blocks, four of 32 elements or one of 256 at a time.

use crate::isa::Isa;
use candle_sparse_core::ActivationGroup;

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

/// `Operand` of a block.
macro_rules! operand {
    ($t:ty: $n:literal blocks, groups $($g:literal)*) => {
        impl $crate::format::operand::Operand for $t {
            type Unit = [$t; $n];
            type Column = ActivationGroup;
            type ColumnUnit = [ActivationGroup; { [$($g),*].len() }];

            #[inline(always)]
            fn columns(x: Columns<'_>) -> &[ActivationGroup] {
                let Columns::Quantized(x) = x else { unreachable!("every operation checks its columns") };
                x
            }

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
                    $crate::format::products::add_group::<I, $t, $n, $g, R, C>(isa, acc, w, group);
                )*
            }
        }
    };
}

/// `acc[r][c] += w[r] · x[c]` of group `G`.
#[inline(always)]
pub(super) fn add_group<
    I: Isa,
    T: Block<N>,
    const N: usize,
    const G: usize,
    const R: usize,
    const C: usize,
>(
    isa: I,
    acc: &mut [[I::V; C]; R],
    w: [&[T; N]; R],
    x: [&ActivationGroup; C],
) {
    add_vector::<I, T, N, G, 0, R, C>(isa, acc, w, x);
    if I::LANES < 16 {
        add_vector::<I, T, N, G, 1, R, C>(isa, acc, w, x);
    }
    if I::LANES < 8 {
        add_vector::<I, T, N, G, 2, R, C>(isa, acc, w, x);
        add_vector::<I, T, N, G, 3, R, C>(isa, acc, w, x);
    }
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
            acc[r][c] = isa.mul_add(w.times(isa, x[c], V), isa.load(&x[c].d, V), acc[r][c]);
        }
    }
}

/// Both halves of vector `i`.
#[inline(always)]
fn quants<I: Isa>(isa: I, x: &ActivationGroup, i: usize) -> [I::B; 2] {
    [isa.load_bytes(&x.qs[0], i), isa.load_bytes(&x.qs[1], i)]
}

/// `d · q`, `q` signed.
pub(super) struct Signed<I: Isa> {
    pub(super) q: [I::B; 2],
    pub(super) d: I::V,
}

impl<I: Isa> Vector<I> for Signed<I> {
    #[inline(always)]
    fn times(&self, isa: I, x: &ActivationGroup, i: usize) -> I::V {
        let sums = isa.dot_i8(self.q, quants(isa, x, i), &x.neg_sums, i);
        isa.mul(self.d, isa.sums_to_f32(sums))
    }
}

/// `d · (q − 2^SHIFT)`.
pub(super) struct Centred<I: Isa, const SHIFT: u32> {
    pub(super) q: [I::B; 2],
    pub(super) d: I::V,
}

impl<I: Isa, const SHIFT: u32> Vector<I> for Centred<I, SHIFT> {
    #[inline(always)]
    fn times(&self, isa: I, x: &ActivationGroup, i: usize) -> I::V {
        let sums = isa.dot_u6(isa.load_sums::<SHIFT>(&x.neg_sums, i), self.q, quants(isa, x, i));
        isa.mul(self.d, isa.sums_to_f32(sums))
    }
}

/// `d · q − m`.
pub(super) struct Above<I: Isa> {
    pub(super) q: [I::B; 2],
    pub(super) d: I::V,
    pub(super) m: I::V,
}

impl<I: Isa> Vector<I> for Above<I> {
    #[inline(always)]
    fn times(&self, isa: I, x: &ActivationGroup, i: usize) -> I::V {
        let sums = isa.sums_to_f32(isa.dot_u6(isa.zero_sums(), self.q, quants(isa, x, i)));
        let neg_sums = isa.sums_to_f32(isa.load_sums::<0>(&x.neg_sums, i));
        isa.mul_add(self.d, sums, isa.mul(self.m, neg_sums))
    }
}

/// `d · scale · q − dmin · min`, scales and minima per block.
pub(super) struct PerBlock<I: Isa> {
    pub(super) q: [I::B; 2],
    pub(super) scales: I::S,
    pub(super) mins: I::S,
    pub(super) d: I::V,
    pub(super) dmin: I::V,
}

impl<I: Isa> Vector<I> for PerBlock<I> {
    #[inline(always)]
    fn times(&self, isa: I, x: &ActivationGroup, i: usize) -> I::V {
        let sums = isa.dot_scaled::<2, 0>(isa.zero_sums(), self.q, quants(isa, x, i), self.scales);
        let neg_mins = isa.scale_sums(isa.load_sums::<0>(&x.neg_sums, i), self.mins);
        isa.mul_add(self.d, isa.sums_to_f32(sums), isa.mul(self.dmin, isa.sums_to_f32(neg_mins)))
    }
}

/// `d · scale · (q − OFFSET)`, scales per half of a block.
pub(super) struct PerHalf<I: Isa, const OFFSET: u8> {
    pub(super) q: [I::B; 2],
    pub(super) scales: [I::S; 2],
    pub(super) d: I::V,
}

impl<I: Isa, const OFFSET: u8> Vector<I> for PerHalf<I, OFFSET> {
    #[inline(always)]
    fn times(&self, isa: I, x: &ActivationGroup, i: usize) -> I::V {
        let sums = by_half::<I, OFFSET>(isa, self.q, quants(isa, x, i), self.scales);
        isa.mul(self.d, isa.sums_to_f32(sums))
    }
}

/// `d · scale · q + dmin · min`, scales and minima per half of a block.
pub(super) struct PerHalfAbove<I: Isa> {
    pub(super) q: [I::B; 2],
    pub(super) scales: [I::S; 2],
    pub(super) mins: [I::S; 2],
    pub(super) d: I::V,
    pub(super) dmin: I::V,
}

impl<I: Isa> Vector<I> for PerHalfAbove<I> {
    #[inline(always)]
    fn times(&self, isa: I, x: &ActivationGroup, i: usize) -> I::V {
        let x = quants(isa, x, i);
        let sums = by_half::<I, 0>(isa, self.q, x, self.scales);
        let mins = by_half::<I, 0>(isa, [isa.splat_byte(1); 2], x, self.mins);
        isa.mul_add(self.d, isa.sums_to_f32(sums), isa.mul(self.dmin, isa.sums_to_f32(mins)))
    }
}

/// `(w − OFFSET) · x`, each half with its factors.
#[inline(always)]
fn by_half<I: Isa, const OFFSET: u8>(isa: I, w: [I::B; 2], x: [I::B; 2], factors: [I::S; 2]) -> I::S {
    let low = isa.dot_scaled::<1, OFFSET>(isa.zero_sums(), [w[0]], [x[0]], factors[0]);
    isa.dot_scaled::<1, OFFSET>(low, [w[1]], [x[1]], factors[1])
}

#[inline(always)]
pub(super) fn or<I: Isa>(isa: I, a: [I::B; 2], b: [I::B; 2]) -> [I::B; 2] {
    [isa.or(a[0], b[0]), isa.or(a[1], b[1])]
}
