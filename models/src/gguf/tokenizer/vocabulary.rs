//! The tokens of a file and their types.

use super::{
    BOS, ENDS,
    metadata::{self, Metadata, TOKENS, array, fail, id, integer},
    own::Own,
    wrong,
};
use crate::tokenizer::MOST_ADDED_BYTES;
use candle_core::{Result, quantized::gguf_file::Value};
use std::collections::HashSet;
use tokenizers::{AddedToken, Tokenizer, models::bpe::Vocab};

pub(super) const TYPES: &str = "tokenizer.ggml.token_type";

/// What a token is: [`llama_token_type`], which means the same in every vocabulary.
///
/// | | in a text | printed |
/// |---|---|---|
/// | normal, byte | through merges | yes |
/// | unknown, control | where its text stands | no |
/// | user defined | where its text stands | yes |
/// | unused, undefined | never | no |
///
/// [`llama_token_type`]: https://github.com/ggml-org/llama.cpp/blob/eb6a99c6fab2e530114a5fc996629ba17ec85096/include/llama.h
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Undefined,
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl Kind {
    const ALL: [Self; 7] = [
        Self::Undefined,
        Self::Normal,
        Self::Unknown,
        Self::Control,
        Self::UserDefined,
        Self::Unused,
        Self::Byte,
    ];

    /// Its number in the file.
    pub(crate) fn value(self) -> Value {
        Value::I32(self as i32)
    }
}

/// Texts and types; the id of a token is its place.
pub(super) struct Vocabulary {
    pub(super) texts: Vec<String>,
    pub(super) kinds: Vec<Kind>,
}

impl Vocabulary {
    pub(super) fn read(metadata: &Metadata) -> Result<Self> {
        let tokens = array(metadata, TOKENS)?;
        let texts = (0..tokens.len()).map(|i| {
            let text = metadata::text(tokens, i)?;
            // As in llama.cpp, for no two tokens may be the same text.
            Ok(if text.is_empty() { format!("[EMPTY_{i}]") } else { text.to_string() })
        });
        let texts = texts.collect::<Result<Vec<_>>>()?;
        let mut kinds = match metadata.contains_key(TYPES) {
            true => kinds(array(metadata, TYPES)?, tokens.len())?,
            // As in llama.cpp, and a notice says so.
            false => vec![Kind::Normal; tokens.len()],
        };
        // The tokens that begin and end texts are no text, whatever their type says.
        for key in [BOS].into_iter().chain(ENDS) {
            if let Some(kind) = id(metadata, key)?.and_then(|id| kinds.get_mut(id as usize)) {
                *kind = Kind::Control;
            }
        }
        Ok(Self { texts, kinds })
    }

    /// Ids by text. Tokens that are never used have none, so that they are neither found nor printed, but for those that
    /// are `needed`.
    pub(super) fn ids(&self, needed: &HashSet<&str>) -> Result<Vocab> {
        let mut ids = Vocab::with_capacity(self.texts.len());
        for ((id, text), kind) in (0..).zip(&self.texts).zip(&self.kinds) {
            let unused = matches!(kind, Kind::Unused | Kind::Undefined);
            if unused && !needed.contains(text.as_str()) {
                continue;
            }
            if let Some(first) = ids.insert(text.clone(), id) {
                return fail(format!("GGUF metadata: tokens {first} and {id} are both '{text}'"));
            }
        }
        Ok(ids)
    }

    /// Adds the tokens that stand for themselves in a text.
    pub(super) fn add_tokens(&self, tokenizer: &mut Tokenizer, own: &Own) -> Result<()> {
        let mut tokens: Vec<AddedToken> = Vec::new();
        let mut bytes = 0;
        for (id, (text, kind)) in self.texts.iter().zip(&self.kinds).enumerate() {
            let special = match kind {
                Kind::Unknown | Kind::Control => true,
                Kind::UserDefined => false,
                _ => continue,
            };
            bytes += text.len();
            if bytes > MOST_ADDED_BYTES {
                return fail(format!(
                    "GGUF metadata: with token {id} those that are looked for in texts have more than {MOST_ADDED_BYTES} bytes"
                ));
            }
            let token = AddedToken::from(text.clone(), special).normalized(false);
            tokens.push(own.flags_of(text).map_or(token.clone(), |flags| flags.apply(token)));
        }
        tokenizer.add_tokens(tokens).map_err(wrong)?;
        Ok(())
    }
}

fn kinds(types: &[Value], tokens: usize) -> Result<Vec<Kind>> {
    if types.len() != tokens {
        let types = types.len();
        return fail(format!("GGUF metadata: `{TOKENS}` has {tokens} entries, `{TYPES}` {types}"));
    }
    let kind = |(i, value)| {
        let kind = integer(value).and_then(|n| usize::try_from(n).ok()).and_then(|n| Kind::ALL.get(n));
        match kind {
            Some(kind) => Ok(*kind),
            None => fail(format!("GGUF metadata: entry {i} of `{TYPES}` is no type of token (0 to 6)")),
        }
    };
    types.iter().enumerate().map(kind).collect()
}
