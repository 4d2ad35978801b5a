//! A page: 32 positions of every key/value head of a layer, in one of the tiers' formats.
//!
//! What lies where is [`candle_sparse_core::kv_cache::page`]'s; here a value row holds the channels of one head, so that the rows of
//! a head follow one another in memory.

use super::KvDType;
pub use candle_sparse_core::kv_cache::tiers::Tier;
use candle_sparse_core::{
    BlockQ4_1, BlockQ5_1, BlockQ8_0, Format, Matrix, Rows,
    kv_cache::page::{self, PageMut, PageRows, PartMut},
};
use half::{bf16, f16};
use std::sync::Arc;

/// Heads and their size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageShape {
    pub(super) heads: usize,
    pub(super) head_dim: usize,
}

/// `Clone` shares the memory: who writes to a page that others hold too gets one of its own.
#[derive(Clone, Debug)]
pub(super) enum Page {
    F32(Arc<[f32]>),
    F16(Arc<[f16]>),
    BF16(Arc<[bf16]>),
    Q8_0(Arc<[BlockQ8_0]>),
    /// Keys in `Q5_1`, then values in `Q4_1`.
    Cold(Arc<[u16]>),
}

/// Of 16 bits, in a block of keys and in one of values of a cold page.
const COLD_KEY_BLOCK: usize = size_of::<BlockQ5_1>() / 2;
const COLD_VALUE_BLOCK: usize = size_of::<BlockQ4_1>() / 2;

impl PageShape {
    /// The same in the words of the rule: a value row is that of one head.
    fn rule(self) -> page::PageShape {
        page::PageShape { channels: self.heads * self.head_dim, row: self.head_dim }
    }

    /// Elements of a value row in either form, at most.
    pub(super) fn width(self) -> usize {
        self.rule().width()
    }

    /// Bytes of a page in a tier, scales included.
    pub(super) fn bytes(self, tier: Tier, dtype: KvDType) -> usize {
        self.rule().bytes(tier.format(dtype.format()))
    }

    pub(super) fn new_page(self, tier: Tier, dtype: KvDType) -> Page {
        let rule = self.rule();
        let values = rule.value_blocks(Format::Q8_0);
        let (n, blocks) = (2 * rule.elements(), self.key_blocks() + values);
        match (tier, dtype) {
            (Tier::Hot, KvDType::F32) => Page::F32(zeroed(n)),
            (Tier::Hot, KvDType::F16) => Page::F16(zeroed(n)),
            (Tier::Hot, KvDType::BF16) => Page::BF16(zeroed(n)),
            (Tier::Warm, _) => Page::Q8_0(zeroed(blocks)),
            _ => Page::Cold(zeroed(self.key_blocks() * COLD_KEY_BLOCK + values * COLD_VALUE_BLOCK)),
        }
    }

    /// Blocks of quantised keys.
    fn key_blocks(self) -> usize {
        self.rule().key_blocks(Format::Q8_0)
    }
}

fn zeroed<T: bytemuck::Zeroable + Copy>(n: usize) -> Arc<[T]> {
    core::iter::repeat_n(T::zeroed(), n).collect()
}

/// Keys up to element (or block) `keys` and the values behind them.
fn part<'a, T: Copy>(
    page: &'a mut Arc<[T]>,
    keys: usize,
    part: impl Fn(&'a mut [T]) -> PartMut<'a>,
) -> PageMut<'a> {
    let (keys, values) = Arc::make_mut(page).split_at_mut(keys);
    PageMut { keys: part(keys), values: part(values) }
}

impl Page {
    /// Whether nobody else holds its memory.
    pub(super) fn is_own(&mut self) -> bool {
        match self {
            Self::F32(p) => Arc::get_mut(p).is_some(),
            Self::F16(p) => Arc::get_mut(p).is_some(),
            Self::BF16(p) => Arc::get_mut(p).is_some(),
            Self::Q8_0(p) => Arc::get_mut(p).is_some(),
            Self::Cold(p) => Arc::get_mut(p).is_some(),
        }
    }

    pub(super) fn tier(&self) -> Tier {
        match self {
            Self::F32(_) | Self::F16(_) | Self::BF16(_) => Tier::Hot,
            Self::Q8_0(_) => Tier::Warm,
            Self::Cold(_) => Tier::Cold,
        }
    }

    fn rows(&self, shape: PageShape) -> PageRows<'_> {
        let rows = match self {
            Self::F32(p) => Rows::F32(p),
            Self::F16(p) => Rows::F16(p),
            Self::BF16(p) => Rows::BF16(p),
            Self::Q8_0(p) => Rows::Q8_0(p),
            Self::Cold(p) => {
                let (keys, values) = p.split_at(shape.key_blocks() * COLD_KEY_BLOCK);
                let (keys, values) = (bytemuck::cast_slice(keys), bytemuck::cast_slice(values));
                return PageRows { keys: Rows::Q5_1(keys), values: Rows::Q4_1(values) };
            }
        };
        shape.rule().split(rows)
    }

    fn memory(&mut self, shape: PageShape) -> PageMut<'_> {
        let (n, blocks) = (shape.rule().elements(), shape.key_blocks());
        match self {
            Self::F32(p) => part(p, n, PartMut::F32),
            Self::F16(p) => part(p, n, PartMut::F16),
            Self::BF16(p) => part(p, n, PartMut::BF16),
            Self::Q8_0(p) => part(p, blocks, PartMut::Q8_0),
            Self::Cold(p) => {
                let (keys, values) = Arc::make_mut(p).split_at_mut(blocks * COLD_KEY_BLOCK);
                let (keys, values) = (bytemuck::cast_slice_mut(keys), bytemuck::cast_slice_mut(values));
                PageMut { keys: PartMut::Q5_1(keys), values: PartMut::Q4_1(values) }
            }
        }
    }

    /// The keys of a head, `[head_dim, PAGE_LEN]`.
    pub(super) fn keys(&self, shape: PageShape, head: usize) -> Matrix<'_> {
        shape.rule().keys(self.rows(shape), head * shape.head_dim..(head + 1) * shape.head_dim)
    }

    /// The values of the first `n` positions of a head, `[n, head_dim]`; quantised ones are as wide as
    /// [`PageShape::width`].
    pub(super) fn values(&self, shape: PageShape, head: usize, n: usize) -> Matrix<'_> {
        shape.rule().values(self.rows(shape), head, n)
    }

    /// Stores keys and values `[heads · head_dim]` of a position of a hot page.
    pub(super) fn write(&mut self, shape: PageShape, position: usize, k: &[f32], v: &[f32]) {
        self.memory(shape).write(shape.rule(), position, k, v);
    }

    /// Fills `to`, a page of another tier, with this page's elements.
    pub(super) fn fill(&self, shape: PageShape, to: &mut Page) {
        to.memory(shape).fill(shape.rule(), self.rows(shape));
    }

    /// The memory as bytes, for a file.
    pub(super) fn as_bytes(&self) -> &[u8] {
        match self {
            Self::F32(p) => bytemuck::cast_slice(p),
            Self::F16(p) => bytemuck::cast_slice(p),
            Self::BF16(p) => bytemuck::cast_slice(p),
            Self::Q8_0(p) => bytemuck::cast_slice(p),
            Self::Cold(p) => bytemuck::cast_slice(p),
        }
    }

    pub(super) fn as_bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::F32(p) => bytemuck::cast_slice_mut(Arc::make_mut(p)),
            Self::F16(p) => bytemuck::cast_slice_mut(Arc::make_mut(p)),
            Self::BF16(p) => bytemuck::cast_slice_mut(Arc::make_mut(p)),
            Self::Q8_0(p) => bytemuck::cast_slice_mut(Arc::make_mut(p)),
            Self::Cold(p) => bytemuck::cast_slice_mut(Arc::make_mut(p)),
        }
    }
}
