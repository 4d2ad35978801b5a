//! What a request asks for: its fields, checked, and everything that would change the answer and is not done here refused.

use crate::{
    ask::{Asker, Prompt, Wish},
    error::ApiError,
    fields::{Fields, Wrong},
};
use axum::http::StatusCode;
use candle_sparse::input::check_json;
use candle_sparse_models::engine::Request;
use serde_json::{Value, json};

/// Answers to one prompt at most.
const MOST_CHOICES: u64 = 16;
/// Tokens to write after a text where the request does not say: OpenAI's number, which clients count on.
const TEXT_TOKENS: usize = 16;
/// Alternatives to each token at most, in a conversation and after a text.
const MOST_ALTERNATIVES: [u64; 2] = [20, 5];

/// Fields that change no answer.
const IGNORED: [&str; 8] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
];

/// Which of the two ways to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Text,
}

/// What is asked for.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) kind: Kind,
    pub(crate) stream: bool,
    /// Whether a stream ends with the numbers of tokens.
    pub(crate) include_usage: bool,
    pub(crate) logprobs: bool,
    /// Answers to each prompt.
    pub(crate) n: usize,
    /// One per text to write, prompt by prompt.
    pub(crate) requests: Vec<Request>,
}

impl Asked {
    /// Reads the body of a request to the model `name`, which may ask for `most` texts.
    pub(crate) fn new(
        asker: &Asker,
        kind: Kind,
        name: &str,
        most: usize,
        body: &[u8],
    ) -> Result<Self, ApiError> {
        let invalid = |problem| ApiError::invalid(StatusCode::BAD_REQUEST, "invalid_json", problem);
        check_json(body).map_err(|error| invalid(format!("the body {error}")))?;
        let value = serde_json::from_slice(body);
        let value = value.map_err(|error| invalid(format!("the body is no JSON: {error}")))?;
        let mut fields = Fields::new(value, "")?;
        check_model(&mut fields, name)?;
        refuse(&mut fields, kind)?;
        let stream = fields.flag("stream")?.unwrap_or(false);
        let include_usage = include_usage(&mut fields, stream)?;
        let n = fields.integer("n", 1..=MOST_CHOICES)?.unwrap_or(1);
        let alternatives = alternatives(&mut fields, kind)?;
        let mut wish = asker.wish(&mut fields)?;
        if kind == Kind::Text {
            fields.neutral("best_of", &[json!(n), json!(1)])?;
            wish.max_tokens.get_or_insert(TEXT_TOKENS);
        }
        let prompt = fields.needed(if kind == Kind::Chat { "messages" } else { "prompt" })?;
        // Before the prompt is read, which can take a while.
        fields.finish()?;
        let n = n as usize;
        check_texts(&prompt, n, most)?;
        let prompts = match kind {
            Kind::Chat => vec![asker.chat(prompt)?],
            Kind::Text => asker.texts(prompt)?,
        };
        let requests = requests(asker, &prompts, &wish, n, alternatives);
        Ok(Self { kind, stream, include_usage, logprobs: alternatives.is_some(), n, requests })
    }
}

/// Refuses more texts than could ever wait, before any of them is read: each has the stops and the settings of the request.
fn check_texts(prompt: &Value, n: usize, most: usize) -> Result<(), Wrong> {
    let prompts = match prompt {
        Value::Array(list) if !list.iter().all(|item| item.is_number() || item.is_object()) => list.len(),
        _ => 1,
    };
    match prompts.saturating_mul(n) {
        texts if texts > most => {
            Err(Wrong::value("n", format_args!("{texts} texts at a time are more than {most}")))
        }
        _ => Ok(()),
    }
}

fn requests(
    asker: &Asker,
    prompts: &[Prompt],
    wish: &Wish,
    n: usize,
    alternatives: Option<usize>,
) -> Vec<Request> {
    let of_prompt = |prompt| {
        (0..n).map(move |choice| {
            let mut request = asker.request(prompt, wish, choice);
            request.top_logprobs = alternatives;
            request
        })
    };
    prompts.iter().flat_map(of_prompt).collect()
}

fn check_model(fields: &mut Fields, name: &str) -> Result<(), ApiError> {
    match fields.text("model")? {
        Some(model) if model != name => Err(no_model(&model, name)),
        _ => Ok(()),
    }
}

/// The error for a model that is not here.
pub(crate) fn no_model(asked: &str, name: &str) -> ApiError {
    let message = format!("the model '{asked}' is not here: this server has '{name}'");
    ApiError::invalid(StatusCode::NOT_FOUND, "model_not_found", message)
}

/// Takes the fields that are done in one way alone, and refuses any other.
fn refuse(fields: &mut Fields, kind: Kind) -> Result<(), Wrong> {
    fields.ignore(&IGNORED);
    let zero = [json!(0)];
    let none = [json!([]), json!({})];
    for field in ["frequency_penalty", "presence_penalty"] {
        fields.neutral(field, &zero)?;
    }
    fields.neutral("logit_bias", &none)?;
    match kind {
        Kind::Chat => {
            for field in ["tools", "functions"] {
                fields.neutral(field, &none)?;
            }
            for field in ["tool_choice", "function_call"] {
                fields.neutral(field, &[json!("none"), json!("auto")])?;
            }
            fields.neutral("response_format", &[json!({ "type": "text" })])?;
            fields.neutral("modalities", &[json!(["text"])])
        }
        Kind::Text => {
            fields.neutral("echo", &[json!(false)])?;
            fields.neutral("suffix", &[json!("")])
        }
    }
}

fn include_usage(fields: &mut Fields, stream: bool) -> Result<bool, Wrong> {
    let Some(options) = fields.take("stream_options") else { return Ok(false) };
    if !stream {
        return Err(Wrong::value("stream_options", "belongs to \"stream\": true"));
    }
    let mut options = Fields::new(options, "stream_options")?;
    let include_usage = options.flag("include_usage")?.unwrap_or(false);
    // It pads the events of a stream so that their lengths tell nothing.
    options.neutral("include_obfuscation", &[json!(false)])?;
    options.finish()?;
    Ok(include_usage)
}

/// How many alternatives to each token are told; `None`: not even the token's own probability.
fn alternatives(fields: &mut Fields, kind: Kind) -> Result<Option<usize>, Wrong> {
    let [chat, text] = MOST_ALTERNATIVES;
    if kind == Kind::Text {
        return Ok(fields.integer("logprobs", 0..=text)?.map(|n| n as usize));
    }
    let wanted = fields.flag("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0..=chat)?;
    match (wanted, top) {
        (false, Some(1..)) => Err(Wrong::value("top_logprobs", "belongs to \"logprobs\": true")),
        (false, _) => Ok(None),
        (true, top) => Ok(Some(top.unwrap_or(0) as usize)),
    }
}
