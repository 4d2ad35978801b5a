//! Text to tokens and back, over tables that lie in an image: nothing is allocated, nothing is copied.
//!
//! Two kinds of vocabularies are read, both with byte-pair merges (Sennrich et al. 2016): **byte-level** (GPT-2, SmolLM) and
//! **pieces** (`SentencePiece` as `tokenizer.json` has it: Llama 2, TinyLlama, llama2.c). Ids equal those of Hugging Face's
//! `tokenizers` for the same `tokenizer.json`.

mod decode;
mod encode;
mod parts;
mod split;

pub use decode::TextStream;
pub use parts::{Blanks, Kind, Merge, NONE, Parts, Range};

use crate::error::Error;

/// A vocabulary whose tables were checked: no text and no token can make it panic.
#[derive(Clone, Copy, Debug)]
pub struct Tokenizer<'a> {
    parts: Parts<'a>,
}

impl<'a> Tokenizer<'a> {
    /// Checks the tables. Cost: a few operations per token and merge.
    ///
    /// # Errors
    /// The first table whose length, order or content does not fit the others.
    pub fn new(parts: Parts<'a>) -> Result<Self, Error> {
        parts.check()?;
        Ok(Self { parts })
    }

    /// Reads the tables out of the bytes that [`Parts::write`] gave, in place.
    ///
    /// # Errors
    /// Bytes that are too short or not aligned to 4, and those of [`Self::new`].
    pub fn from_bytes(bytes: &'a [u8]) -> Result<Self, Error> {
        Self::new(Parts::from_bytes(bytes)?)
    }

    /// The tables.
    #[must_use]
    pub fn parts(&self) -> &Parts<'a> {
        &self.parts
    }

    /// Tokens there are; ids are below it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.parts.text_ends.len()
    }

    /// Whether there are no tokens.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes of a token as the vocabulary has them: byte-level ones as text, pieces with `▁` for a blank.
    /// `None`: there is no such token.
    #[must_use]
    pub fn token(&self, id: u32) -> Option<&'a [u8]> {
        self.parts.token(id as usize)
    }

    /// Whether the model ends its text with this token.
    #[must_use]
    pub fn is_end(&self, id: u32) -> bool {
        self.parts.ends.contains(&id)
    }

    /// The token of these bytes among those that merges make or begin with.
    fn find(&self, bytes: &[u8]) -> Option<u32> {
        let sorted = self.parts.sorted;
        let at = sorted.binary_search_by(|&id| self.token(id).unwrap_or_default().cmp(bytes));
        at.ok().map(|at| sorted[at])
    }

    /// The merge of two neighbours, if they have one.
    fn merge_of(&self, left: u32, right: u32) -> Option<&'a Merge> {
        let starts = self.parts.merge_starts.get(left as usize..left as usize + 2)?;
        let merges = &self.parts.merges[starts[0] as usize..starts[1] as usize];
        merges.binary_search_by_key(&right, |m| m.right).ok().map(|at| &merges[at])
    }

    /// Whether a token has no text of its own, such as the first one of a text.
    fn is_special(&self, id: u32) -> bool {
        let word = self.parts.special.get(id as usize / 32).copied().unwrap_or(0);
        word >> (id % 32) & 1 == 1
    }
}
