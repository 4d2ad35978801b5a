//! Text out of tokens, one by one.

use serde_json::Value;
use std::{ops::Deref, sync::Arc};
use tokenizers::Tokenizer;

/// The text of tokens as they come.
///
/// All pieces together, [`Self::finish`] included, are the text of all tokens, without special ones. Bytes that
/// make no character are U+FFFD, as `String::from_utf8_lossy` has it, and nothing is an error: what a model says need not be text.
/// A piece waits only for the rest of its last character. A token costs what its own text costs.
///
/// ```
/// # use candle_sparse_models::{files::ModelFiles, tokenizer::TextStream};
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// # let tokenizer = ModelFiles::from_folder(folder)?.load_tokenizer()?;
/// let mut stream = TextStream::new(&tokenizer);
/// let mut text = String::new();
/// for id in tokenizer.encode("Once upon a time", false).unwrap().get_ids() {
///     text += &stream.push(*id);
/// }
/// text += &stream.finish();
/// assert_eq!(text.trim(), "Once upon a time");
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: Shared<'a>,
    how: How,
    /// The beginning of a character.
    pending: Vec<u8>,
    /// Whether no text came yet: tokenizers that put a blank before a text take it away again.
    at_start: bool,
    /// With [`How::Whole`]: the tokens whose text decides how the next one is written.
    context: Vec<u32>,
}

/// A tokenizer that somebody else holds, or that is held together with others.
#[derive(Clone, Debug)]
enum Shared<'a> {
    Lent(&'a Tokenizer),
    Counted(Arc<Tokenizer>),
}

impl Deref for Shared<'_> {
    type Target = Tokenizer;

    fn deref(&self) -> &Tokenizer {
        match self {
            Self::Lent(tokenizer) => tokenizer,
            Self::Counted(tokenizer) => tokenizer,
        }
    }
}

/// How a token becomes bytes.
#[derive(Debug, PartialEq, Eq)]
enum How {
    /// Each character stands for a byte, as GPT-2 has it.
    ByteLevel,
    /// Pieces of text and tokens for single bytes; first what is replaced in a piece, then how many blanks are taken
    /// away at the start of a text.
    Pieces { replace: Vec<(String, String)>, bytes: bool, strip: usize },
    /// Some other way, left to the tokenizer.
    Whole,
}

/// Tokens before one that are decoded with it where its own text is not enough.
const CONTEXT: usize = 4;

impl TextStream<'static> {
    /// As [`Self::new`], for a stream that lives as long as it likes.
    #[must_use]
    pub fn shared(tokenizer: Arc<Tokenizer>) -> Self {
        Self::of(Shared::Counted(tokenizer))
    }
}

impl<'a> TextStream<'a> {
    /// A stream that no token has entered yet.
    #[must_use]
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self::of(Shared::Lent(tokenizer))
    }

    fn of(tokenizer: Shared<'a>) -> Self {
        let decoder = tokenizer.get_decoder().and_then(|d| serde_json::to_value(d).ok());
        let how = decoder.as_ref().and_then(how).unwrap_or(How::Whole);
        Self { tokenizer, how, pending: Vec::new(), at_start: true, context: Vec::new() }
    }

    /// The text that this token completes; empty while a character is not complete.
    ///
    /// Cost: that of the token's own text, however long the text before it is.
    pub fn push(&mut self, id: u32) -> String {
        let Some(token) = self.tokenizer.id_to_token(id) else { return String::new() };
        if self.tokenizer.get_added_vocabulary().is_special_token(&token) {
            return String::new();
        }
        match self.own_bytes(&token) {
            Some(bytes) => self.pending.extend(bytes),
            None => {
                let text = self.text_behind_context(id);
                self.pending.extend(text.bytes());
            }
        }
        self.strip_start();
        self.complete()
    }

    /// The bytes of a token by itself, those of a special token's name too: what probabilities of tokens are told of. It changes
    /// nothing.
    ///
    /// ```
    /// # use candle_sparse_models::{files::ModelFiles, tokenizer::TextStream};
    /// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
    /// # let tokenizer = ModelFiles::from_folder(folder)?.load_tokenizer()?;
    /// let ids = tokenizer.encode("Once upon", false).unwrap();
    /// let stream = TextStream::new(&tokenizer);
    /// let bytes: Vec<u8> = ids.get_ids().iter().flat_map(|&id| stream.token_bytes(id)).collect();
    /// assert_eq!(bytes, b"Once upon");
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let Some(token) = self.tokenizer.id_to_token(id) else { return Vec::new() };
        if self.tokenizer.get_added_vocabulary().is_special_token(&token) {
            return token.into_bytes();
        }
        self.own_bytes(&token)
            .unwrap_or_else(|| self.tokenizer.decode(&[id], false).unwrap_or_default().into_bytes())
    }

    /// The bytes of a token, where they do not depend on the tokens before it.
    fn own_bytes(&self, token: &str) -> Option<Vec<u8>> {
        match &self.how {
            How::ByteLevel => Some(bytes_of(token)),
            How::Pieces { replace, bytes, .. } => Some(match byte_of(token).filter(|_| *bytes) {
                Some(byte) => vec![byte],
                None => replace
                    .iter()
                    .fold(token.to_string(), |text, (from, to)| text.replace(from, to))
                    .into_bytes(),
            }),
            How::Whole => None,
        }
    }

    /// The rest of the text: U+FFFD for a character that was not completed.
    #[must_use]
    pub fn finish(mut self) -> String {
        String::from_utf8_lossy(&core::mem::take(&mut self.pending)).into_owned()
    }

    fn strip_start(&mut self) {
        if !self.at_start || self.pending.is_empty() {
            return;
        }
        self.at_start = false;
        if let How::Pieces { strip, .. } = self.how {
            let blanks = self.pending.iter().take(strip).take_while(|byte| **byte == b' ').count();
            self.pending.drain(..blanks);
        }
    }

    /// Takes what is certain out of the pending bytes.
    fn complete(&mut self) -> String {
        let mut text = String::new();
        let mut rest = 0;
        for chunk in self.pending.utf8_chunks() {
            text.push_str(chunk.valid());
            let bad = chunk.invalid().len();
            rest += chunk.valid().len() + bad;
            if rest == self.pending.len() && may_go_on(chunk.invalid()) {
                rest -= bad;
            } else if bad > 0 {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.pending.drain(..rest);
        text
    }

    fn text_behind_context(&mut self, id: u32) -> String {
        // What cannot be decoded has no text.
        let decode = |ids: &[u32]| self.tokenizer.decode(ids, true).unwrap_or_default();
        let before = decode(&self.context);
        self.context.push(id);
        let text = decode(&self.context);
        let new = text.strip_prefix(&before).map_or_else(|| decode(&[id]), str::to_string);
        if self.context.len() > CONTEXT {
            self.context.remove(0);
        }
        new
    }
}

/// Whether more bytes can make a character of these.
fn may_go_on(bytes: &[u8]) -> bool {
    // They are the longest beginning of a character already, or no beginning at all.
    let needed = match bytes.first() {
        Some(0xC2..=0xDF) => 2,
        Some(0xE0..=0xEF) => 3,
        Some(0xF0..=0xF4) => 4,
        _ => 0,
    };
    bytes.len() < needed
}

/// Reads the decoder of a tokenizer.
fn how(decoder: &Value) -> Option<How> {
    let one = [decoder.clone()];
    let steps = match decoder["type"].as_str()? {
        "Sequence" => decoder["decoders"].as_array()?.as_slice(),
        _ => &one,
    };
    if let [only] = steps
        && only["type"] == "ByteLevel"
    {
        return Some(How::ByteLevel);
    }
    let (mut replace, mut bytes, mut strip, mut fused) = (Vec::new(), false, 0, false);
    for step in steps {
        match step["type"].as_str()? {
            // In this order alone a token is written without looking at others.
            "Replace" if !bytes && !fused => {
                replace.push((
                    step["pattern"]["String"].as_str()?.to_string(),
                    step["content"].as_str()?.to_string(),
                ));
            }
            "ByteFallback" if !fused => bytes = true,
            "Fuse" => fused = true,
            "Strip" if fused && step["content"] == " " && step["stop"] == 0 => {
                strip = usize::try_from(step["start"].as_u64()?).ok()?;
            }
            _ => return None,
        }
    }
    fused.then_some(How::Pieces { replace, bytes, strip })
}

/// The byte of a token such as `<0x0A>`.
fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>').filter(|digits| digits.len() == 2)?;
    u8::from_str_radix(digits, 16).ok()
}

/// The bytes that a byte-level token stands for; a token with other characters (an added one) stands for its text.
pub(crate) fn bytes_of(token: &str) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = token.chars().map(byte_of_char).collect();
    bytes.unwrap_or_else(|| token.as_bytes().to_vec())
}

/// GPT-2 shows printable bytes as themselves and moves the others, in their order, behind U+0100.
fn byte_of_char(c: char) -> Option<u8> {
    let shown = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let code = u32::from(c);
    match u8::try_from(code) {
        Ok(byte) => shown(byte).then_some(byte),
        Err(_) => (0..=u8::MAX).filter(|byte| !shown(*byte)).nth(code.checked_sub(0x100)? as usize),
    }
}
