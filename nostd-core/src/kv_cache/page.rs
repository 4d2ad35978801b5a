//! A page: 32 positions of every key/value head of a layer, in one of the tiers' formats.
//!
//! ```text
//! keys    [channels][32 positions]              a row is a channel: its scale is folded into the query's element
//! values  [channels / row][32 positions][row]   a row is a position: its scale is folded into the probability
//! ```
//!
//! So both products of attention are weighted sums of rows of a page. Quantised keys are grouped per channel over 32
//! positions and values per position over 32 channels, as in KIVI (Liu et al. 2024). A value row holds the channels of one
//! head, or of all heads: then heads of 8 channels share a block of 32, and nothing is filled up with zeros.

use crate::{
    error::Error,
    format::{BLOCK_LEN, BlockQ4_1, BlockQ8_0, Format},
    matrix::{Matrix, Rows},
};
use core::ops::Range;
use half::{bf16, f16, slice::HalfFloatSliceExt};

/// Positions per page.
pub const PAGE_LEN: usize = 32;
const _: () = assert!(PAGE_LEN == BLOCK_LEN);

/// What lies in a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageShape {
    /// Channels of all key (or value) heads, `kv_dim`.
    pub channels: usize,
    /// Channels of a value row; divides `channels`.
    pub row: usize,
}

impl PageShape {
    /// Elements of a page of floats.
    #[must_use]
    pub const fn elements(self) -> usize {
        2 * self.channels * PAGE_LEN
    }

    /// Elements of a quantised value row: whole blocks, the last one filled up with zeros.
    #[must_use]
    pub const fn width(self) -> usize {
        self.row.next_multiple_of(BLOCK_LEN)
    }

    /// Blocks of a quantised page.
    #[must_use]
    pub const fn blocks(self) -> usize {
        self.channels + self.channels / self.row * PAGE_LEN * (self.width() / BLOCK_LEN)
    }

    /// Bytes of a page, scales included.
    #[must_use]
    pub const fn bytes(self, format: Format) -> usize {
        if format.is_quantized() {
            self.blocks() * format.block_bytes()
        } else {
            self.elements() * format.block_bytes()
        }
    }

    /// The keys of some channels, `[channels, PAGE_LEN]`.
    ///
    /// # Panics
    /// The page is shorter than [`Self::bytes`] says, or has no such channels.
    #[must_use]
    pub fn keys(self, page: Rows<'_>, channels: Range<usize>) -> Matrix<'_> {
        let per_row = PAGE_LEN / page.format().block_len();
        let rows = page.slice(channels.start * per_row..channels.end * per_row);
        Matrix::new(channels.len(), PAGE_LEN, rows).expect("rows of a page's length were sliced")
    }

    /// The first `n` positions of value rows `i` of `channels / row`: `[n, row]`, as wide as [`Self::width`] where quantised.
    ///
    /// # Panics
    /// The page is shorter than [`Self::bytes`] says, or has no such rows.
    #[must_use]
    pub fn values(self, page: Rows<'_>, i: usize, n: usize) -> Matrix<'_> {
        let (len, cols) = (page.format().block_len(), self.value_cols(page.format()));
        let start = (self.channels + i * cols) * PAGE_LEN / len;
        let rows = page.slice(start..start + n * cols / len);
        Matrix::new(n, cols, rows).expect("whole rows were sliced")
    }

    const fn value_cols(self, format: Format) -> usize {
        if format.is_quantized() { self.width() } else { self.row }
    }

    /// Blocks of up to 32 elements, in the order of memory: where each begins and how many elements of floats it has.
    fn runs(self) -> impl Iterator<Item = Run> {
        let (per_row, row) = (self.width() / BLOCK_LEN, self.row);
        let keys = (0..self.channels).map(|c| Run { block: c, element: c * PAGE_LEN, len: PAGE_LEN });
        let values = (0..self.channels / row * PAGE_LEN * per_row).map(move |i| Run {
            block: self.channels + i,
            element: self.channels * PAGE_LEN + i / per_row * row + i % per_row * BLOCK_LEN,
            len: (row - i % per_row * BLOCK_LEN).min(BLOCK_LEN),
        });
        keys.chain(values)
    }

    /// Reads one run as f32; what lies past its end is zero.
    fn read(page: Rows<'_>, run: Run, out: &mut [f32; BLOCK_LEN]) {
        if page.format().is_quantized() {
            page.slice(run.block..run.block + 1).dequantize(out);
            return;
        }
        let rows = page.slice(run.element..run.element + run.len);
        out[run.len..].fill(0.0);
        match rows {
            // By the CPU's own conversion where it has one.
            Rows::F16(d) => d.convert_to_f32_slice(&mut out[..run.len]),
            _ => rows.dequantize(&mut out[..run.len]),
        }
    }
}

/// A block of a quantised page, and the same elements of a page of floats.
#[derive(Clone, Copy)]
struct Run {
    block: usize,
    element: usize,
    len: usize,
}

/// The memory of a page that is being filled.
#[derive(Debug)]
pub enum PageMut<'a> {
    /// [`Format::F32`]
    F32(&'a mut [f32]),
    /// [`Format::F16`]
    F16(&'a mut [f16]),
    /// [`Format::BF16`]
    BF16(&'a mut [bf16]),
    /// [`Format::Q8_0`]
    Q8_0(&'a mut [BlockQ8_0]),
    /// [`Format::Q4_1`]
    Q4_1(&'a mut [BlockQ4_1]),
}

impl<'a> PageMut<'a> {
    /// A page over bytes.
    ///
    /// # Errors
    /// A format that pages never have, or bytes that are not aligned for it.
    pub fn from_bytes(format: Format, bytes: &'a mut [u8]) -> Result<Self, Error> {
        let bad = |_| Error::OutOfRange("alignment of a page");
        Ok(match format {
            Format::F32 => Self::F32(bytemuck::try_cast_slice_mut(bytes).map_err(bad)?),
            Format::F16 => Self::F16(bytemuck::try_cast_slice_mut(bytes).map_err(bad)?),
            Format::BF16 => Self::BF16(bytemuck::try_cast_slice_mut(bytes).map_err(bad)?),
            Format::Q8_0 => Self::Q8_0(bytemuck::try_cast_slice_mut(bytes).map_err(bad)?),
            Format::Q4_1 => Self::Q4_1(bytemuck::try_cast_slice_mut(bytes).map_err(bad)?),
            _ => return Err(Error::OutOfRange("format of a page")),
        })
    }

    /// Stores keys and values `[channels]` of a position; a quantised page is filled as a whole only and stays as it is.
    ///
    /// # Panics
    /// A length is not that of `shape`.
    pub fn write(&mut self, shape: PageShape, position: usize, k: &[f32], v: &[f32]) {
        match self {
            Self::F32(p) => write(p, shape, position, [k, v], |x| x, |to, x| to.copy_from_slice(x)),
            Self::F16(p) => write(p, shape, position, [k, v], f16::from_f32, convert),
            Self::BF16(p) => write(p, shape, position, [k, v], bf16::from_f32, convert),
            Self::Q8_0(_) | Self::Q4_1(_) => {}
        }
    }

    /// Takes over all elements of another page, rounded to this page's format.
    ///
    /// # Panics
    /// A length is not that of `shape`.
    pub fn fill(&mut self, shape: PageShape, from: Rows<'_>) {
        let mut x = [0.0; BLOCK_LEN];
        for run in shape.runs() {
            PageShape::read(from, run, &mut x);
            let floats = run.element..run.element + run.len;
            match self {
                Self::F32(p) => p[floats].copy_from_slice(&x[..run.len]),
                Self::F16(p) => p[floats].convert_from_f32_slice(&x[..run.len]),
                Self::BF16(p) => p[floats].convert_from_f32_slice(&x[..run.len]),
                Self::Q8_0(p) => p[run.block] = BlockQ8_0::quantize(&x),
                Self::Q4_1(p) => p[run.block] = BlockQ4_1::quantize(&x),
            }
        }
    }
}

/// Stores a position of a page of floats; `one` converts an element, `run` a run of them.
fn write<T>(
    page: &mut [T],
    shape: PageShape,
    position: usize,
    [k, v]: [&[f32]; 2],
    one: impl Fn(f32) -> T,
    run: impl Fn(&mut [T], &[f32]),
) {
    let (keys, values) = page.split_at_mut(shape.channels * PAGE_LEN);
    for (channel, x) in keys.as_chunks_mut::<PAGE_LEN>().0.iter_mut().zip(k) {
        channel[position] = one(*x);
    }
    for (rows, x) in values.chunks_exact_mut(PAGE_LEN * shape.row).zip(v.chunks_exact(shape.row)) {
        run(&mut rows[position * shape.row..(position + 1) * shape.row], x);
    }
}

fn convert<T>(to: &mut [T], x: &[f32])
where
    [T]: HalfFloatSliceExt,
{
    to.convert_from_f32_slice(x);
}

/// Rounds elements as a page of `format` stores them: `x` becomes what would be read.
pub fn round(format: Format, x: &mut [f32]) {
    match format {
        Format::F16 => x.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32()),
        Format::BF16 => x.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32()),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{vec, vec::Vec};

    fn noise(n: usize, seed: f32) -> Vec<f32> {
        (0..n).map(|i| libm::sinf(i as f32 * 1.3 + seed)).collect()
    }

    #[test]
    fn heads_of_8_channels_share_blocks() {
        let (joined, apart) = (PageShape { channels: 32, row: 32 }, PageShape { channels: 32, row: 8 });
        assert_eq!(joined.bytes(Format::F16), 4096);
        assert_eq!(joined.bytes(Format::Q8_0), 2 * 32 * 34);
        assert_eq!(joined.bytes(Format::Q4_1), 2 * 32 * 20);
        assert_eq!(apart.bytes(Format::Q8_0), (32 + 4 * 32) * 34);
    }

    #[test]
    fn what_was_written_is_read_in_every_tier() {
        for (channels, row) in [(32, 32), (32, 8), (80, 40), (6, 6)] {
            let shape = PageShape { channels, row };
            let mut hot = vec![0.0; shape.elements()];
            for position in 0..PAGE_LEN {
                let (k, v) = (noise(channels, position as f32), noise(channels, -1.0 - position as f32));
                PageMut::F32(&mut hot).write(shape, position, &k, &v);
            }
            for (format, step) in
                [(Format::F16, 1e-3), (Format::Q8_0, 1.0 / 127.0), (Format::Q4_1, 2.0 / 15.0)]
            {
                let mut words = vec![0_u32; shape.bytes(format).div_ceil(4)];
                let bytes = &mut bytemuck::cast_slice_mut::<u32, u8>(&mut words)[..shape.bytes(format)];
                let mut page = PageMut::from_bytes(format, bytes).unwrap();
                page.fill(shape, Rows::F32(&hot));
                let rows = Rows::from_bytes(format, bytes).unwrap();
                for position in 0..PAGE_LEN {
                    let (k, v) = (noise(channels, position as f32), noise(channels, -1.0 - position as f32));
                    let mut lane = [0.0; PAGE_LEN];
                    for (c, k) in k.iter().enumerate() {
                        shape.keys(rows, c..c + 1).dequantize_row(0, &mut lane);
                        assert!((lane[position] - k).abs() <= 0.6 * step, "{format:?} key");
                    }
                    for (i, v) in v.chunks_exact(row).enumerate() {
                        let values = shape.values(rows, i, position + 1);
                        let mut got = vec![0.0; values.cols()];
                        values.dequantize_row(position, &mut got);
                        assert!(got.iter().zip(v).all(|(g, v)| (g - v).abs() <= 0.6 * step), "{format:?}");
                    }
                }
                let mut back = vec![0.0; shape.elements()];
                PageMut::F32(&mut back).fill(shape, rows);
                assert!(back.iter().zip(&hot).all(|(b, h)| (b - h).abs() <= 0.6 * step), "{format:?}");
            }
        }
    }
}
