//! Where the pages of a cache lie in the memory that the caller gives.
//!
//! No page needs a table: pages of a tier follow one another in a ring of slots, page p ≥ 1 in slot `(p − 1) mod slots`, and the
//! tier of a page depends on the number of positions alone. The first page, which holds the attention sinks, stays hot and
//! has a slot of its own.

use super::{
    KvConfig,
    page::{PAGE_LEN, PageShape},
    tiers::Tier,
};
use crate::format::Format;

/// Sizes of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) page: PageShape,
    pub(crate) config: KvConfig,
    /// Positions of the longest context.
    pub(crate) limit: usize,
    /// Elements of a gate's state in each layer; `None` where no gate has a say.
    pub(crate) state_len: Option<usize>,
    /// Whether pages are recalled by their bounds.
    pub(crate) recalls: bool,
    /// Pages that a token sees, its own among them, beside the first one; `None`: all.
    pub(crate) visible: Option<usize>,
}

impl Layout {
    /// Pages seen that a ring has at least: the one being written, and one that is whole.
    pub(crate) const LEAST_VISIBLE: usize = 2;

    /// Pages that are held at most, the first one among them. One more than a token sees, so that 32 positions can be taken
    /// back.
    pub(crate) fn held(&self) -> usize {
        let all = self.limit.div_ceil(PAGE_LEN).max(1);
        self.visible.map_or(all, |v| v.saturating_add(2).min(all))
    }

    /// Slots of hot, warm and cold pages of a layer.
    fn slots(&self) -> [usize; 3] {
        let (hot, warm) = (self.config.ageing.hot, self.config.ageing.hot.max(self.config.ageing.warm));
        // The page being written, and what the last layer cools later than the first.
        let most_hot = hot.saturating_add(PAGE_LEN - 1).div_ceil(PAGE_LEN).saturating_add(1);
        let cooler = |kept: usize| match self.visible {
            None => (self.limit.saturating_sub(kept) / PAGE_LEN).saturating_sub(1),
            Some(v) => v.saturating_sub(kept.saturating_sub(PAGE_LEN - 1).div_ceil(PAGE_LEN)),
        };
        let between = (warm - hot).div_ceil(PAGE_LEN);
        [1 + most_hot.min(self.held() - 1), between.min(cooler(hot)), cooler(warm)]
    }

    pub(crate) fn format(&self, tier: Tier) -> Format {
        tier.format(self.config.dtype)
    }

    fn page_bytes(&self) -> [usize; 3] {
        Tier::ALL.map(|tier| self.page.bytes(self.format(tier)))
    }

    /// Where the pages of each tier begin in a layer's memory, and where they end.
    fn begins(&self) -> [usize; 4] {
        let (slots, bytes) = (self.slots(), self.page_bytes());
        let mut begins = [0_usize; 4];
        for i in 0..3 {
            begins[i + 1] = begins[i].saturating_add(slots[i].saturating_mul(bytes[i]));
        }
        begins
    }

    /// The slot of a page among [`Self::held`].
    pub(crate) fn slot(&self, page: usize) -> usize {
        ring(page, self.held())
    }

    /// The first page, of those behind the very first, that a token of page `page` sees.
    pub(crate) fn first_visible(&self, page: usize) -> usize {
        self.visible.map_or(1, |v| (page + 1).saturating_sub(v).max(1))
    }

    /// The first page, of those behind the very first, that is held of `len` positions.
    pub(crate) fn first_held(&self, len: usize) -> usize {
        self.visible.map_or(1, |v| (len / PAGE_LEN).saturating_sub(v).max(1))
    }

    /// Words of 4 bytes of what is known of the pages: scores, states, states before pages, bounds.
    pub(crate) fn notes(&self) -> [usize; 4] {
        let (held, state) = (self.held(), self.state_len.unwrap_or(0));
        let product = |factors: [usize; 3]| factors.into_iter().fold(self.layers, usize::saturating_mul);
        [
            if self.state_len.is_some() { product([held, self.heads, 1]) } else { 0 },
            product([state, 1, 1]),
            product([state, held, 1]),
            // Minimum and maximum of a channel, two bytes each.
            if self.recalls { product([held, self.page.channels, 1]) } else { 0 },
        ]
    }

    /// Words of 4 bytes of everything: how far each layer has cooled and how long it runs dense, notes, pages.
    pub(crate) fn words(&self) -> usize {
        let pages = self.layers.saturating_mul(self.begins()[3]).div_ceil(size_of::<u32>());
        self.notes().into_iter().chain([3 * self.layers, pages]).fold(0, usize::saturating_add)
    }

    /// The same with the largest ring that fits `words` words, or without one where everything fits; `None` where not even the
    /// smallest fits.
    pub(crate) fn fitted(self, words: usize) -> Option<Self> {
        if self.words() <= words {
            return Some(self);
        }
        let most = self.visible.unwrap_or_else(|| self.held().saturating_sub(2));
        let fits = |v: usize| Self { visible: Some(v), ..self }.words() <= words;
        if most < Self::LEAST_VISIBLE || !fits(Self::LEAST_VISIBLE) {
            return None;
        }
        let (mut low, mut high) = (Self::LEAST_VISIBLE, most);
        while low < high {
            let middle = low + (high - low).div_ceil(2);
            if fits(middle) { low = middle } else { high = middle - 1 }
        }
        Some(Self { visible: Some(low), ..self })
    }
}

/// Where pages lie, computed once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Places {
    /// Bytes of a layer's pages.
    pub(crate) layer_bytes: usize,
    slots: [usize; 3],
    begins: [usize; 4],
    page_bytes: [usize; 3],
}

impl From<&Layout> for Places {
    fn from(layout: &Layout) -> Self {
        let (slots, begins, page_bytes) = (layout.slots(), layout.begins(), layout.page_bytes());
        Self { layer_bytes: begins[3], slots, begins, page_bytes }
    }
}

impl Places {
    /// Where a page of a tier lies in its layer's memory: its first byte, and its bytes.
    pub(crate) fn of(&self, tier: Tier, page: usize) -> (usize, usize) {
        let i = tier as usize;
        let slot = match tier {
            Tier::Hot => ring(page, self.slots[i]),
            _ => (page - 1) % self.slots[i].max(1),
        };
        (self.begins[i] + slot * self.page_bytes[i], self.page_bytes[i])
    }
}

/// The first slot for the first page, the others for the rest in turn.
fn ring(page: usize, slots: usize) -> usize {
    if page == 0 || slots < 2 { 0 } else { 1 + (page - 1) % (slots - 1) }
}
