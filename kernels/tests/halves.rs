//! Matrices in halves: first looks against the scalar definition, rows joined again against the whole matrix, bit for bit.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use candle_sparse_core::{
    ActivationGroup, BLOCK_LEN, BlockQ8_0, BlockQ8_0Upper, Columns, Format, Halves, KernelSet, Matrix, Rows,
    Scalar, Upper, format::q8_0_halves::LowerHalves,
};
use candle_sparse_kernels::{Kernels, Level};
use common::{Stored, bound, numbers, quantized};
use half::f16;

/// Rows of the test matrices: less and more than are asked for ahead.
const COUNT: usize = 23;

/// A matrix in halves, each upper row followed by `more` blocks that are no part of it.
struct Split {
    upper: Vec<BlockQ8_0Upper>,
    lower: Vec<LowerHalves>,
    row_blocks: usize,
    more: usize,
}

impl Split {
    fn new(w: Matrix<'_>, more: usize) -> Self {
        let Rows::Q8_0(blocks) = w.data() else { panic!("Q8_0") };
        let (mut upper, mut lower) = (Vec::new(), Vec::new());
        for row in blocks.chunks(w.row_blocks()) {
            for block in row {
                let (u, l) = BlockQ8_0Upper::split(block);
                upper.push(u);
                lower.push(l);
            }
            upper.extend(vec![BlockQ8_0Upper { d: f16::NAN, qs: [0xa5; 16] }; more]);
        }
        Self { upper, lower, row_blocks: w.row_blocks(), more }
    }

    fn halves(&self) -> Halves<'_> {
        let upper = Upper { row_blocks: self.row_blocks + self.more, blocks: &self.upper };
        Halves { upper, row_blocks: self.row_blocks, lower: &self.lower }
    }
}

fn look(k: &impl KernelSet, w: Upper<'_>, x: &[ActivationGroup]) -> Vec<f32> {
    let mut y = vec![f32::NAN; w.blocks.len() / w.row_blocks];
    k.matvec_upper(w, x, &mut y);
    y
}

#[test]
fn first_looks_agree_with_scalar_and_differ_from_the_product_by_the_lower_halves() {
    for kernels in Kernels::available() {
        for blocks in 1..=19 {
            let cols = blocks * BLOCK_LEN;
            let stored = Stored::new(Format::Q8_0, &numbers(COUNT * cols, 1));
            let (w, x) = (stored.matrix(COUNT, cols), numbers(cols, 2));
            let (split, groups) = (Split::new(w, 0), quantized(&x, cols));
            let upper = split.halves().upper;
            let (got, want) = (look(&kernels, upper, &groups), look(&Scalar, upper, &groups));
            let mut exact = [0.0; COUNT];
            kernels.matmul(w, Columns::Quantized(&groups), &mut [&mut exact]);
            for r in 0..COUNT {
                // Weights are at most 1 and an eighth of a cell more, activations 1 and some rounding.
                let level = kernels.level();
                assert!((got[r] - want[r]).abs() <= bound(cols, 1.2 * cols as f32), "{level} {blocks} [{r}]");
                // A lower half is at most 7.5 of 127 steps away.
                let most = 7.6 / 127.0 * x.iter().map(|v| v.abs() + 0.01).sum::<f32>();
                assert!((got[r] - exact[r]).abs() <= most, "{level} {blocks} [{r}]: {} {}", got[r], exact[r]);
            }
            // Rows do not depend on those beside them.
            let alone = Upper { row_blocks: blocks, blocks: &upper.blocks[5 * blocks..6 * blocks] };
            assert_eq!(look(&kernels, alone, &groups)[0].to_bits(), got[5].to_bits());
        }
    }
}

#[test]
fn extreme_halves_are_exact() {
    for kernels in Kernels::available() {
        for u in [0_u8, 1, 7, 8, 15] {
            for x in [-127.0, -1.0, 0.0, 1.0, 127.0] {
                let blocks = [BlockQ8_0Upper { d: f16::ONE, qs: [u | u << 4; 16] }];
                let mut column = [x; BLOCK_LEN];
                // So that the scale is 1, whatever x is.
                column[7] = 127.0;
                let groups = [ActivationGroup::quantize(&[column])];
                let got = look(&kernels, Upper { row_blocks: 1, blocks: &blocks }, &groups);
                let want = (16.0 * (f32::from(u) - 8.0) + 7.5) * (31.0 * x + 127.0);
                assert_eq!(got, [want], "{} {u} {x}", kernels.level());
            }
        }
    }
}

#[test]
fn joined_rows_are_those_before_the_split() {
    for kernels in Kernels::available() {
        for blocks in [1, 2, 4, 5, 18] {
            let bytes: Vec<i8> =
                numbers(COUNT * blocks * BLOCK_LEN, 3).iter().map(|v| (v * 128.0) as i8).collect();
            let whole: Vec<BlockQ8_0> = bytes
                .as_chunks()
                .0
                .iter()
                .zip(numbers(COUNT * blocks, 4))
                .map(|(qs, d)| BlockQ8_0 { d: f16::from_f32(d), qs: *qs })
                .collect();
            let w = Matrix::new(COUNT, blocks * BLOCK_LEN, Rows::Q8_0(&whole)).unwrap();
            for more in [0, 1] {
                let split = Split::new(w, more);
                for rows in [vec![], vec![22], (0..23).collect(), (0..23).step_by(3).collect::<Vec<u32>>()] {
                    let mut got = vec![BlockQ8_0 { d: f16::NAN, qs: [77; 32] }; rows.len() * blocks];
                    kernels.join_rows(split.halves(), &rows, &mut got);
                    let want = rows.iter().flat_map(|&r| &whole[r as usize * blocks..][..blocks]);
                    assert!(got.iter().eq(want), "{} {blocks} {rows:?}", kernels.level());
                }
            }
        }
    }
}

#[test]
fn levels_that_differ_in_byte_products_have_the_same_bits() {
    let cols = 19 * BLOCK_LEN;
    let stored = Stored::new(Format::Q8_0, &numbers(COUNT * cols, 5));
    let split = Split::new(stored.matrix(COUNT, cols), 0);
    let groups = quantized(&numbers(cols, 6), cols);
    for (a, b) in [(Level::Avx2, Level::AvxVnni), (Level::Neon, Level::NeonDotprod)] {
        if let (Some(a), Some(b)) = (Kernels::for_level(a), Kernels::for_level(b)) {
            assert_eq!(look(&a, split.halves().upper, &groups), look(&b, split.halves().upper, &groups));
        }
    }
}

#[test]
#[should_panic(expected = "past the last")]
fn a_row_too_far_is_refused() {
    let stored = Stored::new(Format::Q8_0, &numbers(2 * 32, 7));
    let split = Split::new(stored.matrix(2, 32), 0);
    Kernels::get().unwrap().join_rows(split.halves(), &[2], &mut [BlockQ8_0 { d: f16::ONE, qs: [0; 32] }]);
}
