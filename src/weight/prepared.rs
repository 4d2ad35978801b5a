//! Activations in the forms that matrices of different formats are multiplied with.

use crate::threads::Threads;
use candle_sparse_core::{ActivationGroup, Columns, Format, KernelSet, Matrix};
use candle_sparse_kernels::{Kernels, PackedColumns, Packing};

/// Bytes of packed columns that the memory of a prompt has at most, where a matrix can be multiplied with a part of them at a time.
const PACKED_BYTES: usize = 16 * 1024 * 1024;

/// Working memory for such forms, grown to the largest.
#[derive(Debug, Default)]
pub(crate) struct Prepared {
    groups: Vec<ActivationGroup>,
    words: Vec<f32>,
}

impl Prepared {
    /// Makes room for some rows of `cols` quantised activations: later nothing is allocated for them.
    pub(crate) fn reserve(&mut self, rows: usize, cols: usize) {
        grown(&mut self.groups, rows * ActivationGroup::count(cols), ActivationGroup::ZERO);
    }
}

/// The first `len` of what has at least as many afterwards.
fn grown<T: Copy>(memory: &mut Vec<T>, len: usize, zero: T) -> &mut [T] {
    if memory.len() < len {
        memory.resize(len, zero);
    }
    &mut memory[..len]
}

/// Rows `[n, cols]` of activations as [`Compute::input`] prepared them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Activations<'a> {
    plain: &'a [f32],
    quantized: &'a [ActivationGroup],
    packed: Option<PackedColumns<'a>>,
}

impl<'a> Activations<'a> {
    fn columns(self, format: Format) -> Columns<'a> {
        if format.is_quantized() { Columns::Quantized(self.quantized) } else { Columns::F32(self.plain) }
    }

    /// `y[c][r] = Σ_k w[r, k] · x[c, k]`, on the calling thread.
    ///
    /// # Panics
    /// Shapes do not fit.
    pub(crate) fn multiply(self, kernels: &Kernels, w: Matrix<'_>, y: &mut [&mut [f32]]) {
        match self.packed {
            Some(x) if x.format() == w.format() => kernels.matmul_packed(w, x, y),
            _ => kernels.matmul(w, self.columns(w.format()), y),
        }
    }
}

/// What an operation runs on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Compute<'a> {
    /// The kernels of the level in use.
    pub kernels: &'a Kernels,
    /// The threads it may use.
    pub threads: Threads,
}

impl Compute<'_> {
    /// How many of `n` columns matrices of `formats` are best multiplied with at a time.
    pub(super) fn at_once(self, formats: impl Iterator<Item = Format>, cols: usize, n: usize) -> usize {
        self.packing(formats, cols, n).map_or(n, |p| p.part(n, PACKED_BYTES))
    }

    /// For the first of the formats that so many columns are packed for; they rarely differ.
    fn packing(self, mut formats: impl Iterator<Item = Format>, cols: usize, n: usize) -> Option<Packing> {
        formats.find_map(|f| self.kernels.packing(f, n, cols))
    }

    /// One column in the form that weights of `format` are multiplied with.
    #[must_use]
    pub(crate) fn column<'b>(self, format: Format, x: &'b [f32], prepared: &'b mut Prepared) -> Columns<'b> {
        self.input(core::iter::once(format), x.len(), x, prepared).columns(format)
    }

    /// Rows `[n, cols]` of activations in the forms that weights of `formats` are multiplied with.
    #[must_use]
    pub(crate) fn input<'b>(
        self,
        formats: impl Iterator<Item = Format> + Clone,
        cols: usize,
        x: &'b [f32],
        prepared: &'b mut Prepared,
    ) -> Activations<'b> {
        let Prepared { groups, words } = prepared;
        let quantized = if !x.is_empty() && formats.clone().any(Format::is_quantized) {
            self.quantize(cols, x, groups)
        } else {
            &[]
        };
        Activations { plain: x, quantized, packed: self.pack(formats, cols, x, words) }
    }

    fn quantize<'b>(
        self,
        cols: usize,
        x: &[f32],
        groups: &'b mut Vec<ActivationGroup>,
    ) -> &'b [ActivationGroup] {
        let (n, per_row) = (x.len() / cols, ActivationGroup::count(cols));
        let groups = grown(groups, n * per_row, ActivationGroup::ZERO);
        let rows = n.div_ceil(self.threads.tasks(n, size_of_val(x) / 4));
        let parts = x.chunks(rows * cols).zip(groups.chunks_mut(rows * per_row));
        self.threads.for_each(parts, |(x, groups)| {
            for (x, groups) in x.chunks_exact(cols).zip(groups.chunks_exact_mut(per_row)) {
                self.kernels.quantize(x, groups);
            }
        });
        groups
    }

    fn pack<'b>(
        self,
        formats: impl Iterator<Item = Format>,
        cols: usize,
        x: &[f32],
        words: &'b mut Vec<f32>,
    ) -> Option<PackedColumns<'b>> {
        let n = x.len() / cols.max(1);
        let packing = self.packing(formats, cols, n)?;
        let words = grown(words, packing.words(n), 0.0);
        let pieces = n.div_ceil(Packing::COLUMNS);
        let columns = pieces.div_ceil(self.threads.tasks(pieces, size_of_val(x))) * Packing::COLUMNS;
        let parts = x.chunks(columns * cols).zip(words.chunks_mut(packing.words(columns)));
        self.threads.for_each(parts, |(x, words)| {
            let _: PackedColumns<'_> = self.kernels.pack(packing, x, words);
        });
        Some(PackedColumns::new(packing, n, words))
    }
}
