//! What GGUF has no words for: a key of our own, which other readers do not know.

use super::{
    metadata::{Metadata, fail, string},
    pieces::Prefix,
};
use candle_core::{Result, quantized::gguf_file::Value};
use serde::{Deserialize, Serialize};
use tokenizers::AddedToken;

pub(crate) const KEY: &str = "candle_sparse.tokenizer";

/// JSON in [`KEY`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Own {
    /// Where pieces get a blank in front, if not at each part of a text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) prefix: Option<Prefix>,
    /// Tokens that are matched in another way than by their text alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) added_tokens: Vec<Flags>,
    /// Tokens that end an answer, beside the three that GGUF has keys for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) end_tokens: Vec<u32>,
}

/// How a token is matched in a text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Flags {
    pub(crate) content: String,
    pub(crate) single_word: bool,
    pub(crate) lstrip: bool,
    pub(crate) rstrip: bool,
    pub(crate) normalized: bool,
}

impl Own {
    pub(crate) fn read(metadata: &Metadata) -> Result<Self> {
        let Some(json) = string(metadata, KEY)? else { return Ok(Self::default()) };
        match serde_json::from_str(json) {
            Ok(own) => Ok(own),
            Err(e) => fail(format!("GGUF metadata: `{KEY}`: {e}")),
        }
    }

    /// The value of [`KEY`]; `None`: GGUF has words for all.
    pub(crate) fn value(&self) -> Result<Option<Value>> {
        if *self == Self::default() {
            return Ok(None);
        }
        let json = serde_json::to_string(self).map_err(candle_core::Error::wrap)?;
        Ok(Some(Value::String(json)))
    }

    pub(super) fn flags_of(&self, text: &str) -> Option<&Flags> {
        self.added_tokens.iter().find(|flags| flags.content == text)
    }
}

impl Flags {
    /// Those of a token, if they say more than its text.
    pub(crate) fn of(token: &AddedToken) -> Option<Self> {
        let AddedToken { single_word, lstrip, rstrip, normalized, .. } = *token;
        let content = token.content.clone();
        (single_word || lstrip || rstrip || normalized).then_some(Self {
            content,
            single_word,
            lstrip,
            rstrip,
            normalized,
        })
    }

    pub(super) fn apply(&self, token: AddedToken) -> AddedToken {
        token
            .single_word(self.single_word)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .normalized(self.normalized)
    }
}
