//! From the JSON that a client or a line of a file holds to what the engine is asked: prompts, sampling, where to end.
#![allow(dead_code, reason = "not every program uses all of it")]

use super::{
    fields::{Fields, Wrong, kind},
    sampling::SamplingArgs,
};
use anyhow::Result;
use candle_core::{Error, Result as CandleResult};
use candle_sparse_models::{
    chat::{ChatTemplate, Message, stop_tokens},
    engine::Request,
    generation::GenerationConfig,
    llama::LlamaEosToks,
    pretrained::{Pretrained, first_line},
    sampling::Sampling,
    tokenizer::prompt_tokens,
};
use serde_json::{Value, json};
use std::sync::Arc;
use tokenizers::Tokenizer;

/// Texts of `stop` at most: each is looked for in all that is written.
const MOST_STOPS: usize = 16;
/// Bytes of all of them: every text that a request asks for has its own copy.
const MOST_STOP_BYTES: usize = 4096;
/// Bytes of a text that are looked at first: it takes some 200 times its bytes while it becomes tokens, so one that is far longer than
/// the context is to be known by its beginning.
const FIRST_LOOK: usize = 64 << 10;

/// What a model needs to know to be asked.
#[derive(Debug)]
pub(crate) struct Asker {
    pub(crate) tokenizer: Arc<Tokenizer>,
    /// How conversations are read; why not, where they cannot be.
    template: Result<ChatTemplate, String>,
    /// Positions of the model.
    pub(crate) context: usize,
    vocab_size: usize,
    ends: Vec<u32>,
    /// Those of answers: the token behind one as the template writes it is among them.
    chat_ends: Vec<u32>,
    args: SamplingArgs,
    generation: GenerationConfig,
    seeds: Seeds,
}

/// The seed of a text that asks for none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seeds {
    /// That of the flags, or ours.
    Fixed,
    /// That of the flag, or else one that nobody can foresee.
    Random,
}

/// How one text is to be written, whatever it continues.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    sampling: Sampling,
    stop: Vec<String>,
    /// Tokens to write at most; `None`: as many as the context holds.
    pub(crate) max_tokens: Option<usize>,
}

/// What is continued.
#[derive(Clone, Debug)]
pub(crate) struct Prompt {
    pub(crate) ids: Vec<u32>,
    is_chat: bool,
}

impl Asker {
    /// For a loaded model, with the flags' settings where a request has none.
    pub(crate) fn new(loaded: &Pretrained, args: &SamplingArgs, seeds: Seeds) -> Result<Self> {
        args.check()?;
        let template = match loaded.chat_template() {
            Ok(Some(template)) => Ok(template.clone()),
            Ok(None) => Err("this model has no chat template (--chat-template gives it one)".to_string()),
            Err(error) => Err(first_line(&error)),
        };
        let ends = match &loaded.config.eos_token_id {
            Some(LlamaEosToks::Single(id)) => vec![*id],
            Some(LlamaEosToks::Multiple(ids)) => ids.clone(),
            None => Vec::new(),
        };
        let mut chat_ends = ends.clone();
        if let Ok(template) = &template {
            chat_ends.extend(stop_tokens(&loaded.tokenizer, template));
        }
        Ok(Self {
            tokenizer: Arc::new(loaded.tokenizer.clone()),
            template,
            context: loaded.config.max_position_embeddings,
            vocab_size: loaded.config.vocab_size,
            ends,
            chat_ends,
            args: args.clone(),
            generation: loaded.generation,
            seeds,
        })
    }

    /// Whether conversations can be read.
    pub(crate) fn chats(&self) -> bool {
        self.template.is_ok()
    }

    /// Takes the fields that say how tokens are chosen and where to end.
    pub(crate) fn wish(&self, fields: &mut Fields) -> Result<Wish, Wrong> {
        let mut sampling =
            self.args.sampling(self.generation).map_err(|error| Wrong::new(error.to_string()))?;
        if let Some(t) = fields.number("temperature", 0.0..=100.0)? {
            sampling.temperature = t;
        }
        if let Some(k) = fields.integer("top_k", 0..=u64::from(u32::MAX))? {
            sampling.top_k = k as usize;
        }
        if let Some(p) = fields.number("top_p", 0.0..=1.0)? {
            // As OpenAI's: 0 is the most likely token alone.
            sampling.top_p = p.max(f64::from(f32::MIN_POSITIVE));
        }
        if let Some(p) = fields.number("min_p", 0.0..=0.999_999)? {
            sampling.min_p = p;
        }
        if let Some(p) = fields.number("repetition_penalty", 0.01..=100.0)? {
            sampling.repeat_penalty = p as f32;
        }
        match fields.integer("seed", 0..=u64::MAX)? {
            Some(seed) => sampling.seed = seed,
            None if self.seeds == Seeds::Random && !self.args.has_seed() => sampling.seed = random(),
            None => {}
        }
        let newer = fields.integer("max_completion_tokens", 1..=u64::from(u32::MAX))?;
        let older = fields.integer("max_tokens", 1..=u64::from(u32::MAX))?;
        let max_tokens = newer.or(older).map(|n| n as usize).or(self.args.sample_len);
        Ok(Wish { sampling, stop: self.stops(fields)?, max_tokens })
    }

    fn stops(&self, fields: &mut Fields) -> Result<Vec<String>, Wrong> {
        let stops = match fields.take("stop") {
            None => return Ok(self.args.stop.clone()),
            Some(Value::String(stop)) => vec![stop],
            Some(Value::Array(stops)) => texts(stops)
                .map_err(|i| Wrong::value(fields.name(&format!("stop[{i}]")), "a string is needed"))?,
            Some(other) => {
                let problem = format!("a string or a list of strings is needed, this is {}", kind(&other));
                return Err(Wrong::value(fields.name("stop"), problem));
            }
        };
        if stops.len() > MOST_STOPS {
            let problem = format!("{} texts are more than {MOST_STOPS}", stops.len());
            return Err(Wrong::value(fields.name("stop"), problem));
        }
        let bytes: usize = stops.iter().map(String::len).sum();
        if bytes > MOST_STOP_BYTES {
            let problem = format!("{bytes} bytes are more than {MOST_STOP_BYTES}");
            return Err(Wrong::value(fields.name("stop"), problem));
        }
        if stops.iter().any(String::is_empty) {
            return Err(Wrong::value(fields.name("stop"), "a text that is empty ends nothing"));
        }
        Ok(stops)
    }

    /// The tokens of a conversation, up to where the answer begins.
    pub(crate) fn chat(&self, messages: Value) -> Result<Prompt, Wrong> {
        let messages = messages_of(messages)?;
        let template = self
            .template
            .as_ref()
            .map_err(|why| Wrong { code: Some("no_chat_template"), ..Wrong::value("messages", why) })?;
        let text = template.render(&messages, true).map_err(|e| Wrong::value("messages", first_line(&e)))?;
        if text.is_empty() {
            return Err(Wrong::value("messages", "the chat template makes no text of this conversation"));
        }
        self.prompt(self.encode(&text, "messages")?, true, "messages")
    }

    /// The tokens of texts to continue: a string, a list of strings, a list of tokens or a list of such lists.
    pub(crate) fn texts(&self, prompt: Value) -> Result<Vec<Prompt>, Wrong> {
        let list = match prompt {
            Value::String(_) => vec![prompt],
            Value::Array(list) if list.is_empty() => {
                return Err(Wrong::value("prompt", "the list is empty: there is nothing to continue"));
            }
            // One text as tokens.
            Value::Array(list) if list.iter().all(Value::is_number) => vec![Value::Array(list)],
            Value::Array(list) => list,
            other => {
                return Err(Wrong::value(
                    "prompt",
                    format_args!("a string or a list is needed, this is {}", kind(&other)),
                ));
            }
        };
        let one = list.len() == 1;
        list.into_iter()
            .enumerate()
            .map(|(i, text)| {
                let param = if one { "prompt".to_string() } else { format!("prompt[{i}]") };
                let ids = match text {
                    Value::String(text) => self.encode(&text, &param)?,
                    Value::Array(ids) => self.ids(&ids, &param)?,
                    other => {
                        let problem =
                            format!("a string or a list of tokens is needed, this is {}", kind(&other));
                        return Err(Wrong::value(param, problem));
                    }
                };
                self.prompt(ids, false, &param)
            })
            .collect()
    }

    fn encode(&self, text: &str, param: &str) -> Result<Vec<u32>, Wrong> {
        let mut look = FIRST_LOOK;
        while look < text.len() / 2 {
            let beginning = &text[..text.floor_char_boundary(look)];
            // Twice: where a word is cut in two, its half can have more tokens than the word.
            let tokens = prompt_tokens(&self.tokenizer, beginning).map_or(0, |ids| ids.len());
            if tokens > 2 * self.context {
                return Err(self.too_long(&format!("the {tokens} tokens of its first {look} bytes"), param));
            }
            look *= 2;
        }
        let ids: CandleResult<_> = prompt_tokens(&self.tokenizer, text);
        ids.map_err(|e: Error| Wrong::value(param, first_line(&e)))
    }

    fn too_long(&self, what: &str, param: &str) -> Wrong {
        let context = self.context;
        let problem = format!("{what} leave no room in the model's context of {context}: shorten the text");
        Wrong { code: Some("context_length_exceeded"), ..Wrong::value(param, problem) }
    }

    fn ids(&self, ids: &[Value], param: &str) -> Result<Vec<u32>, Wrong> {
        let known = |id: &Value| id.as_u64().filter(|id| *id < self.vocab_size as u64).map(|id| id as u32);
        let id = |id| {
            known(id).ok_or_else(|| {
                let last = self.vocab_size - 1;
                Wrong::value(param, format_args!("{id} is no token of this model: they are 0 to {last}"))
            })
        };
        ids.iter().map(id).collect()
    }

    fn prompt(&self, ids: Vec<u32>, is_chat: bool, param: &str) -> Result<Prompt, Wrong> {
        if ids.is_empty() {
            return Err(Wrong::value(param, "there is nothing to continue: give at least one character"));
        }
        if ids.len() >= self.context {
            return Err(self.too_long(&format!("{} tokens", ids.len()), param));
        }
        Ok(Prompt { ids, is_chat })
    }

    /// What the engine is asked for one text; the `choice`th of several has a seed of its own.
    pub(crate) fn request(&self, prompt: &Prompt, wish: &Wish, choice: usize) -> Request {
        let mut sampling = wish.sampling;
        sampling.seed = sampling.seed.wrapping_add(choice as u64);
        let mut request = Request::new(prompt.ids.clone());
        request.sampling = sampling;
        request.max_tokens = wish.max_tokens.unwrap_or(self.context);
        request.end_tokens = if prompt.is_chat { self.chat_ends.clone() } else { self.ends.clone() };
        request.stop.clone_from(&wish.stop);
        request.deadline = self.args.until();
        request
    }
}

/// The strings of a list, or the index of what is none.
fn texts(list: Vec<Value>) -> Result<Vec<String>, usize> {
    let text = |(i, value)| if let Value::String(text) = value { Ok(text) } else { Err(i) };
    list.into_iter().enumerate().map(text).collect()
}

/// The messages of a conversation as OpenAI writes them.
fn messages_of(messages: Value) -> Result<Vec<Message>, Wrong> {
    let Value::Array(messages) = messages else {
        let problem = format!("a list of messages is needed, this is {}", kind(&messages));
        return Err(Wrong::value("messages", problem));
    };
    if messages.is_empty() {
        return Err(Wrong::value("messages", "the list is empty: there is nothing to answer"));
    }
    messages.into_iter().enumerate().map(|(i, message)| one(message, &format!("messages[{i}]"))).collect()
}

fn one(message: Value, place: &str) -> Result<Message, Wrong> {
    let mut fields = Fields::new(message, place)?;
    let role = match fields.needed("role")? {
        Value::String(role) => role,
        other => {
            return Err(Wrong::value(
                fields.name("role"),
                format_args!("a string is needed, this is {}", kind(&other)),
            ));
        }
    };
    // What OpenAI calls so since 2024; models know the older word.
    let role = if role == "developer" { "system".to_string() } else { role };
    if !matches!(role.as_str(), "system" | "user" | "assistant") {
        let problem = format!("'{role}' is none of system, developer, user, assistant");
        return Err(Wrong::value(fields.name("role"), problem));
    }
    let content = fields.needed("content")?;
    let content = content_of(content, &fields.name("content"))?;
    // What the official client sends back with an answer that it was given.
    for empty in ["tool_calls", "annotations"] {
        fields.neutral(empty, &[json!([])])?;
    }
    fields.finish()?;
    Ok(Message { role, content })
}

/// A text, or parts that are texts.
fn content_of(content: Value, place: &str) -> Result<String, Wrong> {
    match content {
        Value::String(text) => Ok(text),
        Value::Array(parts) => {
            let part = |(i, part)| {
                let mut fields = Fields::new(part, &format!("{place}[{i}]"))?;
                fields.needed("type").map(|kind| fields_type(&fields, &kind))??;
                let text = fields.text("text")?.unwrap_or_default();
                fields.finish().map(|()| text)
            };
            parts.into_iter().enumerate().map(part).collect()
        }
        other => Err(Wrong::value(
            place,
            format_args!("a string or a list of parts is needed, this is {}", kind(&other)),
        )),
    }
}

fn fields_type(fields: &Fields, kind: &Value) -> Result<(), Wrong> {
    match kind.as_str() {
        Some("text") => Ok(()),
        _ => Err(Wrong::unsupported(
            fields.name("type"),
            format_args!("{kind} is not supported: text alone is"),
        )),
    }
}

/// A number that nobody can foresee.
pub(crate) fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    RandomState::new().build_hasher().finish()
}
