//! The products of an unpacked part of thirty-two rows with several columns, and the sums of the rows.

use super::{Chunk, FOURS, Next, Part};
use crate::{
    arch::prefetch_at,
    format::products::{Kind, MOST_PLANES},
    isa::{Isa, Kernel},
};
use candle_sparse_core::ActivationGroup;
use core::marker::PhantomData;

/// Sums of a column: of each group of a chunk, for each four rows.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Sums([[[f32; 16]; FOURS]; 4]);

pub(super) const NO_SUMS: Sums = Sums([[[0.0; 16]; FOURS]; 4]);

/// `sums += chunk · x` for all columns.
pub(super) struct Multiply<'a, K> {
    pub(super) chunk: &'a Chunk,
    pub(super) part: Part,
    pub(super) x: &'a [ActivationGroup],
    pub(super) per_column: usize,
    /// Whether there are no sums yet.
    pub(super) first: bool,
    pub(super) next: Next,
    pub(super) sums: &'a mut [Sums],
    pub(super) kind: PhantomData<K>,
}

impl<K: Kind> Kernel for Multiply<'_, K> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { chunk, part: Part { group, groups, .. }, x, per_column, first, next, sums, .. } = self;
        // Only a whole chunk has more than one class per block.
        let (step, groups) = if groups == 4 { (1, 4) } else { (0, groups.min(2)) };
        let mut columns = x.chunks_exact(per_column);
        let each = next.bytes.div_ceil((groups * columns.len().div_ceil(2)).max(1)).next_multiple_of(64);
        let mut asked = 0;
        for sums in sums.as_chunks_mut::<2>().0 {
            let Some(a) = columns.next() else { return };
            let b = columns.next().unwrap_or(a);
            let (a, b) = (&a[group..][..groups], &b[group..][..groups]);
            let [sums_a, sums_b] = sums;
            for g in 0..groups {
                let (acc_a, acc_b) = (&mut sums_a.0[g * step], &mut sums_b.0[g * step]);
                for line in (asked..next.bytes.min(asked + each)).step_by(64) {
                    prefetch_at(next.address.wrapping_add(line));
                }
                asked += each;
                if I::PAIRS {
                    add_group::<I, K, 2>(isa, chunk, g, [&a[g], &b[g]], first, [acc_a, acc_b]);
                } else {
                    add_group::<I, K, 1>(isa, chunk, g, [&a[g]], first, [acc_a]);
                    add_group::<I, K, 1>(isa, chunk, g, [&b[g]], first, [acc_b]);
                }
            }
        }
    }
}

/// `acc += w · x` for group `g` of a panel and `C` columns, where the `first` such product begins at 0.
#[inline(always)]
fn add_group<I: Isa, K: Kind, const C: usize>(
    isa: I,
    w: &Chunk,
    g: usize,
    x: [&ActivationGroup; C],
    first: bool,
    mut acc: [&mut [[f32; 16]; FOURS]; C],
) {
    // What all rows need of two columns, or of both halves, would not stay in registers.
    let halved = K::SPLIT || (I::PAIRS && K::PLANES > 1);
    let fours = if halved { FOURS / 2 } else { FOURS };
    for v in 0..16 / I::LANES {
        for from in (0..FOURS).step_by(fours) {
            if halved {
                add_fours::<I, K, { FOURS / 2 }, C>(isa, w, [g, v, from], x, first, &mut acc);
            } else {
                add_fours::<I, K, FOURS, C>(isa, w, [g, v, from], x, first, &mut acc);
            }
        }
    }
}

/// [`add_group`] for vector `v` of `R` times four rows.
#[inline(always)]
fn add_fours<I: Isa, K: Kind, const R: usize, const C: usize>(
    isa: I,
    w: &Chunk,
    [g, v, from]: [usize; 3],
    x: [&ActivationGroup; C],
    first: bool,
    acc: &mut [&mut [[f32; 16]; FOURS]; C],
) {
    let zero = isa.zero_sums();
    let (mut negs, mut sums) = ([[zero; 3]; C], [[[zero; 2]; C]; R]);
    for c in 0..C {
        for i in 0..3 {
            negs[c][i] = isa.spread_four_sums(&x[c].neg_sums[i], v);
        }
        let offsets = K::offsets(isa, negs[c]);
        for k in 0..R {
            sums[k][c] = offsets;
        }
    }
    for h in 0..2 {
        let mut xs = [isa.spread(isa.load_bytes(&x[0].qs[h], v)); C];
        for c in 1..C {
            xs[c] = isa.spread(isa.load_bytes(&x[c].qs[h], v));
        }
        for k in 0..R {
            let q = &w.quants[g][from + k][h];
            let q = [
                isa.load_bytes(&q[0], v),
                isa.load_bytes(&q[1], v),
                isa.load_bytes(&q[2], v),
                isa.load_bytes(&q[3], v),
            ];
            for c in 0..C {
                let of = if K::SPLIT { h } else { 0 };
                sums[k][c][of] = isa.dot_four(K::BITS, sums[k][c][of], q, xs[c]);
            }
        }
    }
    for c in 0..C {
        let d = isa.spread_four(&x[c].d, v);
        for k in 0..R {
            let mut planes = [isa.splat(0.0); MOST_PLANES];
            for p in 0..K::PLANES {
                planes[p] = isa.load(&w.planes[p][g][from + k], v);
            }
            let t = K::times(isa, &planes, sums[k][c], negs[c]);
            let acc = &mut acc[c][from + k];
            let sum = if first { isa.splat(0.0) } else { isa.load(acc, v) };
            isa.store(isa.mul_add(t, d, sum), acc, v);
        }
    }
}

/// The sums of some rows, in the order of [`crate::format::products::dot`].
#[inline(always)]
pub(super) fn write<I: Isa>(isa: I, sums: &Sums, y: &mut [f32]) {
    for (k, y) in y.chunks_mut(4).enumerate() {
        let mut all = [isa.splat(0.0); 4];
        for v in 0..16 / I::LANES {
            let s = &sums.0;
            let even = isa.add(isa.load(&s[0][k], v), isa.load(&s[2][k], v));
            all[v] = isa.add(even, isa.add(isa.load(&s[1][k], v), isa.load(&s[3][k], v)));
        }
        let rows = isa.sum_fours(all);
        for (y, sum) in y.iter_mut().zip(rows) {
            *y = sum + 0.0;
        }
    }
}
