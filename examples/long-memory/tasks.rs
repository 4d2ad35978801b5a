//! Texts that hide something, and a question about it.

use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};

/// What the text is filled up with.
const FILLER: [&str; 5] = [
    "The grass is green. ",
    "The sky is blue. ",
    "The sun is yellow. ",
    "Here we go. ",
    "There and back again. ",
];
/// Tokens of a filler sentence, about.
const SENTENCE: usize = 5;
const THINGS: [&str; 16] = [
    "apple", "river", "stone", "cloud", "tiger", "lemon", "chair", "piano", "garden", "rocket", "silver",
    "candle", "forest", "bridge", "window", "basket",
];

/// Names of the tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    /// One number, said twice.
    Passkey,
    /// One of four numbers.
    Numbers,
    /// One of eight numbers.
    MoreNumbers,
}

/// A text with its question, and what the answer holds.
pub(crate) struct Prompt {
    pub(crate) text: String,
    pub(crate) answer: String,
}

impl Task {
    pub(crate) const ALL: [Self; 3] = [Self::Passkey, Self::Numbers, Self::MoreNumbers];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Passkey => "passkey",
            Self::Numbers => "one of four numbers",
            Self::MoreNumbers => "one of eight numbers",
        }
    }

    /// Text `i` of `n`, of about `tokens` tokens; the passkey lies at depth `i / (n − 1)`.
    pub(crate) fn prompt(self, tokens: usize, i: usize, n: usize) -> Prompt {
        let mut rng = StdRng::seed_from_u64(i as u64);
        let mut text: Vec<String> = (0..tokens / SENTENCE)
            .map(|_| FILLER.choose(&mut rng).copied().unwrap_or_default().to_string())
            .collect();
        if self == Self::Passkey {
            let key = rng.random_range(10_000..100_000);
            let at = text.len() * i / (n - 1).max(1);
            text.insert(at, format!("The pass key is {key}. Remember it. {key} is the pass key. "));
            text.insert(0, "There is important information hidden in the text. ".to_string());
            let question = "\nWhat is the pass key? The pass key is";
            return Prompt { text: text.concat() + question, answer: key.to_string() };
        }
        let count = if self == Self::Numbers { 4 } else { 8 };
        let things: Vec<_> = THINGS.choose_multiple(&mut rng, count).collect();
        let numbers: Vec<u32> = things.iter().map(|_| rng.random_range(1000..10_000)).collect();
        for (thing, number) in things.iter().zip(&numbers) {
            let at = rng.random_range(0..text.len());
            text.insert(at, format!("The number of the {thing} is {number}. "));
        }
        let asked = i % count;
        let question = format!("\nThe number of the {} is", things[asked]);
        Prompt { text: text.concat() + &question, answer: numbers[asked].to_string() }
    }
}
