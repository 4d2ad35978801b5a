//! Which positions are kept how, and what that takes.

use super::{KvCache, KvDType, PAGE_LEN, page::Tier};
use crate::core::{BLOCK_LEN, BlockQ4_1};
use candle_core::{Result, bail};

/// How a cache keeps keys and values: hot, warm and cold by age, in pages of 32 positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvConfig {
    /// Dtype of hot pages, and of the first page, which holds the attention sinks.
    pub dtype: KvDType,
    /// At least so many of the last positions stay hot.
    pub hot: usize,
    /// At least so many of the last positions stay hot or warm (`Q8_0`); what is older is cold (`Q4_1`).
    pub warm: usize,
    /// Rounds the cold tier up or down at random, without bias, by a generator with this seed.
    pub stochastic: Option<u64>,
    /// The most bytes that pages may take; a step that needs more is an error.
    pub max_bytes: Option<usize>,
}

impl KvConfig {
    /// Every position in `dtype`, as candle keeps them.
    #[must_use]
    pub const fn exact(dtype: KvDType) -> Self {
        Self { dtype, hot: usize::MAX, warm: usize::MAX, stochastic: None, max_bytes: None }
    }

    /// The last 256 positions in F16, up to 2048 in `Q8_0`, the rest in `Q4_1`.
    #[must_use]
    pub const fn tiered() -> Self {
        Self { hot: 256, warm: 2048, ..Self::exact(KvDType::F16) }
    }

    /// All but the last 32 positions in `Q8_0`.
    #[must_use]
    pub const fn q8() -> Self {
        Self { hot: PAGE_LEN, ..Self::exact(KvDType::F16) }
    }

    /// All but the last 32 positions in `Q4_1`.
    #[must_use]
    pub const fn q4() -> Self {
        Self { hot: PAGE_LEN, warm: 0, ..Self::exact(KvDType::F16) }
    }

    /// Whether pages are quantised when they are old.
    #[must_use]
    pub const fn is_tiered(&self) -> bool {
        self.hot != usize::MAX
    }

    /// Pages at the front that are at least as cold as warm and as cold, of a sequence of `len` positions.
    pub(super) fn cooled(&self, len: usize) -> [usize; 2] {
        // The page being written is hot whatever the settings say.
        let pages = |kept: usize| len.saturating_sub(kept) / PAGE_LEN;
        [pages(self.hot), pages(self.hot.max(self.warm))]
    }
}

/// How a block is rounded.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rounding {
    Nearest,
    /// By the random numbers of this state.
    Stochastic(u64),
}

impl Rounding {
    /// Of block `at` of a page.
    pub(super) fn of(config: &KvConfig, layer: usize, page: usize, at: usize) -> Self {
        let Some(seed) = config.stochastic else { return Self::Nearest };
        let parts = [layer as u64, page as u64, at as u64];
        Self::Stochastic(parts.iter().fold(seed, |s, &p| splitmix(s ^ p.wrapping_mul(0x9e37_79b9_7f4a_7c15))))
    }

    pub(super) fn quantize(self, x: &[f32; BLOCK_LEN]) -> BlockQ4_1 {
        let mut block = BlockQ4_1::quantize(x);
        let (Self::Stochastic(mut state), d) = (self, block.d.to_f32()) else { return block };
        if d == 0.0 || !d.is_finite() {
            return block;
        }
        let mut level = |v: f32| {
            state = splitmix(state);
            let chance = (state >> 40) as f32 / (1_u64 << 24) as f32;
            ((v - block.m.to_f32()) / d + chance).floor().clamp(0.0, 15.0) as u8
        };
        let levels = x.map(&mut level);
        for (j, q) in block.qs.iter_mut().enumerate() {
            *q = levels[j] | levels[j + BLOCK_LEN / 2] << 4;
        }
        block
    }
}

/// One step of splitmix64 (Steele, Lea and Flood 2014).
fn splitmix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// What the pages of a cache hold and take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TierStats {
    /// Pages, over all layers and sequences; those waiting to be filled included.
    pub pages: usize,
    /// Bytes, scales included.
    pub bytes: usize,
}

impl KvCache {
    /// Pages and bytes of a tier.
    #[must_use]
    pub fn tier(&self, tier: Tier) -> TierStats {
        let held = self.sequences.iter().flatten().flatten().filter(|p| p.tier() == tier).count();
        let pages = held + self.spare.count(tier);
        TierStats { pages, bytes: pages * self.shape.page.bytes(tier, self.config.dtype) }
    }

    /// Moves pages that have become old to their tiers: whole pages, once each.
    pub(super) fn settle(&mut self) {
        let [warm, cold] = self.config.cooled(self.len);
        let from = self.cooled;
        // The first page holds the sinks; those before the first one that is held are gone.
        let held = self.first.max(1);
        for (tier, pages) in [(Tier::Warm, from[0].max(held)..warm), (Tier::Cold, from[1].max(held)..cold)] {
            for page in pages {
                self.cool(page, tier);
            }
        }
        self.cooled = [from[0].max(warm), from[1].max(cold)];
    }

    fn cool(&mut self, page: usize, tier: Tier) {
        let (shape, config) = (self.shape.page, self.config);
        for (sequence, layers) in self.sequences.iter_mut().enumerate() {
            for (layer, pages) in layers.iter_mut().enumerate() {
                let mut to = self.spare.take(tier).unwrap_or_else(|| shape.new_page(tier, config.dtype));
                let held = &mut pages[page - self.first];
                held.quantize_into(shape, &mut to, |at| Rounding::of(&config, layer, page, at));
                let was = std::mem::replace(held, to);
                match &mut self.undo {
                    Some(undo) => undo.push(([sequence, layer, page], was)),
                    None => self.spare.give(was),
                }
            }
        }
    }

    /// Makes the pages hot that positions from `self.len` on are to be written to.
    pub(super) fn thaw(&mut self, positions: usize) {
        let (shape, dtype) = (self.shape.page, self.config.dtype);
        let (first, end) = (self.len / PAGE_LEN, positions.div_ceil(PAGE_LEN));
        let [from, to] = [first, end].map(|page| page.saturating_sub(self.first));
        for pages in self.sequences.iter_mut().flatten() {
            let to = to.min(pages.len());
            for (i, page) in pages.get_mut(from..to).unwrap_or_default().iter_mut().enumerate() {
                if page.tier() != Tier::Hot {
                    let mut hot =
                        self.spare.take(Tier::Hot).unwrap_or_else(|| shape.new_page(Tier::Hot, dtype));
                    if (first + i) * PAGE_LEN < self.len {
                        page.thaw_into(shape, &mut hot);
                    }
                    self.spare.give(std::mem::replace(page, hot));
                }
            }
        }
        self.cooled = self.cooled.map(|c| c.min(first));
    }

    /// Puts aside the pages that are missing to reach `positions` positions.
    pub(super) fn provide(&mut self, batch: usize, positions: usize) {
        let (shape, dtype) = (self.shape.page, self.config.dtype);
        // Behind a sliding window each tier grows and shrinks.
        let from = if self.window.is_some() { 0 } else { positions };
        let most = (from..=positions)
            .map(|n| self.pages_at(n))
            .fold([0; 3], |most, pages| std::array::from_fn(|tier| most[tier].max(pages[tier])));
        for (tier, pages) in Tier::ALL.into_iter().zip(most) {
            // One more than settled, since a page is filled before the one that it replaces is free.
            let more = usize::from(tier != Tier::Cold || self.window.is_some());
            let needed = tier == Tier::Hot || self.config.is_tiered() && positions > PAGE_LEN;
            let wanted = if needed { (pages + more) * batch * self.shape.layers } else { 0 };
            for _ in self.tier(tier).pages..wanted {
                self.spare.give(shape.new_page(tier, dtype));
            }
        }
    }

    /// An error if `positions` positions would take more than the budget.
    pub(super) fn check_bytes(&self, batch: usize, positions: usize) -> Result<()> {
        let Some(max) = self.config.max_bytes else { return Ok(()) };
        let needed = self.bytes_at(batch, positions);
        if needed > max {
            bail!(
                "kv cache: {positions} positions of {batch} sequence(s) take {needed} bytes, the budget is {max}: shorten \
                 the text, or choose colder tiers"
            );
        }
        Ok(())
    }

    /// Bytes of `positions` positions of `batch` sequences once they have settled.
    #[must_use]
    pub fn bytes_at(&self, batch: usize, positions: usize) -> usize {
        let pages = Tier::ALL.into_iter().zip(self.pages_at(positions));
        let bytes = |(tier, pages)| pages * self.shape.page.bytes(tier, self.config.dtype);
        batch * self.shape.layers * pages.map(bytes).sum::<usize>()
    }

    /// Pages by tier of a layer with `positions` positions that have settled.
    fn pages_at(&self, positions: usize) -> [usize; 3] {
        let (first, end) = (self.first_kept(positions), positions.div_ceil(PAGE_LEN));
        // The first page of all stays hot.
        let [cooled, cold] = self.config.cooled(positions).map(|c| c.saturating_sub(first.max(1)));
        [end - first - cooled, cooled - cold, cold]
    }
}
