//! Rows of one form written in another.

use super::Part;
use crate::buffer::Buffer;
use candle_core::{CpuStorage, Device, Error, Result, Storage, Tensor, bail};
use candle_sparse_core::{Format, SUPER_BLOCK_LEN};
use half::{bf16, f16};
use rayon::prelude::*;

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

/// Memory for a matrix in `format`, or in what the rows of `part` take in its stead.
pub(super) fn room(format: Format, rows: usize, cols: usize, part: &Part) -> Result<(Format, Buffer)> {
    let format = part.fitting(format, cols);
    let len = rows.checked_mul(format.row_bytes(cols)).ok_or_else(|| Error::msg("weight: size overflows"))?;
    Ok((format, Buffer::zeroed(len)?))
}

/// Writes a part's rows in `format`.
pub(super) fn write_rows(part: &Part, format: Format, out: &mut [u8]) -> Result<()> {
    match part {
        Part::Tensor(t) => {
            let (n, cols) = (t.elem_count(), t.dim(1)?);
            with_cpu_storage(t, |storage, start| match storage {
                CpuStorage::F32(v) => convert(&v[start..start + n], cols, format, out),
                CpuStorage::F16(v) => convert(&v[start..start + n], cols, format, out),
                CpuStorage::BF16(v) => convert(&v[start..start + n], cols, format, out),
                _ => bail!("weight: dtype {:?} is not supported, use F32, F16 or BF16", t.dtype()),
            })
        }
        Part::Weight(w) if w.format == format => {
            out.copy_from_slice(w.as_bytes());
            Ok(())
        }
        Part::Weight(w) => write_rows(&Part::Tensor(w.dequantize()?), format, out),
    }
}

/// An element type that weights are loaded from.
pub(super) trait Source: bytemuck::Pod + Sync {
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

pub(super) fn convert<T: Source>(x: &[T], cols: usize, format: Format, out: &mut [u8]) -> Result<()> {
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

/// Where the rows of a tensor go in [`Weight::interleaved`](super::Weight::interleaved).
#[derive(Clone, Copy)]
pub(super) struct Gather<'a> {
    pub(super) order: &'a [u32],
    pub(super) parts: usize,
    pub(super) part: usize,
}

pub(super) fn gather_rows(part: &Part, format: Format, to: Gather<'_>, out: &mut [u8]) -> Result<()> {
    let t = match part {
        Part::Tensor(t) => t.clone(),
        Part::Weight(w) if w.format == format => {
            let (row_bytes, bytes) = (format.row_bytes(w.cols), w.as_bytes());
            let groups = out.par_chunks_exact_mut((to.parts * row_bytes).max(1)).zip(to.order);
            groups.for_each(|(out, &row)| {
                out[to.part * row_bytes..][..row_bytes]
                    .copy_from_slice(&bytes[row as usize * row_bytes..][..row_bytes]);
            });
            return Ok(());
        }
        Part::Weight(w) => w.dequantize()?,
    };
    let (n, cols) = (t.elem_count(), t.dim(1)?);
    with_cpu_storage(&t, |storage, start| {
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
