//! Blocks of 32 elements, in fours.

use super::{
    Element, RowsOf,
    elements::{Grid, constant, number},
    products::{Above, Block, Centred, Planes, Signed, or},
    units::{Factors, Summand, Units},
};
use crate::{
    isa::Isa,
    kernel::{
        axpy_rows::{self, Together},
        matmul_t::{self, MatmulT},
    },
};
use bytemuck::must_cast_ref;
use candle_sparse_core::{
    ActivationGroup, BLOCK_LEN, BlockQ4_0, BlockQ4_1, BlockQ5_0, BlockQ5_1, BlockQ8_0, Columns,
};

operand!(BlockQ8_0: 4 blocks);
operand!(BlockQ5_1: 4 blocks);
operand!(BlockQ5_0: 4 blocks);
operand!(BlockQ4_1: 4 blocks);
operand!(BlockQ4_0: 4 blocks);

/// An expression of each of four blocks. Not `map`, which LLVM stops inlining where there is much of it.
macro_rules! four {
    ($w:ident, |$b:ident| $e:expr) => {
        four!(@ $w $b $e, 0 1 2 3)
    };
    (@ $w:ident $b:ident $e:expr, $($i:literal)*) => {
        [$({ let $b = &$w[$i]; $e }),*]
    };
}

/// `Block` of four: its quants, and where its minimum stands. Its scale stands first.
macro_rules! block {
    ($t:ty: $kind:ty, |$isa:ident, $w:ident, $v:ident| $quants:expr $(, $m:literal)?) => {
        impl Block<4> for $t {
            type Kind = $kind;
            const GROUPS: usize = 1;

            #[inline(always)]
            fn quants<I: Isa, const G: usize, const V: usize>($isa: I, $w: &[Self; 4]) -> [I::B; 2] {
                let $v = V;
                $quants
            }

            #[inline(always)]
            fn planes<I: Isa>(isa: I, w: [&[Self; 4]; 4], _: [usize; 4], q: usize) -> Planes<I> {
                let mut planes = [isa.splat(0.0); _];
                let w = four!(w, |w| must_cast_ref::<_, [[u16; size_of::<$t>() / 2]; 4]>(*w));
                planes[0] = isa.widen_words::<_, 0>(w, q);
                // Their minima are added.
                $(planes[1] = isa.sub(planes[1], isa.widen_words::<_, $m>(w, q));)?
                planes
            }
        }
    };
}

block!(BlockQ8_0: Signed, |isa, w, v| {
    let [low, high] = isa.load_halves(four!(w, |w| &w.qs), v);
    [isa.biased(low), isa.biased(high)]
});
block!(BlockQ4_0: Centred<3>, |isa, w, v| nibbles(isa, four!(w, |w| &w.qs), v));
block!(BlockQ4_1: Above, |isa, w, v| nibbles(isa, four!(w, |w| &w.qs), v), 1);
block!(BlockQ5_0: Centred<4>, |isa, w, v| fives(isa, four!(w, |w| (&w.qs, w.qh)), v));
block!(BlockQ5_1: Above, |isa, w, v| fives(isa, four!(w, |w| (&w.qs, w.qh)), v), 1);

#[inline(always)]
fn fives<I: Isa>(isa: I, w: [(&[u8; 16], [u8; 4]); 4], i: usize) -> [I::B; 2] {
    or(isa, nibbles(isa, four!(w, |w| w.0), i), fifth_bits(isa, four!(w, |w| w.1), i))
}

#[inline(always)]
fn nibbles<I: Isa>(isa: I, qs: [&[u8; 16]; 4], i: usize) -> [I::B; 2] {
    [isa.fields(qs, [0; 4], 0x0f, i), isa.fields(qs, [-4; 4], 0x0f, i)]
}

/// The fifth bits where they belong, above nibbles.
#[inline(always)]
fn fifth_bits<I: Isa>(isa: I, qh: [[u8; 4]; 4], i: usize) -> [I::B; 2] {
    let low = four!(qh, |b| u16::from_le_bytes([b[0], b[1]]));
    let high = four!(qh, |b| u16::from_le_bytes([b[2], b[3]]));
    [isa.bits(low, 1 << 4, i), isa.bits(high, 1 << 4, i)]
}

macro_rules! units {
    ($t:ty, |$isa:ident, $unit:ident, $i:ident| $value:expr) => {
        impl Units for $t {
            type Vectors = Self;
            const RESTS: bool = false;
            const IN_HALVES: bool = true;

            #[inline(always)]
            fn vectors(row: &[Self]) -> &[Self] {
                row
            }

            #[inline(always)]
            fn rest(row: &[Self]) -> Self {
                row[0]
            }

            /// The elements themselves: quants and scales are short, their product is exact.
            #[inline(always)]
            fn value<I: Isa>($isa: I, $unit: &Self, $i: usize) -> I::V {
                $value
            }
        }
    };
}

units!(BlockQ8_0, |isa, unit, i| isa.mul(isa.load_i8(&unit.qs, i), isa.splat_f16(unit.d)));
units!(BlockQ4_0, |isa, unit, i| {
    isa.mul(isa.load_nibbles(&unit.qs, i), isa.mul(isa.splat_f16(unit.d), isa.splat(1.0 / 16.0)))
});
units!(BlockQ4_1, |isa, unit, i| {
    // Of d · q + m, with 16 · (q − 8) for q.
    let d = isa.splat_f16(unit.d);
    let start = isa.mul_add(d, isa.splat(8.0), isa.splat_f16(unit.m));
    isa.mul_add(isa.load_nibbles(&unit.qs, i), isa.mul(d, isa.splat(1.0 / 16.0)), start)
});
units!(BlockQ5_1, |isa, unit, i| {
    // 16 · q from 16 · (q − 8) of the nibble, and 16 · 16 for the fifth bit: exact, so d · q + m is rounded once.
    let above = isa.select_bits(u32::from_le_bytes(unit.qh), i, isa.splat(384.0), isa.splat(128.0));
    let q = isa.add(isa.load_nibbles(&unit.qs, i), above);
    isa.mul_add(q, isa.mul(isa.splat_f16(unit.d), isa.splat(1.0 / 16.0)), isa.splat_f16(unit.m))
});

impl Summand for BlockQ8_0 {
    const STEP: f32 = 1.0;

    #[inline(always)]
    fn scale<I: Isa>(isa: I, unit: &Self, alpha: I::V) -> I::V {
        isa.mul(isa.splat_f16(unit.d), alpha)
    }

    #[inline(always)]
    fn vector<I: Isa>(isa: I, unit: &Self, i: usize) -> I::V {
        isa.load_i8(&unit.qs, i)
    }
}

impl Summand for BlockQ4_0 {
    const STEP: f32 = 1.0 / 16.0;

    #[inline(always)]
    fn scale<I: Isa>(isa: I, unit: &Self, alpha: I::V) -> I::V {
        isa.mul(isa.splat_f16(unit.d), alpha)
    }

    #[inline(always)]
    fn vector<I: Isa>(isa: I, unit: &Self, i: usize) -> I::V {
        isa.load_nibbles(&unit.qs, i)
    }

    #[inline(always)]
    fn factors<I: Isa>(isa: I, units: &[Self], alpha: f32, out: &mut Factors) {
        let (fours, few) = units.as_chunks::<4>();
        for (g, four) in fours.iter().enumerate() {
            for i in 0..16 / I::LANES {
                let factors = isa.mul(isa.splat_four(four!(four, |b| b.d), i), isa.splat(alpha));
                isa.store(factors, &mut out[g / 2], g % 2 * (16 / I::LANES) + i);
            }
        }
        for (unit, out) in few.iter().zip(out.as_flattened_mut()[16 * fours.len()..].as_chunks_mut().0) {
            *out = [number(unit.d) * alpha; 4];
        }
    }

    #[inline(always)]
    fn factor<I: Isa>(isa: I, _: &Self, _: I::V, factors: &Factors, k: usize) -> I::V {
        isa.splat(factors.as_flattened()[4 * k])
    }
}

/// `Element` of a block with [`Units`], and with [`Summand`] if rows are named.
macro_rules! element {
    ($t:ty, sums $($rows:ident)?) => {
        impl Element for $t {
            #[inline(always)]
            fn write<I: Isa>(isa: I, row: &[Self], first: usize, out: &mut [[f32; BLOCK_LEN]]) {
                Self::write_units(isa, row, first, out);
            }

            $(#[inline(always)]
            fn add_rows<I: Isa>(isa: I, $rows: Together<'_, Self>, y: &mut [f32]) {
                axpy_rows::by_units(isa, $rows, y);
            })?

            #[inline(always)]
            fn sum_rows<I: Isa>(isa: I, rows: RowsOf<'_, Self>, sums: MatmulT<'_, '_>) {
                matmul_t::by_units::<I, Self, false>(isa, rows, sums);
            }
        }
    };
}

element!(BlockQ8_0, sums rows);
element!(BlockQ4_0, sums rows);
element!(BlockQ4_1, sums);
element!(BlockQ5_1, sums);
unpack!(BlockQ5_0: 1, |block| constant(block.d, 0.0));
