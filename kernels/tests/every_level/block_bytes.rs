//! Products with blocks of any bytes, files' extremes among them, against the definition of their format.

use super::{Stored, numbers, product};
use candle_sparse_core::{ActivationGroup, Format};
use candle_sparse_kernels::Kernels;
use half::f16;

/// Where a block has its f16 numbers, and the largest element if they are 1.
fn block_layout(format: Format) -> (&'static [usize], f32) {
    match format {
        Format::Q8_0 => (&[0], 128.0),
        Format::Q6K => (&[208], 128.0 * 32.0),
        Format::Q5_1 => (&[0, 2], 32.0),
        Format::Q5_0 => (&[0], 16.0),
        Format::Q5K => (&[0, 2], 63.0 * 32.0),
        Format::Q4_1 => (&[0, 2], 16.0),
        Format::Q4_0 => (&[0], 8.0),
        Format::Q4K => (&[0, 2], 63.0 * 16.0),
        Format::Q3K => (&[108], 32.0 * 4.0),
        Format::Q2K => (&[80, 82], 15.0 * 4.0),
        Format::F32 | Format::F16 | Format::BF16 => (&[], 0.0),
    }
}

/// Blocks whose quants and scales have the bytes of `pattern`, and scales of scales are 1.
fn blocks_of(format: Format, blocks: usize, pattern: impl Fn(usize) -> u8) -> Stored {
    let len = format.block_bytes();
    let mut words = vec![0_u32; (blocks * len).div_ceil(4)];
    let bytes = &mut bytemuck::cast_slice_mut(&mut words)[..blocks * len];
    bytes.iter_mut().enumerate().for_each(|(i, byte)| *byte = pattern(i));
    for block in bytes.chunks_exact_mut(len) {
        for &at in block_layout(format).0 {
            block[at..at + 2].copy_from_slice(&f16::ONE.to_le_bytes());
        }
    }
    Stored { format, words }
}

/// Groups of whole numbers with scale 1.
fn whole(x: &[i8]) -> Vec<ActivationGroup> {
    let mut groups = vec![ActivationGroup::ZERO; x.len() / 128];
    for (group, x) in groups.iter_mut().zip(x.chunks(128)) {
        x.as_chunks().0.iter().enumerate().for_each(|(b, qs)| group.set_block(b, 1.0, qs));
    }
    groups
}

#[test]
fn every_byte_of_a_block_counts_as_its_format_says() {
    let (rows, cols) = if cfg!(miri) { (1, 256) } else { (5, 512) };
    let hashed = |i: usize, seed: u32| (numbers(1, i as u32 ^ (seed << 20))[0] * 127.5) as i8;
    // Bytes −128, of which some formats have a scale, are among the constant ones.
    let constant = [0x00, 0xff, 0x80, 0x7f, 0x55, 0xaa, 0x0f, 0xf0];
    let columns: [&dyn Fn(usize) -> i8; 6] = [
        &|_| 127,
        &|_| -127,
        &|k| if k % 2 == 0 { 127 } else { -127 },
        &|k| if k % 32 < 16 { 127 } else { -127 },
        &|k| (k * 7 % 3) as i8 - 1,
        &|k| hashed(k, 9).max(-127),
    ];
    let x: Vec<i8> = columns.iter().flat_map(|column| (0..cols).map(column)).collect();
    for format in Format::ALL.into_iter().filter(|f| f.is_quantized()) {
        let blocks = rows * cols / format.block_len();
        let constant = constant.map(|byte| blocks_of(format, blocks, |_| byte));
        let hashed = [1, 2, 3].map(|seed| blocks_of(format, blocks, |i| hashed(i, seed).cast_unsigned()));
        for stored in constant.iter().chain(&hashed) {
            let (w, mut row) = (stored.matrix(rows, cols), vec![0.0; cols]);
            for kernels in Kernels::available() {
                // All at once, and one at a time.
                let mut got = product(&kernels, w, &[], &whole(&x), columns.len());
                got.extend(x.chunks(cols).map(|x| product(&kernels, w, &[], &whole(x), 1).remove(0)));
                for (c, r) in (0..got.len()).flat_map(|c| (0..rows).map(move |r| (c, r))) {
                    let x = &x[c % columns.len() * cols..][..cols];
                    w.dequantize_row(r, &mut row);
                    let want: f64 = row.iter().zip(x).map(|(w, &x)| f64::from(*w) * f64::from(x)).sum();
                    let size = x.iter().map(|x| f32::from(*x).abs()).sum::<f32>() * block_layout(format).1;
                    // Sums of whole numbers that f32 holds are exact; others are rounded where lanes are added up.
                    let bound = if size < (1 << 24) as f32 { 0.0 } else { 16.0 * f32::EPSILON * size };
                    let off = (f64::from(got[c][r]) - want).abs();
                    let level = kernels.level();
                    assert!(off <= f64::from(bound), "{level} {format:?} [{r},{c}]: {} {want}", got[c][r]);
                }
            }
        }
    }
}
