//! Text to tokens: cut at added tokens, cut into words, merged pair by pair.

use super::{Blanks, Kind, NONE, Tokenizer};
use crate::error::Error;

/// What a blank is in pieces.
const BLANK: &str = "\u{2581}";

/// Tokens so far, and one word for each beside them, for the ranks of merges.
struct Tokens<'b> {
    ids: &'b mut [u32],
    ranks: &'b mut [u32],
    len: usize,
}

impl Tokens<'_> {
    fn push(&mut self, id: u32) -> Result<(), Error> {
        let got = self.ids.len().min(self.ranks.len());
        if self.len >= got {
            return Err(Error::Length { what: "room for tokens", expected: self.len + 1, got });
        }
        self.ids[self.len] = id;
        self.len += 1;
        Ok(())
    }
}

impl Tokenizer<'_> {
    /// Writes the tokens of `text` to the front of `ids` and returns how many.
    ///
    /// Both buffers hold each byte (each character, for pieces) for a moment before it is merged: `text.len() + 3` elements
    /// are enough for a text without special tokens, three more for each of them. Cost: for a word of n symbols at most
    /// n² comparisons; a word is the whole text for pieces that may span words.
    ///
    /// # Errors
    /// A buffer that is too short.
    pub fn encode(&self, text: &str, ids: &mut [u32], ranks: &mut [u32]) -> Result<usize, Error> {
        let mut tokens = Tokens { ids, ranks, len: 0 };
        self.encode_behind(text, &mut tokens)?;
        Ok(tokens.len)
    }

    /// As [`Self::encode`], with the tokens before every text in front, unless the text begins with them.
    ///
    /// # Errors
    /// Those of [`Self::encode`].
    pub fn encode_prompt(&self, text: &str, ids: &mut [u32], ranks: &mut [u32]) -> Result<usize, Error> {
        let first = self.parts.first;
        let mut tokens = Tokens { ids, ranks, len: 0 };
        first.iter().try_for_each(|&id| tokens.push(id))?;
        self.encode_behind(text, &mut tokens)?;
        let Tokens { ids, mut len, .. } = tokens;
        if ids[first.len()..len].starts_with(first) {
            ids.copy_within(first.len()..len, 0);
            len -= first.len();
        }
        Ok(len)
    }

    fn encode_behind(&self, text: &str, tokens: &mut Tokens<'_>) -> Result<(), Error> {
        let mut start = 0;
        let mut at = 0;
        while at < text.len() {
            if let Some((id, len)) = self.added_at(&text[at..]) {
                self.part(&text[start..at], start == 0, tokens)?;
                tokens.push(id)?;
                at += len;
                start = at;
            } else {
                at += text[at..].chars().next().map_or(1, char::len_utf8);
            }
        }
        self.part(&text[start..], start == 0, tokens)
    }

    /// The longest added token that `text` begins with.
    fn added_at(&self, text: &str) -> Option<(u32, usize)> {
        let added = self.parts.added.iter().filter_map(|&id| Some((id, self.token(id)?)));
        let here = added.filter(|(_, bytes)| text.as_bytes().starts_with(bytes));
        here.map(|(id, bytes)| (id, bytes.len())).max_by_key(|&(_, len)| len)
    }

    /// A text without added tokens.
    fn part(&self, text: &str, is_first: bool, tokens: &mut Tokens<'_>) -> Result<(), Error> {
        match self.parts.kind {
            _ if text.is_empty() => Ok(()),
            Kind::ByteLevel { digits: false } => self.words(text, tokens),
            Kind::ByteLevel { digits: true } => {
                let mut rest = text;
                while !rest.is_empty() {
                    let (part, behind) = rest.split_at(self.digit_part(rest));
                    self.words(part, tokens)?;
                    rest = behind;
                }
                Ok(())
            }
            Kind::Pieces { blanks, words, fuse_unknown, .. } => {
                let bare = !(text.starts_with(' ') || text.starts_with(BLANK));
                let prefix = match blanks {
                    Blanks::None => false,
                    Blanks::Parts => true,
                    Blanks::Always => bare,
                    Blanks::First => bare && is_first,
                };
                self.pieces(text, prefix, words, fuse_unknown, tokens)
            }
        }
    }

    fn words(&self, text: &str, tokens: &mut Tokens<'_>) -> Result<(), Error> {
        let mut rest = text;
        while !rest.is_empty() {
            let (word, behind) = rest.split_at(self.word(rest));
            let start = tokens.len;
            for byte in word.bytes() {
                match self.parts.bytes[usize::from(byte)] {
                    NONE if self.parts.unknown == NONE => {}
                    NONE => tokens.push(self.parts.unknown)?,
                    id => tokens.push(id)?,
                }
            }
            self.finish(start, Some(word.as_bytes()), tokens);
            rest = behind;
        }
        Ok(())
    }

    fn pieces(
        &self,
        text: &str,
        prefix: bool,
        words: bool,
        fuse_unknown: bool,
        tokens: &mut Tokens<'_>,
    ) -> Result<(), Error> {
        let mut start = tokens.len;
        let mut unknown_before = false;
        let blank = prefix.then_some(' ');
        for c in blank.into_iter().chain(text.chars()) {
            let c = if c == ' ' { '\u{2581}' } else { c };
            if words && c == '\u{2581}' {
                self.finish(start, None, tokens);
                (start, unknown_before) = (tokens.len, false);
            }
            let known = self.symbols(c, tokens)?;
            if !known && self.parts.unknown != NONE && !(unknown_before && fuse_unknown) {
                tokens.push(self.parts.unknown)?;
            }
            unknown_before = !known;
        }
        self.finish(start, None, tokens);
        Ok(())
    }

    /// The token of a character, else those of its bytes; `false`: it has neither.
    fn symbols(&self, c: char, tokens: &mut Tokens<'_>) -> Result<bool, Error> {
        let mut buffer = [0; 4];
        let bytes = c.encode_utf8(&mut buffer).as_bytes();
        if let Some(id) = self.find(bytes) {
            tokens.push(id)?;
            return Ok(true);
        }
        let byte = |&b: &u8| self.parts.bytes[usize::from(b)];
        let known = bytes.iter().all(|b| byte(b) != NONE);
        if known {
            bytes.iter().try_for_each(|b| tokens.push(byte(b)))?;
        }
        Ok(known)
    }

    /// Merges the symbols from `start` on, which are those of one word.
    fn finish(&self, start: usize, word: Option<&[u8]>, tokens: &mut Tokens<'_>) {
        let whole = word.filter(|_| self.parts.ignore_merges).and_then(|word| self.find(word));
        let (ids, ranks) = (&mut tokens.ids[start..tokens.len], &mut tokens.ranks[start..]);
        let n = match whole {
            Some(id) if !ids.is_empty() => {
                ids[0] = id;
                1
            }
            _ => self.merge(ids, ranks),
        };
        tokens.len = start + n;
    }

    /// Merges the pair of the lowest rank, of equal ones the first, until no pair has one; returns how many are left.
    fn merge(&self, ids: &mut [u32], ranks: &mut [u32]) -> usize {
        let rank = |ids: &[u32], i: usize| self.merge_of(ids[i], ids[i + 1]).map_or(NONE, |m| m.rank);
        let mut n = ids.len();
        for i in 1..n {
            ranks[i - 1] = rank(ids, i - 1);
        }
        while n > 1 {
            let lowest = ranks[..n - 1].iter().enumerate().min_by_key(|&(_, &rank)| rank);
            let Some(merge) = lowest.and_then(|(i, _)| Some((i, self.merge_of(ids[i], ids[i + 1])?))) else {
                break;
            };
            let (i, merge) = merge;
            ids[i] = merge.token;
            ids.copy_within(i + 2..n, i + 1);
            ranks.copy_within(i + 1..n - 1, i);
            n -= 1;
            for i in i.saturating_sub(1)..(i + 1).min(n - 1) {
                ranks[i] = rank(ids, i);
            }
        }
        n
    }
}
