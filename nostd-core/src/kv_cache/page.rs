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
    format::{BLOCK_LEN, BlockQ4_1, BlockQ5_1, BlockQ8_0, Format},
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

/// How the keys and the values of a page are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFormat {
    /// That of the keys.
    pub keys: Format,
    /// That of the values.
    pub values: Format,
}

impl PageFormat {
    /// Keys and values in one format.
    #[must_use]
    pub const fn both(format: Format) -> Self {
        Self { keys: format, values: format }
    }
}

/// The elements of a page.
#[derive(Clone, Copy, Debug)]
pub struct PageRows<'a> {
    /// `[channels, PAGE_LEN]`
    pub keys: Rows<'a>,
    /// `[channels / row, PAGE_LEN, row]`
    pub values: Rows<'a>,
}

impl PageShape {
    /// Elements of the keys, and of the values, of a page of floats.
    #[must_use]
    pub const fn elements(self) -> usize {
        self.channels * PAGE_LEN
    }

    /// Elements of a quantised value row: whole blocks, the last one filled up with zeros.
    #[must_use]
    pub const fn width(self) -> usize {
        self.row.next_multiple_of(BLOCK_LEN)
    }

    /// Blocks (elements of formats without blocks) of the keys.
    #[must_use]
    pub const fn key_blocks(self, format: Format) -> usize {
        self.elements() / format.block_len()
    }

    /// Blocks (elements of formats without blocks) of the values.
    #[must_use]
    pub const fn value_blocks(self, format: Format) -> usize {
        self.channels / self.row * PAGE_LEN * self.value_cols(format) / format.block_len()
    }

    /// Bytes of the keys.
    const fn key_bytes(self, format: Format) -> usize {
        self.key_blocks(format) * format.block_bytes()
    }

    /// Bytes of a page, scales included: the keys, then the values.
    #[must_use]
    pub const fn bytes(self, format: PageFormat) -> usize {
        self.key_bytes(format.keys) + self.value_blocks(format.values) * format.values.block_bytes()
    }

    /// The two parts of a page that has one format.
    ///
    /// # Panics
    /// The page is shorter than [`Self::bytes`] says.
    #[must_use]
    pub fn split(self, page: Rows<'_>) -> PageRows<'_> {
        let (keys, values) = (self.key_blocks(page.format()), self.value_blocks(page.format()));
        PageRows { keys: page.slice(0..keys), values: page.slice(keys..keys + values) }
    }

    /// The two parts of a page over bytes.
    ///
    /// # Errors
    /// Bytes that are not aligned for the formats.
    ///
    /// # Panics
    /// There are fewer than [`Self::bytes`].
    pub fn rows(self, format: PageFormat, bytes: &[u8]) -> Result<PageRows<'_>, Error> {
        let bad = |_| UNALIGNED;
        let (keys, values) = bytes[..self.bytes(format)].split_at(self.key_bytes(format.keys));
        let keys = Rows::from_bytes(format.keys, keys).map_err(bad)?;
        Ok(PageRows { keys, values: Rows::from_bytes(format.values, values).map_err(bad)? })
    }

    /// The keys of some channels, `[channels, PAGE_LEN]`.
    ///
    /// # Panics
    /// The page has no such channels.
    #[must_use]
    pub fn keys(self, page: PageRows<'_>, channels: Range<usize>) -> Matrix<'_> {
        let per_row = PAGE_LEN / page.keys.format().block_len();
        let rows = page.keys.slice(channels.start * per_row..channels.end * per_row);
        Matrix::new(channels.len(), PAGE_LEN, rows).expect("rows of a page's length were sliced")
    }

    /// The first `n` positions of value rows `i` of `channels / row`: `[n, row]`, as wide as [`Self::width`] where quantised.
    ///
    /// # Panics
    /// The page has no such rows.
    #[must_use]
    pub fn values(self, page: PageRows<'_>, i: usize, n: usize) -> Matrix<'_> {
        let format = page.values.format();
        let (len, cols) = (format.block_len(), self.value_cols(format));
        let start = i * cols * PAGE_LEN / len;
        let rows = page.values.slice(start..start + n * cols / len);
        Matrix::new(n, cols, rows).expect("whole rows were sliced")
    }

    const fn value_cols(self, format: Format) -> usize {
        if format.is_quantized() { self.width() } else { self.row }
    }

    /// The keys in blocks, in the order of memory.
    fn key_runs(self) -> impl Iterator<Item = Run> {
        (0..self.channels).map(|c| Run { block: c, element: c * PAGE_LEN, len: PAGE_LEN })
    }

    /// The values in blocks of up to 32 elements, in the order of memory.
    fn value_runs(self) -> impl Iterator<Item = Run> {
        let (per_row, row) = (self.width() / BLOCK_LEN, self.row);
        (0..self.channels / row * PAGE_LEN * per_row).map(move |i| Run {
            block: i,
            element: i / per_row * row + i % per_row * BLOCK_LEN,
            len: (row - i % per_row * BLOCK_LEN).min(BLOCK_LEN),
        })
    }
}

const UNALIGNED: Error = Error::OutOfRange("alignment of a page");

/// A block of quantised keys (or values): where it begins, and how many elements of floats it has.
#[derive(Clone, Copy)]
struct Run {
    block: usize,
    element: usize,
    len: usize,
}

impl Run {
    /// Reads the elements as f32; what lies past the end is zero.
    fn read(self, from: Rows<'_>, out: &mut [f32; BLOCK_LEN]) {
        if from.format().is_quantized() {
            from.slice(self.block..self.block + 1).dequantize(out);
            return;
        }
        let rows = from.slice(self.element..self.element + self.len);
        out[self.len..].fill(0.0);
        match rows {
            // By the CPU's own conversion where it has one.
            Rows::F16(d) => d.convert_to_f32_slice(&mut out[..self.len]),
            _ => rows.dequantize(&mut out[..self.len]),
        }
    }
}

/// The memory of the keys, or of the values, of a page that is being filled.
#[derive(Debug)]
pub enum PartMut<'a> {
    /// [`Format::F32`]
    F32(&'a mut [f32]),
    /// [`Format::F16`]
    F16(&'a mut [f16]),
    /// [`Format::BF16`]
    BF16(&'a mut [bf16]),
    /// [`Format::Q8_0`]
    Q8_0(&'a mut [BlockQ8_0]),
    /// [`Format::Q5_1`]
    Q5_1(&'a mut [BlockQ5_1]),
    /// [`Format::Q4_1`]
    Q4_1(&'a mut [BlockQ4_1]),
}

impl<'a> PartMut<'a> {
    fn from_bytes(format: Format, bytes: &'a mut [u8]) -> Result<Self, Error> {
        let bad = |_| UNALIGNED;
        Ok(match format {
            Format::F32 => Self::F32(bytemuck::try_cast_slice_mut(bytes).map_err(bad)?),
            Format::F16 => Self::F16(bytemuck::try_cast_slice_mut(bytes).map_err(bad)?),
            Format::BF16 => Self::BF16(bytemuck::try_cast_slice_mut(bytes).map_err(bad)?),
            Format::Q8_0 => Self::Q8_0(bytemuck::try_cast_slice_mut(bytes).map_err(bad)?),
            Format::Q5_1 => Self::Q5_1(bytemuck::try_cast_slice_mut(bytes).map_err(bad)?),
            Format::Q4_1 => Self::Q4_1(bytemuck::try_cast_slice_mut(bytes).map_err(bad)?),
            _ => return Err(Error::OutOfRange("format of a page")),
        })
    }

    fn fill(&mut self, runs: impl Iterator<Item = Run>, from: Rows<'_>) {
        let mut x = [0.0; BLOCK_LEN];
        for run in runs {
            run.read(from, &mut x);
            let floats = run.element..run.element + run.len;
            match self {
                Self::F32(p) => p[floats].copy_from_slice(&x[..run.len]),
                Self::F16(p) => p[floats].convert_from_f32_slice(&x[..run.len]),
                Self::BF16(p) => p[floats].convert_from_f32_slice(&x[..run.len]),
                Self::Q8_0(p) => p[run.block] = BlockQ8_0::quantize(&x),
                Self::Q5_1(p) => p[run.block] = BlockQ5_1::quantize(&x),
                Self::Q4_1(p) => p[run.block] = BlockQ4_1::quantize(&x),
            }
        }
    }
}

/// The memory of a page that is being filled.
#[derive(Debug)]
pub struct PageMut<'a> {
    /// `[channels, PAGE_LEN]`
    pub keys: PartMut<'a>,
    /// `[channels / row, PAGE_LEN, row]`
    pub values: PartMut<'a>,
}

impl<'a> PageMut<'a> {
    /// A page over bytes.
    ///
    /// # Errors
    /// A format that pages never have, or bytes that are not aligned for it.
    ///
    /// # Panics
    /// There are fewer bytes than [`PageShape::bytes`] says.
    pub fn from_bytes(shape: PageShape, format: PageFormat, bytes: &'a mut [u8]) -> Result<Self, Error> {
        let (keys, values) = bytes[..shape.bytes(format)].split_at_mut(shape.key_bytes(format.keys));
        let keys = PartMut::from_bytes(format.keys, keys)?;
        Ok(Self { keys, values: PartMut::from_bytes(format.values, values)? })
    }

    /// Stores keys and values `[channels]` of a position; a quantised page is filled as a whole only and stays as it is.
    ///
    /// # Panics
    /// A length is not that of `shape`.
    pub fn write(&mut self, shape: PageShape, position: usize, k: &[f32], v: &[f32]) {
        use PartMut::{BF16, F16, F32};
        match (&mut self.keys, &mut self.values) {
            (F32(keys), F32(values)) => {
                write([keys, values], shape, position, [k, v], |x| x, |to, x| to.copy_from_slice(x));
            }
            (F16(keys), F16(values)) => {
                write([keys, values], shape, position, [k, v], f16::from_f32, convert);
            }
            (BF16(keys), BF16(values)) => {
                write([keys, values], shape, position, [k, v], bf16::from_f32, convert);
            }
            _ => {}
        }
    }

    /// Takes over all elements of another page, rounded to this page's format.
    ///
    /// # Panics
    /// A length is not that of `shape`.
    pub fn fill(&mut self, shape: PageShape, from: PageRows<'_>) {
        self.keys.fill(shape.key_runs(), from.keys);
        self.values.fill(shape.value_runs(), from.values);
    }
}

/// Stores a position of a page of floats; `one` converts an element, `run` a run of them.
fn write<T>(
    [keys, values]: [&mut [T]; 2],
    shape: PageShape,
    position: usize,
    [k, v]: [&[f32]; 2],
    one: impl Fn(f32) -> T,
    run: impl Fn(&mut [T], &[f32]),
) {
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

    const COLD: PageFormat = PageFormat { keys: Format::Q5_1, values: Format::Q4_1 };

    fn noise(n: usize, seed: f32) -> Vec<f32> {
        (0..n).map(|i| libm::sinf(i as f32 * 1.3 + seed)).collect()
    }

    #[test]
    fn heads_of_8_channels_share_blocks() {
        let (joined, apart) = (PageShape { channels: 32, row: 32 }, PageShape { channels: 32, row: 8 });
        assert_eq!(joined.bytes(PageFormat::both(Format::F16)), 4096);
        assert_eq!(joined.bytes(PageFormat::both(Format::Q8_0)), 2 * 32 * 34);
        assert_eq!(joined.bytes(COLD), 32 * 24 + 32 * 20);
        assert_eq!(apart.bytes(PageFormat::both(Format::Q8_0)), (32 + 4 * 32) * 34);
    }

    #[test]
    fn what_was_written_is_read_in_every_tier() {
        let both = PageFormat::both;
        for (channels, row) in [(32, 32), (32, 8), (80, 40), (6, 6)] {
            let shape = PageShape { channels, row };
            let mut hot = vec![0_u32; shape.bytes(both(Format::F32)) / 4];
            let hot = bytemuck::cast_slice_mut::<u32, u8>(&mut hot);
            for position in 0..PAGE_LEN {
                let (k, v) = (noise(channels, position as f32), noise(channels, -1.0 - position as f32));
                let mut page = PageMut::from_bytes(shape, both(Format::F32), hot).unwrap();
                page.write(shape, position, &k, &v);
            }
            let hot = shape.rows(both(Format::F32), hot).unwrap();
            for (format, steps) in [
                (both(Format::F16), [1e-3; 2]),
                (both(Format::Q8_0), [1.0 / 127.0; 2]),
                (COLD, [2.0 / 31.0, 2.0 / 15.0]),
            ] {
                let mut words = vec![0_u32; shape.bytes(format).div_ceil(4)];
                let bytes = &mut bytemuck::cast_slice_mut::<u32, u8>(&mut words)[..shape.bytes(format)];
                PageMut::from_bytes(shape, format, bytes).unwrap().fill(shape, hot);
                let rows = shape.rows(format, bytes).unwrap();
                for position in 0..PAGE_LEN {
                    holds(shape, rows, position, steps);
                }
                let mut back = vec![0_u32; shape.bytes(both(Format::F32)) / 4];
                let back = bytemuck::cast_slice_mut::<u32, u8>(&mut back);
                PageMut::from_bytes(shape, both(Format::F32), back).unwrap().fill(shape, rows);
                let back = shape.rows(both(Format::F32), back).unwrap();
                for position in 0..PAGE_LEN {
                    holds(shape, back, position, steps);
                }
            }
        }
    }

    /// Whether a position has its noise, up to a little more than half a step of keys and of values.
    fn holds(shape: PageShape, rows: PageRows<'_>, position: usize, [key_step, value_step]: [f32; 2]) {
        let (k, v) = (noise(shape.channels, position as f32), noise(shape.channels, -1.0 - position as f32));
        let mut lane = [0.0; PAGE_LEN];
        for (c, k) in k.iter().enumerate() {
            shape.keys(rows, c..c + 1).dequantize_row(0, &mut lane);
            assert!((lane[position] - k).abs() <= 0.6 * key_step, "{:?} key", rows.keys.format());
        }
        for (i, v) in v.chunks_exact(shape.row).enumerate() {
            let values = shape.values(rows, i, position + 1);
            let mut got = vec![0.0; values.cols()];
            values.dequantize_row(position, &mut got);
            let near = got.iter().zip(v).all(|(g, v)| (g - v).abs() <= 0.6 * value_step);
            assert!(near, "{:?} value", rows.values.format());
        }
    }
}
