//! Bits do not change by accident: not between levels, not between versions.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use candle_sparse_core::{Activation, Format, GluActivation, KernelSet, Neurons};
use candle_sparse_kernels::{Kernels, Level};
use common::{Stored, column, numbers, quantized};

/// FNV-1a of the bits of every number.
fn hash(hash: u64, x: &[f32]) -> u64 {
    x.iter().fold(hash, |h, v| (h ^ u64::from(v.to_bits())).wrapping_mul(0x0100_0000_01b3))
}

/// The hash of all operations with rows of a format: whole and partial units, panels, every width of a tile.
fn bits(kernels: &Kernels, format: Format) -> u64 {
    let mut h = 0xcbf2_9ce4_8422_2325;
    for (rows, cols, n) in
        [(23, 256_usize, 1), (70, 768, 9), (13, 512, 2), (9, 1024, 3), (6, 288, 4), (5, 39, 7)]
    {
        let cols = cols.next_multiple_of(format.block_len());
        let stored = Stored::new(format, &numbers(3 * rows * cols, 1));
        let (w, x, weights) = (stored.matrix(rows, cols), numbers(n * cols, 2), numbers(n * rows, 3));
        let groups = if format.is_quantized() { quantized(&x, cols) } else { Vec::new() };
        let (mut y, mut sums) = (vec![vec![0.0; rows]; n], vec![numbers(cols, 4); n]);
        kernels.matmul(
            w,
            column(format, &x, &groups),
            &mut y.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>(),
        );
        let a: Vec<&[f32]> = weights.chunks(rows).collect();
        kernels.matmul_t(w, &a, &mut sums.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>());
        h = y.iter().chain(&sums).fold(h, |h, y| hash(h, y));

        let active: Vec<u32> = (0..rows as u32).filter(|r| r % 4 != 1).collect();
        let x = column(format, &x[..cols], &groups[..groups.len() / n]);
        let (mut gate, mut y) = (vec![0.0; active.len()], numbers(cols, 5));
        let neurons = Neurons::GateUpDown(stored.matrix(3 * rows, cols));
        kernels.sparse_ffn(
            neurons,
            GluActivation { act: Activation::Silu, shift: 0.1 },
            &active,
            x,
            &mut gate,
            &mut y,
        );
        h = hash(hash(h, &gate), &y);
    }
    h
}

/// Of every level but the scalar one: sums have one order, whatever the width of vectors. BF16 where it is multiplied in pairs
/// has another.
#[test]
fn levels_have_the_same_bits() {
    let levels: Vec<Kernels> = Kernels::available().filter(|k| k.level() != Level::Scalar).collect();
    for pair in levels.windows(2) {
        let exact = pair.iter().all(|k| k.level().is_exact());
        for format in Format::ALL.into_iter().filter(|&f| exact || f != Format::BF16) {
            let (a, b) = (bits(&pair[0], format), bits(&pair[1], format));
            assert_eq!(a, b, "{} {} {format:?}", pair[0].level(), pair[1].level());
        }
    }
}

/// A change of rounding is a change of what users get: whoever means it writes the new hash here.
#[test]
fn bits_are_those_of_the_version_before() {
    for kernels in Kernels::available().filter(|k| k.level() != Level::Scalar && k.level().is_exact()) {
        let got = Format::ALL.iter().fold(0_u64, |h, &format| h.rotate_left(5) ^ bits(&kernels, format));
        assert_eq!(got, 0x6175_632f_790c_8ab3, "{}: {got:#018x}", kernels.level());
    }
}

#[test]
fn bits_of_pairs_are_those_of_the_version_before() {
    for kernels in Kernels::available().filter(|k| !k.level().is_exact()) {
        let got = bits(&kernels, Format::BF16);
        assert_eq!(got, 0x100e_9fd6_910a_32b7, "{}: {got:#018x}", kernels.level());
    }
}
