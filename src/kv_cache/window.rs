//! What a model's sliding window leaves of the past.
//!
//! The tokens of a page are all given the pages that the first of them sees, and positions are masked token by token: so
//! what a token reads depends neither on how a prompt is cut into calls nor on the other tokens of a call. Pages that no
//! token of the page before the one being written can see are given back; a step can always be taken back by a page.

use super::{KvCache, PAGE_LEN};
use candle_core::{Result, bail};
use candle_sparse_core::Config;

/// The window of a model; `None` where no position is past it.
pub(super) fn of(config: &Config) -> Option<usize> {
    config.sliding_window.map(|w| w.max(1)).filter(|w| *w < config.max_position_embeddings)
}

/// Pages that tokens of a page see at most, of a model.
pub(crate) fn most_pages(config: &Config) -> usize {
    most(config.max_position_embeddings, of(config))
}

fn most(limit: usize, window: Option<usize>) -> usize {
    let all = limit.div_ceil(PAGE_LEN);
    window.map_or(all, |w| all.min(1 + (w - 1).div_ceil(PAGE_LEN)))
}

impl KvCache {
    /// Positions that a token sees, its own among them, where that is fewer than the model's context.
    #[must_use]
    pub fn sliding_window(&self) -> Option<usize> {
        self.window
    }

    /// The first position that the token at `position` sees, see [`Config::first_visible`].
    #[must_use]
    pub(crate) fn first_visible(&self, position: usize) -> usize {
        self.window.map_or(0, |w| (position + 1).saturating_sub(w))
    }

    /// The first page that tokens of page `page` are given.
    #[must_use]
    pub(crate) fn first_page(&self, page: usize) -> usize {
        self.first_visible(page * PAGE_LEN) / PAGE_LEN
    }

    /// Pages that tokens of a page are given at most.
    pub(crate) fn most_pages(&self) -> usize {
        most(self.limit, self.window)
    }

    /// The first page that is kept of `len` positions.
    pub(super) fn first_kept(&self, len: usize) -> usize {
        self.first_page((len / PAGE_LEN).saturating_sub(1))
    }

    /// Gives back the pages that no later token can see, unless the step may be taken back.
    pub(super) fn release(&mut self) {
        let first = self.first_kept(self.len);
        if self.undo.is_some() || first <= self.first {
            return;
        }
        for pages in self.sequences.iter_mut().flatten() {
            pages.drain(..first - self.first).for_each(|page| self.pool.give(page));
        }
        self.first = first;
    }

    /// Whether the pages that a token at `position` is given are still held.
    ///
    /// # Errors
    /// They are not.
    pub(super) fn check_window(&self, position: usize) -> Result<()> {
        let Some(window) = self.window else { return Ok(()) };
        if position == 0 || self.first_page(position / PAGE_LEN) >= self.first {
            return Ok(());
        }
        let least = (self.first + (window - 1).div_ceil(PAGE_LEN)) * PAGE_LEN;
        bail!(
            "index_pos {position} is too far back: the sliding window of {window} has dropped positions that it needs: \
             start again at 0, or at {least} or later"
        );
    }
}

#[cfg(test)]
mod tests;
