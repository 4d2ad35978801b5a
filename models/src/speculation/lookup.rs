//! Drafts from the text itself: what followed where its last tokens stood before.

use super::measured::Seen;
use std::collections::HashMap;

/// Tokens that must match at least.
const LEAST: usize = 2;
/// Longer matches count as this long.
const MOST: usize = 16;
/// Lengths of matches from which on they are counted apart.
const CLASSES: [usize; 5] = [2, 3, 4, 6, 10];
/// How often what follows a match of each class comes again, before any was seen, and for how many sightings that counts.
const GUESS: [f64; 5] = [0.15, 0.3, 0.45, 0.6, 0.75];
const GUESS_COUNTS: f64 = 4.0;
/// Sightings after which older ones count half.
const MEMORY: f64 = 64.0;

/// A text, and where its pairs of tokens stood last.
#[derive(Clone, Debug, Default)]
pub(super) struct Lookup {
    ids: Vec<u32>,
    /// The position behind each pair of tokens.
    behind: HashMap<[u32; 2], usize>,
    seen: [Seen; 5],
}

/// What stood behind an earlier place of the last tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Match {
    /// Its position.
    from: usize,
    /// How many tokens before it are the last ones.
    len: usize,
}

impl Lookup {
    pub(super) fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// A token comes: what would have been guessed is compared with it.
    pub(super) fn push(&mut self, id: u32) {
        if let Some(found) = self.find() {
            self.seen[class(found.len)].note(self.ids[found.from] == id, MEMORY);
        }
        if let [.., a, b] = self.ids[..] {
            self.behind.insert([a, b], self.ids.len());
        }
        self.ids.push(id);
    }

    /// Forgets the tokens from `len` on.
    pub(super) fn cut(&mut self, len: usize) {
        if len < self.ids.len() {
            self.ids.truncate(len);
            self.behind = (LEAST..len).map(|i| ([self.ids[i - 2], self.ids[i - 1]], i)).collect();
        }
    }

    /// An earlier place of the last tokens, the latest one.
    pub(super) fn find(&self) -> Option<Match> {
        let &[.., a, b] = &self.ids[..] else { return None };
        let from = *self.behind.get(&[a, b])?;
        let pairs = self.ids[..from].iter().rev().zip(self.ids.iter().rev());
        Some(Match { from, len: pairs.take(MOST).take_while(|(a, b)| a == b).count() })
    }

    /// The tokens that a match says come next, `n` at most; a match that reaches the end of the text goes on with itself.
    pub(super) fn draft(&self, found: Match, n: usize) -> Vec<u32> {
        let period = self.ids.len() - found.from;
        (0..n).map(|i| self.ids[found.from + i % period]).collect()
    }

    /// The probability that each token of a draft is right, if those before it are.
    pub(super) fn right(&self, found: Match) -> impl Iterator<Item = f64> {
        (found.len..).map(|len| self.share(class(len)))
    }

    fn share(&self, class: usize) -> f64 {
        self.seen[class].share(GUESS[class], GUESS_COUNTS)
    }
}

fn class(len: usize) -> usize {
    CLASSES.iter().rposition(|least| *least <= len).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(ids: impl IntoIterator<Item = u32>) -> Lookup {
        let mut lookup = Lookup::default();
        ids.into_iter().for_each(|id| lookup.push(id));
        lookup
    }

    #[test]
    fn what_followed_before_follows_again() {
        let lookup = of([1, 2, 3, 4, 5, 9, 2, 3]);
        let found = lookup.find().expect("2, 3 stood before");
        assert_eq!((found.from, found.len), (3, 2));
        assert_eq!(lookup.draft(found, 3), [4, 5, 9]);
        assert!(of([1, 2, 3, 4]).find().is_none());
        // A text that repeats itself goes on so, further than it has been written.
        let lookup = of([7, 8, 7, 8, 7, 8]);
        assert_eq!(lookup.draft(lookup.find().expect("a match"), 5), [7, 8, 7, 8, 7]);
    }

    #[test]
    fn what_is_right_is_learned() {
        let lookup = of((0..200).map(|i| i % 7));
        let right: Vec<f64> = lookup.right(lookup.find().expect("a match")).take(3).collect();
        assert!(right.iter().all(|p| *p > 0.95), "{right:?}");
        // The same pair, and something else behind it each time.
        let lookup = of((0..600_u32).map(|i| if i % 3 < 2 { i % 3 } else { i }).chain([0, 1]));
        let found = lookup.find().expect("0, 1 stood before");
        assert!(lookup.right(found).next().is_some_and(|p| p < 0.05));
    }

    #[test]
    fn tokens_that_were_cut_off_are_forgotten() {
        let mut lookup = of([1, 2, 3, 4, 1, 2]);
        lookup.cut(4);
        assert!(lookup.find().is_none());
        [1, 2].into_iter().for_each(|id| lookup.push(id));
        assert_eq!(lookup.draft(lookup.find().expect("a match"), 2), [3, 4]);
    }
}
