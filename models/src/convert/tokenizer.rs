//! A tokenizer in GGUF's words.

use crate::gguf::tokenizer::{
    BOS, EOM, EOS, EOT,
    metadata::TOKENS,
    own::{Flags, KEY, Own},
    pieces::Prefix,
    splits::Splits,
    vocabulary::Kind,
};
use crate::{
    llama::{Config, LlamaEosToks},
    tokenizer::{end_tokens_by_text, frame},
};
use candle_core::{Error, Result, quantized::gguf_file::Value};
use candle_sparse::error::plain;
use serde::Deserialize;
use std::collections::{HashMap, HashSet};
use tokenizers::{DecoderWrapper, Tokenizer};

/// Metadata, and what they do not say to others.
pub(super) struct Words {
    pub(super) metadata: Vec<(String, Value)>,
    pub(super) notices: Vec<String>,
}

/// The model of a `tokenizer.json`, of which only byte pairs have words in GGUF.
#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    vocab: HashMap<String, u32>,
    #[serde(default)]
    merges: Vec<Merge>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    unk_token: Option<String>,
    dropout: Option<f32>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Joined(String),
    Pair(String, String),
}

impl Merge {
    fn pair(&self) -> (&str, &str) {
        match self {
            Self::Joined(text) => text.split_once(' ').unwrap_or((text, "")),
            Self::Pair(a, b) => (a, b),
        }
    }
}

/// The vocabulary, merges or scores, and kinds of tokens of a byte-pair tokenizer.
pub(super) fn metadata(tokenizer: &Tokenizer, config: &Config) -> Result<Words> {
    let model = model(tokenizer)?;
    let mut words = Words { metadata: Vec::new(), notices: Vec::new() };
    let mut own = Own::default();
    words.vocabulary(tokenizer, &model, config.vocab_size);
    if model.byte_fallback {
        words.pieces(tokenizer, &model, config.vocab_size, &mut own)?;
    } else {
        words.byte_level(tokenizer, &model)?;
    }
    words.special(tokenizer, config, &mut own)?;
    words.flags(tokenizer, &mut own);
    if let Some(value) = own.value()? {
        words.put(KEY, value);
    }
    Ok(words)
}

fn model(tokenizer: &Tokenizer) -> Result<Model> {
    let json = serde_json::to_value(tokenizer.get_model()).map_err(Error::wrap)?;
    let kind = json["type"].as_str().unwrap_or_default().to_string();
    if kind != "BPE" {
        return no_words(&format!("it is a {kind} tokenizer; byte-pair tokenizers (BPE) can be written"));
    }
    let model: Model = serde_json::from_value(json).map_err(Error::wrap)?;
    let affix = |text: &Option<String>| text.as_deref().is_some_and(|text| !text.is_empty());
    if affix(&model.continuing_subword_prefix) || affix(&model.end_of_word_suffix) {
        return no_words("its tokens have a prefix or suffix inside words");
    }
    if model.dropout.is_some_and(|p| p > 0.0) {
        return no_words("it leaves out merges at random (dropout)");
    }
    debug_assert!(model.kind.is_some());
    Ok(model)
}

impl Words {
    fn put(&mut self, key: &str, value: Value) {
        self.metadata.push((key.to_string(), value));
    }

    /// Texts and types of all tokens.
    fn vocabulary(&mut self, tokenizer: &Tokenizer, model: &Model, size: usize) {
        let mut tokens: Vec<Option<(&str, Kind)>> = vec![None; size];
        let mut past = Vec::new();
        for (text, id) in &model.vocab {
            let byte =
                model.byte_fallback && text.len() == 6 && text.starts_with("<0x") && text.ends_with('>');
            if let Some(token) = tokens.get_mut(*id as usize) {
                *token = Some((text, if byte { Kind::Byte } else { Kind::Normal }));
            }
        }
        let added = tokenizer.get_added_tokens_decoder();
        for (id, token) in &added {
            let kind = match token.special {
                true if model.unk_token.as_ref() == Some(&token.content) => Kind::Unknown,
                true => Kind::Control,
                false => Kind::UserDefined,
            };
            match tokens.get_mut(*id as usize) {
                Some(place) => *place = Some((&token.content, kind)),
                None => past.push(token.content.as_str()),
            }
        }
        if !past.is_empty() {
            past.sort_unstable();
            self.notices.push(format!(
                "{} added tokens lie past the {size} rows of the embedding and are left out: {}",
                past.len(),
                list(&past)
            ));
        }
        let taken: HashSet<&str> = tokens.iter().flatten().map(|(text, _)| *text).collect();
        let filler = |id: usize| {
            let mut text = format!("[PAD{id}]");
            while taken.contains(text.as_str()) {
                text.push('_');
            }
            text
        };
        let texts = tokens
            .iter()
            .enumerate()
            .map(|(id, token)| token.map_or_else(|| filler(id), |t| t.0.to_string()));
        let texts = strings(texts);
        let kinds = tokens.iter().map(|token| token.map_or(Kind::Unused, |(_, kind)| kind).value());
        let kinds = Value::Array(kinds.collect());
        self.put(TOKENS, texts);
        self.put("tokenizer.ggml.token_type", kinds);
    }

    /// `SentencePiece`'s kind: a piece scores by its first merge, so that merges come back in their order.
    fn pieces(&mut self, tokenizer: &Tokenizer, model: &Model, size: usize, own: &mut Own) -> Result<()> {
        let Some(prefix) = Prefix::of(tokenizer)? else {
            return no_words(&format!(
                "how it normalizes and splits texts: normalizer {}, pre-tokenizer {}, decoder {}",
                shown(&tokenizer.get_normalizer()),
                shown(&tokenizer.get_pre_tokenizer()),
                shown(&tokenizer.get_decoder())
            ));
        };
        if matches!(prefix, Prefix::Always | Prefix::First) {
            own.prefix = Some(prefix);
        }
        let others = match prefix {
            Prefix::Parts | Prefix::None => None,
            Prefix::Always => Some("a text that begins with one"),
            Prefix::First => Some("a text that begins with one or stands behind a special token"),
        };
        if let Some(others) = others {
            self.notices.push(format!(
                "llama.cpp puts a blank also before {others}, this model's tokenizer does not"
            ));
        }
        let mut first: HashMap<String, usize> = HashMap::new();
        for (rank, merge) in model.merges.iter().enumerate() {
            let (a, b) = merge.pair();
            first.entry(format!("{a}{b}")).or_insert(rank);
        }
        let mut scores = vec![-(model.merges.len() as f32) - 1.0; size];
        for (text, id) in &model.vocab {
            if let (Some(score), Some(rank)) = (scores.get_mut(*id as usize), first.get(text)) {
                *score = -(*rank as f32);
            }
        }
        self.put("tokenizer.ggml.model", Value::String("llama".into()));
        self.put("tokenizer.ggml.scores", Value::Array(scores.into_iter().map(Value::F32).collect()));
        self.put("tokenizer.ggml.add_space_prefix", Value::Bool(prefix != Prefix::None));
        if let Some(id) = model.unk_token.as_ref().and_then(|text| tokenizer.token_to_id(text)) {
            self.put("tokenizer.ggml.unknown_token_id", Value::U32(id));
        }
        Ok(())
    }

    /// GPT-2's kind.
    fn byte_level(&mut self, tokenizer: &Tokenizer, model: &Model) -> Result<()> {
        let (normalizer, pre) = (tokenizer.get_normalizer(), tokenizer.get_pre_tokenizer());
        let Some(splits) = Splits::of(normalizer, pre, model.ignore_merges)? else {
            return no_words(&format!(
                "how it normalizes and splits texts: normalizer {}, pre-tokenizer {}",
                shown(&normalizer),
                shown(&pre)
            ));
        };
        if !matches!(tokenizer.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
            return no_words(&format!(
                "how it writes tokens as text: decoder {}",
                shown(&tokenizer.get_decoder())
            ));
        }
        if splits.nfc {
            self.notices
                .push("the tokenizer composes letters and marks (NFC), which llama.cpp leaves out".into());
        }
        if splits.ignore_merges != model.ignore_merges {
            let takes = if model.ignore_merges { "takes" } else { "does not take" };
            self.notices.push(format!(
                "the tokenizer {takes} whole words from the vocabulary (ignore_merges): llama.cpp does the contrary"
            ));
        }
        let merges = model.merges.iter().map(|merge| {
            let (a, b) = merge.pair();
            format!("{a} {b}")
        });
        self.put("tokenizer.ggml.model", Value::String("gpt2".into()));
        self.put("tokenizer.ggml.pre", Value::String(splits.name().into()));
        self.put("tokenizer.ggml.merges", strings(merges));
        self.put("tokenizer.ggml.ignore_merges", Value::Bool(model.ignore_merges));
        Ok(())
    }

    /// The tokens that begin and end texts.
    fn special(&mut self, tokenizer: &Tokenizer, config: &Config, own: &mut Own) -> Result<()> {
        let frame = frame(tokenizer)?;
        let mut ends = match &config.eos_token_id {
            Some(LlamaEosToks::Single(id)) => vec![*id],
            Some(LlamaEosToks::Multiple(ids)) => ids.clone(),
            None => tokenizer.token_to_id("</s>").into_iter().collect(),
        };
        let bos = match frame.first.as_slice() {
            [] => config.bos_token_id,
            [one] => Some(*one),
            more => return no_words(&format!("that it puts {} tokens before a text", more.len())),
        };
        match frame.last.as_slice() {
            [] => (),
            [one] if ends.contains(one) => {
                ends.retain(|id| id != one);
                ends.insert(0, *one);
            }
            other => return no_words(&format!("that it puts the tokens {other:?} behind a text")),
        }
        ends.retain(|id| (*id as usize) < config.vocab_size);
        self.put("tokenizer.ggml.add_bos_token", Value::Bool(!frame.first.is_empty()));
        self.put("tokenizer.ggml.add_eos_token", Value::Bool(!frame.last.is_empty()));
        if let Some(bos) = bos.filter(|id| (*id as usize) < config.vocab_size) {
            self.put(BOS, Value::U32(bos));
        }
        let mut ends = ends.into_iter();
        if let Some(eos) = ends.next() {
            self.put(EOS, Value::U32(eos));
        }
        self.more_ends(tokenizer, ends.collect(), own);
        Ok(())
    }

    /// End tokens beside the first: of a message, of a turn, and those that are found by their text or told of by us.
    fn more_ends(&mut self, tokenizer: &Tokenizer, mut ends: Vec<u32>, own: &mut Own) {
        let added = tokenizer.get_added_tokens_decoder();
        // A key makes its token a special one.
        let special = |id: &u32| added.get(id).is_some_and(|token| token.special);
        if let Some(at) =
            ends.iter().position(|id| tokenizer.token_to_id("<|eom_id|>") == Some(*id) && special(id))
        {
            self.put(EOM, Value::U32(ends.remove(at)));
        }
        let known = end_tokens_by_text(tokenizer);
        ends.sort_by_key(|id| known.contains(id));
        if let Some(at) = ends.iter().position(special) {
            self.put(EOT, Value::U32(ends.remove(at)));
        }
        own.end_tokens = ends.into_iter().filter(|id| !known.contains(id)).collect();
        if !own.end_tokens.is_empty() {
            let texts: Vec<_> = own.end_tokens.iter().filter_map(|id| tokenizer.id_to_token(*id)).collect();
            let texts: Vec<_> = texts.iter().map(String::as_str).collect();
            self.notices.push(format!(
                "GGUF has no key for so many end tokens: llama.cpp will not stop at {}",
                list(&texts)
            ));
        }
    }

    /// How added tokens are matched.
    fn flags(&mut self, tokenizer: &Tokenizer, own: &mut Own) {
        let added = tokenizer.get_added_tokens_decoder();
        let mut all: Vec<_> = added.iter().collect();
        all.sort_unstable_by_key(|(id, _)| **id);
        let flags = all.into_iter().filter_map(|(_, token)| {
            let mut token = token.clone();
            token.normalized &= tokenizer.get_normalizer().is_some();
            Flags::of(&token)
        });
        own.added_tokens = flags.collect();
        if !own.added_tokens.is_empty() {
            let texts: Vec<_> = own.added_tokens.iter().map(|flags| flags.content.as_str()).collect();
            self.notices.push(format!(
                "GGUF has no words for lstrip, rstrip, single_word and normalized: llama.cpp matches the text alone of {}",
                list(&texts)
            ));
        }
    }
}

/// The first few of many.
fn list(texts: &[&str]) -> String {
    let shown: Vec<_> = texts.iter().take(8).map(|text| format!("'{text}'")).collect();
    plain(&shown.join(", ")) + if texts.len() > shown.len() { ", …" } else { "" }
}

fn shown(part: &impl serde::Serialize) -> String {
    let json = serde_json::to_string(part).unwrap_or_default();
    match json.char_indices().nth(200) {
        Some((at, _)) => format!("{}…", &json[..at]),
        None => json,
    }
}

fn strings(all: impl IntoIterator<Item = String>) -> Value {
    Value::Array(all.into_iter().map(Value::String).collect())
}

fn no_words<T>(what: &str) -> Result<T> {
    Err(Error::Msg(plain(&format!("GGUF has no words for this tokenizer: {what}"))))
}
