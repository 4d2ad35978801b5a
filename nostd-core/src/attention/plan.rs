//! Which pages a token reads: sinks, window, and what the gate or the query itself brings in between.
//!
//! ```text
//! dense   every page
//! window  sinks · window
//! gated   sinks · the most salient pages, as many as the budget holds · window · recalled pages
//! recall  sinks · window · recalled pages, as many as the budget holds
//! sampled sinks · window · recalled pages · some of all others, drawn at random, each counted for those that it stands for
//! ```
//!
//! 1. Pages are chosen for each key/value head, for all its query heads, and once for 32 positions: the window reaches
//!    back to a page's beginning, so that tokens of one page see the same. A token sees what was salient when its page
//!    began and never what a later token says.
//! 2. Where all pages between sinks and window fit the budget, attention is dense.
//! 3. Recall is for each token: the pages whose [bound](crate::kv_cache::bounds) is highest for it. Some heads need many of
//!    them and some none: where it is known how many, the budget is the mean of all heads of all layers
//!    ([`LayerWeights::recall_shares`](crate::weights::LayerWeights::recall_shares)).
//! 4. A sample of `m` of `n` pages counts `n / m` times: then the softmax's sums, numerator and denominator, are on average
//!    those over all pages. What is spread over the whole past, such as a count, is not lost (vAttention: Desai et al. 2025).
//! 5. Behind a model's own sliding window there is nothing: no sinks, nothing to choose or recall. Lists begin with the
//!    first page that any token of a page sees; positions are masked.

use crate::kv_cache::PAGE_LEN;
use crate::with_methods;
use core::ops::Range;

/// Which positions of its past a token reads.
///
/// ```
/// use candle_sparse_core::attention::{AttentionConfig, AttentionMode};
///
/// assert_eq!(AttentionConfig::default().mode, AttentionMode::Dense);
/// // The first 4 and the last 512 positions, whatever the length of the past.
/// let window = AttentionConfig::new(AttentionMode::Window).with_window(512);
/// assert_eq!((window.sinks, window.window, window.recalled_pages()), (4, 512, 0));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum AttentionMode {
    /// All positions.
    #[default]
    Dense,
    /// The first and the last positions (`StreamingLLM`: Xiao et al. 2024).
    Window,
    /// Those of [`Self::Window`], and the pages between them that the gate scored highest.
    Gated,
    /// Those of [`Self::Window`], and the pages between them that may score highest for the query (Quest: Tang et al. 2024);
    /// needs no gate.
    Recall,
    /// Those of [`Self::Window`], pages that may score highest for the query, and a uniform sample of all others, each weighted
    /// by the number of pages that it stands for; needs no gate.
    Sampled,
}

/// Settings of sparse attention; sizes in positions, rounded up to whole pages of 32. Any size may be larger than the context:
/// then there is no limit.
///
/// ```
/// use candle_sparse_core::attention::{AttentionConfig, AttentionMode};
///
/// let config = AttentionConfig::new(AttentionMode::Recall).with_budget(500);
/// assert_eq!((config.sinks, config.window), (4, 256));
/// // 500 positions are 16 pages of 32.
/// assert_eq!(config.recalled_pages(), 16);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AttentionConfig {
    /// Which positions are read.
    pub mode: AttentionMode,
    /// So many first positions are always read.
    pub sinks: usize,
    /// So many positions before the token are always read, at least 32.
    pub window: usize,
    /// At most so many positions between sinks and window are read; with [`AttentionMode::Sampled`] so many are drawn. Where heads share
    /// the budget of [`AttentionMode::Recall`] out, it is the mean of all of them.
    pub budget: usize,
    /// With [`AttentionMode::Gated`] and [`AttentionMode::Sampled`] so many more positions, chosen by the query.
    pub recall: usize,
}

with_methods!(AttentionConfig {
    with_mode: mode: AttentionMode,
    with_sinks: sinks: usize,
    with_window: window: usize,
    with_budget: budget: usize,
    with_recall: recall: usize,
});

impl Default for AttentionConfig {
    /// Dense; with another mode 4 sinks, a window of 256, a budget of 1536 and 256 recalled positions, some 2048 in all.
    fn default() -> Self {
        Self::new(AttentionMode::Dense)
    }
}

impl AttentionConfig {
    /// The default sizes with a mode.
    #[must_use]
    pub const fn new(mode: AttentionMode) -> Self {
        Self { mode, sinks: 4, window: 256, budget: 1536, recall: 256 }
    }

    /// Pages of 32 positions that each token chooses by its query.
    #[must_use]
    pub fn recalled_pages(&self) -> usize {
        match self.mode {
            AttentionMode::Dense | AttentionMode::Window => 0,
            AttentionMode::Gated | AttentionMode::Sampled => self.recall.div_ceil(PAGE_LEN),
            AttentionMode::Recall => self.budget.div_ceil(PAGE_LEN),
        }
    }

    /// Those of one head, which has `share` times the mean with [`AttentionMode::Recall`], rounded; other modes give every head as
    /// many.
    ///
    /// ```
    /// use candle_sparse_core::attention::{AttentionConfig, AttentionMode};
    ///
    /// let config = AttentionConfig::new(AttentionMode::Recall).with_budget(320);
    /// assert_eq!([0.0, 1.0, 2.5].map(|share| config.recalled_pages_of(share)), [0, 10, 25]);
    /// ```
    #[must_use]
    pub fn recalled_pages_of(&self, share: f32) -> usize {
        let pages = self.recalled_pages();
        let shared = self.mode == AttentionMode::Recall && share != 1.0;
        if shared { libm::roundf(pages as f32 * share) as usize } else { pages }
    }

    /// Pages of 32 positions that each token draws at random.
    #[must_use]
    pub fn sampled_pages(&self) -> usize {
        if self.mode == AttentionMode::Sampled { self.budget.div_ceil(PAGE_LEN) } else { 0 }
    }

    /// Whether tokens choose pages by their own query, or draw some.
    #[must_use]
    pub fn chooses_by_token(&self) -> bool {
        self.recalled_pages() + self.sampled_pages() > 0
    }

    /// Pages that a token reads at most, recalled ones not among them.
    #[must_use]
    pub fn most_pages(&self) -> usize {
        let pages = |positions: usize| positions.div_ceil(PAGE_LEN);
        match self.mode {
            AttentionMode::Dense => usize::MAX,
            // The page that is being written, and one that the window reaches into.
            _ => pages(self.sinks) + pages(self.budget) + pages(self.window).max(1) + 2,
        }
    }

    /// Pages between sinks and window that a token of page `page` does not see anyway, of those from `first` on.
    #[must_use]
    pub fn between(&self, first: usize, page: usize) -> Range<usize> {
        let end = page.saturating_sub(self.window.div_ceil(PAGE_LEN).max(1)).max(first);
        self.sinks.div_ceil(PAGE_LEN).clamp(first, end)..end
    }

    /// The pages among which a token of page `page` recalls, of those from `first` on; empty where it recalls nothing.
    #[must_use]
    pub fn recalls(&self, first: usize, page: usize) -> Range<usize> {
        let between = self.between(first, page);
        let all_read = between.len() <= self.budget.div_ceil(PAGE_LEN);
        if !self.chooses_by_token() || all_read { 0..0 } else { between }
    }

    /// Writes the pages of `held` that a token of page `page` reads to the front of `out`, in order, recalled ones not among
    /// them, and returns how many. Cost: linear on average.
    ///
    /// # Panics
    /// `out` is shorter than `held`.
    pub fn choose(
        &self,
        held: Range<usize>,
        page: usize,
        gate: Option<Wanted<'_>>,
        out: &mut [u32],
    ) -> usize {
        let between = self.between(held.start, page);
        let budget = self.budget.div_ceil(PAGE_LEN);
        if self.mode == AttentionMode::Dense || between.len() <= budget && self.mode != AttentionMode::Window
        {
            return put(out, 0, held);
        }
        let first = put(out, 0, held.start..between.start);
        let mut n = first;
        if let Some(Wanted { threshold, salience }) = gate {
            for page in between.clone().filter(|&page| salience(page) >= threshold) {
                out[n] = page as u32;
                n += 1;
            }
            n = first + keep_best(&mut out[first..n], budget, |page| salience(page as usize));
        }
        put(out, n, between.end..held.end)
    }

    /// Writes the pages that a head of this `share` recalls for a token to the front of `out`, in order, and returns how many: of
    /// `pages` those of the highest `bound` that `chosen`, increasing, has not.
    ///
    /// # Panics
    /// `out` is shorter than `pages`.
    pub fn recall(
        &self,
        pages: Range<usize>,
        chosen: &[u32],
        share: f32,
        bound: impl Fn(u32) -> f32,
        out: &mut [u32],
    ) -> usize {
        let (mut rest, mut n) = (chosen, 0);
        for page in pages.start as u32..pages.end as u32 {
            while rest.first().is_some_and(|&c| c < page) {
                rest = &rest[1..];
            }
            out[n] = page;
            n += usize::from(rest.first() != Some(&page));
        }
        keep_best(&mut out[..n], self.recalled_pages_of(share), bound)
    }

    /// Writes the pages that a token draws to the front of `out`, in order: of `pages` some of those that are not `recalled`,
    /// increasing, each with the same probability. What `seed` is, [`sample_seed`] says.
    ///
    /// # Panics
    /// `out` is shorter than the sample.
    pub fn sample(&self, pages: Range<usize>, recalled: &[u32], seed: u64, out: &mut [u32]) -> Sample {
        let n = pages.len() - recalled.len();
        let Sample { pages: m, weight } = self.sample_of(n);
        if m == 0 {
            return Sample { pages: 0, weight };
        }
        // Evenly spread from a random start: of all starts, each page is met by the same number.
        let start = (seed % n as u64) as usize;
        let (mut rest, mut passed, mut drawn) = (recalled, 0, 0);
        for page in pages.start as u32..pages.end as u32 {
            if rest.first() == Some(&page) {
                rest = &rest[1..];
                continue;
            }
            if drawn < m && (drawn * n + start) / m == passed {
                out[drawn] = page;
                drawn += 1;
            }
            passed += 1;
        }
        Sample { pages: drawn, weight }
    }

    /// The size and weight of a sample of `n` pages.
    #[must_use]
    pub fn sample_of(&self, n: usize) -> Sample {
        let pages = self.sampled_pages().min(n);
        Sample { pages, weight: if pages == 0 { 0.0 } else { libm::logf(n as f32 / pages as f32) } }
    }
}

/// What [`AttentionConfig::sample`] drew.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// How many pages.
    pub pages: usize,
    /// Added to the scores of their positions: the logarithm of the pages that each stands for.
    pub weight: f32,
}

/// The seed of one token's sample in one layer, for one key/value head: the same wherever it is computed (`SplitMix64`: Steele
/// et al. 2014).
#[must_use]
pub fn sample_seed(position: usize, layer: usize, head: usize) -> u64 {
    let mut z =
        ((position as u64) << 32 | (layer as u64) << 16 | head as u64).wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// What a gate says to the pages of a head.
#[derive(Clone, Copy)]
pub struct Wanted<'a> {
    /// From this salience on a page is wanted.
    pub threshold: f32,
    /// The largest score of a page's tokens; ∞ where the gate has not seen all of them.
    pub salience: &'a dyn Fn(usize) -> f32,
}

impl core::fmt::Debug for Wanted<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Wanted").field("threshold", &self.threshold).finish_non_exhaustive()
    }
}

/// Writes `pages` from place `at` on and returns the place behind them.
fn put(out: &mut [u32], at: usize, pages: Range<usize>) -> usize {
    let end = at + pages.len();
    out[at..end].iter_mut().zip(pages).for_each(|(o, page)| *o = page as u32);
    end
}

/// Moves the `n` pages of the highest value to the front, in order; of equal ones the later. Returns how many there are.
fn keep_best(pages: &mut [u32], n: usize, value: impl Fn(u32) -> f32) -> usize {
    if pages.len() <= n {
        return pages.len();
    }
    if n > 0 {
        pages.select_nth_unstable_by(n - 1, |a, b| value(*b).total_cmp(&value(*a)).then(b.cmp(a)));
        pages[..n].sort_unstable();
    }
    n
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{vec, vec::Vec};

    const SMALL: AttentionConfig =
        AttentionConfig { mode: AttentionMode::Gated, sinks: 4, window: 64, budget: 64, recall: 32 };

    fn chosen(config: AttentionConfig, held: Range<usize>, page: usize, salience: &[f32]) -> Vec<u32> {
        let gate = Wanted { threshold: 0.5, salience: &|page| salience[page] };
        let mut out = vec![0; held.len()];
        let n = config.choose(held, page, (config.mode == AttentionMode::Gated).then_some(gate), &mut out);
        out.truncate(n);
        out
    }

    #[test]
    fn sinks_window_and_the_most_salient() {
        let salience = [9.0, 0.6, 0.1, 0.9, 0.6, 0.7, f32::INFINITY, 9.0];
        let window = AttentionConfig { mode: AttentionMode::Window, ..SMALL };
        assert_eq!(chosen(window, 0..8, 8, &salience), [0, 6, 7]);
        assert_eq!(chosen(SMALL, 0..8, 8, &salience), [0, 3, 5, 6, 7]);
        let one = AttentionConfig { budget: 32, ..SMALL };
        assert_eq!(chosen(one, 0..8, 8, &salience), [0, 3, 6, 7]);
        let none = AttentionConfig { budget: 0, ..SMALL };
        assert_eq!(chosen(none, 0..8, 8, &salience), [0, 6, 7]);
        assert_eq!(chosen(SMALL, 0..5, 4, &salience), [0, 1, 2, 3, 4], "all between fit the budget");
        assert_eq!(chosen(SMALL, 2..9, 8, &salience), [3, 5, 6, 7, 8], "what is gone is not chosen");
    }

    #[test]
    fn a_sample_meets_each_page_equally_often() {
        let config = AttentionConfig { mode: AttentionMode::Sampled, budget: 96, recall: 32, ..SMALL };
        let (recalled, mut out, mut met) = ([5, 9], [0; 3], [0; 20]);
        for seed in 0..10 {
            let sample = config.sample(3..15, &recalled, seed, &mut out);
            assert_eq!(sample.pages, 3);
            assert!((sample.weight - (10.0_f32 / 3.0).ln()).abs() < 1e-6 && out.is_sorted());
            out.iter().for_each(|page| met[*page as usize] += 1);
        }
        let others = |page: &usize| (3..15).contains(page) && ![5, 9].contains(page);
        assert!((0..20).all(|page| met[page] == if others(&page) { 3 } else { 0 }), "{met:?}");
        let all = config.sample(3..6, &[5], 7, &mut out);
        assert_eq!((all, &out[..2]), (Sample { pages: 2, weight: 0.0 }, &[3, 4][..]));
        assert_eq!(config.sample(3..4, &[3], 7, &mut out), Sample { pages: 0, weight: 0.0 });
    }

    #[test]
    fn recall_takes_the_highest_bounds_that_were_not_chosen() {
        let bounds = [0.0, 5.0, 9.0, f32::NAN, 7.0];
        let mut out = [0; 5];
        let mut best = |n: usize, chosen: &[u32]| {
            let config = AttentionConfig { recall: n * PAGE_LEN, ..SMALL };
            let n = config.recall(1..5, chosen, 9.0, |page| bounds[page as usize], &mut out);
            out[..n].to_vec()
        };
        assert_eq!(best(2, &[0, 2]), [3, 4]);
        assert_eq!(best(1, &[0, 3]), [2]);
        assert_eq!(best(9, &[4]), [1, 2, 3]);
        assert!(best(0, &[]).is_empty());
    }

    #[test]
    fn a_budget_is_shared_out_in_recall_alone() {
        let of = |mode, share: f32| AttentionConfig { mode, ..SMALL }.recalled_pages_of(share);
        let of_recall = [0.0, 0.24, 0.25, 1.0, 1.3, 4.0].map(|share| of(AttentionMode::Recall, share));
        assert_eq!(of_recall, [0, 0, 1, 2, 3, 8]);
        assert_eq!([AttentionMode::Gated, AttentionMode::Sampled].map(|mode| of(mode, 4.0)), [1; 2]);
        let all = AttentionConfig { mode: AttentionMode::Recall, budget: usize::MAX, ..SMALL };
        assert_eq!(all.recalled_pages_of(0.0), 0);
        assert!(all.recalled_pages_of(4.0) > 1 << 40);
    }
}
