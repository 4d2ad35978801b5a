//! Keys and values of a batch of sequences in fixed pages: appending copies the new token and nothing else.

use crate::core::{Config, Matrix, Rows};
use candle_core::{DType, Result, bail};
use half::{bf16, f16, slice::HalfFloatSliceExt};

/// Positions per page.
pub const PAGE_LEN: usize = 32;

/// How cached keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvDType {
    /// 4 bytes per element, exact.
    F32,
    /// 2 bytes per element.
    F16,
    /// 2 bytes per element.
    BF16,
}

impl TryFrom<DType> for KvDType {
    type Error = candle_core::Error;

    fn try_from(dtype: DType) -> Result<Self> {
        match dtype {
            DType::F32 => Ok(Self::F32),
            DType::F16 => Ok(Self::F16),
            DType::BF16 => Ok(Self::BF16),
            other => bail!("kv cache: dtype {other:?} is not supported, use F32, F16 or BF16"),
        }
    }
}

impl KvDType {
    fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }
}

/// Which of the two a page half holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kv {
    /// Keys, after rotation.
    Key,
    /// Values.
    Value,
}

/// `[key, value][head][PAGE_LEN][head_dim]`, so that a head's part of a page is one matrix.
#[derive(Clone)]
enum Page {
    F32(Box<[f32]>),
    F16(Box<[f16]>),
    BF16(Box<[bf16]>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    layers: usize,
    heads: usize,
    head_dim: usize,
    dtype: KvDType,
}

/// Keys and values of every layer for a batch of sequences of equal length; `Clone` is a deep copy.
#[derive(Clone)]
pub struct KvCache {
    shape: Shape,
    len: usize,
    limit: usize,
    /// `[sequence][layer][page]`
    sequences: Vec<Vec<Vec<Page>>>,
}

impl core::fmt::Debug for KvCache {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let (batch, bytes) = (self.batch_size(), self.bytes());
        let mut f = f.debug_struct("KvCache");
        f.field("shape", &self.shape).field("len", &self.len).field("batch", &batch).field("bytes", &bytes);
        f.finish_non_exhaustive()
    }
}

impl KvCache {
    /// An empty cache for a model.
    #[must_use]
    pub fn new(config: &Config, dtype: KvDType) -> Self {
        let shape = Shape {
            layers: config.num_hidden_layers,
            heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            dtype,
        };
        Self { shape, len: 0, limit: config.max_position_embeddings, sequences: Vec::new() }
    }

    /// Whether the cache was made for a model of this shape.
    #[must_use]
    pub fn fits(&self, config: &Config) -> bool {
        let model = Self::new(config, self.shape.dtype);
        self.shape == model.shape && self.limit <= model.limit
    }

    /// Positions held by each sequence.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no position is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Sequences held.
    #[must_use]
    pub fn batch_size(&self) -> usize {
        self.sequences.len()
    }

    /// Bytes of the pages, those waiting to be filled included.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let pages: usize = self.sequences.iter().flatten().map(Vec::len).sum();
        pages * self.page_elements() * self.shape.dtype.bytes()
    }

    /// Forgets every position from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Forgets every position; pages stay allocated for the next use.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Makes room for `positions` positions of `batch` sequences, so that reaching them allocates nothing.
    ///
    /// # Errors
    /// More positions than the model's context, or another batch size than the cached one.
    pub fn reserve(&mut self, batch: usize, positions: usize) -> Result<()> {
        self.check(batch, self.len, positions.saturating_sub(self.len))?;
        self.grow(batch, positions);
        Ok(())
    }

    /// Whether [`Self::begin`] would succeed; changes nothing.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub fn check(&self, batch: usize, index_pos: usize, seq_len: usize) -> Result<()> {
        if index_pos > self.len {
            bail!("index_pos {index_pos} leaves a gap: the cache holds {} positions", self.len);
        }
        if seq_len > self.limit || index_pos > self.limit - seq_len {
            bail!(
                "{seq_len} tokens from position {index_pos} are past the model's context of {} positions",
                self.limit
            );
        }
        if index_pos > 0 && batch != self.sequences.len() {
            bail!(
                "the kv cache holds a batch of {}, this input has a batch of {batch}",
                self.sequences.len()
            );
        }
        Ok(())
    }

    /// Cuts the cache back to `index_pos` and makes room for `seq_len` more positions of `batch` sequences.
    ///
    /// # Errors
    /// `index_pos` leaves a gap behind the cached positions, the end is past the model's context, or the batch is not the
    /// cached one. The cache is unchanged then.
    pub fn begin(&mut self, batch: usize, index_pos: usize, seq_len: usize) -> Result<()> {
        self.check(batch, index_pos, seq_len)?;
        self.truncate(index_pos);
        self.grow(batch, index_pos + seq_len);
        Ok(())
    }

    fn grow(&mut self, batch: usize, positions: usize) {
        self.sequences.resize_with(batch, || vec![Vec::new(); self.shape.layers]);
        let (shape, pages) = (self.shape, positions.div_ceil(PAGE_LEN));
        for layer in self.sequences.iter_mut().flatten().filter(|l| l.len() < pages) {
            layer.resize_with(pages, || new_page(shape));
        }
    }

    /// Makes `seq_len` written positions part of the past.
    pub fn advance(&mut self, seq_len: usize) {
        self.len += seq_len;
    }

    /// Rounds elements as storing does: `x` becomes what would be read.
    pub fn round(&self, x: &mut [f32]) {
        match self.shape.dtype {
            KvDType::F32 => {}
            KvDType::F16 => x.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32()),
            KvDType::BF16 => x.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32()),
        }
    }

    /// Stores one token's keys and values `[heads · head_dim]`.
    ///
    /// # Panics
    /// There is no room at `position` (see [`Self::begin`]), or a length is wrong.
    pub fn write(&mut self, sequence: usize, layer: usize, position: usize, k: &[f32], v: &[f32]) {
        let Shape { heads, head_dim, .. } = self.shape;
        assert!(k.len() == heads * head_dim && v.len() == k.len(), "kv cache: wrong length");
        let page = &mut self.sequences[sequence][layer][position / PAGE_LEN];
        for (half, x) in [k, v].into_iter().enumerate() {
            for (head, x) in x.chunks_exact(head_dim).enumerate() {
                let start = ((half * heads + head) * PAGE_LEN + position % PAGE_LEN) * head_dim;
                match page {
                    Page::F32(p) => p[start..start + head_dim].copy_from_slice(x),
                    Page::F16(p) => p[start..start + head_dim].convert_from_f32_slice(x),
                    Page::BF16(p) => p[start..start + head_dim].convert_from_f32_slice(x),
                }
            }
        }
    }

    /// The first `n` positions of a page for one head, `[n, head_dim]`.
    ///
    /// # Panics
    /// There is no such page.
    #[must_use]
    pub fn page(
        &self,
        sequence: usize,
        layer: usize,
        page: usize,
        kv: Kv,
        head: usize,
        n: usize,
    ) -> Matrix<'_> {
        let Shape { heads, head_dim, .. } = self.shape;
        let start = (kv as usize * heads + head) * PAGE_LEN * head_dim;
        let r = start..start + n * head_dim;
        let rows = match &self.sequences[sequence][layer][page] {
            Page::F32(p) => Rows::F32(&p[r]),
            Page::F16(p) => Rows::F16(&p[r]),
            Page::BF16(p) => Rows::BF16(&p[r]),
        };
        Matrix::new(n, head_dim, rows).expect("n rows of head_dim were sliced")
    }

    fn page_elements(&self) -> usize {
        2 * self.shape.heads * PAGE_LEN * self.shape.head_dim
    }
}

fn new_page(shape: Shape) -> Page {
    let n = 2 * shape.heads * PAGE_LEN * shape.head_dim;
    match shape.dtype {
        KvDType::F32 => Page::F32(vec![0.0; n].into()),
        KvDType::F16 => Page::F16(vec![f16::ZERO; n].into()),
        KvDType::BF16 => Page::BF16(vec![bf16::ZERO; n].into()),
    }
}
