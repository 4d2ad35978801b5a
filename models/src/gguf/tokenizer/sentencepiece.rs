//! `SentencePiece` vocabularies as the tokenizer that transformers makes of them.

use super::{
    Defaults, around_texts,
    metadata::{Metadata, TOKENS, array, fail, flag, id},
    own::Own,
    pieces::Prefix,
    vocabulary::{Kind, TYPES, Vocabulary},
    wrong,
};
use candle_core::{Result, quantized::gguf_file::Value};
use std::collections::HashSet;
use tokenizers::{Tokenizer, models::bpe::BPE};

const SCORES: &str = "tokenizer.ggml.scores";

/// As transformers' [`LlamaConverter`], for texts and special tokens alike.
///
/// [`LlamaConverter`]: https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/convert_slow_tokenizer.py#L1617-L1660
pub(super) fn tokenizer(metadata: &Metadata, notices: &mut Vec<String>) -> Result<Tokenizer> {
    let scores = scores(metadata)?;
    // Without types no byte is known.
    array(metadata, TYPES)?;
    let vocabulary = Vocabulary::read(metadata)?;
    let unknown = id(metadata, "tokenizer.ggml.unknown_token_id")?.unwrap_or(0);
    let Some(unknown) = vocabulary.texts.get(unknown as usize) else {
        return fail(format!("GGUF metadata: `tokenizer.ggml.unknown_token_id` is {unknown}: no such token"));
    };
    let ids = vocabulary.ids(&HashSet::from([unknown.as_str()]))?;
    let merges = merges(&vocabulary, &scores)?;
    let bpe = BPE::builder()
        .vocab_and_merges(ids, merges)
        .unk_token(unknown.clone())
        .fuse_unk(true)
        .byte_fallback(true)
        .build()
        .map_err(wrong)?;
    let mut tokenizer = Tokenizer::new(bpe);
    let own = Own::read(metadata)?;
    let prefix = match flag(metadata, "tokenizer.ggml.add_space_prefix")? {
        Some(false) => Prefix::None,
        _ => own.prefix.unwrap_or(Prefix::Parts),
    };
    prefix.apply(&mut tokenizer)?;
    vocabulary.add_tokens(&mut tokenizer, &own)?;
    // As in llama.cpp: such vocabularies begin with an unknown token and these two.
    let control = |id: usize| vocabulary.kinds.get(id) == Some(&Kind::Control);
    let ids = [1, 2].map(|id| control(id).then_some(id as u32));
    around_texts(&mut tokenizer, metadata, &Defaults { adds_bos: true, ids }, notices)?;
    Ok(tokenizer)
}

fn scores(metadata: &Metadata) -> Result<Vec<f32>> {
    let (tokens, scores) = (array(metadata, TOKENS)?.len(), array(metadata, SCORES)?);
    if scores.len() != tokens {
        let values = scores.len();
        return fail(format!("GGUF metadata: `{TOKENS}` has {tokens} entries, `{SCORES}` {values}"));
    }
    let score = |(i, score): (usize, &Value)| match score {
        Value::F32(score) if !score.is_nan() => Ok(*score),
        _ => fail(format!("GGUF metadata: entry {i} of `{SCORES}` is not a number in F32")),
    };
    scores.iter().enumerate().map(score).collect()
}

/// More merges, or more text in them, no vocabulary has: the largest has 0.6 million of some 10 bytes.
const MOST_MERGES: usize = 1 << 20;
const MOST_MERGE_BYTES: usize = 1 << 25;

/// A token that texts are put together of.
struct Piece<'a> {
    id: u32,
    text: &'a str,
    score: f32,
    chars: usize,
}

/// All ways to put a piece together of two others, best pieces first: [`generate_merges`].
///
/// [`generate_merges`]: https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/convert_slow_tokenizer.py#L122-L143
fn merges(vocabulary: &Vocabulary, scores: &[f32]) -> Result<Vec<(String, String)>> {
    let all = (0_u32..).zip(&vocabulary.texts).zip(scores).zip(&vocabulary.kinds);
    let pieces: Vec<Piece<'_>> = all
        .filter(|(_, kind)| **kind == Kind::Normal)
        .map(|(((id, text), score), _)| Piece { id, text, score: *score, chars: text.chars().count() })
        .collect();
    let (begins, ends) = (longest_parts(&pieces, Side::Start), longest_parts(&pieces, Side::End));
    let mut merges: Vec<[u32; 3]> = Vec::new();
    let (mut lefts, mut rights, mut bytes) = (Vec::new(), Vec::new(), 0);
    for (whole, piece) in pieces.iter().enumerate() {
        let first = merges.len();
        parts_of(whole, &begins, &mut lefts);
        parts_of(whole, &ends, &mut rights);
        // The longer the left part, the shorter the right one.
        let mut right = rights.iter().rev().copied().peekable();
        for &left in &lefts {
            let missing = piece.text.len() - pieces[left as usize].text.len();
            while right.next_if(|right| pieces[*right as usize].text.len() < missing).is_some() {}
            merges.extend(
                right
                    .next_if(|right| pieces[*right as usize].text.len() == missing)
                    .map(|right| [whole as u32, left, right]),
            );
        }
        bytes += (merges.len() - first) * piece.text.len();
        if merges.len() > MOST_MERGES || bytes > MOST_MERGE_BYTES {
            return fail(format!(
                "GGUF metadata: the tokens up to {} of `{TOKENS}` are made of one another in {} ways, which are merges of {} \
                 MB: no vocabulary is",
                piece.id,
                merges.len(),
                bytes >> 20
            ));
        }
        merges[first..]
            .sort_by_key(|[_, left, right]| (pieces[*left as usize].id, pieces[*right as usize].id));
    }
    let at = |piece: &u32| &pieces[*piece as usize];
    // Pieces of the same score and the same left length: the one whose right part is longer is itself longer.
    merges.sort_by(|[a, left_a, right_a], [b, left_b, right_b]| {
        let chars = |piece: &u32| at(piece).chars;
        let scores = at(b).score.total_cmp(&at(a).score);
        scores.then(chars(left_b).cmp(&chars(left_a))).then_with(|| chars(right_b).cmp(&chars(right_a)))
    });
    let texts = |[_, left, right]: &[u32; 3]| (at(left).text.to_string(), at(right).text.to_string());
    Ok(merges.iter().map(texts).collect())
}

#[derive(Clone, Copy)]
enum Side {
    Start,
    End,
}

/// Of each piece the longest other one that it begins or ends with. In the order of their texts a piece stands behind all that it
/// begins with, and those are a chain: one pass finds them, however long and alike the pieces are.
fn longest_parts(pieces: &[Piece<'_>], side: Side) -> Vec<Option<u32>> {
    let text = |piece: u32| pieces[piece as usize].text;
    let is_part = |part: u32, whole: u32| match side {
        Side::Start => text(whole).starts_with(text(part)),
        Side::End => text(whole).ends_with(text(part)),
    };
    let mut order: Vec<u32> = (0..pieces.len() as u32).collect();
    match side {
        Side::Start => order.sort_by_key(|piece| text(*piece)),
        Side::End => order.sort_by(|a, b| text(*a).bytes().rev().cmp(text(*b).bytes().rev())),
    }
    let (mut longest, mut chain) = (vec![None; pieces.len()], Vec::new());
    for piece in order {
        while chain.pop_if(|last| !is_part(*last, piece)).is_some() {}
        longest[piece as usize] = chain.last().copied();
        chain.push(piece);
    }
    longest
}

/// All parts of a piece on one side, the longest first.
fn parts_of(piece: usize, longest: &[Option<u32>], parts: &mut Vec<u32>) {
    parts.clear();
    let mut next = longest[piece];
    while let Some(part) = next {
        parts.push(part);
        next = longest[part as usize];
    }
}
