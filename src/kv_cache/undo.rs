//! The way back to what a cache was before a step.

use super::{KvCache, Notes, Origin, PAGE_LEN, page::Page};
use std::sync::Arc;

/// What a step may change, as it was before.
#[derive(Debug)]
pub(crate) struct Before {
    len: usize,
    cooled: Vec<[usize; 2]>,
    /// The first page that was held.
    first: usize,
    /// Of those held so many are not written.
    kept: usize,
    /// `[sequence][layer]`: the pages behind them.
    pages: Vec<Vec<Vec<Page>>>,
    notes: Vec<Vec<Notes>>,
    origin: Option<Arc<Origin>>,
}

/// A page that became colder: where it stood, and what it was.
pub(super) type Cooled = ([usize; 3], Page);

impl KvCache {
    /// Keeps what a step from `index_pos` on may change, until [`Self::restore`] or [`Self::settled`].
    ///
    /// Cost: a copy of the pages from `index_pos` on and of what is known for choosing pages.
    #[must_use]
    pub(crate) fn remember(&mut self, index_pos: usize) -> Before {
        self.undo = Some(Vec::new());
        // From 0 on all are, whatever they hold now.
        let kept = (index_pos / PAGE_LEN).saturating_sub(self.first);
        let tail = |pages: &Vec<Page>| pages.get(kept..).unwrap_or_default().to_vec();
        let pages = self.sequences.iter().map(|layers| layers.iter().map(tail).collect()).collect();
        let Self { len, first, .. } = *self;
        let origin = self.origin.clone();
        Before { len, cooled: self.cooled.clone(), first, kept, pages, notes: self.notes.clone(), origin }
    }

    /// Goes back to before the step.
    pub(crate) fn restore(&mut self, before: Before) {
        for ([sequence, layer, page], was) in self.undo.take().unwrap_or_default().into_iter().rev() {
            // Pages of a batch that is gone come back with `before`.
            if let Some(page) =
                self.sequences.get_mut(sequence).and_then(|s| s[layer].get_mut(page - self.first))
            {
                *page = was;
            }
        }
        self.sequences.resize_with(before.pages.len(), || vec![Vec::new(); self.shape.layers]);
        let tails = before.pages.into_iter().flatten();
        for (pages, tail) in self.sequences.iter_mut().flatten().zip(tails) {
            pages.drain(before.kept.min(pages.len())..).for_each(|page| self.pool.give(page));
            pages.extend(tail);
        }
        (self.len, self.first, self.cooled) = (before.len, before.first, before.cooled);
        (self.notes, self.origin) = (before.notes, before.origin);
        self.generation += 1;
        self.pool.recount(self.sequences.iter().flatten().flatten());
    }

    /// The step is over: nothing is kept any more, and pages that no later token sees are given back.
    pub(crate) fn settled(&mut self) {
        for (_, page) in self.undo.take().unwrap_or_default() {
            self.pool.give(page);
        }
        self.release();
        self.pool.recount(self.sequences.iter().flatten().flatten());
    }
}
