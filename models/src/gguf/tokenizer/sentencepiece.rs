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
use std::collections::{HashMap, HashSet};
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
    let (ids, merges) = (vocabulary.ids(&HashSet::from([unknown.as_str()]))?, merges(&vocabulary, &scores));
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

/// All ways to put a piece together of two others, best pieces first: [`generate_merges`].
///
/// [`generate_merges`]: https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/convert_slow_tokenizer.py#L122-L143
fn merges(vocabulary: &Vocabulary, scores: &[f32]) -> Vec<(String, String)> {
    let all = (0_u32..).zip(&vocabulary.texts).zip(scores).zip(&vocabulary.kinds);
    let pieces: Vec<(u32, &str, f32)> = all
        .filter(|(_, kind)| **kind == Kind::Normal)
        .map(|(((id, text), score), _)| (id, text.as_str(), *score))
        .collect();
    let ids: HashMap<&str, u32> = pieces.iter().map(|&(id, text, _)| (text, id)).collect();
    // Only where both parts have a length that some piece has is there anything to look up: a piece of a megabyte would
    // otherwise take a megabyte's look-ups of a megabyte each.
    let lengths: HashSet<usize> = pieces.iter().map(|(_, text, _)| text.len()).collect();
    let mut merges = Vec::new();
    for &(_, text, score) in &pieces {
        let first = merges.len();
        for (chars, (at, _)) in text.char_indices().enumerate().skip(1) {
            if !(lengths.contains(&at) && lengths.contains(&(text.len() - at))) {
                continue;
            }
            let (left, right) = text.split_at(at);
            if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                merges.push((score, chars, (left, right), (l, r)));
            }
        }
        merges[first..].sort_by_key(|&(.., ids)| ids);
    }
    // Pieces of the same score and the same left length: the one whose right part is longer is itself longer.
    merges.sort_by(|(score_a, chars_a, a, _), (score_b, chars_b, b, _)| {
        let right = |pair: &(&str, &str)| pair.1.chars().count();
        score_b.total_cmp(score_a).then(chars_b.cmp(chars_a)).then_with(|| right(b).cmp(&right(a)))
    });
    merges.into_iter().map(|(_, _, (left, right), _)| (left.to_string(), right.to_string())).collect()
}
