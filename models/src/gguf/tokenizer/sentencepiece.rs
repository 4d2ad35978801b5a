//! `SentencePiece` vocabularies as the tokenizer that transformers makes of them.

use super::{
    BOS, EOS,
    metadata::{self, Metadata, TOKENS, array, fail, flag, id, integer},
    wrong,
};
use candle_core::{Result, quantized::gguf_file::Value};
use std::collections::HashMap;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, Tokenizer,
    decoders::{
        byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence as DecoderSequence, strip::Strip,
    },
    models::bpe::{BPE, Vocab},
    normalizers::{Prepend, Replace, Sequence},
    processors::template::{SpecialToken, TemplateProcessing},
};

const BLANK: char = '\u{2581}';
const SCORES: &str = "tokenizer.ggml.scores";
const TYPES: &str = "tokenizer.ggml.token_type";

/// A token of the vocabulary; its id is its place.
struct Piece {
    text: String,
    score: f32,
    kind: Kind,
}

/// [`llama_token_type`](https://github.com/ggml-org/llama.cpp/blob/eb6a99c6fab2e530114a5fc996629ba17ec85096/include/llama.h).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl Kind {
    fn new(value: &Value) -> Option<Self> {
        Some(match integer(value)? {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }
}

/// As transformers' [`LlamaConverter`], for texts and special tokens alike.
///
/// [`LlamaConverter`]: https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/convert_slow_tokenizer.py#L1617-L1660
pub(super) fn tokenizer(metadata: &Metadata) -> Result<Tokenizer> {
    let pieces = pieces(metadata)?;
    let unknown = id(metadata, "tokenizer.ggml.unknown_token_id")?.unwrap_or(0);
    let Some(unknown) = pieces.get(unknown as usize) else {
        return fail(format!("GGUF metadata: `tokenizer.ggml.unknown_token_id` is {unknown}: no such token"));
    };
    let (ids, merges) = (ids(&pieces)?, merges(&pieces));
    let bpe = BPE::builder()
        .vocab_and_merges(ids, merges)
        .unk_token(unknown.text.clone())
        .fuse_unk(true)
        .byte_fallback(true)
        .build()
        .map_err(wrong)?;
    let mut tokenizer = Tokenizer::new(bpe);
    let prefix = flag(metadata, "tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    tokenizer.with_normalizer(Some(normalizer(prefix)?)).map_err(wrong)?;
    tokenizer.with_decoder(Some(decoder(prefix)?));
    add_tokens(&mut tokenizer, metadata, &pieces)?;
    if let Some(processor) = post_processor(metadata)? {
        tokenizer.with_post_processor(Some(processor));
    }
    Ok(tokenizer)
}

fn pieces(metadata: &Metadata) -> Result<Vec<Piece>> {
    let tokens = array(metadata, TOKENS)?;
    let (scores, types) = (array(metadata, SCORES)?, array(metadata, TYPES)?);
    for (key, values) in [(SCORES, scores), (TYPES, types)] {
        if values.len() != tokens.len() {
            let (tokens, values) = (tokens.len(), values.len());
            return fail(format!("GGUF metadata: `{TOKENS}` has {tokens} entries, `{key}` {values}"));
        }
    }
    let piece = |i: usize| {
        let text = metadata::text(tokens, i)?;
        // As in llama.cpp, for no two tokens may be the same text.
        let text = if text.is_empty() { format!("[EMPTY_{i}]") } else { text.to_string() };
        let score = match scores[i] {
            Value::F32(score) if !score.is_nan() => score,
            _ => return fail(format!("GGUF metadata: entry {i} of `{SCORES}` is not a number in F32")),
        };
        match Kind::new(&types[i]) {
            Some(kind) => Ok(Piece { text, score, kind }),
            None => fail(format!("GGUF metadata: entry {i} of `{TYPES}` is no type of token (1 to 6)")),
        }
    };
    (0..tokens.len()).map(piece).collect()
}

fn ids(pieces: &[Piece]) -> Result<Vocab> {
    let mut ids = Vocab::with_capacity(pieces.len());
    for (id, piece) in (0..).zip(pieces) {
        if let Some(first) = ids.insert(piece.text.clone(), id) {
            return fail(format!("GGUF metadata: tokens {first} and {id} are both '{}'", piece.text));
        }
    }
    Ok(ids)
}

/// All ways to put a piece together of two others, best pieces first: [`generate_merges`].
///
/// [`generate_merges`]: https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/convert_slow_tokenizer.py#L122-L143
fn merges(pieces: &[Piece]) -> Vec<(String, String)> {
    let normal = || (0_u32..).zip(pieces).filter(|(_, p)| p.kind == Kind::Normal);
    let ids: HashMap<&str, u32> = normal().map(|(id, piece)| (piece.text.as_str(), id)).collect();
    let mut merges = Vec::new();
    for (_, piece) in normal() {
        let first = merges.len();
        for (chars, (at, _)) in piece.text.char_indices().enumerate().skip(1) {
            let (left, right) = piece.text.split_at(at);
            if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                merges.push((piece.score, chars, (left, right), (l, r)));
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

fn normalizer(prefix: bool) -> Result<NormalizerWrapper> {
    let replace = Replace::new(" ", BLANK.to_string()).map_err(wrong)?.into();
    let prepend = prefix.then(|| Prepend::new(BLANK.to_string()).into());
    Ok(Sequence::new(prepend.into_iter().chain([replace]).collect()).into())
}

fn decoder(prefix: bool) -> Result<DecoderWrapper> {
    let replace = Replace::new(BLANK.to_string(), " ").map_err(wrong)?.into();
    let mut steps: Vec<DecoderWrapper> = vec![replace, ByteFallback::new().into(), Fuse::new().into()];
    if prefix {
        steps.push(Strip::new(' ', 1, 0).into());
    }
    Ok(DecoderSequence::new(steps).into())
}

fn add_tokens(tokenizer: &mut Tokenizer, metadata: &Metadata, pieces: &[Piece]) -> Result<()> {
    let special: Vec<_> = [BOS, EOS].iter().filter_map(|key| id(metadata, key).transpose()).collect();
    let special = special.into_iter().collect::<Result<Vec<_>>>()?;
    let added = (0..).zip(pieces).filter_map(|(id, piece)| {
        let special = special.contains(&id) || matches!(piece.kind, Kind::Control | Kind::Unknown);
        let added = special || piece.kind == Kind::UserDefined;
        added.then(|| AddedToken::from(piece.text.clone(), special).normalized(false))
    });
    let (special, plain): (Vec<_>, Vec<_>) = added.partition(|token| token.special);
    tokenizer.add_special_tokens(special).map_err(wrong)?;
    tokenizer.add_tokens(plain).map_err(wrong)?;
    Ok(())
}

fn post_processor(metadata: &Metadata) -> Result<Option<TemplateProcessing>> {
    let wanted = |flag_key: &str, default: bool, id_key: &str, name: &str| {
        if !flag(metadata, flag_key)?.unwrap_or(default) {
            return Ok(None);
        }
        match (id(metadata, id_key)?, metadata::token_text(metadata, id_key)?) {
            (Some(id), Some(text)) => {
                let token = SpecialToken::new(name.to_string(), vec![id], vec![text.to_string()]);
                token.map(Some).map_err(wrong)
            }
            _ if default => Ok(None),
            _ => fail(format!("GGUF metadata: `{flag_key}` is set, `{id_key}` is missing")),
        }
    };
    let bos = wanted("tokenizer.ggml.add_bos_token", true, BOS, "bos")?;
    let eos = wanted("tokenizer.ggml.add_eos_token", false, EOS, "eos")?;
    if bos.is_none() && eos.is_none() {
        return Ok(None);
    }
    let around = |sequence: &str, segment: usize| {
        let name = |name: &str| format!("{name}:{segment}");
        let parts =
            [bos.as_ref().map(|_| name("bos")), Some(name(sequence)), eos.as_ref().map(|_| name("eos"))];
        parts.into_iter().flatten().collect::<Vec<_>>()
    };
    let mut template = TemplateProcessing::builder();
    template.try_single(around("$A", 0)).map_err(wrong)?;
    template.try_pair([around("$A", 0), around("$B", 1)].concat()).map_err(wrong)?;
    template.special_tokens(bos.into_iter().chain(eos).collect::<Vec<_>>());
    template.build().map(Some).map_err(wrong)
}
