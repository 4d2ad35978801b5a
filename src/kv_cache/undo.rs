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

/// What became colder in a step that may be taken back.
#[derive(Debug)]
pub(super) struct Undo {
    /// The positions from here on can be taken back one by one; `usize::MAX`: only the whole step can.
    first: usize,
    /// Pages that had been made warm and cold before it, by layer.
    before: Vec<[usize; 2]>,
    pages: Vec<Cooled>,
}

/// A page that became colder when its sequence had `len` positions: where it stood, and what it was.
#[derive(Debug)]
struct Cooled {
    len: usize,
    place: [usize; 3],
    was: Page,
}

impl Undo {
    pub(super) fn push(&mut self, len: usize, place: [usize; 3], was: Page) {
        self.pages.push(Cooled { len, place, was });
    }
}

impl KvCache {
    /// Keeps what a step from `index_pos` on may change, until [`Self::restore`] or [`Self::settled`].
    ///
    /// Cost: a copy of the pages from `index_pos` on and of what is known for choosing pages.
    #[must_use]
    pub(crate) fn remember(&mut self, index_pos: usize) -> Before {
        self.undo = Some(Undo { first: usize::MAX, before: Vec::new(), pages: Vec::new() });
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
        let cooled = self.undo.take().map(|undo| undo.pages).unwrap_or_default();
        for Cooled { place: [sequence, layer, page], was, .. } in cooled.into_iter().rev() {
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
        let Some(undo) = self.undo.take() else { return };
        undo.pages.into_iter().for_each(|cooled| self.pool.give(cooled.was));
        self.release();
        self.pool.recount(self.sequences.iter().flatten().flatten());
    }

    /// From here on positions can be taken back one by one, until [`Self::end_trial`].
    pub(crate) fn try_out(&mut self) {
        self.end_trial();
        self.undo = Some(Undo { first: self.len, before: self.cooled.clone(), pages: Vec::new() });
    }

    /// The first position that can be taken back as if it had never been read.
    #[must_use]
    pub(crate) fn on_trial(&self) -> Option<usize> {
        self.undo.as_ref().map(|undo| undo.first).filter(|first| *first != usize::MAX)
    }

    /// What is on trial stays.
    pub(crate) fn end_trial(&mut self) {
        if self.on_trial().is_some() {
            self.settled();
        }
    }

    /// Takes back what the positions from `len` on made colder, as far as they are on trial.
    pub(super) fn warm_again(&mut self, len: usize) {
        let Some(first) = self.on_trial() else { return };
        let (len, undo) = (len.max(first), self.undo.as_mut());
        let Undo { before, pages, .. } = undo.unwrap_or_else(|| unreachable!("it is on trial"));
        for i in (0..pages.len()).rev() {
            if pages[i].len > len {
                let Cooled { place: [sequence, layer, page], was, .. } = pages.remove(i);
                let now = std::mem::replace(&mut self.sequences[sequence][layer][page - self.first], was);
                self.pool.give(now);
            }
        }
        let layers = self.shape.layers;
        for (layer, (cooled, before)) in self.cooled.iter_mut().zip(before).enumerate() {
            let [warm, cold] = self.config.cooled((layer, layers), len);
            *cooled = [before[0].max(warm), before[1].max(cold)];
        }
    }

    /// Goes back to the positions before a step that was given up half way: room was made, and no position was added.
    pub(crate) fn give_up(&mut self) {
        self.warm_again(self.len);
        self.drop_pages(self.len);
        self.end_trial();
    }
}
