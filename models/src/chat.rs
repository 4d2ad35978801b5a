//! Conversations: chat templates, and turns that make a model read only what is new.

mod environment;
mod python;
mod restore;
mod source;
mod template;

pub use template::ChatTemplate;

use crate::tokenizer::prompt_tokens;
use candle_core::{Error, Result};
use tokenizers::Tokenizer;

/// How much of what was read is tokenised again beside a turn, so that the turn's tokens are those of a text in its middle.
const CONTEXT_CHARS: usize = 64;

/// One message of a conversation: who speaks, and what is said.
///
/// ```
/// use candle_sparse_models::chat::Message;
///
/// let message = Message::user("Who are you?");
/// assert_eq!((message.role.as_str(), message.content.as_str()), ("user", "Who are you?"));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `user`, `assistant`, `system`, or what else the template knows.
    pub role: String,
    /// What it says.
    pub content: String,
}

impl Message {
    fn new(role: &str, content: impl Into<String>) -> Self {
        Self { role: role.to_string(), content: content.into() }
    }

    /// A message of the user.
    #[must_use]
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// An answer of the model.
    #[must_use]
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }

    /// Instructions that come before the conversation.
    #[must_use]
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }
}

/// What the model has to read before it answers.
///
/// ```
/// use candle_sparse_models::chat::{Chat, ChatTemplate};
///
/// # let source = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}\
/// #     {% if add_generation_prompt %}<|assistant|>{% endif %}";
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// # let tokenizer = candle_sparse_models::files::ModelFiles::from_folder(folder)?.load_tokenizer()?;
/// let mut chat = Chat::new(ChatTemplate::new(source, "<s>", "</s>")?, None);
/// let turn = chat.say("Hello")?;
/// assert_eq!(turn.text, "<|user|>Hello</s><|assistant|>");
/// // The model has read nothing yet, so anything follows it.
/// assert!(turn.continues);
/// assert!(!turn.encode(&tokenizer)?.is_empty());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// The text.
    pub text: String,
    /// Whether the text follows what the model has read and written. If not, it is the whole conversation, to be read from
    /// position 0, since the template now writes what was said before in another way than it was read.
    pub continues: bool,
    /// The end of what was read before.
    context: String,
}

impl Turn {
    /// The tokens to feed. The text's special tokens are in the text; at position 0 the tokenizer's own first token is
    /// added where the template does not write it, for models are trained with it.
    ///
    /// # Errors
    /// What the tokenizer cannot encode.
    pub fn encode(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        if self.context.is_empty() {
            // A conversation that a template makes no text of is none, whatever a text begins with.
            return if self.text.is_empty() { Ok(Vec::new()) } else { prompt_tokens(tokenizer, &self.text) };
        }
        // Where a token would span what was read and what is new, a line's end stands for the former: what matters is that
        // tokenizers which put a blank before a text do not do so here.
        for before in [self.context.as_str(), "\n"] {
            let read = encode(tokenizer, before, false)?;
            let both = encode(tokenizer, &format!("{before}{}", self.text), false)?;
            if let Some(new) = both.strip_prefix(read.as_slice()) {
                return Ok(new.to_vec());
            }
        }
        encode(tokenizer, &self.text, false)
    }
}

fn encode(tokenizer: &Tokenizer, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
    let encoding = tokenizer
        .encode(text, add_special_tokens)
        .map_err(|e| Error::Msg(format!("the tokenizer cannot encode the conversation: {e}")))?;
    Ok(encoding.get_ids().to_vec())
}

/// A conversation that keeps what the model has read and written, so that each turn is only what is new.
///
/// ```
/// use candle_sparse_models::chat::{Chat, ChatTemplate};
///
/// # let source = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}\
/// #     {% if add_generation_prompt %}<|assistant|>{% endif %}";
/// let mut chat = Chat::new(ChatTemplate::new(source, "<s>", "</s>")?, Some("Be brief."));
/// assert_eq!(chat.say("Hello")?.text, "<|system|>Be brief.</s><|user|>Hello</s><|assistant|>");
/// // The model has said this, and then its end token, which was not fed.
/// chat.answered("Hi!", None);
/// let turn = chat.say("Who are you?")?;
/// assert!(turn.continues);
/// assert_eq!(turn.text, "</s><|user|>Who are you?</s><|assistant|>");
/// assert_eq!(chat.messages().len(), 4);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Chat {
    template: ChatTemplate,
    messages: Vec<Message>,
    /// What the model has in its cache, as text.
    read: String,
    /// The end token after the last answer, if the model has it in its cache.
    read_end: String,
    /// The turn that the last message makes, until it is answered: whether the model has read it is not known before.
    unanswered: Option<Turn>,
}

impl Chat {
    /// An empty conversation, or one with instructions.
    #[must_use]
    pub fn new(template: ChatTemplate, system: Option<&str>) -> Self {
        let messages = system.map(Message::system).into_iter().collect();
        Self { template, messages, read: String::new(), read_end: String::new(), unanswered: None }
    }

    /// The messages so far; the last is the user's if it is not answered yet.
    #[must_use]
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Adds the user's next message and returns what the model has to read: feed that, let the model answer, then call
    /// [`Self::answered`]. A message that was not answered, since feeding it failed, is replaced by the next one.
    ///
    /// # Errors
    /// What the template refuses; the conversation is then as before.
    pub fn say(&mut self, user_text: &str) -> Result<Turn> {
        let before = self.unanswered.is_some().then(|| self.messages.pop()).flatten();
        self.messages.push(Message::user(user_text));
        let turn = self.turn().inspect_err(|_| {
            self.messages.pop();
            self.messages.extend(before);
        })?;
        self.unanswered = Some(turn.clone());
        Ok(turn)
    }

    /// What the model answered, without the token that ended it. That token is usually sampled and never fed: then
    /// `fed_end` is `None`, and the next turn begins with what the template writes after an answer. If it was fed,
    /// `fed_end` is its text, and the next turn begins behind it.
    pub fn answered(&mut self, generated_text: &str, fed_end: Option<&str>) {
        if let Some(turn) = self.unanswered.take() {
            if !turn.continues {
                self.read.clear();
            }
            self.read.push_str(&turn.text);
        }
        self.messages.push(Message::assistant(generated_text));
        self.read_end = fed_end.unwrap_or_default().to_string();
        self.read.push_str(generated_text);
        self.read.push_str(&self.read_end);
    }

    fn turn(&self) -> Result<Turn> {
        let whole = self.template.render(&self.messages, true)?;
        let new = match whole.strip_prefix(&self.read) {
            Some(rest) => Some(rest.to_string()),
            // Many templates strip an answer or put blanks around it: these need not be read again.
            None => {
                let rest = self.after_answer();
                rest.filter(|rest| equal_but_blanks(self.read.chars().chain(rest.chars()), &whole))
            }
        };
        Ok(match new {
            Some(text) => Turn { text, continues: true, context: last_chars(&self.read) },
            None => Turn { text: whole, continues: false, context: String::new() },
        })
    }

    /// What the template writes behind the last answer.
    fn after_answer(&self) -> Option<String> {
        let last = self.messages.iter().rposition(|m| m.role == "assistant")?;
        let rest = after_content(&self.template, &self.messages, last)?;
        let behind_end = rest.trim_start().strip_prefix(&self.read_end);
        Some(match behind_end {
            Some(behind_end) if !self.read_end.is_empty() => behind_end.to_string(),
            _ => rest,
        })
    }
}

/// What a template writes behind the content of one message, whatever that is: it is found by a mark in its place.
fn after_content(template: &ChatTemplate, messages: &[Message], index: usize) -> Option<String> {
    // Private characters, so that no template has a reason to change them.
    let mut marks = (0..).map(|n| format!("\u{e000}{n}\u{e001}"));
    let mark = marks.find(|mark| messages.iter().all(|m| !m.content.contains(mark)))?;
    let mut marked = messages.to_vec();
    marked[index].content.clone_from(&mark);
    // A template that fails on the mark shows nothing here; on the messages themselves its error was reported.
    let text = template.render(&marked, true).ok()?;
    text.rsplit_once(&mark).map(|(_, rest)| rest.to_string())
}

fn equal_but_blanks(text: impl Iterator<Item = char>, other: &str) -> bool {
    let filled = |c: &char| !c.is_whitespace();
    text.filter(filled).eq(other.chars().filter(filled))
}

fn last_chars(text: &str) -> String {
    let start = text.char_indices().rev().take(CONTEXT_CHARS).last().map_or(0, |(at, _)| at);
    text[start..].to_string()
}

/// Tokens that end an answer beside the model's own end tokens: the added token that the template writes behind what
/// the assistant says, such as `<|im_end|>`.
///
/// ```
/// use candle_sparse_models::chat::{ChatTemplate, stop_tokens};
/// use tokenizers::AddedToken;
///
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// # let mut tokenizer = candle_sparse_models::files::ModelFiles::from_folder(folder)?.load_tokenizer()?;
/// let source = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}";
/// let template = ChatTemplate::new(source, "", "")?;
/// tokenizer.add_special_tokens([AddedToken::from("<|im_end|>", true)]);
/// let id = tokenizer.token_to_id("<|im_end|>").expect("it was added");
/// assert_eq!(stop_tokens(&tokenizer, &template), [id]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[must_use]
pub fn stop_tokens(tokenizer: &Tokenizer, template: &ChatTemplate) -> Vec<u32> {
    let messages = [Message::user("?"), Message::assistant("!"), Message::user("?")];
    // Some templates know one turn only, or write nothing behind a last answer: more is tried first.
    let rest = after_content(template, &messages, 1).or_else(|| after_content(template, &messages[..2], 1));
    let Some(rest) = rest else { return Vec::new() };
    let added = tokenizer.get_added_tokens_decoder();
    let rest = rest.trim_start();
    let fits = added.iter().filter(|(_, t)| !t.content.is_empty() && rest.starts_with(&t.content));
    fits.max_by_key(|(_, token)| token.content.len()).map(|(&id, _)| id).into_iter().collect()
}
