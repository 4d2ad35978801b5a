//! Matrices in halves: first looks against the scalar definition, rows joined again against the whole matrix, bit for bit.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use candle_sparse_core::{
    ActivationGroup, BLOCK_LEN, BlockQ8_0, BlockQ8_0Upper, Columns, Format, GROUP_LEN, Halves, KernelSet,
    Matrix, Rows, Scalar, Upper, UpperColumn, format::q8_0_halves::LowerHalves, kernel::halves::UPPER_BLOCKS,
};
use candle_sparse_kernels::{Kernels, Level};
use common::{Stored, bound, numbers, quantized};
use half::f16;

/// Rows of the test matrices: less and more than are asked for ahead.
const COUNT: usize = 23;

/// A matrix in halves, each upper row filled up to whole groups.
struct Split {
    qs: Vec<[u8; 64]>,
    d: Vec<[f16; UPPER_BLOCKS]>,
    lower: Vec<LowerHalves>,
    row_blocks: usize,
}

impl Split {
    fn new(w: Matrix<'_>) -> Self {
        let Rows::Q8_0(blocks) = w.data() else { panic!("Q8_0") };
        let n = w.row_blocks().div_ceil(UPPER_BLOCKS);
        // What fills a row up must not matter to joined rows.
        let (mut qs, mut d) = (vec![[0xa5; 64]; w.rows() * n], vec![[f16::NAN; UPPER_BLOCKS]; w.rows() * n]);
        let mut lower = Vec::new();
        for (i, block) in blocks.iter().enumerate() {
            let (upper, low) = BlockQ8_0Upper::split(block);
            let (group, b) = (
                i / w.row_blocks() * n + i % w.row_blocks() / UPPER_BLOCKS,
                i % w.row_blocks() % UPPER_BLOCKS,
            );
            qs[group].as_chunks_mut().0[b] = upper.qs;
            d[group][b] = upper.d;
            lower.push(low);
        }
        Self { qs, d, lower, row_blocks: w.row_blocks() }
    }

    fn halves(&self) -> Halves<'_> {
        let row_groups = self.row_blocks.div_ceil(UPPER_BLOCKS);
        let upper = Upper { row_groups, qs: &self.qs, d: &self.d };
        Halves { upper, row_blocks: self.row_blocks, lower: &self.lower }
    }
}

fn look(k: &impl KernelSet, w: Upper<'_>, x: &[ActivationGroup]) -> Vec<f32> {
    let mut y = vec![f32::NAN; w.qs.len() / w.row_groups];
    k.matvec_upper(w, &x.iter().map(UpperColumn::from).collect::<Vec<_>>(), &mut y);
    y
}

#[test]
fn first_looks_agree_with_scalar_and_differ_from_the_product_by_the_lower_halves() {
    for kernels in Kernels::available() {
        for groups in 1..=9 {
            let cols = groups * GROUP_LEN;
            let stored = Stored::new(Format::Q8_0, &numbers(COUNT * cols, 1));
            let (w, x) = (stored.matrix(COUNT, cols), numbers(cols, 2));
            let (split, column) = (Split::new(w), quantized(&x, cols));
            let upper = split.halves().upper;
            let (got, want) = (look(&kernels, upper, &column), look(&Scalar, upper, &column));
            let mut exact = [0.0; COUNT];
            kernels.matmul(w, Columns::Quantized(&column), &mut [&mut exact]);
            for r in 0..COUNT {
                let level = kernels.level();
                // Nibbles of 0 and what corrects them make terms up to twice as large as the elements.
                assert!((got[r] - want[r]).abs() <= bound(cols, 3.0 * cols as f32), "{level} {groups} [{r}]");
                // A lower half is at most 7.5 of 127 steps away.
                let most = 7.6 / 127.0 * x.iter().map(|v| v.abs() + 0.01).sum::<f32>();
                assert!((got[r] - exact[r]).abs() <= most, "{level} {groups} [{r}]: {} {}", got[r], exact[r]);
            }
            // Rows do not depend on those beside them.
            assert_eq!(look(&kernels, upper.slice_rows(5..6), &column)[0].to_bits(), got[5].to_bits());
        }
    }
}

#[test]
fn extreme_halves_are_exact() {
    for kernels in Kernels::available() {
        for u in [0_u8, 1, 7, 8, 15] {
            for x in [-127.0, -1.0, 0.0, 1.0, 127.0] {
                let (qs, d) = ([[u | u << 4; 64]], [[f16::ZERO, f16::ZERO, f16::ZERO, f16::ONE]]);
                let mut column = [x; BLOCK_LEN];
                // So that the scale is 1, whatever x is.
                column[7] = 127.0;
                let groups = [ActivationGroup::quantize(&[column])];
                let got = look(&kernels, Upper { row_groups: 1, qs: &qs, d: &d }, &groups);
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
            let split = Split::new(w);
            for rows in [vec![], vec![22], (0..23).collect(), (0..23).step_by(3).collect::<Vec<u32>>()] {
                let mut got = vec![BlockQ8_0 { d: f16::NAN, qs: [77; 32] }; rows.len() * blocks];
                kernels.join_rows(split.halves(), &rows, &mut got);
                let want = rows.iter().flat_map(|&r| &whole[r as usize * blocks..][..blocks]);
                assert!(got.iter().eq(want), "{} {blocks} {rows:?}", kernels.level());
            }
        }
    }
}

#[test]
fn levels_that_differ_in_byte_products_have_the_same_bits() {
    let cols = 5 * GROUP_LEN;
    let stored = Stored::new(Format::Q8_0, &numbers(COUNT * cols, 5));
    let split = Split::new(stored.matrix(COUNT, cols));
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
    let split = Split::new(stored.matrix(2, 32));
    Kernels::get().unwrap().join_rows(split.halves(), &[2], &mut [BlockQ8_0 { d: f16::ONE, qs: [0; 32] }]);
}
