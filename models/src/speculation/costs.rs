//! What steps of several tokens cost, as they were measured, and how many tokens are worth drafting.

use super::measured::usual;
use std::time::Duration;

/// Rows of the steps that are chosen among: few, so that each is soon measured.
const WIDTHS: [usize; 8] = [1, 2, 3, 4, 6, 8, 12, 16];
/// What a further row costs in steps of one, before it was measured.
const GUESS: f64 = 0.33;
/// A draft must promise so much: its gain is uncertain.
const LEAST_GAIN: f64 = 1.05;

/// Seconds of steps by their rows.
#[derive(Clone, Debug, Default)]
pub(crate) struct Costs {
    /// By [`WIDTHS`].
    seconds: [Option<f64>; WIDTHS.len()],
}

impl Costs {
    /// Notes what a step took.
    pub(crate) fn note(&mut self, rows: usize, took: Duration) {
        let Some(at) = WIDTHS.iter().position(|w| *w == rows) else { return };
        self.seconds[at] = Some(usual(self.seconds[at], took.as_secs_f64()));
    }

    /// Seconds of a step of one row, if one was measured.
    pub(super) fn one(&self) -> Option<f64> {
        self.seconds[0]
    }

    /// A step of so many rows in steps of one: measured, between what was measured, or guessed.
    pub(crate) fn steps(&self, rows: usize) -> f64 {
        let Some(one) = self.seconds[0] else { return 1.0 + GUESS * (rows - 1) as f64 };
        let known = || WIDTHS.iter().zip(self.seconds).filter_map(|(w, s)| Some((*w as f64, s? / one)));
        let rows = rows as f64;
        let below = known().rfind(|(w, _)| *w <= rows).unwrap_or((1.0, 1.0));
        match known().find(|(w, _)| *w >= rows) {
            Some(above) if above.0 > below.0 => {
                below.1 + (above.1 - below.1) * (rows - below.0) / (above.0 - below.0)
            }
            Some(above) => above.1,
            None => below.1 + GUESS * (rows - below.0),
        }
    }

    /// How many tokens are worth drafting, `most` at most, beside `others` rows of other sequences, and how many times as many tokens
    /// a second that promises; `right` has each token's probability to be right if those before it are, and a token of the
    /// draft costs `each` steps.
    pub(super) fn best(
        &self,
        right: impl Iterator<Item = f64>,
        each: f64,
        most: usize,
        others: usize,
    ) -> (usize, f64) {
        // Sequences are read one by one where a step of all is dearer.
        let plain = (others + 1) as f64 / self.steps(others + 1).min((others + 1) as f64);
        let (mut best, mut kept, mut sum) = ((0, 1.0), 1.0, (others + 1) as f64);
        for (n, right) in (1..=most.min(WIDTHS[WIDTHS.len() - 1] - 1)).zip(right) {
            kept *= right;
            sum += kept;
            let worth = WIDTHS.contains(&(n + 1)) || others > 0;
            let gain = sum / (self.steps(others + 1 + n) + each * n as f64) / plain;
            if worth && gain > best.1 && gain > LEAST_GAIN {
                best = (n, gain);
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(of: &[(usize, u64)]) -> Costs {
        let mut costs = Costs::default();
        of.iter().for_each(|(rows, ms)| costs.note(*rows, Duration::from_millis(*ms)));
        costs
    }

    #[test]
    fn costs_lie_between_what_was_measured() {
        let costs = measured(&[(1, 10), (4, 20), (8, 24)]);
        assert_eq!([1, 4, 6, 8].map(|rows| costs.steps(rows)), [1.0, 2.0, 2.2, 2.4]);
        assert!(costs.steps(16) > 2.4);
        let mut disturbed = costs.clone();
        disturbed.note(1, Duration::from_secs(1));
        assert!(disturbed.steps(4) > 1.4, "a step that was disturbed counts little");
    }

    #[test]
    fn only_what_pays_is_drafted() {
        let costs = measured(&[(1, 10), (4, 20), (8, 24)]);
        assert_eq!(costs.best(std::iter::repeat(0.1), 0.0, 15, 0).0, 0);
        let (n, gain) = costs.best(std::iter::repeat(0.9), 0.0, 15, 0);
        assert!(n == 7 && gain > 2.0, "{n} {gain}");
        // Drafts that cost half a step each.
        assert!(costs.best(std::iter::repeat(0.9), 0.5, 15, 0).1 < gain / 1.5);
        let dear = measured(&[(1, 10), (2, 20), (3, 30), (4, 40), (6, 60), (8, 80), (12, 120), (16, 160)]);
        assert_eq!(dear.best(std::iter::repeat(0.99), 0.0, 15, 0).0, 0);
    }
}
