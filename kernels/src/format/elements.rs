//! Rows as f32, by the vectors of an instruction set.
//!
//! Formats that no kernel reads directly unpack a block's quants into bytes first; an element is `d · quant + m`, and `d`
//! and `m` are the same for at least sixteen neighbours, as many as the widest vector has lanes.

use super::Element;
use crate::isa::{Isa, Kernel};
use candle_sparse_core::{BLOCK_LEN, format::f16_to_f32};
use half::f16;

/// The longest block as units of 32 elements.
pub(crate) const LONGEST: usize = 8;

/// `d` and `m` of each sixteen elements.
pub(super) type Grid = [(f32, f32); 2 * LONGEST];

/// Writes the elements of a block.
#[inline(always)]
pub(super) fn write_block<I: Isa, Q: Copy + Into<i16>>(isa: I, quants: &[Q], grid: &Grid, out: &mut [[f32; BLOCK_LEN]]) {
    for (b, (q, out)) in quants.as_chunks::<BLOCK_LEN>().0.iter().zip(out).enumerate() {
        let mut bytes = [0; BLOCK_LEN];
        for j in 0..BLOCK_LEN {
            bytes[j] = q[j].into() as i8;
        }
        for i in 0..32 / I::LANES {
            let (d, m) = grid[2 * b + i * I::LANES / 16];
            let scaled = isa.mul(isa.load_i8(&bytes, i), isa.splat(d));
            isa.store(isa.add(scaled, isa.splat(m)), out, i);
        }
    }
}

/// The same `d` and `m` for all elements.
#[inline(always)]
pub(super) fn constant(d: f16, m: f32) -> Grid {
    [(number(d), m); 2 * LONGEST]
}

#[inline(always)]
pub(super) fn number(x: f16) -> f32 {
    f16_to_f32(x.to_bits())
}

/// [`Element::write`] as a function of its own, for it is long and several kernels need it.
pub(crate) struct Write<'a, T> {
    pub(crate) row: &'a [T],
    pub(crate) first: usize,
    pub(crate) out: &'a mut [[f32; BLOCK_LEN]],
}

impl<T: Element> Kernel for Write<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        T::write(isa, self.row, self.first, self.out);
    }
}
