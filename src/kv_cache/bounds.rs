//! Bounds of what the keys of a page can score, for bringing pages back that nothing else chose.
//!
//! `q · k ≤ Σ_c max(q_c · min_c, q_c · max_c) = q⁻ · min + q⁺ · max` for every key of a page, with `min` and `max` the
//! extremes of its channels (Quest: Tang et al. 2024, <https://arxiv.org/abs/2406.10774>). The bounds of 32 pages lie
//! side by side, `[head][min, max][head_dim][32 pages]`, so that a query scores all of them in one weighted sum of rows.

use super::page::{Page, PageShape};
use candle_sparse_core::{Matrix, Rows, kv_cache::bounds};
use half::f16;

/// Pages of a group.
pub(super) const GROUP: usize = 32;

/// The bounds of a layer of a sequence.
#[derive(Clone, Debug, Default)]
pub(super) struct Bounds {
    groups: Vec<Group>,
    /// Groups before it were forgotten.
    first: usize,
    /// Pages whose bounds are known, those that were forgotten included.
    pages: usize,
    /// Groups that wait for their next use.
    spare: Vec<Group>,
}

/// In F16: a scale over several pages would make the bounds of one depend on later ones.
type Group = Box<[f16]>;

impl Bounds {
    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        self.groups.iter().chain(&self.spare).map(|g| size_of_val(&**g)).sum()
    }

    /// Forgets the pages from `pages` on.
    pub(super) fn cut(&mut self, pages: usize) {
        if pages < self.pages {
            self.groups.truncate((pages / GROUP).saturating_sub(self.first));
            self.pages = pages / GROUP * GROUP;
        }
    }

    /// Reads the keys of the pages `held ..` up to `full` whose bounds are not known; those before `held` are forgotten.
    pub(super) fn update(&mut self, shape: PageShape, pages: &[Page], held: usize, full: usize) {
        let rows = 2 * shape.heads * shape.head_dim;
        self.forget(held);
        while self.pages < full {
            if self.first + self.groups.len() <= self.pages / GROUP {
                let group = self.spare.pop().unwrap_or_else(|| vec![f16::ZERO; rows * GROUP].into());
                self.groups.push(group);
            }
            if let Some(group) = self.groups.last_mut() {
                note(shape, &pages[self.pages - held], self.pages % GROUP, group);
            }
            self.pages += 1;
        }
    }

    fn forget(&mut self, held: usize) {
        let gone = (held / GROUP).saturating_sub(self.first).min(self.groups.len());
        self.spare.extend(self.groups.drain(..gone));
        self.first = if self.groups.is_empty() { held / GROUP } else { self.first + gone };
        self.pages = self.pages.max(held);
    }

    /// The bounds of pages `32 · group ..` for a head, `[2 · head_dim, 32]`: minima, then maxima.
    pub(super) fn group(&self, shape: PageShape, group: usize, head: usize) -> Matrix<'_> {
        let rows = 2 * shape.head_dim;
        let data =
            Rows::F16(&self.groups[group - self.first][head * rows * GROUP..(head + 1) * rows * GROUP]);
        Matrix::new(rows, GROUP, data).expect("rows of a group were sliced")
    }
}

/// Writes the bounds of a page as column `at` of a group.
fn note(shape: PageShape, page: &Page, at: usize, group: &mut [f16]) {
    for (head, group) in group.chunks_exact_mut(2 * shape.head_dim * GROUP).enumerate() {
        bounds::note(page.keys(shape, head), GROUP, at, group);
    }
}
