//! A byte-level vocabulary of a few merges, and texts through it and back.

use crate::model::Words;
use candle_sparse_core::tokenizer::{Blanks, Kind, Merge, NONE, Parts, Range, TextStream, Tokenizer};

/// Tables that live as long as they are looked at.
pub(crate) struct Tables {
    text_ends: Vec<u32>,
    sorted: Vec<u32>,
    merge_starts: Vec<u32>,
    merges: Vec<Merge>,
    bytes: Vec<u32>,
    texts: Vec<u8>,
}

/// Tokens 0..256 are the bytes, then ` a`, `an`, ` an`, `the` (which no merge makes), a beginning and an end of texts.
pub(crate) fn tables() -> Tables {
    let mut texts: Vec<Vec<u8>> = (0..=u8::MAX).map(|b| vec![b]).collect();
    texts.extend([" a", "an", " an", "the", "<s>", "</s>"].map(|t| t.as_bytes().to_vec()));
    let mut sorted: Vec<u32> = (0..260).collect();
    sorted.sort_by_key(|&id| texts[id as usize].clone());
    let mut merge_starts = vec![0; texts.len() + 1];
    // By left token: 32 (blank) + 97 (a), 97 + 110 (n), 256 + 110.
    let merges = vec![
        Merge { right: 97, rank: 1, token: 256 },
        Merge { right: 257, rank: 2, token: 258 },
        Merge { right: 110, rank: 0, token: 257 },
    ];
    merge_starts[33..98].fill(2);
    merge_starts[98..].fill(3);
    let text_ends = texts.iter().scan(0, |end, t| {
        *end += t.len() as u32;
        Some(*end)
    });
    let text_ends = text_ends.collect();
    Tables { text_ends, sorted, merge_starts, merges, bytes: (0..256).collect(), texts: texts.concat() }
}

impl Tables {
    pub(crate) fn parts(&self) -> Parts<'_> {
        Parts {
            kind: Kind::ByteLevel { digits: false },
            ignore_merges: false,
            unknown: NONE,
            text_ends: &self.text_ends,
            sorted: &self.sorted,
            merge_starts: &self.merge_starts,
            merges: &self.merges,
            bytes: &self.bytes,
            added: &[260, 261],
            special: &[0, 0, 0, 0, 0, 0, 0, 0, 0b11_0000],
            first: &[260],
            ends: &[261],
            letters: &[Range { first: 97, last: 122 }, Range { first: 0xC0, last: 0x24F }],
            numbers: &[Range { first: 48, last: 57 }],
            texts: &self.texts,
        }
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.parts().write(|piece| bytes.extend_from_slice(piece));
        bytes
    }
}

fn encoded(parts: Parts<'_>, text: &str) -> Vec<u32> {
    let (mut ids, mut ranks) = ([0; 64], [0; 64]);
    let n = Tokenizer::new(parts).unwrap().encode(text, &mut ids, &mut ranks).unwrap();
    ids[..n].to_vec()
}

#[test]
fn merges_go_by_rank_within_words() {
    let tables = tables();
    assert_eq!(encoded(tables.parts(), "an ana an"), [257, 258, 97, 258]);
    assert_eq!(encoded(tables.parts(), "a<s>the"), [97, 260, 116, 104, 101]);
    assert_eq!(encoded(Parts { ignore_merges: true, ..tables.parts() }, "the"), [259]);
    assert_eq!(encoded(tables.parts(), ""), []);
}

#[test]
fn pieces_put_blanks_where_they_are_told() {
    let tables = tables();
    let pieces = |blanks| Kind::Pieces { blanks, words: false, strip: true, fuse_unknown: true };
    let ids = |blanks, text: &str| encoded(Parts { kind: pieces(blanks), ..tables.parts() }, text);
    let blank = [0xE2, 0x96, 0x81];
    let behind_blank = |rest: &[u32]| [&blank[..], rest].concat();
    assert_eq!(ids(Blanks::None, "b"), [98]);
    assert_eq!(ids(Blanks::Parts, " b"), [&blank[..], &blank[..], &[98]].concat());
    assert_eq!(ids(Blanks::Always, " b"), behind_blank(&[98]));
    assert_eq!(ids(Blanks::Always, "<s>b"), [&[260], &behind_blank(&[98])[..]].concat());
    assert_eq!(ids(Blanks::First, "<s>b"), [260, 98]);
    assert_eq!(ids(Blanks::First, "b"), behind_blank(&[98]));
}

#[test]
fn unknown_symbols_are_fused_or_left_out() {
    let tables = tables();
    let none = [NONE; 256];
    let kind = |fuse_unknown| Kind::Pieces { blanks: Blanks::None, words: false, strip: false, fuse_unknown };
    let parts = |fuse, unknown| Parts { kind: kind(fuse), bytes: &none, unknown, ..tables.parts() };
    assert_eq!(encoded(parts(true, 259), "\u{e9}\u{e9}a\u{e9}"), [259, 97, 259]);
    assert_eq!(encoded(parts(false, 259), "\u{e9}\u{e9}a"), [259, 259, 97]);
    assert_eq!(encoded(parts(true, NONE), "\u{e9}a"), [97]);
}

#[test]
fn text_comes_character_by_character() {
    let tables = tables();
    let tokenizer = Tokenizer::new(tables.parts()).unwrap();
    let (mut text, mut stream) = (String::new(), TextStream::default());
    for (id, expected) in
        [(260, ""), (0xC3, ""), (0xA9, "é"), (0xE2, "é"), (258, "é\u{fffd} an"), (0xF0, "é\u{fffd} an")]
    {
        stream.push(&tokenizer, id, &mut text).unwrap();
        assert_eq!(text, expected, "after {id}");
    }
    stream.finish(&mut text).unwrap();
    assert_eq!(text, "é\u{fffd} an\u{fffd}");
    let mut lone = String::new();
    TextStream::default().push(&tokenizer, 9999, &mut lone).unwrap();
    assert_eq!(lone, "");
}

#[test]
fn tables_are_read_back_from_their_bytes() {
    let tables = tables();
    let words = Words::new(&tables.to_bytes());
    let tokenizer = Tokenizer::from_bytes(words.bytes()).unwrap();
    assert_eq!(format!("{:?}", tokenizer.parts()), format!("{:?}", tables.parts()));
    assert!(tokenizer.is_end(261) && !tokenizer.is_end(0));
}

#[test]
fn a_buffer_that_is_too_short_is_an_error() {
    let tables = tables();
    let tokenizer = Tokenizer::new(tables.parts()).unwrap();
    for len in 0..12 {
        let (mut ids, mut ranks) = (vec![0; len], vec![0; len]);
        let result = tokenizer.encode_prompt("an ana an", &mut ids, &mut ranks);
        assert_eq!(result.is_ok(), len >= 7, "{len}: {result:?}");
    }
}
