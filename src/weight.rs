//! A weight matrix held once, in its own format, shared by every clone of a model.

use crate::{
    buffer::Buffer,
    core::{ActivationGroup, Columns, Format, KernelSet, Matrix, SUPER_BLOCK_LEN},
    kernels::Kernels,
    threads::{Threads, ranges},
};
use candle_core::{CpuStorage, DType, Device, Error, Result, Storage, Tensor, bail};
use half::{bf16, f16};
use rayon::prelude::*;
use std::sync::Arc;

/// Tasks get whole tiles of the kernels, which are four rows high.
pub const ROW_STEP: usize = 4;

/// A matrix `[rows, cols]` in one [`Format`], immutable and cheap to clone.
#[derive(Clone, Debug)]
pub struct Weight {
    rows: usize,
    cols: usize,
    format: Format,
    data: Arc<Buffer>,
}

/// The format that keeps a candle dtype as it is.
#[must_use]
pub fn format_of(dtype: DType) -> Option<Format> {
    match dtype {
        DType::F32 => Some(Format::F32),
        DType::F16 => Some(Format::F16),
        DType::BF16 => Some(Format::BF16),
        _ => None,
    }
}

/// The candle dtype of a format that is not quantised.
#[must_use]
pub fn dtype_of(format: Format) -> Option<DType> {
    match format {
        Format::F32 => Some(DType::F32),
        Format::F16 => Some(DType::F16),
        Format::BF16 => Some(DType::BF16),
        _ => None,
    }
}

impl Weight {
    /// A matrix whose rows are those of several tensors `[rows_i, cols]`, one below the other.
    ///
    /// Tensors are asked for one at a time and dropped before the next, so peak memory is the matrix and one tensor.
    /// Rows that are no whole number of blocks cannot be quantised and keep their dtype.
    ///
    /// # Errors
    /// A tensor fails to load, has another shape or a dtype other than F32, F16, BF16, or lies on another device.
    pub fn stacked(
        format: Format,
        cols: usize,
        parts: &[usize],
        mut tensor: impl FnMut(usize) -> Result<Tensor>,
    ) -> Result<Self> {
        let rows: usize = parts.iter().sum();
        let mut start = 0;
        let (mut format, mut data) = (format, None);
        for (i, &n) in parts.iter().enumerate() {
            // Read before anything is allocated for it: a shape that the file does not have costs no memory.
            let t = tensor(i)?;
            if t.dims() != [n, cols] {
                bail!("weight: shape {:?}, expected {:?}", t.dims(), [n, cols]);
            }
            if data.is_none() && !cols.is_multiple_of(format.block_len()) {
                format = format_of(t.dtype()).unwrap_or(Format::F16);
            }
            let row_bytes = format.row_bytes(cols);
            let len = rows.checked_mul(row_bytes).ok_or_else(|| Error::msg("weight: size overflows"))?;
            let buffer = match &mut data {
                Some(buffer) => buffer,
                None => data.insert(Buffer::zeroed(len)?),
            };
            write_rows(&t, format, &mut buffer.bytes_mut()[start * row_bytes..(start + n) * row_bytes])?;
            start += n;
        }
        let data = data.map_or_else(|| Buffer::zeroed(0), Ok)?;
        Ok(Self { rows, cols, format, data: Arc::new(data) })
    }

    /// A matrix from one tensor `[rows, cols]`, in the given format.
    ///
    /// # Errors
    /// As [`Self::stacked`].
    pub fn from_tensor(t: &Tensor, format: Format) -> Result<Self> {
        let (rows, cols) = t.dims2()?;
        Self::stacked(format, cols, &[rows], |_| Ok(t.clone()))
    }

    /// A matrix whose row `i · parts + j` is row `order[i]` of tensor `j`: rows that are read together lie together.
    ///
    /// Tensors `[order.len(), cols]` are asked for one at a time, as in [`Self::stacked`].
    ///
    /// # Errors
    /// As [`Self::stacked`]; also an `order` past the last row.
    pub fn interleaved(
        format: Format,
        cols: usize,
        parts: usize,
        order: &[u32],
        mut tensor: impl FnMut(usize) -> Result<Tensor>,
    ) -> Result<Self> {
        let n = order.len();
        if let Some(row) = order.iter().find(|&&row| row as usize >= n) {
            bail!("weight: row {row} asked for, there are {n}");
        }
        let (mut format, mut data) = (format, None);
        for part in 0..parts {
            let t = tensor(part)?;
            if t.dims() != [n, cols] {
                bail!("weight: shape {:?}, expected {:?}", t.dims(), [n, cols]);
            }
            if data.is_none() && !cols.is_multiple_of(format.block_len()) {
                format = format_of(t.dtype()).unwrap_or(Format::F16);
            }
            let len = (n * parts).checked_mul(format.row_bytes(cols));
            let len = len.ok_or_else(|| Error::msg("weight: size overflows"))?;
            let buffer = match &mut data {
                Some(buffer) => buffer,
                None => data.insert(Buffer::zeroed(len)?),
            };
            gather_rows(&t, format, Gather { order, parts, part }, &mut buffer.bytes_mut()[..len])?;
        }
        let data = data.map_or_else(|| Buffer::zeroed(0), Ok)?;
        Ok(Self { rows: n * parts, cols, format, data: Arc::new(data) })
    }

    /// A matrix `[values.len() / cols, cols]` from its elements; rows must be whole blocks of `format`.
    ///
    /// # Errors
    /// Another number of elements than whole rows, or the system has not the memory.
    pub fn from_f32(format: Format, cols: usize, values: &[f32]) -> Result<Self> {
        if cols == 0 || !values.len().is_multiple_of(cols) || !cols.is_multiple_of(format.block_len()) {
            bail!("weight: {} elements are no rows of {cols} in {}", values.len(), format.name());
        }
        let rows = values.len() / cols;
        let mut data = Buffer::zeroed(rows * format.row_bytes(cols))?;
        convert(values, cols, format, &mut data.bytes_mut()[..rows * format.row_bytes(cols)])?;
        Ok(Self { rows, cols, format, data: Arc::new(data) })
    }

    /// Rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the elements are stored.
    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.rows * self.format.row_bytes(self.cols)
    }

    /// Whether both are the same matrix in memory, as a tied head and its embedding.
    #[must_use]
    pub fn shares_memory(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.data, &other.data)
    }

    /// The matrix, borrowed.
    ///
    /// # Panics
    /// Never: the shape was checked when the weight was made, and its buffer is page-aligned.
    #[must_use]
    pub fn matrix(&self) -> Matrix<'_> {
        Matrix::from_bytes(self.rows, self.cols, self.format, &self.data.bytes()[..self.bytes()])
            .expect("shape checked when made, buffer page-aligned")
    }

    /// `y[c][r] = Σ_k w[r, k] · x[c, k]` for the rows of `x` `[n, cols]`, into `y` `[n, rows]`, over all threads.
    ///
    /// For one column nothing is allocated. `groups` is working memory of `n` times [`ActivationGroup::count`], used by
    /// quantised formats. Cost: `n · rows · cols` multiply-adds; the weights are read once per call.
    ///
    /// # Panics
    /// Shapes do not fit.
    pub fn matmul(&self, on: On<'_>, x: &[f32], groups: &mut [ActivationGroup], y: &mut [f32]) {
        let x = on.columns(self.format, self.cols, x, groups);
        let w = self.matrix();
        let n = x.count(self.cols);
        assert_eq!(y.len(), n * self.rows, "matmul: y is not [n, rows]");
        let tasks = on.threads.tasks(self.rows.div_ceil(ROW_STEP), n * self.bytes());
        if n == 1 {
            let mut rest = y;
            let tasks = ranges(self.rows, tasks, ROW_STEP).map(|r| {
                let (part, tail) = core::mem::take(&mut rest).split_at_mut(r.len());
                rest = tail;
                (w.slice_rows(r), part)
            });
            on.threads.for_each(tasks, |(w, y)| on.kernels.matmul(w, x, &mut [y]));
        } else {
            let ranges: Vec<_> = ranges(self.rows, tasks, ROW_STEP).collect();
            let parts = split_columns(y, self.rows, ranges.iter().map(ExactSizeIterator::len));
            on.threads.for_each(ranges.into_iter().zip(parts), |(r, mut y)| {
                on.kernels.matmul(w.slice_rows(r), x, &mut y);
            });
        }
    }
}

/// `y` `[n, width]` cut along its rows: item `i` holds, for each of the `n` rows, the next `widths[i]` elements.
pub fn split_columns(
    y: &mut [f32],
    width: usize,
    widths: impl Iterator<Item = usize> + Clone,
) -> Vec<Vec<&mut [f32]>> {
    let n = y.len() / width.max(1);
    let mut parts: Vec<Vec<&mut [f32]>> = widths.clone().map(|_| Vec::with_capacity(n)).collect();
    for mut row in y.chunks_exact_mut(width.max(1)) {
        for (part, w) in parts.iter_mut().zip(widths.clone()) {
            let (head, tail) = row.split_at_mut(w);
            part.push(head);
            row = tail;
        }
    }
    parts
}

/// What an operation runs on.
#[derive(Clone, Copy, Debug)]
pub struct On<'a> {
    /// The kernels of the level in use.
    pub kernels: &'a Kernels,
    /// The threads it may use.
    pub threads: Threads,
}

impl On<'_> {
    /// Rows `[n, cols]` of activations in the form that weights of `format` are multiplied with.
    ///
    /// # Panics
    /// `groups` is too short for a quantised format.
    #[must_use]
    pub fn columns<'b>(
        self,
        format: Format,
        cols: usize,
        x: &'b [f32],
        groups: &'b mut [ActivationGroup],
    ) -> Columns<'b> {
        if !format.is_quantized() {
            return Columns::F32(x);
        }
        if x.is_empty() {
            return Columns::Quantized(&[]);
        }
        let per_row = ActivationGroup::count(cols);
        let groups = &mut groups[..x.len() / cols * per_row];
        let tasks = self.threads.tasks(x.len() / cols, size_of_val(x) / 4);
        let rows = (x.len() / cols).div_ceil(tasks);
        let parts = x.chunks(rows * cols).zip(groups.chunks_mut(rows * per_row));
        self.threads.for_each(parts, |(x, groups)| {
            for (x, groups) in x.chunks_exact(cols).zip(groups.chunks_exact_mut(per_row)) {
                self.kernels.quantize(x, groups);
            }
        });
        Columns::Quantized(groups)
    }
}

/// Calls `f` with the contiguous elements of a CPU tensor.
pub(crate) fn with_cpu_storage<R>(t: &Tensor, f: impl FnOnce(&CpuStorage, usize) -> Result<R>) -> Result<R> {
    if !matches!(t.device(), Device::Cpu) {
        bail!(
            "candle-sparse runs on the CPU, this tensor is on {:?}: use candle's own model there",
            t.device()
        );
    }
    let t = t.contiguous()?;
    let (storage, layout) = t.storage_and_layout();
    match &*storage {
        Storage::Cpu(cpu) => f(cpu, layout.start_offset()),
        _ => bail!("candle-sparse runs on the CPU: use candle's own model on other devices"),
    }
}

/// Writes a tensor's rows in `format`.
fn write_rows(t: &Tensor, format: Format, out: &mut [u8]) -> Result<()> {
    let (n, cols) = (t.elem_count(), t.dim(1)?);
    with_cpu_storage(t, |storage, start| match storage {
        CpuStorage::F32(v) => convert(&v[start..start + n], cols, format, out),
        CpuStorage::F16(v) => convert(&v[start..start + n], cols, format, out),
        CpuStorage::BF16(v) => convert(&v[start..start + n], cols, format, out),
        _ => bail!("weight: dtype {:?} is not supported, use F32, F16 or BF16", t.dtype()),
    })
}

/// An element type that weights are loaded from.
trait Source: bytemuck::Pod + Sync {
    const FORMAT: Format;
    fn f32(self) -> f32;
}

impl Source for f32 {
    const FORMAT: Format = Format::F32;
    fn f32(self) -> f32 {
        self
    }
}

impl Source for f16 {
    const FORMAT: Format = Format::F16;
    fn f32(self) -> f32 {
        self.to_f32()
    }
}

impl Source for bf16 {
    const FORMAT: Format = Format::BF16;
    fn f32(self) -> f32 {
        self.to_f32()
    }
}

fn convert<T: Source>(x: &[T], cols: usize, format: Format, out: &mut [u8]) -> Result<()> {
    if format == T::FORMAT {
        out.copy_from_slice(bytemuck::cast_slice(x));
        return Ok(());
    }
    let row_bytes = format.row_bytes(cols);
    if row_bytes == 0 {
        return Ok(());
    }
    out.par_chunks_exact_mut(row_bytes)
        .zip(x.par_chunks_exact(cols))
        .for_each(|(out, x)| convert_row(x, format, out));
    Ok(())
}

fn convert_row<T: Source>(x: &[T], format: Format, out: &mut [u8]) {
    if format == T::FORMAT {
        return out.copy_from_slice(bytemuck::cast_slice(x));
    }
    // A piece is a whole number of blocks in every format, as is what is left of a row.
    let piece = format.row_bytes(SUPER_BLOCK_LEN);
    let mut values = [0.0; SUPER_BLOCK_LEN];
    for (out, x) in out.chunks_mut(piece).zip(x.chunks(SUPER_BLOCK_LEN)) {
        values.iter_mut().zip(x).for_each(|(v, x)| *v = x.f32());
        format.quantize(&values[..x.len()], out);
    }
}

/// Where the rows of a tensor go in [`Weight::interleaved`].
#[derive(Clone, Copy)]
struct Gather<'a> {
    order: &'a [u32],
    parts: usize,
    part: usize,
}

fn gather_rows(t: &Tensor, format: Format, to: Gather<'_>, out: &mut [u8]) -> Result<()> {
    let (n, cols) = (t.elem_count(), t.dim(1)?);
    with_cpu_storage(t, |storage, start| {
        match storage {
            CpuStorage::F32(v) => gather(&v[start..start + n], cols, format, to, out),
            CpuStorage::F16(v) => gather(&v[start..start + n], cols, format, to, out),
            CpuStorage::BF16(v) => gather(&v[start..start + n], cols, format, to, out),
            _ => bail!("weight: dtype {:?} is not supported, use F32, F16 or BF16", t.dtype()),
        }
        Ok(())
    })
}

fn gather<T: Source>(x: &[T], cols: usize, format: Format, to: Gather<'_>, out: &mut [u8]) {
    let row_bytes = format.row_bytes(cols);
    if row_bytes == 0 {
        return;
    }
    out.par_chunks_exact_mut(to.parts * row_bytes).zip(to.order).for_each(|(out, &row)| {
        let x = &x[row as usize * cols..][..cols];
        convert_row(x, format, &mut out[to.part * row_bytes..][..row_bytes]);
    });
}
