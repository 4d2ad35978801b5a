//! Many columns of numbers in the order in which rows are multiplied with them, so that all who multiply rows of a matrix share them.

use crate::{Kernels, Level, format::packed};
use candle_sparse_core::{Format, Matrix};

/// Bytes of columns that [`KernelSet::matmul`](crate::KernelSet::matmul) packs at once.
const OWN_BYTES: usize = 4 * 1024 * 1024;
/// Rows that it packs columns for. Fewer do not bring back what that costs; a gate's few rows (`src/gate.rs` of candle-sparse)
/// are multiplied in decode, which allocates nothing.
const LEAST_ROWS: usize = 64;

/// How columns are packed for the matrices of a format, from [`Kernels::packing`].
///
/// ```
/// use candle_sparse_core::{Format, Matrix, Rows};
/// use candle_sparse_kernels::{Kernels, KernelSet};
///
/// let kernels = Kernels::get()?;
/// let (weights, x) = (vec![1.0; 2 * 256], vec![0.5; 64 * 256]);
/// let w = Matrix::new(2, 256, Rows::F32(&weights))?;
/// let mut y = vec![[0.0; 2]; 64];
/// let mut y: Vec<&mut [f32]> = y.iter_mut().map(|y| &mut y[..]).collect();
/// // Few columns, and the scalar level, are better off without.
/// if let Some(packing) = kernels.packing(Format::F32, 64, 256) {
///     let mut words = vec![0.0; packing.words(64)];
///     let columns = kernels.pack(packing, &x, &mut words);
///     kernels.matmul_packed(w, columns, &mut y);
///     assert!(y.iter().all(|y| y[..] == [128.0; 2]));
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packing {
    level: Level,
    format: Format,
    elements: usize,
    /// Words of a piece.
    piece: usize,
}

impl Packing {
    /// Columns of a piece: those that begin at a multiple of it can be packed by themselves.
    pub const COLUMNS: usize = packed::TOGETHER;

    /// Words (f32) that so many columns become: `32 · (12 · ⌈elements / 32⌉ + 16)` for each [`Self::COLUMNS`] or fewer; where they
    /// are rounded to BF16 `⌈elements / 64⌉`.
    #[must_use]
    pub fn words(self, columns: usize) -> usize {
        columns.div_ceil(Self::COLUMNS) * self.piece
    }

    /// Into how many columns each so many are best cut so that none of the parts takes more than `bytes` when it is packed: whole
    /// pieces, one at least.
    #[must_use]
    pub fn part(self, columns: usize, bytes: usize) -> usize {
        let most = (bytes / size_of::<f32>() / self.piece).max(1) * Self::COLUMNS;
        columns.div_ceil(columns.div_ceil(most).max(1)).next_multiple_of(Self::COLUMNS)
    }
}

/// Columns that [`Kernels::pack`] packed.
#[derive(Clone, Copy, Debug)]
pub struct PackedColumns<'a> {
    packing: Packing,
    columns: usize,
    words: &'a [f32],
}

impl<'a> PackedColumns<'a> {
    /// Columns whose pieces [`Kernels::pack`] packed one by one, all with this packing: others give other results.
    ///
    /// # Panics
    /// `words` is not as long as [`Packing::words`] says.
    #[must_use]
    pub fn new(packing: Packing, columns: usize, words: &'a [f32]) -> Self {
        assert_eq!(words.len(), packing.words(columns), "packed columns: words");
        Self { packing, columns, words }
    }

    /// The format of the matrices that they are multiplied with.
    #[must_use]
    pub fn format(self) -> Format {
        self.packing.format
    }
}

impl Kernels {
    /// How so many columns of `elements` numbers are packed for matrices of a format; `None` where that does not pay.
    #[must_use]
    pub fn packing(&self, format: Format, columns: usize, elements: usize) -> Option<Packing> {
        let piece = self.token?.packed_len(format, columns, elements)?;
        Some(Packing { level: self.level, format, elements, piece })
    }

    /// Packs columns `x` `[n, elements]` into `words`. Cost: each number is read and written once.
    ///
    /// # Panics
    /// `x` is no whole number of columns, `words` is not as long as [`Packing::words`] says, or the packing is another level's.
    pub fn pack<'a>(&self, packing: Packing, x: &[f32], words: &'a mut [f32]) -> PackedColumns<'a> {
        let columns = x.len() / packing.elements;
        assert_eq!((self.level, x.len()), (packing.level, columns * packing.elements), "pack: level, x");
        assert_eq!(words.len(), packing.words(columns), "pack: words");
        if let Some(token) = self.token {
            token.pack(packing.format, packing.elements, x, words);
        }
        PackedColumns::new(packing, columns, words)
    }

    /// [`KernelSet::matmul`](crate::KernelSet::matmul) with packed columns: the same bits.
    ///
    /// # Panics
    /// Shapes do not fit, or the columns were packed for another format or by another level.
    pub fn matmul_packed(&self, w: Matrix<'_>, x: PackedColumns<'_>, y: &mut [&mut [f32]]) {
        let PackedColumns { packing, columns, words } = x;
        assert_eq!((self.level, w.format()), (packing.level, packing.format), "matmul_packed: level, format");
        assert_eq!((w.cols(), y.len()), (packing.elements, columns), "matmul_packed: columns");
        assert!(y.iter().all(|y| y.len() == w.rows()), "matmul_packed: y is not [columns, rows]");
        if let (Some(token), false) = (self.token, y.is_empty() || w.rows() == 0) {
            token.matmul_packed(w, words, y);
        }
    }

    /// How columns are packed for one product with `w`; `None` where that does not pay.
    pub(crate) fn own_packing(&self, w: Matrix<'_>, columns: usize) -> Option<Packing> {
        if w.rows() < LEAST_ROWS { None } else { self.packing(w.format(), columns, w.cols()) }
    }

    /// `w` times columns that are packed for it alone.
    pub(crate) fn pack_and_multiply(&self, packing: Packing, w: Matrix<'_>, x: &[f32], y: &mut [&mut [f32]]) {
        let part = packing.part(y.len(), OWN_BYTES);
        let mut words = vec![0.0; packing.words(part.min(y.len()))];
        for (x, y) in x.chunks(part * w.cols()).zip(y.chunks_mut(part)) {
            let columns = self.pack(packing, x, &mut words[..packing.words(y.len())]);
            self.matmul_packed(w, columns, y);
        }
    }
}
