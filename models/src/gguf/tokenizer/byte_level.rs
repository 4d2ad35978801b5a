//! Byte-level vocabularies: GPT-2's kind.

use super::{
    Defaults, around_texts,
    metadata::{Metadata, array, fail, flag, string},
    own::Own,
    splits::Splits,
    vocabulary::{Kind, TYPES, Vocabulary},
    wrong,
};
use candle_core::{Result, quantized::gguf_file::Value};
use std::collections::HashSet;
use tokenizers::{Tokenizer, decoders::byte_level::ByteLevel, models::bpe::BPE};

const PRE: &str = "tokenizer.ggml.pre";
const MERGES: &str = "tokenizer.ggml.merges";

pub(super) fn tokenizer(metadata: &Metadata, notices: &mut Vec<String>) -> Result<Tokenizer> {
    let vocabulary = Vocabulary::read(metadata)?;
    if !metadata.contains_key(TYPES) {
        notices.push(format!(
            "GGUF metadata: `{TYPES}` is missing: tokens such as <|...|> are read and printed as text, but for those that \
             begin and end one"
        ));
    }
    let splits = splits(metadata, &vocabulary, notices)?;
    let merges = merges(metadata)?;
    let joined: Vec<String> = merges.iter().map(|(a, b)| format!("{a}{b}")).collect();
    let parts = merges.iter().flat_map(|(a, b)| [a.as_str(), b.as_str()]);
    let needed: HashSet<&str> = parts.chain(joined.iter().map(String::as_str)).collect();
    let ids = vocabulary.ids(&needed)?;
    // Of a merge that is longer than every token its maker reads past the end.
    if let Some(text) = joined.iter().find(|text| !ids.contains_key(*text)) {
        return fail(format!("GGUF metadata: `{MERGES}` puts together '{text}', which is no token"));
    }
    let ignore_merges = flag(metadata, "tokenizer.ggml.ignore_merges")?.unwrap_or(splits.ignore_merges);
    let mut bpe = BPE::builder().ignore_merges(ignore_merges);
    // Files name an unknown token where there is none: it serves only if its type says so.
    let unknown = vocabulary.kinds.iter().position(|kind| *kind == Kind::Unknown);
    if let Some(unknown) = unknown {
        bpe = bpe.unk_token(vocabulary.texts[unknown].clone());
    }
    let bpe = bpe.vocab_and_merges(ids, merges).build().map_err(wrong)?;
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer.with_normalizer(splits.normalizer()).map_err(wrong)?;
    tokenizer.with_pre_tokenizer(Some(splits.pre_tokenizer()?));
    tokenizer.with_decoder(Some(ByteLevel::new(false, true, true)));
    vocabulary.add_tokens(&mut tokenizer, &Own::read(metadata)?)?;
    let defaults = Defaults { adds_bos: splits.adds_bos, ids: [None; 2] };
    around_texts(&mut tokenizer, metadata, &defaults, notices)?;
    Ok(tokenizer)
}

/// How texts are split. Files that do not say are older than the key, or were made by a converter that did not know.
fn splits(
    metadata: &Metadata,
    vocabulary: &Vocabulary,
    notices: &mut Vec<String>,
) -> Result<&'static Splits> {
    if let Some(name) = string(metadata, PRE)?.filter(|name| *name != "default") {
        return match Splits::named(name) {
            Some(splits) => Ok(splits),
            None => fail(format!(
                "GGUF tokenizers with the pre-tokenizer '{name}' are not supported: {}",
                super::HINT
            )),
        };
    }
    let recognised = Splits::recognise(&vocabulary.texts)?;
    notices.push(match recognised {
        Some(splits) => format!(
            "GGUF metadata: `{PRE}` does not say how texts are split: as '{}', which the vocabulary was made by",
            splits.name()
        ),
        None => format!(
            "GGUF metadata: `{PRE}` does not say how texts are split: as 'gpt-2', which may not be how the model was \
             trained; to be sure {}",
            super::HINT
        ),
    });
    match recognised.or_else(|| Splits::named("gpt-2")) {
        Some(splits) => Ok(splits),
        None => fail(format!("GGUF metadata: `{PRE}` is missing")),
    }
}

fn merges(metadata: &Metadata) -> Result<Vec<(String, String)>> {
    let merge = |(i, value): (usize, &Value)| {
        let Value::String(text) = value else {
            return fail(format!("GGUF metadata: entry {i} of `{MERGES}` is not a string"));
        };
        // A part may be a blank itself where a vocabulary was not made of bytes.
        let second = text.char_indices().nth(1).map_or(text.len(), |(at, _)| at);
        match text[second..].find(' ').map(|at| text.split_at(second + at)) {
            Some((a, b)) => Ok((a.to_string(), b[1..].to_string())),
            None => fail(format!("GGUF metadata: entry {i} of `{MERGES}` is no two tokens: '{text}'")),
        }
    };
    array(metadata, MERGES)?.iter().enumerate().map(merge).collect()
}
