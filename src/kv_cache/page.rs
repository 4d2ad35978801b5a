//! A page: 32 positions of every key/value head of a layer, in one of the tiers' formats.
//!
//! ```text
//! keys    [head][head_dim][32 positions]     a row is a channel: its scale is folded into the query's element
//! values  [head][32 positions][head_dim]     a row is a position: its scale is folded into the probability
//! ```
//!
//! So both products of attention are weighted sums of rows of a page ([`matmul_t`](candle_sparse_core::KernelSet::matmul_t)), in
//! whose loops no sum crosses lanes, and each element is converted once for all query heads of its group. Quantised keys
//! are thus grouped per channel over 32 positions and values per position over 32 channels, as in KIVI (Liu et al. 2024).

use super::{KvDType, PAGE_LEN};
use candle_sparse_core::{BLOCK_LEN, BlockQ4_1, BlockQ8_0, Matrix, Rows};
use half::{bf16, f16, slice::HalfFloatSliceExt};

/// How a page is stored, by its age.
///
/// ```
/// use candle_sparse::{KvCache, KvConfig, kv_cache::Tier};
///
/// # use candle_sparse_models::llama::LlamaConfig;
/// # let json = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu/config.json"));
/// # let config: LlamaConfig = serde_json::from_slice(json).map_err(candle_core::Error::wrap)?;
/// # let config = config.into_config(false).to_core()?;
/// // A model of 4 layers, 2 key/value heads of 32 channels and a context of 1024 positions.
/// let mut cache = KvCache::new(&config, KvConfig::q8());
/// cache.begin(1, 0, 160)?;
/// cache.advance(160);
/// // Of five pages per layer the last stays hot, and the first, which holds the sinks.
/// assert!(cache.tier(Tier::Warm).pages >= 2 * 4);
/// assert_eq!(cache.tier(Tier::Cold).pages, 0);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Tier {
    /// In the cache's dtype, written token by token.
    Hot,
    /// `Q8_0`, 8.5 bits per element.
    Warm,
    /// `Q4_1`, 5 bits per element.
    Cold,
}

impl Tier {
    /// From hot to cold.
    pub const ALL: [Self; 3] = [Self::Hot, Self::Warm, Self::Cold];
}

/// Heads and their size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageShape {
    pub(super) heads: usize,
    pub(super) head_dim: usize,
}

#[derive(Clone, Debug)]
pub(super) enum Page {
    F32(Box<[f32]>),
    F16(Box<[f16]>),
    BF16(Box<[bf16]>),
    Q8_0(Box<[BlockQ8_0]>),
    Q4_1(Box<[BlockQ4_1]>),
}

impl PageShape {
    /// Elements of a page of whole numbers.
    fn elements(self) -> usize {
        2 * self.heads * PAGE_LEN * self.head_dim
    }

    /// Blocks of a value row; the last one is filled up with zeros.
    fn row_blocks(self) -> usize {
        self.head_dim.div_ceil(BLOCK_LEN)
    }

    /// Blocks of a quantised page.
    fn blocks(self) -> usize {
        self.heads * (self.head_dim + PAGE_LEN * self.row_blocks())
    }

    /// Elements of a value row in either form, at most.
    pub(super) fn width(self) -> usize {
        self.row_blocks() * BLOCK_LEN
    }

    /// Bytes of a page in a tier, scales included.
    pub(super) fn bytes(self, tier: Tier, dtype: KvDType) -> usize {
        match tier {
            Tier::Hot => self.elements() * dtype.bytes(),
            Tier::Warm => self.blocks() * size_of::<BlockQ8_0>(),
            Tier::Cold => self.blocks() * size_of::<BlockQ4_1>(),
        }
    }

    pub(super) fn new_page(self, tier: Tier, dtype: KvDType) -> Page {
        let (n, blocks) = (self.elements(), self.blocks());
        match (tier, dtype) {
            (Tier::Hot, KvDType::F32) => Page::F32(vec![0.0; n].into()),
            (Tier::Hot, KvDType::F16) => Page::F16(vec![f16::ZERO; n].into()),
            (Tier::Hot, KvDType::BF16) => Page::BF16(vec![bf16::ZERO; n].into()),
            (Tier::Warm, _) => Page::Q8_0(vec![bytemuck::Zeroable::zeroed(); blocks].into()),
            (Tier::Cold, _) => Page::Q4_1(vec![bytemuck::Zeroable::zeroed(); blocks].into()),
        }
    }
}

/// A row as f32; F16 by the CPU's own conversion where it has one.
fn read_row(m: Matrix<'_>, row: usize, out: &mut [f32]) {
    match m.data() {
        Rows::F16(d) => d[row * m.cols()..][..m.cols()].convert_to_f32_slice(out),
        _ => m.dequantize_row(row, out),
    }
}

impl Page {
    pub(super) fn tier(&self) -> Tier {
        match self {
            Self::F32(_) | Self::F16(_) | Self::BF16(_) => Tier::Hot,
            Self::Q8_0(_) => Tier::Warm,
            Self::Q4_1(_) => Tier::Cold,
        }
    }

    /// The keys of a head, `[head_dim, PAGE_LEN]`.
    pub(super) fn keys(&self, shape: PageShape, head: usize) -> Matrix<'_> {
        let head_dim = shape.head_dim;
        let r = head * head_dim * PAGE_LEN..(head + 1) * head_dim * PAGE_LEN;
        let blocks = head * head_dim..(head + 1) * head_dim;
        let rows = match self {
            Self::F32(p) => Rows::F32(&p[r]),
            Self::F16(p) => Rows::F16(&p[r]),
            Self::BF16(p) => Rows::BF16(&p[r]),
            Self::Q8_0(p) => Rows::Q8_0(&p[blocks]),
            Self::Q4_1(p) => Rows::Q4_1(&p[blocks]),
        };
        Matrix::new(head_dim, PAGE_LEN, rows).expect("head_dim rows of a page's length were sliced")
    }

    /// The values of the first `n` positions of a head, `[n, head_dim]`; quantised ones are as wide as
    /// [`PageShape::width`].
    pub(super) fn values(&self, shape: PageShape, head: usize, n: usize) -> Matrix<'_> {
        let start = (shape.heads + head) * PAGE_LEN * shape.head_dim;
        let r = start..start + n * shape.head_dim;
        let start = shape.heads * shape.head_dim + head * PAGE_LEN * shape.row_blocks();
        let blocks = start..start + n * shape.row_blocks();
        let (cols, rows) = match self {
            Self::F32(p) => (shape.head_dim, Rows::F32(&p[r])),
            Self::F16(p) => (shape.head_dim, Rows::F16(&p[r])),
            Self::BF16(p) => (shape.head_dim, Rows::BF16(&p[r])),
            Self::Q8_0(p) => (shape.width(), Rows::Q8_0(&p[blocks])),
            Self::Q4_1(p) => (shape.width(), Rows::Q4_1(&p[blocks])),
        };
        Matrix::new(n, cols, rows).expect("n rows were sliced")
    }

    /// Stores keys and values `[heads · head_dim]` of a position of a hot page.
    pub(super) fn write(&mut self, shape: PageShape, position: usize, k: &[f32], v: &[f32]) {
        let values = shape.elements() / 2 + position * shape.head_dim;
        let stride = PAGE_LEN * shape.head_dim;
        macro_rules! write {
            ($page:expr, $convert:expr, $copy:ident) => {{
                for (channel, x) in $page.as_chunks_mut::<PAGE_LEN>().0.iter_mut().zip(k) {
                    channel[position] = $convert(*x);
                }
                for (row, x) in $page[values..].chunks_mut(stride).zip(v.chunks_exact(shape.head_dim)) {
                    row[..shape.head_dim].$copy(x);
                }
            }};
        }
        match self {
            Self::F32(p) => write!(p, |x| x, copy_from_slice),
            Self::F16(p) => write!(p, f16::from_f32, convert_from_f32_slice),
            Self::BF16(p) => write!(p, bf16::from_f32, convert_from_f32_slice),
            Self::Q8_0(_) | Self::Q4_1(_) => unreachable!("only hot pages are written"),
        }
    }

    /// Fills `to`, a quantised page, with this page's elements.
    pub(super) fn quantize_into(&self, shape: PageShape, to: &mut Page) {
        let mut row = vec![0.0; shape.width()];
        let mut at = 0;
        let mut put = |x: &[f32; BLOCK_LEN]| {
            match to {
                Self::Q8_0(p) => p[at] = BlockQ8_0::quantize(x),
                Self::Q4_1(p) => p[at] = BlockQ4_1::quantize(x),
                _ => unreachable!("only quantised pages are filled"),
            }
            at += 1;
        };
        for head in 0..shape.heads {
            let keys = self.keys(shape, head);
            for channel in 0..shape.head_dim {
                let mut block = [0.0; BLOCK_LEN];
                read_row(keys, channel, &mut block);
                put(&block);
            }
        }
        for head in 0..shape.heads {
            let values = self.values(shape, head, PAGE_LEN);
            for position in 0..PAGE_LEN {
                row.fill(0.0);
                read_row(values, position, &mut row[..values.cols()]);
                row.as_chunks().0.iter().for_each(&mut put);
            }
        }
    }

    /// Fills `to`, a hot page, with what this page holds: the way back, when positions behind it are cut off.
    pub(super) fn thaw_into(&self, shape: PageShape, to: &mut Page) {
        let PageShape { heads, head_dim } = shape;
        let mut keys = vec![[0.0; PAGE_LEN]; heads * head_dim];
        for (i, row) in keys.iter_mut().enumerate() {
            self.keys(shape, i / head_dim).dequantize_row(i % head_dim, row);
        }
        let mut row = vec![0.0; shape.width()];
        for position in 0..PAGE_LEN {
            let k: Vec<f32> = keys.iter().map(|channel| channel[position]).collect();
            let mut v = Vec::with_capacity(heads * head_dim);
            for head in 0..heads {
                let values = self.values(shape, head, PAGE_LEN);
                values.dequantize_row(position, &mut row[..values.cols()]);
                v.extend_from_slice(&row[..head_dim]);
            }
            to.write(shape, position, &k, &v);
        }
    }

    /// The memory as bytes, for a file.
    pub(super) fn as_bytes(&self) -> &[u8] {
        match self {
            Self::F32(p) => bytemuck::cast_slice(p),
            Self::F16(p) => bytemuck::cast_slice(p),
            Self::BF16(p) => bytemuck::cast_slice(p),
            Self::Q8_0(p) => bytemuck::cast_slice(p),
            Self::Q4_1(p) => bytemuck::cast_slice(p),
        }
    }

    pub(super) fn as_bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::F32(p) => bytemuck::cast_slice_mut(p),
            Self::F16(p) => bytemuck::cast_slice_mut(p),
            Self::BF16(p) => bytemuck::cast_slice_mut(p),
            Self::Q8_0(p) => bytemuck::cast_slice_mut(p),
            Self::Q4_1(p) => bytemuck::cast_slice_mut(p),
        }
    }
}
