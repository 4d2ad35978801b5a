//! Keys and values of one sequence in memory that the caller gives.
//!
//! Pages age: as positions move away from the end, whole pages go from the cache's format to `Q8_0` and on to `Q4_1`. Where
//! the memory does not hold the whole context, the oldest pages are dropped, all but the first, which holds the attention
//! sinks. Nothing changes before a step has succeeded.

pub mod bounds;
pub(crate) mod layout;
pub mod page;
pub mod tiers;

use crate::{
    config::Config,
    error::Error,
    format::Format,
    matrix::{Matrix, Rows},
};
use core::ops::Range;
use half::f16;
use layout::{Layout, Places};
pub use page::PAGE_LEN;
use page::{PageMut, PageShape};
use tiers::{Ageing, Tier};

/// How a cache keeps keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvConfig {
    /// Format of hot pages, and of the first page, which holds the attention sinks: F32, F16 or BF16.
    pub dtype: Format,
    /// When pages become warm and cold.
    pub ageing: Ageing,
}

impl KvConfig {
    /// Every position in `dtype`.
    #[must_use]
    pub const fn exact(dtype: Format) -> Self {
        Self { dtype, ageing: Ageing::NEVER }
    }

    /// The last `hot` positions in F16, up to `warm` in `Q8_0`, the rest in `Q4_1`.
    #[must_use]
    pub const fn tiered(hot: usize, warm: usize) -> Self {
        Self { ageing: Ageing { hot, warm }, ..Self::exact(Format::F16) }
    }

    /// Whether pages can be of this kind.
    ///
    /// # Errors
    /// They cannot.
    pub fn validate(&self) -> Result<(), Error> {
        match self.dtype {
            Format::F32 | Format::F16 | Format::BF16 => Ok(()),
            _ => Err(Error::OutOfRange("kv cache dtype (F32, F16 or BF16)")),
        }
    }
}

impl Layout {
    /// Of a model whose gates, where they have a say, have states of `state_len` elements.
    pub(crate) fn new(c: &Config, config: KvConfig, state_len: Option<usize>, recalls: bool) -> Self {
        // One page begins before the window does.
        let window = c.sliding_window.map(|w| (w - 1).div_ceil(PAGE_LEN).saturating_add(1));
        let all = Self {
            layers: c.num_hidden_layers,
            heads: c.num_key_value_heads,
            page: PageShape { channels: c.kv_dim(), row: c.kv_dim() },
            config,
            limit: c.max_position_embeddings,
            state_len,
            recalls,
            visible: None,
        };
        all.seeing(window.unwrap_or(usize::MAX))
    }

    /// With pages enough that a token sees `pages` of them.
    pub(crate) fn seeing(self, pages: usize) -> Self {
        let all = self.limit.div_ceil(PAGE_LEN);
        let visible = pages.max(Self::LEAST_VISIBLE).min(self.visible.unwrap_or(usize::MAX));
        Self { visible: Some(visible).filter(|v| v.saturating_add(2) < all), ..self }
    }
}

/// Keys and values of every layer.
#[derive(Debug)]
pub struct KvCache<'a> {
    layout: Layout,
    places: Places,
    len: usize,
    /// The first page held, of those behind the very first.
    first: usize,
    /// `[layer]`: pages at the front that have been made warm and cold.
    cooled: &'a mut [[u32; 2]],
    /// `[layer]`: tokens for which the FFN runs dense.
    pub(crate) dense_left: &'a mut [u32],
    /// `[layer, slot, head]`: the largest score of a page's tokens; ∞ where the gate did not see all of them.
    salience: &'a mut [f32],
    /// `[layer, state_len]`: of the gates, after the last token.
    states: &'a mut [f32],
    /// `[layer, slot, state_len]`: before each page.
    before: &'a mut [f32],
    /// `[layer, head, 2 · head_dim, slot]`
    bounds: &'a mut [f16],
    /// `[layer]`, as [`Layout`] says.
    pages: &'a mut [u8],
}

impl<'a> KvCache<'a> {
    pub(crate) fn with_layout(layout: Layout, memory: &'a mut [u32]) -> Result<Self, Error> {
        let got = memory.len();
        let least = Layout { visible: Some(Layout::LEAST_VISIBLE), ..layout };
        let expected = least.words().min(layout.words());
        let layout = layout.fitted(got).ok_or(Error::Length { what: "kv cache", expected, got })?;
        let mut rest = memory;
        let mut take = |n: usize| {
            let (head, tail) = core::mem::take(&mut rest).split_at_mut(n);
            rest = tail;
            head
        };
        let [salience, states, before, bounds] = layout.notes();
        let cache = Self {
            places: Places::from(&layout),
            len: 0,
            first: 1,
            cooled: take(2 * layout.layers).as_chunks_mut().0,
            dense_left: take(layout.layers),
            salience: bytemuck::cast_slice_mut(take(salience)),
            states: bytemuck::cast_slice_mut(take(states)),
            before: bytemuck::cast_slice_mut(take(before)),
            bounds: bytemuck::cast_slice_mut(take(bounds)),
            pages: bytemuck::cast_slice_mut(rest),
            layout,
        };
        cache.cooled.fill([0; 2]);
        cache.dense_left.fill(0);
        cache.states.fill(0.0);
        Ok(cache)
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Positions of the sequence, those that were dropped among them.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no position is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Positions that a token sees at least, beside the first 32: all, or as many as the memory holds.
    #[must_use]
    pub fn visible(&self) -> usize {
        self.layout.visible.map_or(self.layout.limit, |v| (v - 1) * PAGE_LEN)
    }

    /// Forgets every position from `len` on. A page that is then written again in the middle becomes hot again, with the
    /// values to which its tier had rounded it, and counts as wanted by the gate, which no longer knows it.
    ///
    /// # Errors
    /// [`Error::Dropped`]: positions that a token at `len` sees are no longer held. The cache is unchanged.
    pub fn truncate(&mut self, len: usize) -> Result<(), Error> {
        if len < self.len {
            self.check(len)?;
            self.cut(len);
        }
        Ok(())
    }

    /// Whether a token can stand at `position`.
    pub(crate) fn check(&self, position: usize) -> Result<(), Error> {
        if position > self.len {
            return Err(Error::Gap { position, len: self.len });
        }
        let page = position / PAGE_LEN;
        if page > 0 && self.layout.first_visible(page) < self.first {
            let least = self.first + self.layout.visible.unwrap_or(1) - 1;
            return Err(Error::Dropped { position, least: least * PAGE_LEN });
        }
        Ok(())
    }

    /// The pages behind the very first that a token at `position` sees and that hold positions.
    pub(crate) fn visible_pages(&self, position: usize) -> Range<usize> {
        let first = self.layout.first_visible(position / PAGE_LEN);
        first..position.div_ceil(PAGE_LEN).max(first)
    }

    fn tier(&self, layer: usize, page: usize) -> Tier {
        let [warm, cold] = self.cooled[layer].map(|c| c as usize);
        match page {
            0 => Tier::Hot,
            _ if page < cold => Tier::Cold,
            _ if page < warm => Tier::Warm,
            _ => Tier::Hot,
        }
    }

    /// The elements of a page that is held.
    pub(crate) fn page(&self, layer: usize, page: usize) -> Rows<'_> {
        let tier = self.tier(layer, page);
        let (start, bytes) = self.places.of(tier, page);
        let start = layer * self.places.layer_bytes + start;
        Rows::from_bytes(self.layout.format(tier), &self.pages[start..start + bytes])
            .expect("pages begin at even bytes, those of f32 at whole words")
    }

    /// What lies in a page.
    pub(crate) fn shape(&self) -> PageShape {
        self.layout.page
    }

    /// The largest score that the gate gave to a token of a page before `position`; ∞ where it has not seen all.
    pub(crate) fn salience(&self, layer: usize, page: usize, head: usize, position: usize) -> f32 {
        if (page + 1) * PAGE_LEN > position {
            return f32::INFINITY;
        }
        self.salience[(layer * self.layout.held() + self.layout.slot(page)) * self.layout.heads + head]
    }

    /// The bounds of a head, `[2 · head_dim, pages]`: minima, then maxima; the column of a page is [`Self::slot`].
    pub(crate) fn bounds(&self, layer: usize, head: usize) -> Matrix<'_> {
        let (rows, held) = (2 * self.layout.page.channels / self.layout.heads, self.layout.held());
        let start = (layer * self.layout.heads + head) * rows * held;
        Matrix::new(rows, held, Rows::F16(&self.bounds[start..start + rows * held]))
            .expect("rows of a head were sliced")
    }

    /// The column of a page in [`Self::bounds`].
    pub(crate) fn slot(&self, page: usize) -> usize {
        self.layout.slot(page)
    }

    /// The state of a layer's gate before a token at `position`; a page that is written again in the middle is passed over.
    pub(crate) fn state_at(&self, layer: usize, position: usize) -> &[f32] {
        let n = self.layout.state_len.unwrap_or(0);
        if position == self.len {
            return &self.states[layer * n..(layer + 1) * n];
        }
        let slot = layer * self.layout.held() + self.layout.slot(position / PAGE_LEN);
        &self.before[slot * n..(slot + 1) * n]
    }
}

/// What a step leaves behind, layer by layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Token<'a> {
    pub(crate) position: usize,
    /// `[layer, 2 · kv_dim]`: keys, then values.
    pub(crate) kv: &'a [f32],
    /// `[layer, head]`, empty without gates.
    pub(crate) scores: &'a [f32],
    /// `[layer, state_len]`: the gates' states after it.
    pub(crate) states: &'a [f32],
}

/// What happens at the end of a step.
impl KvCache<'_> {
    /// Appends a token at a position that was [checked](Self::check); pages that are old now become colder.
    pub(crate) fn push(&mut self, token: Token<'_>) {
        let Token { position, kv, scores, states } = token;
        self.cut(position);
        let (page, shape) = (position / PAGE_LEN, self.layout.page);
        for (layer, kv) in kv.chunks_exact(2 * shape.channels).enumerate() {
            let (k, v) = kv.split_at(shape.channels);
            self.hot_page(layer, page).write(shape, position % PAGE_LEN, k, v);
        }
        self.observe(position, scores, states);
        self.len = position + 1;
        self.first = self.first.max(self.layout.first_held(self.len));
        (0..self.layout.layers).for_each(|layer| self.settle(layer));
        if self.layout.recalls && self.len.is_multiple_of(PAGE_LEN) {
            self.note_bounds(page);
        }
    }

    /// Forgets what lies at `position` and behind.
    fn cut(&mut self, position: usize) {
        let (page, within) = (position / PAGE_LEN, position % PAGE_LEN);
        if position < self.len {
            for layer in 0..self.layout.layers {
                let was = self.tier(layer, page);
                self.cooled[layer] = self.cooled[layer].map(|c| c.min(page as u32));
                if within > 0 && was != Tier::Hot {
                    self.refill(layer, page, was, Tier::Hot);
                }
                self.rewind(layer, position);
            }
            self.len = position;
            self.first = if page == 0 { 1 } else { self.first };
        }
        if within == 0 {
            self.begin_notes(page);
        }
    }

    /// Takes the state of a layer's gate back to before a page; a page of which a part stays is no longer known.
    fn rewind(&mut self, layer: usize, position: usize) {
        let (Some(n), page) = (self.layout.state_len, position / PAGE_LEN) else { return };
        let slot = layer * self.layout.held() + self.layout.slot(page);
        self.states[layer * n..(layer + 1) * n].copy_from_slice(&self.before[slot * n..(slot + 1) * n]);
        if !position.is_multiple_of(PAGE_LEN) {
            self.salience[slot * self.layout.heads..(slot + 1) * self.layout.heads].fill(f32::INFINITY);
        }
    }

    /// A page begins: nothing was seen of it, and the states are kept.
    fn begin_notes(&mut self, page: usize) {
        let Some(n) = self.layout.state_len else { return };
        for layer in 0..self.layout.layers {
            let slot = layer * self.layout.held() + self.layout.slot(page);
            self.salience[slot * self.layout.heads..(slot + 1) * self.layout.heads].fill(f32::NEG_INFINITY);
            self.before[slot * n..(slot + 1) * n].copy_from_slice(&self.states[layer * n..(layer + 1) * n]);
        }
    }

    fn observe(&mut self, position: usize, scores: &[f32], states: &[f32]) {
        let (Some(n), heads) = (self.layout.state_len, self.layout.heads) else { return };
        for (layer, scores) in scores.chunks_exact(heads).enumerate() {
            let slot = layer * self.layout.held() + self.layout.slot(position / PAGE_LEN);
            let page = &mut self.salience[slot * heads..(slot + 1) * heads];
            // A page of which a part was not seen is passed over.
            if page.iter().any(|s| *s < f32::INFINITY) {
                page.iter_mut().zip(scores).for_each(|(m, s)| *m = s.max(*m));
                self.states[layer * n..(layer + 1) * n].copy_from_slice(&states[layer * n..(layer + 1) * n]);
            }
        }
    }

    /// Moves pages that have become old to their tiers: the coldest first, which makes room for the next.
    fn settle(&mut self, layer: usize) {
        let ageing = self.layout.config.ageing;
        let now = ageing.cooled((layer, self.layout.layers), self.len);
        let was = self.cooled[layer].map(|c| c as usize);
        let before_cold = if ageing.skips_warm() { Tier::Hot } else { Tier::Warm };
        for page in was[1].max(self.first)..now[1] {
            self.refill(layer, page, before_cold, Tier::Cold);
        }
        if !ageing.skips_warm() {
            (was[0].max(self.first)..now[0]).for_each(|page| self.refill(layer, page, Tier::Hot, Tier::Warm));
        }
        self.cooled[layer] = [0, 1].map(|i| was[i].max(now[i]) as u32);
    }

    /// Fills the slot of a page in one tier with what its slot in another one holds.
    fn refill(&mut self, layer: usize, page: usize, from: Tier, to: Tier) {
        let shape = self.layout.page;
        let (source, source_bytes) = self.places.of(from, page);
        let (target, target_bytes) = self.places.of(to, page);
        let bytes = self.places.layer_bytes;
        let memory = &mut self.pages[layer * bytes..(layer + 1) * bytes];
        let (low, high) = memory.split_at_mut(source.max(target));
        let (source, target) = if source < target {
            (&low[source..source + source_bytes], &mut high[..target_bytes])
        } else {
            (&high[..source_bytes], &mut low[target..target + target_bytes])
        };
        let rows = Rows::from_bytes(self.layout.format(from), source).expect("pages are aligned");
        let mut page = PageMut::from_bytes(self.layout.format(to), target).expect("pages are aligned");
        page.fill(shape, rows);
    }

    fn hot_page(&mut self, layer: usize, page: usize) -> PageMut<'_> {
        let (start, bytes) = self.places.of(Tier::Hot, page);
        let start = layer * self.places.layer_bytes + start;
        PageMut::from_bytes(self.layout.config.dtype, &mut self.pages[start..start + bytes])
            .expect("pages are aligned")
    }

    fn note_bounds(&mut self, page: usize) {
        let Layout { page: shape, heads, layers, .. } = self.layout;
        let (rows, held, slot) = (2 * shape.channels / heads, self.layout.held(), self.layout.slot(page));
        for (layer, head) in (0..layers).flat_map(|l| (0..heads).map(move |h| (l, h))) {
            let tier = self.tier(layer, page);
            let (start, bytes) = self.places.of(tier, page);
            let start = layer * self.places.layer_bytes + start;
            let page = Rows::from_bytes(self.layout.format(tier), &self.pages[start..start + bytes]);
            let keys = shape.keys(page.expect("pages are aligned"), head * rows / 2..(head + 1) * rows / 2);
            let start = (layer * heads + head) * rows * held;
            bounds::note(keys, held, slot, &mut self.bounds[start..start + rows * held]);
        }
    }
}
