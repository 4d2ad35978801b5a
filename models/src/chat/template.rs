//! A model's chat template: from its files to the text that the model reads.

use super::{Message, environment, source};
use crate::{gguf::tokenizer::metadata, pretrained::first_line};
use candle_core::{Error, Result, quantized::gguf_file};
use candle_sparse::{error::plain, input::check_json};
use core::{error::Error as _, fmt};
use minijinja::{Environment, Value, context};
use serde::Deserialize;
use std::{collections::HashMap, sync::Arc};

/// The name of the template in its environment: jinja's messages show it.
const NAME: &str = "chat_template";

/// A template that renders conversations as a model was trained to read them.
///
/// It is a program by the model's author: how long it runs and how much text it makes is bounded. What users write is not
/// escaped: the text of a special token is that token.
///
/// It renders as with Jinja 3.1 in transformers. What still differs fails by the name of what is missing: the filters `pprint`,
/// `random`, `urlize`, `wordwrap` and `xmlattr`, the tag `autoescape`, `lipsum`, `varargs` and `kwargs` of macros, `\N{…}` in
/// strings, `str.encode`, `str.translate`, integers beyond 128 bits, a namespace in a namespace. Not noticed is: what `escape`
/// gives is escaped again where it is escaped twice; a macro's default stands in for an undefined argument too; a dict's key comes
/// before a method of that name; other files are never included.
///
/// ```
/// use candle_sparse_models::chat::{ChatTemplate, Message};
///
/// let source = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}";
/// let template = ChatTemplate::new(source, "<s>", "</s>")?;
/// let messages = [Message::user("2 + 2?"), Message::assistant("4")];
/// assert_eq!(template.render(&messages, false)?, "<s>[user] 2 + 2?</s>[assistant] 4</s>");
/// assert!(ChatTemplate::new("{% for %}", "", "").is_err());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
    /// As it was given.
    source: Arc<str>,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("bos_token", &self.bos_token)
            .field("eos_token", &self.eos_token)
            .finish_non_exhaustive()
    }
}

/// What of `tokenizer_config.json` matters here.
#[derive(Deserialize)]
struct TokenizerConfig {
    chat_template: Option<Templates>,
    bos_token: Option<Token>,
    eos_token: Option<Token>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<Named>),
}

#[derive(Deserialize)]
struct Named {
    name: String,
    template: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Token {
    Text(String),
    Added { content: String },
}

impl Token {
    fn text(token: Option<Self>) -> String {
        match token {
            Some(Self::Text(text) | Self::Added { content: text }) => text,
            None => String::new(),
        }
    }
}

impl Templates {
    fn default_one(self) -> Result<String> {
        let named = match self {
            Self::One(source) => return Ok(source),
            Self::Named(named) => named,
        };
        let names: Vec<_> = named.iter().map(|n| format!("'{}'", n.name)).collect();
        let names = names.join(", ");
        named.into_iter().find(|n| n.name == "default").map(|n| n.template).ok_or_else(|| {
            let problem = format!("none of the chat templates {names} is called 'default'");
            Error::Msg(plain(&format!("tokenizer_config.json: {problem}")))
        })
    }
}

impl ChatTemplate {
    /// A template in jinja's language; the tokens are what it finds as `bos_token` and `eos_token`.
    ///
    /// # Errors
    /// A syntax error in `source`, with its line.
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<Self> {
        let invalid =
            |e: minijinja::Error| Error::Msg(plain(&format!("the chat template cannot be read: {e}")));
        let mut environment = environment::environment().map_err(invalid)?;
        let translated = source::translated(source).map_err(invalid)?;
        environment.add_template_owned(NAME, translated).map_err(invalid)?;
        let (bos_token, eos_token) = (bos_token.to_string(), eos_token.to_string());
        Ok(Self { environment, bos_token, eos_token, source: source.into() })
    }

    /// The template as it was given.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The template of a model on the Hub: the file `chat_template.jinja`, else what `tokenizer_config.json` holds,
    /// where there are several the one called `default`; `None` where there is none.
    ///
    /// # Errors
    /// JSON that is no such configuration, several templates without a default, or a syntax error in the template.
    pub fn from_tokenizer_config(
        tokenizer_config_json: &[u8],
        chat_template_jinja: Option<&[u8]>,
    ) -> Result<Option<Self>> {
        check_json(tokenizer_config_json).map_err(|e| Error::Msg(format!("tokenizer_config.json {e}")))?;
        let config: TokenizerConfig = serde_json::from_slice(tokenizer_config_json)
            .map_err(|e| Error::Msg(format!("tokenizer_config.json: {}", plain(&e.to_string()))))?;
        let source = match (chat_template_jinja, config.chat_template) {
            (Some(bytes), _) => String::from_utf8(bytes.to_vec())
                .map_err(|e| Error::Msg(format!("chat_template.jinja: not UTF-8: {e}")))?,
            (None, Some(templates)) => templates.default_one()?,
            (None, None) => return Ok(None),
        };
        Self::new(&source, &Token::text(config.bos_token), &Token::text(config.eos_token)).map(Some)
    }

    /// The template in the metadata of a GGUF file, `None` where there is none.
    ///
    /// # Errors
    /// Metadata of other types than the format asks for, token ids that are out of range, or a syntax error in the
    /// template.
    pub fn from_gguf(content: &HashMap<String, gguf_file::Value>) -> Result<Option<Self>> {
        let Some(source) = metadata::string(content, "tokenizer.chat_template")? else { return Ok(None) };
        Self::with_tokens_of(content, source).map(Some)
    }

    /// Another template for the model of a GGUF file.
    pub(crate) fn with_tokens_of(content: &HashMap<String, gguf_file::Value>, source: &str) -> Result<Self> {
        let token = |key: &str| metadata::token_text(content, key);
        let (bos, eos) = (token("tokenizer.ggml.bos_token_id")?, token("tokenizer.ggml.eos_token_id")?);
        Self::new(source, bos.unwrap_or_default(), eos.unwrap_or_default())
    }

    /// The conversation as text, its special tokens too: encode it without adding any. With `add_generation_prompt`
    /// it ends where the assistant's answer begins.
    ///
    /// # Errors
    /// A conversation that the template refuses, such as one whose roles do not take turns, or a template that
    /// fails or does not come to an end.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let message =
            |m: &Message| Value::from_pairs([("role", m.role.as_str()), ("content", m.content.as_str())]);
        let values = context! {
            messages => messages.iter().map(message).collect::<Vec<_>>(),
            add_generation_prompt,
            bos_token => self.bos_token.as_str(),
            eos_token => self.eos_token.as_str(),
            tools => (),
            documents => (),
        };
        self.environment.get_template(NAME).and_then(|t| t.render(values)).map_err(|e| explain(&e))
    }
}

fn explain(error: &minijinja::Error) -> Error {
    let mut cause = error.source();
    while let Some(e) = cause {
        if let Some(refusal) = e.downcast_ref::<environment::Refusal>() {
            return Error::Msg(plain(&format!("the chat template refuses this conversation: {refusal}")));
        }
        cause = e.source();
    }
    Error::Msg(format!("the chat template fails: {}", first_line(&Error::Msg(error.to_string()))))
}
