//! The tables of a vocabulary: how they lie in an image, and what must hold of them.

use crate::error::Error;
use bytemuck::{Pod, Zeroable};

/// In place of an id: there is no such token.
pub const NONE: u32 = u32::MAX;

/// How a text becomes the symbols that merges begin with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Bytes, in words as GPT-2 splits texts.
    ByteLevel {
        /// Each digit is a word.
        digits: bool,
    },
    /// Characters, blanks as `▁`; what has no token becomes bytes.
    Pieces {
        /// Where a blank is put before a text.
        blanks: Blanks,
        /// Each `▁` begins a word, and merges stay within words.
        words: bool,
        /// Decoding takes one blank off the beginning of the text.
        strip: bool,
        /// Neighbours without a token share one unknown token.
        fuse_unknown: bool,
    },
}

/// Where a blank is put before the pieces of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blanks {
    /// Nowhere.
    None,
    /// Before each part of a text, also behind a special token.
    Parts,
    /// As `Parts`, unless a blank is there.
    Always,
    /// As `Always`, but only at the beginning of the text.
    First,
}

/// A pair of tokens that becomes one; the left one is known from where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Merge {
    /// The right token.
    pub right: u32,
    /// Lower ranks are merged first.
    pub rank: u32,
    /// The token that both become.
    pub token: u32,
}

/// A range of characters, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Range {
    /// First.
    pub first: u32,
    /// Last.
    pub last: u32,
}

/// The tables of a vocabulary of n tokens.
#[derive(Clone, Copy, Debug)]
pub struct Parts<'a> {
    /// How texts become symbols.
    pub kind: Kind,
    /// A word that is a token is taken whole, whatever the merges say.
    pub ignore_merges: bool,
    /// The token of what has none, or [`NONE`]: it is left out.
    pub unknown: u32,
    /// `[n]`: where the text of each token ends in `texts`; it begins where the one before ends.
    pub text_ends: &'a [u32],
    /// Tokens that merges make or begin with, by their bytes, increasing.
    pub sorted: &'a [u32],
    /// `[n + 1]`: where the merges of each left token begin.
    pub merge_starts: &'a [u32],
    /// Merges, by left token, then by right token, increasing.
    pub merges: &'a [Merge],
    /// `[256]`: the token of each byte, or [`NONE`].
    pub bytes: &'a [u32],
    /// Tokens that are taken where their text stands.
    pub added: &'a [u32],
    /// `[n / 32]`, rounded up: a bit for each token that decoding leaves out.
    pub special: &'a [u32],
    /// Tokens before every text.
    pub first: &'a [u32],
    /// Tokens that end what the model says.
    pub ends: &'a [u32],
    /// Characters of the general category L, increasing.
    pub letters: &'a [Range],
    /// Characters of the general category N, increasing.
    pub numbers: &'a [Range],
    /// The bytes of all tokens.
    pub texts: &'a [u8],
}

/// Words of the header: kind, flags, unknown, then the length of each table.
const HEADER: usize = 15;
/// Bits of the flags.
const IGNORE_MERGES: u32 = 1;
const DIGITS: u32 = 2;
const WORDS: u32 = 4;
const STRIP: u32 = 8;
const FUSE: u32 = 16;
/// The most tokens there can be: an id and one more must fit wherever ids are counted.
const MOST_TOKENS: usize = 1 << 24;

impl<'a> Parts<'a> {
    /// Hands the bytes that [`Self::from_bytes`] reads to `put`, piece by piece; together a multiple of 4.
    pub fn write(&self, mut put: impl FnMut(&[u8])) {
        put(bytemuck::cast_slice(&self.header()));
        for words in self.words() {
            put(bytemuck::cast_slice(words));
        }
        put(bytemuck::cast_slice(self.merges));
        put(bytemuck::cast_slice(self.letters));
        put(bytemuck::cast_slice(self.numbers));
        put(self.texts);
        put(&[0; 3][..self.texts.len().next_multiple_of(4) - self.texts.len()]);
    }

    /// The tables of words, in the order in which they are held.
    fn words(&self) -> [&'a [u32]; 8] {
        let Self { text_ends, sorted, merge_starts, bytes, added, special, first, ends, .. } = *self;
        [text_ends, sorted, merge_starts, bytes, added, special, first, ends]
    }

    fn header(&self) -> [u32; HEADER] {
        let mut h = [0; HEADER];
        (h[0], h[1], h[2]) = self.kind_and_flags();
        for (h, words) in h[3..11].iter_mut().zip(self.words()) {
            *h = words.len() as u32;
        }
        let rest = [self.merges.len(), self.letters.len(), self.numbers.len(), self.texts.len()];
        h[11..].iter_mut().zip(rest).for_each(|(h, n)| *h = n as u32);
        h
    }

    fn kind_and_flags(&self) -> (u32, u32, u32) {
        let flag = |set: bool, bit: u32| u32::from(set) * bit;
        let common = flag(self.ignore_merges, IGNORE_MERGES);
        let (kind, flags) = match self.kind {
            Kind::ByteLevel { digits } => (0, flag(digits, DIGITS)),
            Kind::Pieces { blanks, words, strip, fuse_unknown } => {
                (1 + blanks as u32, flag(words, WORDS) | flag(strip, STRIP) | flag(fuse_unknown, FUSE))
            }
        };
        (kind, common | flags, self.unknown)
    }

    /// Finds the tables in the bytes that [`Self::write`] gave.
    ///
    /// # Errors
    /// Bytes that are not aligned to 4, end too early or are followed by others, and a kind that is not known.
    pub fn from_bytes(bytes: &'a [u8]) -> Result<Self, Error> {
        let bad = |what| Error::OutOfRange(what);
        let all: &'a [u32] = bytemuck::try_cast_slice(bytes).map_err(|_| bad("tokenizer bytes"))?;
        let (h, mut rest) = all.split_first_chunk::<HEADER>().ok_or(bad("tokenizer header"))?;
        let mut take = |len: usize, words: usize| -> Result<&'a [u32], Error> {
            let n = len.checked_mul(words).filter(|&n| n <= rest.len());
            let (head, tail) = rest.split_at(n.ok_or(bad("tokenizer table lengths"))?);
            rest = tail;
            Ok(head)
        };
        let mut words = [&[][..]; 8];
        for (words, &len) in words.iter_mut().zip(&h[3..11]) {
            *words = take(len as usize, 1)?;
        }
        let [text_ends, sorted, merge_starts, bytes, added, special, first, ends] = words;
        let merges = bytemuck::cast_slice(take(h[11] as usize, 3)?);
        let letters = bytemuck::cast_slice(take(h[12] as usize, 2)?);
        let numbers = bytemuck::cast_slice(take(h[13] as usize, 2)?);
        let texts = bytemuck::cast_slice(take((h[14] as usize).div_ceil(4), 1)?);
        if !rest.is_empty() {
            return Err(bad("tokenizer table lengths"));
        }
        Ok(Self {
            kind: kind(h[0], h[1])?,
            ignore_merges: h[1] & IGNORE_MERGES != 0,
            unknown: h[2],
            text_ends,
            sorted,
            merge_starts,
            merges,
            bytes,
            added,
            special,
            first,
            ends,
            letters,
            numbers,
            texts: &texts[..h[14] as usize],
        })
    }

    pub(super) fn token(&self, id: usize) -> Option<&'a [u8]> {
        let end = *self.text_ends.get(id)? as usize;
        let start = id.checked_sub(1).map_or(0, |before| self.text_ends[before] as usize);
        Some(&self.texts[start..end])
    }

    /// All that the other modules rely on.
    pub(super) fn check(&self) -> Result<(), Error> {
        let n = self.text_ends.len();
        let known = |ids: &[u32]| ids.iter().all(|&id| (id as usize) < n);
        let known_or_none = |ids: &[u32]| ids.iter().all(|&id| id == NONE || (id as usize) < n);
        let ranges = |ranges: &[Range]| {
            ranges.iter().all(|r| r.first <= r.last) && ranges.is_sorted_by(|a, b| a.last < b.first)
        };
        let text_end = self.text_ends.last().map_or(0, |&end| end as usize);
        let whole = |id: &u32| self.token(*id as usize).is_some_and(|t| core::str::from_utf8(t).is_ok());
        for (holds, what) in [
            ((1..MOST_TOKENS).contains(&n), "tokenizer: number of tokens"),
            (self.text_ends.is_sorted() && text_end == self.texts.len(), "tokenizer: ends of token texts"),
            (known(self.sorted), "tokenizer: sorted tokens"),
            (self.merges_hold(n), "tokenizer: merges"),
            (self.bytes.len() == 256 && known_or_none(self.bytes), "tokenizer: tokens of bytes"),
            (known_or_none(&[self.unknown]), "tokenizer: unknown token"),
            (self.special.len() == n.div_ceil(32), "tokenizer: special tokens"),
            (known(self.first), "tokenizer: first tokens"),
            (known(self.ends), "tokenizer: end tokens"),
            (ranges(self.letters), "tokenizer: letters"),
            (ranges(self.numbers), "tokenizer: numbers"),
        ] {
            if !holds {
                return Err(Error::OutOfRange(what));
            }
        }
        // These read texts, which are known to be in range from here on.
        let empty = |id: &u32| self.token(*id as usize).is_none_or(<[u8]>::is_empty);
        let (sorted, added) = (self.sorted, self.added);
        if !sorted.is_sorted_by(|&a, &b| self.token(a as usize) < self.token(b as usize)) {
            return Err(Error::OutOfRange("tokenizer: sorted tokens"));
        }
        if !known(added) || added.iter().any(empty) || !added.iter().all(whole) {
            return Err(Error::OutOfRange("tokenizer: added tokens"));
        }
        Ok(())
    }

    fn merges_hold(&self, n: usize) -> bool {
        let starts = self.merge_starts;
        let in_order = |s: &[u32]| {
            let merges = &self.merges[s[0] as usize..s[1] as usize];
            merges.is_sorted_by(|a, b| a.right < b.right)
        };
        starts.len() == n + 1
            && starts.is_sorted()
            && starts[n] as usize == self.merges.len()
            && starts.windows(2).all(in_order)
            && self.merges.iter().all(|m| (m.token as usize) < n && m.rank != NONE)
    }
}

fn kind(kind: u32, flags: u32) -> Result<Kind, Error> {
    let set = |bit: u32| flags & bit != 0;
    let pieces =
        |blanks| Kind::Pieces { blanks, words: set(WORDS), strip: set(STRIP), fuse_unknown: set(FUSE) };
    Ok(match kind {
        0 => Kind::ByteLevel { digits: set(DIGITS) },
        1 => pieces(Blanks::None),
        2 => pieces(Blanks::Parts),
        3 => pieces(Blanks::Always),
        4 => pieces(Blanks::First),
        _ => return Err(Error::OutOfRange("tokenizer: kind")),
    })
}
