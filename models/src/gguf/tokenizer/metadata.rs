//! GGUF metadata with errors that name the key.

use candle_core::{Error, Result, quantized::gguf_file::Value};
use candle_sparse::error::plain;
use std::collections::HashMap;

pub(crate) type Metadata = HashMap<String, Value>;

pub(crate) const TOKENS: &str = "tokenizer.ggml.tokens";

pub(super) fn fail<T>(message: String) -> Result<T> {
    // No backtrace, as `bail!` would add one: the file is to blame.
    Err(Error::Msg(plain(&message)))
}

pub(crate) fn string<'a>(metadata: &'a Metadata, key: &str) -> Result<Option<&'a str>> {
    match metadata.get(key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => fail(format!("GGUF metadata: `{key}` is not a string")),
    }
}

pub(crate) fn flag(metadata: &Metadata, key: &str) -> Result<Option<bool>> {
    match metadata.get(key) {
        None => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(_) => fail(format!("GGUF metadata: `{key}` is neither true nor false")),
    }
}

/// A whole number, of whatever width the file keeps it in.
pub(crate) fn integer(value: &Value) -> Option<i64> {
    Some(match *value {
        Value::U8(v) => v.into(),
        Value::I8(v) => v.into(),
        Value::U16(v) => v.into(),
        Value::I16(v) => v.into(),
        Value::U32(v) => v.into(),
        Value::I32(v) => v.into(),
        Value::U64(v) => v.try_into().ok()?,
        Value::I64(v) => v,
        _ => return None,
    })
}

/// The id of a token.
pub(crate) fn id(metadata: &Metadata, key: &str) -> Result<Option<u32>> {
    let Some(value) = metadata.get(key) else { return Ok(None) };
    match integer(value).map(u32::try_from) {
        Some(Ok(id)) => Ok(Some(id)),
        _ => fail(format!("GGUF metadata: `{key}` is not the id of a token")),
    }
}

pub(crate) fn array<'a>(metadata: &'a Metadata, key: &str) -> Result<&'a [Value]> {
    match metadata.get(key) {
        Some(Value::Array(values)) => Ok(values),
        Some(_) => fail(format!("GGUF metadata: `{key}` is not an array")),
        None => fail(format!("GGUF metadata: `{key}` is missing")),
    }
}

/// The text of token `id` of the vocabulary.
pub(crate) fn text(tokens: &[Value], id: usize) -> Result<&str> {
    match tokens.get(id) {
        Some(Value::String(text)) => Ok(text),
        Some(_) => fail(format!("GGUF metadata: token {id} of `{TOKENS}` is not a string")),
        None => fail(format!("GGUF metadata: `{TOKENS}` has {} tokens, none with id {id}", tokens.len())),
    }
}

/// The text of the token whose id `key` holds.
pub(crate) fn token_text<'a>(metadata: &'a Metadata, key: &str) -> Result<Option<&'a str>> {
    let Some(id) = id(metadata, key)? else { return Ok(None) };
    match text(array(metadata, TOKENS)?, id as usize) {
        Ok(text) => Ok(Some(text)),
        Err(e) => fail(format!("{e} (`{key}`)")),
    }
}
