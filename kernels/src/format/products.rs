//! Products of blocks: what a format says about its own, and one row times one column.
//!
//! ```text
//! integer   sum[b] = Σ_k q[b, k] · x[b, k]                         exact, for each block b of 32 elements
//! block     t[b]   = scale[b] · sum[b] (+ min[b] · −Σ_k x[b, k])    one or two roundings
//! row       acc[l] = Σ t[b] · d[b] over the blocks of class l       in order, one multiply-add each
//!           y      = Σ_l acc[l]                                     halves first
//! ```
//!
//! There are sixteen classes. Block `b` of each sixteen is of class `b`; where there are no sixteen left, block `b` of each four.
//! So a sum has one order, whatever computes it: vectors whose lanes are the blocks of a row (here), or rows (`panel.rs`).

use crate::{isa::Isa, kernel::matmul::ask};
use bytemuck::Zeroable;
use candle_sparse_core::ActivationGroup;
use core::marker::PhantomData;

/// A block, `N` of which make a unit of [`Self::GROUPS`] groups.
pub(super) trait Block<const N: usize>: Copy + Zeroable {
    /// What is done with its integer sums.
    type Kind: Kind;
    /// One or two.
    const GROUPS: usize;

    /// Vector `V` of both halves of group `G` of a unit. Constants, because half of what is computed from them is constant then.
    fn quants<I: Isa, const G: usize, const V: usize>(isa: I, w: &[Self; N]) -> [I::B; 2];
    /// Numbers of the blocks of four groups, group `g[j]` of unit `w[j]`, one lane each, as [`Isa::load_fours`].
    fn planes<I: Isa>(isa: I, w: [&[Self; N]; 4], g: [usize; 4], q: usize) -> Planes<I>;
}

/// Numbers that belong to blocks, as many as [`Kind::PLANES`].
pub(super) type Planes<I> = [<I as Isa>::V; MOST_PLANES];
pub(super) const MOST_PLANES: usize = 6;

/// How the product of a block follows from exact integer sums.
pub(super) trait Kind {
    const PLANES: usize;
    /// Bits of a quant; 8 are signed and [`Isa::biased`].
    const BITS: u32;
    /// Whether each half of a block has a sum of its own.
    const SPLIT: bool;

    /// What to add to the sums of blocks, or of their halves, for the offset of quants, from `−Σ x` of blocks, first halves and
    /// second halves.
    fn offsets<I: Isa>(isa: I, neg_sums: [I::S; 3]) -> [I::S; 2];
    /// From the sums of blocks or of their halves without offset, and the same `−Σ x`.
    fn times<I: Isa>(isa: I, p: &Planes<I>, sums: [I::S; 2], neg_sums: [I::S; 3]) -> I::V;
}

/// `d · q`, `q` signed.
pub(super) struct Signed;

impl Kind for Signed {
    const PLANES: usize = 1;
    const BITS: u32 = 8;
    const SPLIT: bool = false;

    #[inline(always)]
    fn offsets<I: Isa>(isa: I, [neg, ..]: [I::S; 3]) -> [I::S; 2] {
        [isa.bias(neg), isa.zero_sums()]
    }

    #[inline(always)]
    fn times<I: Isa>(isa: I, p: &Planes<I>, [sums, _]: [I::S; 2], _: [I::S; 3]) -> I::V {
        isa.mul(p[0], isa.sums_to_f32(sums))
    }
}

/// `d · (q − 2^SHIFT)`.
pub(super) struct Centred<const SHIFT: u32>;

impl<const SHIFT: u32> Kind for Centred<SHIFT> {
    const PLANES: usize = 1;
    const BITS: u32 = SHIFT + 1;
    const SPLIT: bool = false;

    #[inline(always)]
    fn offsets<I: Isa>(isa: I, [neg, ..]: [I::S; 3]) -> [I::S; 2] {
        [isa.shift_sums::<SHIFT>(neg), isa.zero_sums()]
    }

    #[inline(always)]
    fn times<I: Isa>(isa: I, p: &Planes<I>, [sums, _]: [I::S; 2], _: [I::S; 3]) -> I::V {
        isa.mul(p[0], isa.sums_to_f32(sums))
    }
}

/// `d · q − m`, where `d` and `m` may be products of a scale of the scales: f32 holds those exactly.
pub(super) struct Above;

impl Kind for Above {
    const PLANES: usize = 2;
    const BITS: u32 = 5;
    const SPLIT: bool = false;

    #[inline(always)]
    fn offsets<I: Isa>(isa: I, _: [I::S; 3]) -> [I::S; 2] {
        [isa.zero_sums(); 2]
    }

    #[inline(always)]
    fn times<I: Isa>(isa: I, p: &Planes<I>, [sums, _]: [I::S; 2], [neg, ..]: [I::S; 3]) -> I::V {
        isa.mul_add(p[0], isa.sums_to_f32(sums), isa.mul(p[1], isa.sums_to_f32(neg)))
    }
}

/// `d · scale · (q − 2^SHIFT)`, scales per half of a block. Their products are whole numbers that f32 holds.
pub(super) struct PerHalf<const SHIFT: u32>;

impl<const SHIFT: u32> Kind for PerHalf<SHIFT> {
    const PLANES: usize = 3;
    const BITS: u32 = SHIFT + 1;
    const SPLIT: bool = true;

    #[inline(always)]
    fn offsets<I: Isa>(isa: I, [_, low, high]: [I::S; 3]) -> [I::S; 2] {
        [isa.shift_sums::<SHIFT>(low), isa.shift_sums::<SHIFT>(high)]
    }

    #[inline(always)]
    fn times<I: Isa>(isa: I, p: &Planes<I>, sums: [I::S; 2], _: [I::S; 3]) -> I::V {
        isa.mul(p[2], by_half(isa, [p[0], p[1]], sums))
    }
}

/// `d · scale · q − dmin · min`, scales and minima per half of a block.
pub(super) struct PerHalfAbove;

impl Kind for PerHalfAbove {
    const PLANES: usize = 6;
    const BITS: u32 = 2;
    const SPLIT: bool = true;

    #[inline(always)]
    fn offsets<I: Isa>(isa: I, _: [I::S; 3]) -> [I::S; 2] {
        [isa.zero_sums(); 2]
    }

    #[inline(always)]
    fn times<I: Isa>(isa: I, p: &Planes<I>, sums: [I::S; 2], [_, low, high]: [I::S; 3]) -> I::V {
        let mins = isa.mul(p[5], by_half(isa, [p[3], p[4]], [low, high]));
        isa.mul_add(p[2], by_half(isa, [p[0], p[1]], sums), mins)
    }
}

/// `Σ scale · sum` of both halves, exact.
#[inline(always)]
fn by_half<I: Isa>(isa: I, scales: [I::V; 2], sums: [I::S; 2]) -> I::V {
    let high = isa.mul(scales[1], isa.sums_to_f32(sums[1]));
    isa.mul_add(scales[0], isa.sums_to_f32(sums[0]), high)
}

/// `Operand` of a block.
macro_rules! operand {
    ($t:ty: $n:literal blocks) => {
        impl $crate::format::operand::Operand for $t {
            type Column = ActivationGroup;

            #[inline(always)]
            fn columns(x: Columns<'_>) -> &[ActivationGroup] {
                let Columns::Quantized(x) = x else { unreachable!("every operation checks its columns") };
                x
            }

            #[inline(always)]
            fn dot<I: Isa>(isa: I, row: &[Self], x: &[ActivationGroup], ahead: &[Self]) -> f32 {
                $crate::format::products::dot::<I, $t, $n>(isa, row, x, ahead)
            }

            #[inline(always)]
            fn matmul<I: Isa>(
                isa: I,
                rows: $crate::format::RowsOf<'_, Self>,
                x: &[ActivationGroup],
                y: &mut [&mut [f32]],
            ) {
                $crate::format::panel::matmul::<I, $t, $n>(isa, rows, x, y);
            }
        }
    };
}

/// One row times one column.
#[inline(always)]
pub(super) fn dot<I: Isa, T: Block<N>, const N: usize>(
    isa: I,
    w: &[T],
    x: &[ActivationGroup],
    ahead: &[T],
) -> f32 {
    let mut acc = [isa.splat(0.0); 4];
    let per_chunk = 4 / T::GROUPS;
    let units = w.as_chunks::<N>().0;
    let chunks = units.chunks_exact(per_chunk);
    let rest = chunks.remainder();
    let whole = units.len() - rest.len();
    for (k, (w, x)) in chunks.zip(x.as_chunks::<4>().0).enumerate() {
        ask(ahead, k * size_of_val(w), size_of_val(w));
        add_chunk(isa, &mut acc, w, x);
    }
    let x_rest = &x[whole * T::GROUPS..];
    for (w, x) in rest.iter().zip(x_rest.chunks_exact(T::GROUPS)) {
        acc[0] = add_group::<I, T, N, 0>(isa, acc[0], w, &x[0]);
        if T::GROUPS == 2 {
            acc[0] = add_group::<I, T, N, 1>(isa, acc[0], w, &x[1]);
        }
    }
    let mut room = None;
    if let (Some(w), [.., x]) = (last(w, &mut room), x) {
        acc[0] = add_group::<I, T, N, 0>(isa, acc[0], w, x);
    }
    sum_of_classes(isa, acc)
}

/// The sum of a row, from those of its classes.
#[inline(always)]
pub(super) fn sum_of_classes<I: Isa>(isa: I, acc: [I::V; 4]) -> f32 {
    let sum = match I::LANES {
        16 => acc[0],
        8 => isa.add(acc[0], acc[1]),
        _ => isa.add(isa.add(acc[0], acc[2]), isa.add(acc[1], acc[3])),
    };
    // Sums of what rounds to nothing have a sign that depends on what else is zero.
    isa.reduce_add(sum) + 0.0
}

/// What follows the whole units of a row, as a unit: the row's last blocks, some of them a second time. The column's last
/// group is zero where there is no block, or one that was computed already.
#[inline(always)]
pub(super) fn last<'a, T: Zeroable + Copy, const N: usize>(
    row: &'a [T],
    room: &'a mut Option<[T; N]>,
) -> Option<&'a [T; N]> {
    if row.as_chunks::<N>().1.is_empty() {
        return None;
    }
    row.last_chunk().or_else(|| {
        let room = room.insert([T::zeroed(); N]);
        room[N - row.len()..].copy_from_slice(row);
        Some(room)
    })
}

/// Both halves of vector `V` of group `G` of some units.
#[inline(always)]
pub(super) fn quants_of<I: Isa, T: Block<N>, const N: usize, const G: usize, const V: usize>(
    isa: I,
    w: &[[T; N]],
) -> [I::B; 2] {
    if T::GROUPS == 1 {
        T::quants::<I, 0, V>(isa, &w[G])
    } else if G.is_multiple_of(2) {
        T::quants::<I, 0, V>(isa, &w[G / 2])
    } else {
        T::quants::<I, 1, V>(isa, &w[G / 2])
    }
}

/// Calls a macro with each group of sixteen blocks and each of its vectors, as literals.
macro_rules! each_vector {
    ($isa:ident, $vector:ident) => {
        each_vector!(@ $isa, $vector, 0 1 2 3)
    };
    (@ $isa:ident, $vector:ident, $($g:literal)*) => {$(
        $vector!($g, 0);
        if $isa::LANES < 16 {
            $vector!($g, 1);
        }
        if $isa::LANES < 8 {
            $vector!($g, 2);
            $vector!($g, 3);
        }
    )*};
}

/// Numbers of sixteen blocks, vector `q`.
#[inline(always)]
pub(super) fn planes_of<I: Isa, T: Block<N>, const N: usize>(isa: I, w: &[[T; N]], q: usize) -> Planes<I> {
    let units = [&w[0], &w[1 / T::GROUPS], &w[2 / T::GROUPS], &w[3 / T::GROUPS]];
    T::planes(isa, units, [0, 1 % T::GROUPS, 2 % T::GROUPS, 3 % T::GROUPS], q)
}

/// Sums of blocks, or of their halves, vector `q` of sixteen, from sums of lanes.
#[inline(always)]
pub(super) fn sums_of_blocks<I: Isa, K: Kind>(isa: I, sums: &[[I::S; 16]; 2], q: usize) -> [I::S; 2] {
    let mut both = [isa.zero_sums(); 2];
    for h in 0..if K::SPLIT { 2 } else { 1 } {
        let s = &sums[h];
        both[h] = isa.sum_blocks([s[4 * q], s[4 * q + 1], s[4 * q + 2], s[4 * q + 3]]);
    }
    both
}

/// `acc += w · x` for sixteen blocks.
#[inline(always)]
fn add_chunk<I: Isa, T: Block<N>, const N: usize>(
    isa: I,
    acc: &mut [I::V; 4],
    w: &[[T; N]],
    x: &[ActivationGroup; 4],
) {
    let mut sums = [[isa.zero_sums(); 16]; 2];
    macro_rules! vector {
        ($g:literal, $v:literal) => {
            let q = quants_of::<I, T, N, $g, $v>(isa, w);
            let at = $g * (16 / I::LANES) + $v;
            (sums[0][at], sums[1][at]) = sums_of::<I, T::Kind>(isa, q, &x[$g], $v);
        };
    }
    each_vector!(I, vector);
    let x = [&x[0], &x[1], &x[2], &x[3]];
    for q in 0..16 / I::LANES {
        let planes = planes_of::<I, T, N>(isa, w, q);
        let both = sums_of_blocks::<I, T::Kind>(isa, &sums, q);
        let (neg, d) = numbers_of(isa, x, q);
        acc[q] = add_blocks::<I, T::Kind>(isa, acc[q], &planes, both, neg, d);
    }
}

/// `acc += w · x` for group `G` of a unit alone.
#[inline(always)]
fn add_group<I: Isa, T: Block<N>, const N: usize, const G: usize>(
    isa: I,
    acc: I::V,
    w: &[T; N],
    x: &ActivationGroup,
) -> I::V {
    Group::<I, T::Kind>::of::<T, N, G>(isa, w).add(isa, acc, x)
}

/// An unpacked group of a unit alone.
pub(super) struct Group<I: Isa, K> {
    quants: [[I::B; 2]; 4],
    planes: Planes<I>,
    kind: PhantomData<K>,
}

impl<I: Isa, K: Kind> Group<I, K> {
    #[inline(always)]
    pub(super) fn of<T: Block<N, Kind = K>, const N: usize, const G: usize>(isa: I, w: &[T; N]) -> Self {
        let mut quants = [T::quants::<I, G, 0>(isa, w); 4];
        macro_rules! vectors {
            ($($v:literal)*) => {$(quants[$v] = T::quants::<I, G, $v>(isa, w);)*};
        }
        if I::LANES < 16 {
            vectors!(1);
        }
        if I::LANES < 8 {
            vectors!(2 3);
        }
        let none = [T::zeroed(); N];
        let planes = T::planes(isa, [w, &none, &none, &none], [G; 4], 0);
        Self { quants, planes, kind: PhantomData }
    }

    /// `acc += w · x`
    #[inline(always)]
    pub(super) fn add(&self, isa: I, acc: I::V, x: &ActivationGroup) -> I::V {
        let zero = isa.zero_sums();
        let mut sums = [[zero; 4]; 2];
        for v in 0..16 / I::LANES {
            (sums[0][v], sums[1][v]) = sums_of::<I, K>(isa, self.quants[v], x, v);
        }
        let both = [isa.sum_blocks(sums[0]), if K::SPLIT { isa.sum_blocks(sums[1]) } else { zero }];
        let no_x = &ActivationGroup::ZERO;
        let (neg, d) = numbers_of(isa, [x, no_x, no_x, no_x], 0);
        add_blocks::<I, K>(isa, acc, &self.planes, both, neg, d)
    }
}

/// Sums of lanes: of both halves, or of each.
#[inline(always)]
pub(super) fn sums_of<I: Isa, K: Kind>(isa: I, w: [I::B; 2], x: &ActivationGroup, v: usize) -> (I::S, I::S) {
    let x = [isa.load_bytes(&x.qs[0], v), isa.load_bytes(&x.qs[1], v)];
    if K::SPLIT {
        (isa.dot(K::BITS, [w[0]], [x[0]]), isa.dot(K::BITS, [w[1]], [x[1]]))
    } else {
        (isa.dot(K::BITS, w, x), isa.zero_sums())
    }
}

/// `acc += t · d`, a lane per block.
#[inline(always)]
pub(super) fn add_blocks<I: Isa, K: Kind>(
    isa: I,
    acc: I::V,
    planes: &Planes<I>,
    sums: [I::S; 2],
    neg: [I::S; 3],
    d: I::V,
) -> I::V {
    let offsets = K::offsets(isa, neg);
    let sums = [isa.add_sums(sums[0], offsets[0]), isa.add_sums(sums[1], offsets[1])];
    isa.mul_add(K::times(isa, planes, sums, neg), d, acc)
}

/// `−Σ x` and scales of the blocks of four groups, a lane each.
#[inline(always)]
fn numbers_of<I: Isa>(isa: I, x: [&ActivationGroup; 4], q: usize) -> ([I::S; 3], I::V) {
    let mut neg = [isa.zero_sums(); 3];
    for i in 0..3 {
        let x = [&x[0].neg_sums[i], &x[1].neg_sums[i], &x[2].neg_sums[i], &x[3].neg_sums[i]];
        neg[i] = isa.load_four_sums(x, q);
    }
    (neg, isa.load_fours([&x[0].d, &x[1].d, &x[2].d, &x[3].d], q))
}

#[inline(always)]
pub(super) fn or<I: Isa>(isa: I, a: [I::B; 2], b: [I::B; 2]) -> [I::B; 2] {
    [isa.or(a[0], b[0]), isa.or(a[1], b[1])]
}
