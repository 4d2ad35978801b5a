//! A tokenizer in GGUF's words.

use crate::llama::{Config, LlamaEosToks};
use candle_core::{Error, Result, bail, quantized::gguf_file::Value};
use serde::Deserialize;
use std::collections::HashMap;
use tokenizers::Tokenizer;

/// `tokenizer.ggml.token_type`.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

#[derive(Deserialize)]
struct Json {
    model: Model,
    #[serde(default)]
    added_tokens: Vec<Added>,
    pre_tokenizer: Option<serde_json::Value>,
    post_processor: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: Option<String>,
    vocab: Option<HashMap<String, u32>>,
    #[serde(default)]
    merges: Vec<Merge>,
    #[serde(default)]
    byte_fallback: bool,
    unk_token: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Joined(String),
    Pair(String, String),
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    special: bool,
}

/// The vocabulary, merges or scores, and kinds of tokens of a byte-pair tokenizer.
pub(super) fn metadata(tokenizer: &Tokenizer, config: &Config) -> Result<Vec<(String, Value)>> {
    let text = tokenizer.to_string(false).map_err(|e| Error::Msg(format!("tokenizer: {e}")))?;
    let json: Json = serde_json::from_str(&text).map_err(|e| Error::Msg(format!("tokenizer: {e}")))?;
    let Json { model, added_tokens, pre_tokenizer, post_processor } = json;
    let Some(vocab) = model.vocab.as_ref().filter(|_| model.kind.as_deref() == Some("BPE")) else {
        bail!("the tokenizer is no byte-pair tokenizer: GGUF files of llama have no other here");
    };
    let mut tokens: Vec<String> = (0..config.vocab_size).map(|i| format!("[UNUSED{i}]")).collect();
    let mut types = vec![UNUSED; config.vocab_size];
    let mut set = |id: u32, token: &str, kind: i32| {
        if let (Some(t), Some(k)) = (tokens.get_mut(id as usize), types.get_mut(id as usize)) {
            (*t, *k) = (token.to_string(), kind);
        }
    };
    for (token, id) in vocab {
        let byte =
            model.byte_fallback && token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
        set(*id, token, if byte { BYTE } else { NORMAL });
    }
    for token in added_tokens.iter().filter(|t| t.special) {
        let unknown = model.unk_token.as_ref() == Some(&token.content);
        set(token.id, &token.content, if unknown { UNKNOWN } else { CONTROL });
    }
    let begins = post_processor.is_some_and(|p| p.to_string().contains("SpecialToken"));
    let scores: Vec<Value> = (0..config.vocab_size).map(|i| Value::F32(-(i as f32))).collect();
    let mut all = vec![
        ("tokens", strings(tokens)),
        ("token_type", Value::Array(types.into_iter().map(Value::I32).collect())),
        ("add_bos_token", Value::Bool(begins)),
    ];
    if model.byte_fallback {
        // Merges come back from scores that fall with the id, as SentencePiece numbers them.
        all.extend([("model", Value::String("llama".into())), ("scores", Value::Array(scores))]);
    } else {
        let pre = pre_tokenizer.map(|p| p.to_string()).unwrap_or_default();
        if !pre.contains("ByteLevel") {
            bail!("the tokenizer splits texts in a way that GGUF has no name for here: {pre}");
        }
        let plain = pre.contains("\"use_regex\":true");
        let merges = model.merges.into_iter().map(|m| match m {
            Merge::Joined(m) => m,
            Merge::Pair(a, b) => format!("{a} {b}"),
        });
        all.extend([
            ("model", Value::String("gpt2".into())),
            ("pre", Value::String(if plain { "gpt-2" } else { "llama-bpe" }.into())),
            ("merges", strings(merges)),
        ]);
    }
    let eos = match &config.eos_token_id {
        Some(LlamaEosToks::Single(id)) => Some(*id),
        Some(LlamaEosToks::Multiple(ids)) => ids.first().copied(),
        None => tokenizer.token_to_id("</s>"),
    };
    for (key, id) in [("bos_token_id", config.bos_token_id), ("eos_token_id", eos)] {
        all.extend(id.map(|id| (key, Value::U32(id))));
    }
    Ok(all.into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).collect())
}

fn strings(all: impl IntoIterator<Item = String>) -> Value {
    Value::Array(all.into_iter().map(Value::String).collect())
}
