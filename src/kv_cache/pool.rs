//! Where pages come from and go to, so that a budget holds at every moment.

use super::{
    KvConfig, KvDType,
    page::{Page, PageShape, Tier},
};

/// Pages that wait for their next use, and how many there are in all.
#[derive(Debug)]
pub(super) struct Pool {
    shape: PageShape,
    dtype: KvDType,
    max_bytes: usize,
    /// By tier.
    spare: [Vec<Page>; 3],
    /// Pages of each tier, those in use among them.
    alive: [usize; 3],
    /// So many of each tier may wait.
    keep: [usize; 3],
    /// And more while there are no more than so many in all.
    reserved: [usize; 3],
}

impl Pool {
    pub(super) fn new(shape: PageShape, config: &KvConfig) -> Self {
        Self {
            shape,
            dtype: config.dtype,
            max_bytes: config.max_bytes.unwrap_or(usize::MAX),
            spare: Default::default(),
            alive: [0; 3],
            keep: [0; 3],
            reserved: [0; 3],
        }
    }

    /// So many pages of each tier may wait for their next use.
    pub(super) fn keep(&mut self, pages: [usize; 3]) {
        self.keep = pages;
    }

    pub(super) fn set_max_bytes(&mut self, max_bytes: Option<usize>) {
        self.max_bytes = max_bytes.unwrap_or(usize::MAX);
    }

    /// A page, its content of no meaning. Where the budget asks for it others that wait are given up.
    pub(super) fn take(&mut self, tier: Tier) -> Page {
        if let Some(page) = self.spare[tier as usize].pop() {
            return page;
        }
        let more = self.shape.bytes(tier, self.dtype);
        while self.bytes().saturating_add(more) > self.max_bytes {
            let Some(waiting) = Tier::ALL.into_iter().find(|t| !self.spare[*t as usize].is_empty()) else {
                break;
            };
            self.spare[waiting as usize].pop();
            self.alive[waiting as usize] -= 1;
        }
        self.alive[tier as usize] += 1;
        self.shape.new_page(tier, self.dtype)
    }

    /// Takes a page back, to wait or to be freed; one that others hold too stays theirs.
    pub(super) fn give(&mut self, mut page: Page) {
        let tier = page.tier() as usize;
        let wanted = self.spare[tier].len() < self.keep[tier] || self.alive[tier] <= self.reserved[tier];
        if wanted && page.is_own() {
            self.spare[tier].push(page);
        } else {
            self.alive[tier] -= 1;
        }
    }

    /// Makes pages until there are `pages` of each tier, as far as the budget goes; so many stay from now on.
    pub(super) fn reserve(&mut self, pages: [usize; 3]) {
        for tier in Tier::ALL {
            let (i, size) = (tier as usize, self.shape.bytes(tier, self.dtype));
            self.reserved[i] = self.reserved[i].max(pages[i]);
            while self.alive[i] < pages[i] && self.bytes().saturating_add(size) <= self.max_bytes {
                self.alive[i] += 1;
                self.spare[i].push(self.shape.new_page(tier, self.dtype));
            }
        }
    }

    /// Frees what waits.
    pub(super) fn shrink(&mut self) {
        self.reserved = [0; 3];
        for (spare, alive) in self.spare.iter_mut().zip(&mut self.alive) {
            *alive -= spare.len();
            *spare = Vec::new();
        }
    }

    /// Counts anew: `held` by the cache, and what waits.
    pub(super) fn recount<'a>(&mut self, held: impl Iterator<Item = &'a Page>) {
        self.alive = [0, 1, 2].map(|i| self.spare[i].len());
        held.for_each(|page| self.alive[page.tier() as usize] += 1);
    }

    /// Pages that wait.
    pub(super) fn spare(&self) -> impl Iterator<Item = &Page> {
        self.spare.iter().flatten()
    }

    /// Pages of a tier that wait.
    pub(super) fn waiting(&self, tier: Tier) -> usize {
        self.spare[tier as usize].len()
    }

    /// Bytes of all pages.
    pub(super) fn bytes(&self) -> usize {
        Tier::ALL.map(|t| self.alive[t as usize] * self.shape.bytes(t, self.dtype)).iter().sum()
    }
}
