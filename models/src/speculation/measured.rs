//! Means of what was measured lately.

/// How much a measured time counts beside those before it.
const NEWS: f64 = 0.2;
/// What takes so many times as long as usual was disturbed.
const DISTURBED: f64 = 3.0;

/// The usual seconds of what took `took` this time.
pub(super) fn usual(before: Option<f64>, took: f64) -> f64 {
    before.map_or(took, |usual| usual + NEWS * (took.min(DISTURBED * usual) - usual))
}

/// How often guesses were right.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seen {
    right: f64,
    all: f64,
}

impl Seen {
    /// Notes a guess; after `memory` of them older ones count half.
    pub(super) fn note(&mut self, right: bool, memory: f64) {
        if self.all >= memory {
            (self.right, self.all) = (self.right / 2.0, self.all / 2.0);
        }
        self.all += 1.0;
        self.right += f64::from(u8::from(right));
    }

    /// The share of guesses that were right, where `guess` counts as so many sightings.
    pub(super) fn share(self, guess: f64, counts: f64) -> f64 {
        (self.right + guess * counts) / (self.all + counts)
    }
}
