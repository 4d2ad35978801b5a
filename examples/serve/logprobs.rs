//! How likely tokens were, as OpenAI's two ways to ask tell it.

use candle_sparse_models::{engine::TokenLogprobs, tokenizer::TextStream};
use serde_json::{Map, Value, json};
use std::{fmt, sync::Arc};
use tokenizers::Tokenizer;

/// Tokens as bytes.
pub(crate) struct Spelling(TextStream<'static>);

impl fmt::Debug for Spelling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Spelling")
    }
}

impl Spelling {
    pub(crate) fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self(TextStream::shared(tokenizer))
    }

    fn token(&self, id: u32, logprob: f32) -> Token {
        Token { bytes: self.0.token_bytes(id), logprob }
    }
}

#[derive(Debug)]
struct Token {
    bytes: Vec<u8>,
    logprob: f32,
}

/// A token that was written, and those that were as likely.
#[derive(Debug)]
pub(crate) struct Entry {
    token: Token,
    top: Vec<Token>,
}

impl Entry {
    pub(crate) fn new(spelling: &Spelling, id: u32, logprobs: &TokenLogprobs) -> Self {
        let top = logprobs.top.iter().map(|&(id, logprob)| spelling.token(id, logprob)).collect();
        Self { token: spelling.token(id, logprobs.logprob), top }
    }
}

impl Token {
    /// As text; bytes that are no whole character are U+FFFD.
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }

    fn json(&self) -> Value {
        json!({ "token": self.text(), "logprob": number(self.logprob), "bytes": self.bytes })
    }
}

/// JSON knows no infinity: OpenAI writes this for what is impossible.
fn number(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}

pub(crate) fn chat_logprobs(entries: &[Entry]) -> Value {
    let one = |entry: &Entry| {
        let mut one = entry.token.json();
        one["top_logprobs"] = entry.top.iter().map(Token::json).collect();
        one
    };
    json!({ "content": entries.iter().map(one).collect::<Vec<_>>(), "refusal": null })
}

/// `offset`: characters of the text before the first of these tokens.
pub(crate) fn text_logprobs(entries: &[Entry], offset: usize) -> Value {
    let mut offset = offset;
    let (mut tokens, mut offsets) = (Vec::new(), Vec::new());
    for Entry { token, .. } in entries {
        offsets.push(offset);
        offset += token.text().chars().count();
        tokens.push(token.text());
    }
    let top = |entry: &Entry| entry.top.iter().map(|t| (t.text(), number(t.logprob).into())).collect();
    json!({
        "tokens": tokens,
        "token_logprobs": entries.iter().map(|e| number(e.token.logprob)).collect::<Vec<_>>(),
        "top_logprobs": entries.iter().map(top).collect::<Vec<Map<_, _>>>(),
        "text_offset": offsets,
    })
}
