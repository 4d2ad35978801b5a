//! How a text is cut into words before the merges, as GPT-2 does it.

use super::{Range, Tokenizer};

/// What the expressions tell apart.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Letter,
    Number,
    Blank,
    Other,
}

fn is_in(ranges: &[Range], c: char) -> bool {
    let c = u32::from(c);
    let at = ranges.partition_point(|r| r.last < c);
    ranges.get(at).is_some_and(|r| r.first <= c)
}

impl Tokenizer<'_> {
    fn class(&self, c: char) -> Class {
        match c {
            'a'..='z' | 'A'..='Z' => Class::Letter,
            '0'..='9' => Class::Number,
            _ if c.is_whitespace() => Class::Blank,
            _ if is_in(self.parts.letters, c) => Class::Letter,
            _ if is_in(self.parts.numbers, c) => Class::Number,
            _ => Class::Other,
        }
    }

    /// The length in bytes of the first part of `text` where each digit is a part of its own; at least 1 character.
    pub(super) fn digit_part(&self, text: &str) -> usize {
        let is_number = |c| self.class(c) == Class::Number;
        match text.chars().next() {
            Some(c) if is_number(c) => c.len_utf8(),
            _ => text.find(is_number).unwrap_or(text.len()),
        }
    }

    /// The length in bytes of the first word of `text`, which is not empty:
    /// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`.
    ///
    /// Source: the expression of `ByteLevel` in Hugging Face's tokenizers, which is that of GPT-2's `encoder.py`.
    pub(super) fn word(&self, text: &str) -> usize {
        if let Some(end) =
            ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"].iter().find(|e| text.starts_with(**e))
        {
            return end.len();
        }
        let bare = text.strip_prefix(' ').unwrap_or(text);
        let run = |class: Class| bare.find(|c| self.class(c) != class).unwrap_or(bare.len());
        for class in [Class::Letter, Class::Number, Class::Other] {
            let len = run(class);
            if len > 0 {
                return text.len() - bare.len() + len;
            }
        }
        blanks(text)
    }
}

/// All blanks at the beginning of `text`, without the last one where something follows, which that one belongs to.
fn blanks(text: &str) -> usize {
    let rest = text.trim_start();
    let run = &text[..text.len() - rest.len()];
    let last = run.chars().next_back().map_or(0, char::len_utf8);
    match run.len() - last {
        0 => run.len(),
        _ if rest.is_empty() => run.len(),
        before => before,
    }
}
