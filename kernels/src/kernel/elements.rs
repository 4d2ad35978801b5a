//! Rows as f32, by the vectors of an instruction set.
//!
//! Formats that no kernel reads directly unpack a block's quants into bytes first; an element is `d · quant + m`, and `d`
//! and `m` are the same for at least sixteen neighbours, more than any vector has lanes.

use super::units::Units;
use crate::isa::Isa;
use candle_sparse_core::{
    BLOCK_LEN, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K,
    BlockQ8_0, format::f16_to_f32,
};
use half::{bf16, f16};

/// The longest block as units of 32 elements.
pub(super) const LONGEST: usize = 8;

/// An element type of a matrix.
pub(super) trait Elements: Sized {
    /// Writes as many units of a row as `out` holds, from unit `first` on, both whole blocks.
    fn write<I: Isa>(isa: I, row: &[Self], first: usize, out: &mut [[f32; BLOCK_LEN]]);
}

macro_rules! by_units {
    ($($t:ty)*) => {$(
        impl Elements for $t {
            #[inline(always)]
            fn write<I: Isa>(isa: I, row: &[Self], first: usize, out: &mut [[f32; BLOCK_LEN]]) {
                for (unit, out) in Self::units(row)[first..].iter().zip(out) {
                    for i in 0..32 / I::LANES {
                        isa.store(Self::value(isa, unit, i), out, i);
                    }
                }
            }
        }
    )*};
}

by_units!(f32 f16 bf16 BlockQ8_0 BlockQ4_0 BlockQ4_1);

/// `d` and `m` of each sixteen elements.
type Grid = [(f32, f32); 2 * LONGEST];

macro_rules! by_quants {
    ($($t:ty, $units:literal units, |$block:ident| $grid:expr;)*) => {$(
        impl Elements for $t {
            #[inline(always)]
            fn write<I: Isa>(isa: I, row: &[Self], first: usize, out: &mut [[f32; BLOCK_LEN]]) {
                for ($block, out) in row[first / $units..].iter().zip(out.chunks_mut($units)) {
                    let grid: Grid = $grid;
                    let quants = $block.unpack();
                    for (b, (q, out)) in quants.as_chunks::<BLOCK_LEN>().0.iter().zip(out).enumerate() {
                        let mut bytes = [0; BLOCK_LEN];
                        for j in 0..BLOCK_LEN {
                            bytes[j] = q[j] as i8;
                        }
                        for i in 0..32 / I::LANES {
                            let (d, m) = grid[2 * b + i * I::LANES / 16];
                            let scaled = isa.mul(isa.widen_i8(&bytes, i), isa.splat(d));
                            isa.store(isa.add(scaled, isa.splat(m)), out, i);
                        }
                    }
                }
            }
        }
    )*};
}

by_quants! {
    BlockQ6K, 8 units, |block| signed(block.d, &block.scales);
    BlockQ5_1, 1 units, |block| [(number(block.d), number(block.m)); 2 * LONGEST];
    BlockQ5_0, 1 units, |block| [(number(block.d), 0.0); 2 * LONGEST];
    BlockQ5K, 8 units, |block| per_block(block.d, block.dmin, block.unpack_scales());
    BlockQ4K, 8 units, |block| per_block(block.d, block.dmin, block.unpack_scales());
    BlockQ3K, 8 units, |block| signed(block.d, &block.unpack_scales());
    BlockQ2K, 8 units, |block| nibbles(block.d, block.dmin, &block.scales);
}

#[inline(always)]
fn number(x: f16) -> f32 {
    f16_to_f32(x.to_bits())
}

#[inline(always)]
fn signed(d: f16, scales: &[i8; 16]) -> Grid {
    let mut grid = [(0.0, 0.0); 16];
    for j in 0..16 {
        grid[j].0 = number(d) * f32::from(scales[j]);
    }
    grid
}

#[inline(always)]
fn per_block(d: f16, dmin: f16, (scales, mins): ([u8; 8], [u8; 8])) -> Grid {
    let mut grid = [(0.0, 0.0); 16];
    for j in 0..16 {
        grid[j] = (number(d) * f32::from(scales[j / 2]), -(number(dmin) * f32::from(mins[j / 2])));
    }
    grid
}

#[inline(always)]
fn nibbles(d: f16, dmin: f16, scales: &[u8; 16]) -> Grid {
    let mut grid = [(0.0, 0.0); 16];
    for j in 0..16 {
        let (scale, min) = (scales[j] & 0x0f, scales[j] >> 4);
        grid[j] = (number(d) * f32::from(scale), -(number(dmin) * f32::from(min)));
    }
    grid
}
