//! What a client gets: OpenAI's objects, whole or in pieces, out of what happens to the texts it asked for.

use crate::{
    asked::{Asked, Kind},
    error::ApiError,
    logprobs::{Entry, Spelling, chat_logprobs, text_logprobs},
};
use candle_sparse_models::engine::{EventKind, FinishReason, Finished};
use serde_json::{Value, json};

/// What all pieces of an answer have in common.
#[derive(Debug)]
pub(crate) struct Shape {
    kind: Kind,
    /// Of a stream, which has objects of other names.
    stream: bool,
    include_usage: bool,
    logprobs: bool,
    n: usize,
    id: String,
    created: u64,
    model: String,
    spelling: Spelling,
}

/// One text as it grows.
#[derive(Debug, Default)]
pub(crate) struct Choice {
    text: String,
    entries: Vec<Entry>,
    /// Of tokens whose text is held back, since it may be a stop's.
    held: Vec<Entry>,
    /// Whether a stream has its first piece.
    begun: bool,
    finished: Option<Finished>,
}

impl Shape {
    pub(crate) fn new(asked: &Asked, id: u64, created: u64, model: &str, spelling: Spelling) -> Self {
        let prefix = if asked.kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        Self {
            kind: asked.kind,
            stream: asked.stream,
            include_usage: asked.include_usage,
            logprobs: asked.logprobs,
            n: asked.n,
            id: format!("{prefix}-{id:016x}"),
            created,
            model: model.to_string(),
            spelling,
        }
    }

    /// Takes what happened to a text; the piece of a stream that shows it, if it shows.
    pub(crate) fn take(
        &self,
        index: usize,
        choice: &mut Choice,
        kind: EventKind,
    ) -> Result<Option<Value>, ApiError> {
        let (text, shown) = match kind {
            EventKind::Token { id, text, logprobs } => {
                if let Some(logprobs) = logprobs {
                    choice.held.push(Entry::new(&self.spelling, id, &logprobs));
                }
                // The probabilities come with the text that they belong to.
                let shown = if text.is_empty() { Vec::new() } else { std::mem::take(&mut choice.held) };
                (text, shown)
            }
            EventKind::Finished(finished) => {
                let rest = std::mem::take(&mut choice.held);
                let shown = if finished.reason == FinishReason::StopText { Vec::new() } else { rest };
                let text = finished.text.clone();
                fail(&finished)?;
                choice.finished = Some(finished);
                (text, shown)
            }
        };
        Ok(if self.stream { self.piece(index, choice, text, shown) } else { choice.keep(&text, shown) })
    }

    fn piece(&self, index: usize, choice: &mut Choice, text: String, shown: Vec<Entry>) -> Option<Value> {
        let reason = choice.finished.as_ref().map(reason);
        if text.is_empty() && shown.is_empty() && reason.is_none() {
            return None;
        }
        let logprobs = self.logprobs_json(&shown, choice.text.chars().count());
        // Only its length matters from now on, for `text_offset`.
        choice.text.push_str(&text);
        let mut one = json!({ "index": index, "logprobs": logprobs, "finish_reason": reason });
        match self.kind {
            Kind::Text => one["text"] = text.into(),
            Kind::Chat => {
                let mut delta = json!({});
                if !std::mem::replace(&mut choice.begun, true) {
                    delta["role"] = "assistant".into();
                    delta["content"] = "".into();
                }
                if !text.is_empty() {
                    delta["content"] = text.into();
                }
                one["delta"] = delta;
            }
        }
        Some(self.object(vec![one], Value::Null))
    }

    /// The last piece of a stream before its end, if the client wants it.
    pub(crate) fn last_piece(&self, choices: &[Choice]) -> Option<Value> {
        self.include_usage.then(|| self.object(Vec::new(), self.usage(choices)))
    }

    /// The whole answer.
    pub(crate) fn whole(&self, choices: &[Choice]) -> Value {
        let one = |(index, choice): (usize, &Choice)| {
            let logprobs = self.logprobs_json(&choice.entries, 0);
            let reason = choice.finished.as_ref().map(reason);
            let mut one = json!({ "index": index, "logprobs": logprobs, "finish_reason": reason });
            match self.kind {
                Kind::Text => one["text"] = choice.text.as_str().into(),
                Kind::Chat => {
                    one["message"] = json!({ "role": "assistant", "content": choice.text, "refusal": null });
                }
            }
            one
        };
        self.object(choices.iter().enumerate().map(one).collect(), self.usage(choices))
    }

    fn object(&self, choices: Vec<Value>, usage: Value) -> Value {
        let object = match (self.kind, self.stream) {
            (Kind::Chat, true) => "chat.completion.chunk",
            (Kind::Chat, false) => "chat.completion",
            (Kind::Text, _) => "text_completion",
        };
        let mut all = json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices,
            "system_fingerprint": null,
        });
        // A stream has it in its last piece alone, and says so in the others where it was asked for.
        if !self.stream || self.include_usage {
            all["usage"] = usage;
        }
        all
    }

    fn logprobs_json(&self, entries: &[Entry], offset: usize) -> Value {
        match self.kind {
            _ if !self.logprobs => Value::Null,
            Kind::Chat => chat_logprobs(entries),
            Kind::Text => text_logprobs(entries, offset),
        }
    }

    /// Tokens read and written; a prompt with several answers counts once.
    fn usage(&self, choices: &[Choice]) -> Value {
        let finished = |choice: &&Choice| choice.finished.is_some();
        let of = |get: fn(&Finished) -> usize, step| {
            let all = choices.iter().filter(finished).step_by(step);
            all.filter_map(|choice| choice.finished.as_ref()).map(get).sum::<usize>()
        };
        let (read, written) = (of(|f| f.prompt_tokens, self.n), of(|f| f.completion_tokens, 1));
        json!({
            "prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written,
            "prompt_tokens_details": { "cached_tokens": of(|f| f.cached_tokens, self.n) },
        })
    }
}

impl Choice {
    pub(crate) fn is_finished(&self) -> bool {
        self.finished.is_some()
    }

    fn keep(&mut self, text: &str, shown: Vec<Entry>) -> Option<Value> {
        self.text.push_str(text);
        self.entries.extend(shown);
        None
    }
}

/// A text that was given up has no end that a client could understand.
fn fail(finished: &Finished) -> Result<(), ApiError> {
    match finished.reason {
        FinishReason::Failed => {
            Err(ApiError::internal(finished.error.clone().unwrap_or_else(|| "the text failed".to_string())))
        }
        // Nobody but the server itself gives up a text that somebody still waits for.
        FinishReason::Cancelled => Err(ApiError::ending()),
        _ => Ok(()),
    }
}

/// OpenAI's word for why a text ended.
fn reason(finished: &Finished) -> &'static str {
    match finished.reason {
        FinishReason::EndToken | FinishReason::StopText => "stop",
        _ => "length",
    }
}
