//! A page: 32 positions of every key/value head of a layer, in one of the tiers' formats.
//!
//! What lies where is [`candle_sparse_core::kv_cache::page`]'s; here a value row holds the channels of one head, so that the rows of
//! a head follow one another in memory.

use super::KvDType;
pub use candle_sparse_core::kv_cache::tiers::Tier;
use candle_sparse_core::{
    BlockQ4_1, BlockQ8_0, Matrix, Rows,
    kv_cache::page::{self, PageMut},
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
    Q4_1(Arc<[BlockQ4_1]>),
}

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
        let (n, blocks) = (self.rule().elements(), self.rule().blocks());
        match (tier, dtype) {
            (Tier::Hot, KvDType::F32) => Page::F32(zeroed(n)),
            (Tier::Hot, KvDType::F16) => Page::F16(zeroed(n)),
            (Tier::Hot, KvDType::BF16) => Page::BF16(zeroed(n)),
            (Tier::Warm, _) => Page::Q8_0(zeroed(blocks)),
            _ => Page::Q4_1(zeroed(blocks)),
        }
    }
}

fn zeroed<T: bytemuck::Zeroable + Copy>(n: usize) -> Arc<[T]> {
    core::iter::repeat_n(T::zeroed(), n).collect()
}

impl Page {
    /// Whether nobody else holds its memory.
    pub(super) fn is_own(&mut self) -> bool {
        match self {
            Self::F32(p) => Arc::get_mut(p).is_some(),
            Self::F16(p) => Arc::get_mut(p).is_some(),
            Self::BF16(p) => Arc::get_mut(p).is_some(),
            Self::Q8_0(p) => Arc::get_mut(p).is_some(),
            Self::Q4_1(p) => Arc::get_mut(p).is_some(),
        }
    }

    pub(super) fn tier(&self) -> Tier {
        match self {
            Self::F32(_) | Self::F16(_) | Self::BF16(_) => Tier::Hot,
            Self::Q8_0(_) => Tier::Warm,
            Self::Q4_1(_) => Tier::Cold,
        }
    }

    fn rows(&self) -> Rows<'_> {
        match self {
            Self::F32(p) => Rows::F32(p),
            Self::F16(p) => Rows::F16(p),
            Self::BF16(p) => Rows::BF16(p),
            Self::Q8_0(p) => Rows::Q8_0(p),
            Self::Q4_1(p) => Rows::Q4_1(p),
        }
    }

    fn memory(&mut self) -> PageMut<'_> {
        match self {
            Self::F32(p) => PageMut::F32(Arc::make_mut(p)),
            Self::F16(p) => PageMut::F16(Arc::make_mut(p)),
            Self::BF16(p) => PageMut::BF16(Arc::make_mut(p)),
            Self::Q8_0(p) => PageMut::Q8_0(Arc::make_mut(p)),
            Self::Q4_1(p) => PageMut::Q4_1(Arc::make_mut(p)),
        }
    }

    /// The keys of a head, `[head_dim, PAGE_LEN]`.
    pub(super) fn keys(&self, shape: PageShape, head: usize) -> Matrix<'_> {
        shape.rule().keys(self.rows(), head * shape.head_dim..(head + 1) * shape.head_dim)
    }

    /// The values of the first `n` positions of a head, `[n, head_dim]`; quantised ones are as wide as
    /// [`PageShape::width`].
    pub(super) fn values(&self, shape: PageShape, head: usize, n: usize) -> Matrix<'_> {
        shape.rule().values(self.rows(), head, n)
    }

    /// Stores keys and values `[heads · head_dim]` of a position of a hot page.
    pub(super) fn write(&mut self, shape: PageShape, position: usize, k: &[f32], v: &[f32]) {
        self.memory().write(shape.rule(), position, k, v);
    }

    /// Fills `to`, a page of another tier, with this page's elements.
    pub(super) fn fill(&self, shape: PageShape, to: &mut Page) {
        to.memory().fill(shape.rule(), self.rows());
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
            Self::F32(p) => bytemuck::cast_slice_mut(Arc::make_mut(p)),
            Self::F16(p) => bytemuck::cast_slice_mut(Arc::make_mut(p)),
            Self::BF16(p) => bytemuck::cast_slice_mut(Arc::make_mut(p)),
            Self::Q8_0(p) => bytemuck::cast_slice_mut(Arc::make_mut(p)),
            Self::Q4_1(p) => bytemuck::cast_slice_mut(Arc::make_mut(p)),
        }
    }
}
