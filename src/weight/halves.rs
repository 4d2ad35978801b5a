//! A matrix in `Q8_0` held in halves: upper ones for a first look at all rows, lower ones for the rows that matter.
//!
//! ```text
//! first look:  Σ_k upper[r, k] · x[k] + Σ_j rest[r, j] · x[picked_j]
//! exact:       Σ_k w[r, k] · x[k]      of rows joined again, with the bits of the whole matrix
//! ```
//!
//! The input of a head lies mostly in a few columns. What the upper halves leave of these is kept in the blocks that fill each
//! row up to whole groups, which takes two thirds of the error of a first look away for few bytes.

use super::{Compute, ROW_STEP, Weight, split_columns};
use crate::{buffer::Buffer, threads::ranges};
use candle_core::{Result, bail};
use candle_sparse_core::{
    ActivationGroup, BLOCK_LEN, BlockQ8_0, BlockQ8_0Upper, Columns, Format, Halves, KernelSet, Matrix, Rows,
    Upper, UpperColumn, format::q8_0_halves::LowerHalves, kernel::halves::UPPER_BLOCKS,
};
use candle_sparse_kernels::Kernels;
use half::f16;
use rayon::prelude::*;
use std::ops::Range;

/// Rows that are joined at a time.
pub(crate) const JOINED: usize = 16;
/// How much smaller than in other columns the error in picked ones is, and how much larger the row than both: all three are
/// bounded by one number per row, which these keep tight.
const PICKED_PART: f32 = 1.0 / 16.0;
const ROUNDING_PART: f32 = 32.0;

/// A matrix `[rows, cols]` in halves.
#[derive(Debug)]
pub(crate) struct Halved {
    rows: usize,
    cols: usize,
    /// Nibbles and scales of upper halves.
    upper: [Buffer; 2],
    lower: Buffer,
    picked: Vec<usize>,
    /// Of each row, a norm of what a first look does not see.
    missed: Vec<f32>,
    /// The largest norm of a row's kept rest.
    most_kept: f32,
}

/// By how much a first look at a row may be wrong: `scale · missed[row] + offset`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limit {
    scale: f32,
    offset: f32,
}

impl Halved {
    /// How many columns of a row of `cols` elements are picked: as many as fill it up to whole groups, or a group more.
    pub(crate) fn picked(cols: usize) -> usize {
        let n = cols / BLOCK_LEN;
        (UPPER_BLOCKS - n % UPPER_BLOCKS).min(n) * BLOCK_LEN
    }

    /// The halves of `w`, whose input is largest in the columns `picked`.
    ///
    /// Cost: the bytes of `w` once more, until it is dropped.
    ///
    /// # Errors
    /// Another format than Q8_0, another number of columns than [`Self::picked`], or there is no memory for it.
    pub(crate) fn new(w: &Weight, picked: Vec<usize>) -> Result<Self> {
        let (rows, cols) = (w.rows(), w.cols());
        let Rows::Q8_0(blocks) = w.matrix().data() else {
            bail!("halves: the matrix is in {}, q8_0 is needed", w.format().name());
        };
        if rows == 0 || picked.len() != Self::picked(cols) || picked.iter().any(|&c| c >= cols) {
            bail!("halves: columns {picked:?} of a matrix [{rows}, {cols}]");
        }
        let (n, groups) = (cols / BLOCK_LEN, row_groups(cols));
        let mut qs = Buffer::zeroed(rows * groups * size_of::<[u8; 64]>())?;
        let mut d = Buffer::zeroed(rows * groups * size_of::<[f16; UPPER_BLOCKS]>())?;
        let mut lower = Buffer::zeroed(rows * n * size_of::<LowerHalves>())?;
        let out = elements_mut(&mut qs, rows * groups)
            .par_chunks_exact_mut(groups)
            .zip(elements_mut(&mut d, rows * groups).par_chunks_exact_mut(groups))
            .zip(elements_mut(&mut lower, rows * n).par_chunks_exact_mut(n));
        let split = blocks.par_chunks_exact(n).zip(out).map_init(
            || vec![0.0; cols],
            |rest, (row, ((qs, d), lower))| split_row(row, &picked, Row { qs, d, lower }, rest),
        );
        let norms: Vec<[f32; 2]> = split.collect();
        let missed = norms.iter().map(|n| n[0]).collect();
        let most_kept = norms.iter().map(|n| n[1]).fold(0.0, f32::max);
        Ok(Self { rows, cols, upper: [qs, d], lower, picked, missed, most_kept })
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of the input of a first look.
    pub(crate) fn wide(&self) -> usize {
        row_groups(self.cols) * UPPER_BLOCKS * BLOCK_LEN
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        self.first_look_bytes() + self.rows * self.row_blocks() * size_of::<LowerHalves>()
    }

    /// Bytes that a first look at all rows reads.
    pub(crate) fn first_look_bytes(&self) -> usize {
        self.rows * row_groups(self.cols) * UPPER_BLOCKS * size_of::<BlockQ8_0Upper>()
    }

    /// Bytes of a row in both halves.
    pub(crate) fn row_bytes(&self) -> usize {
        Format::Q8_0.row_bytes(self.cols)
    }

    fn row_blocks(&self) -> usize {
        self.cols / BLOCK_LEN
    }

    fn halves(&self) -> Halves<'_> {
        let (n, row_groups) = (self.row_blocks(), row_groups(self.cols));
        let [qs, d] = &self.upper;
        let groups = self.rows * row_groups;
        let upper = Upper { row_groups, qs: elements(qs, groups), d: elements(d, groups) };
        Halves { upper, row_blocks: n, lower: elements(&self.lower, self.rows * n) }
    }

    /// Writes the input of a first look `[wide]` from that of the matrix `[cols]`.
    pub(crate) fn widen(&self, x: &[f32], wide: &mut [f32]) {
        let (all, more) = wide.split_at_mut(self.cols);
        all.copy_from_slice(x);
        more.iter_mut().zip(&self.picked).for_each(|(v, &c)| *v = x[c]);
    }

    /// A first look at some rows.
    pub(crate) fn look(&self, kernels: &Kernels, rows: Range<usize>, wide: &[UpperColumn], y: &mut [f32]) {
        kernels.matvec_upper(self.halves().upper.slice_rows(rows), wide, y);
    }

    /// By how much first looks with an input may be wrong, given as it is rounded for the matrix and for a first look.
    ///
    /// By Cauchy and Schwarz, apart for picked and other columns, for the input is far larger in the former.
    pub(crate) fn limit(&self, x: &[ActivationGroup], wide: &[ActivationGroup]) -> Limit {
        let n = self.row_blocks();
        let block = |x: &[ActivationGroup], i: usize, n: usize| {
            let (group, b) = ActivationGroup::place(i, n);
            let (d, _, qs) = x[group].block(b);
            qs.map(|q| d * f32::from(q))
        };
        let all: f32 = (0..n).map(|i| block(x, i, n).iter().map(|v| v * v).sum::<f32>()).sum();
        let (mut picked, mut rounded) = (0.0, 0.0);
        for (i, columns) in self.picked.chunks(BLOCK_LEN).enumerate() {
            for (c, near) in columns.iter().zip(block(wide, n + i, wide.len() * UPPER_BLOCKS)) {
                let v = block(x, c / BLOCK_LEN, n)[c % BLOCK_LEN];
                picked += v * v;
                rounded += (v - near) * (v - near);
            }
        }
        let [all, others, picked, rounded] = [all, (all - picked).max(0.0), picked, rounded].map(f32::sqrt);
        // Two sums, each of some roundings of terms that are at most ‖w‖ · ‖x‖ together.
        let rounding = 2.0 * (n + 16) as f32 * f32::EPSILON;
        // More than what the norms themselves may be too small by.
        let slack = 1.0 + 1e-4;
        let scale = others + PICKED_PART * picked + ROUNDING_PART * rounding * all;
        Limit { scale: scale * slack, offset: self.most_kept * rounded * slack }
    }

    /// By how much a first look at a row may be wrong.
    #[inline]
    pub(crate) fn error(&self, limit: Limit, row: usize) -> f32 {
        limit.scale * self.missed[row] + limit.offset
    }

    /// `y[i] = Σ_k w[rows[i], k] · x[c, k]` with the bits of the whole matrix, for strictly increasing `rows`; `joined` is working
    /// memory.
    pub(crate) fn multiply(
        &self,
        kernels: &Kernels,
        rows: &[u32],
        x: &[ActivationGroup],
        joined: &mut Vec<BlockQ8_0>,
        y: &mut [&mut [f32]],
    ) {
        let n = self.row_blocks();
        joined.resize(JOINED * n, NOTHING);
        for (first, rows) in (0..).step_by(JOINED).zip(rows.chunks(JOINED)) {
            let joined = &mut joined[..rows.len() * n];
            kernels.join_rows(self.halves(), rows, joined);
            let w = Matrix::new(rows.len(), self.cols, Rows::Q8_0(joined)).expect("whole rows were joined");
            let part = first..first + rows.len();
            match y {
                // A lone column, as in decode, must not allocate.
                [y] => kernels.matmul(w, Columns::Quantized(x), &mut [&mut y[part]]),
                _ => {
                    let mut y: Vec<_> = y.iter_mut().map(|y| &mut y[part.clone()]).collect();
                    kernels.matmul(w, Columns::Quantized(x), &mut y);
                }
            }
        }
    }

    /// As [`Weight::matmul`]: all rows, exact.
    pub(crate) fn matmul(&self, on: Compute<'_>, x: &[f32], groups: &mut [ActivationGroup], y: &mut [f32]) {
        let n = x.len() / self.cols;
        let Columns::Quantized(x) = on.columns(Format::Q8_0, self.cols, x, groups) else {
            unreachable!("columns for Q8_0 are quantised")
        };
        let tasks = on.threads.tasks(self.rows.div_ceil(ROW_STEP), n * self.bytes());
        let ranges: Vec<_> = ranges(self.rows, tasks, ROW_STEP).collect();
        let parts = split_columns(y, self.rows, ranges.iter().map(ExactSizeIterator::len));
        on.threads.for_each(ranges.into_iter().zip(parts), |(r, mut y)| {
            let rows: Vec<u32> = r.map(|r| r as u32).collect();
            self.multiply(on.kernels, &rows, x, &mut Vec::new(), &mut y);
        });
    }

    /// Writes a row as f32.
    pub(crate) fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        let n = self.row_blocks();
        let Halves { upper, lower, .. } = self.halves();
        let lower = lower[row * n..(row + 1) * n].iter().enumerate();
        for ((i, lower), out) in lower.zip(out.as_chunks_mut().0) {
            upper.block(row, i).join(lower).dequantize(out);
        }
    }

    /// The same numbers as F32.
    ///
    /// # Errors
    /// There is no memory for them.
    pub(crate) fn to_f32(&self) -> Result<Weight> {
        let mut values = vec![0.0; self.rows * self.cols];
        let rows = values.par_chunks_exact_mut(self.cols).enumerate();
        rows.for_each(|(r, out)| self.dequantize_row(r, out));
        Weight::from_f32(Format::F32, self.cols, &values)
    }
}

const NOTHING: BlockQ8_0 = BlockQ8_0 { d: f16::ZERO, qs: [0; BLOCK_LEN] };

fn elements<T: bytemuck::Pod>(buffer: &Buffer, n: usize) -> &[T] {
    bytemuck::cast_slice(&buffer.bytes()[..n * size_of::<T>()])
}

fn elements_mut<T: bytemuck::Pod>(buffer: &mut Buffer, n: usize) -> &mut [T] {
    bytemuck::cast_slice_mut(&mut buffer.bytes_mut()[..n * size_of::<T>()])
}

/// Groups of an upper row of so many elements and the picked ones.
fn row_groups(cols: usize) -> usize {
    cols / BLOCK_LEN / UPPER_BLOCKS + 1
}

/// Where the halves of a row go.
struct Row<'a> {
    qs: &'a mut [[u8; 64]],
    d: &'a mut [[f16; UPPER_BLOCKS]],
    lower: &'a mut [LowerHalves],
}

impl Row<'_> {
    fn put(&mut self, i: usize, block: BlockQ8_0Upper) {
        let (group, b) = (i / UPPER_BLOCKS, i % UPPER_BLOCKS);
        self.qs[group].as_chunks_mut().0[b] = block.qs;
        self.d[group][b] = block.d;
    }
}

/// Writes the halves of a row; the norm of what a first look misses, and that of the kept rest. `rest` is working memory.
fn split_row(row: &[BlockQ8_0], picked: &[usize], mut out: Row<'_>, rest: &mut [f32]) -> [f32; 2] {
    let norm = |x: &[f32]| x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt() as f32 * (1.0 + 1e-5);
    let mut size = 0.0_f32;
    for (i, (block, rest)) in row.iter().zip(rest.as_chunks_mut::<BLOCK_LEN>().0).enumerate() {
        let (upper, lower) = BlockQ8_0Upper::split(block);
        out.put(i, upper);
        out.lower[i] = lower;
        let mut middle = [0.0; BLOCK_LEN];
        upper.dequantize(&mut middle);
        block.dequantize(rest);
        size = size.hypot(norm(rest));
        rest.iter_mut().zip(middle).for_each(|(r, m)| *r -= m);
    }
    let (mut kept, mut left) = (0.0_f32, 0.0_f32);
    for (i, columns) in picked.as_chunks::<BLOCK_LEN>().0.iter().enumerate() {
        let mut of_picked = columns.map(|c| std::mem::take(&mut rest[c]));
        let block = BlockQ8_0Upper::quantize(&of_picked);
        out.put(row.len() + i, block);
        let mut values = [0.0; BLOCK_LEN];
        block.dequantize(&mut values);
        of_picked.iter_mut().zip(values).for_each(|(l, v)| *l -= v);
        (kept, left) = (kept.hypot(norm(&values)), left.hypot(norm(&of_picked)));
    }
    [norm(rest).max(left / PICKED_PART).max(size / ROUNDING_PART), kept]
}
