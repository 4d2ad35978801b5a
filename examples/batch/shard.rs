//! Which lines of the input a run does.

use std::str::FromStr;

/// Every `of`th line, from the `index`th on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shard {
    index: usize,
    of: usize,
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        match numbers {
            Some((index, of)) if index < of => Ok(Self { index, of }),
            _ => Err(format!("'{text}' is no share: I/N with I from 0 to N - 1, such as 0/4")),
        }
    }
}

impl Shard {
    /// Whether the line with this number, from 0 on, belongs to it.
    pub(crate) fn has(self, line: usize) -> bool {
        line % self.of == self.index
    }
}
