//! Rows as f32, by the vectors of an instruction set.
//!
//! Formats that no kernel reads directly unpack a block's quants into bytes first; an element is `d · quant + m`, and `d`
//! and `m` are the same for at least sixteen neighbours, as many as the widest vector has lanes.

use super::{Element, operand::Operand};
use crate::isa::{Isa, Kernel};
use candle_sparse_core::{BLOCK_LEN, format::f16_to_f32};
use half::f16;

/// The longest block as units of 32 elements.
pub(crate) const LONGEST: usize = 8;

/// `d` and `m` of each sixteen elements.
pub(super) type Grid = [(f32, f32); 2 * LONGEST];

/// A block whose elements are made from unpacked quants.
pub(super) trait Unpack: Copy {
    /// Its units of 32 elements.
    const UNITS: usize;

    fn quants(&self) -> impl AsRef<[i8]>;
    fn grid(&self) -> Grid;
}

macro_rules! unpack {
    ($t:ty: $units:expr, |$block:ident| $grid:expr) => {
        impl $crate::format::elements::Unpack for $t {
            const UNITS: usize = $units;

            #[inline(always)]
            fn quants(&self) -> impl AsRef<[i8]> {
                bytemuck::must_cast::<_, [i8; { $units * BLOCK_LEN }]>(self.unpack())
            }

            #[inline(always)]
            fn grid(&self) -> Grid {
                let $block = self;
                $grid
            }
        }
    };
}

impl<T: Unpack + Operand> Element for T {
    #[inline(always)]
    fn write<I: Isa>(isa: I, row: &[Self], first: usize, out: &mut [[f32; BLOCK_LEN]]) {
        isa.leaf(Write { blocks: &row[first / T::UNITS..], out });
    }
}

/// Writes the elements of blocks; a function of its own, for it is long and several kernels need it.
struct Write<'a, T> {
    blocks: &'a [T],
    out: &'a mut [[f32; BLOCK_LEN]],
}

impl<T: Unpack> Kernel for Write<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        for (block, out) in self.blocks.iter().zip(self.out.chunks_mut(T::UNITS)) {
            let (quants, grid) = (block.quants(), block.grid());
            for (b, (q, out)) in quants.as_ref().as_chunks().0.iter().zip(out).enumerate() {
                for i in 0..32 / I::LANES {
                    let (d, m) = grid[2 * b + i * I::LANES / 16];
                    let scaled = isa.mul(isa.load_i8(q, i), isa.splat(d));
                    isa.store(isa.add(scaled, isa.splat(m)), out, i);
                }
            }
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
