//! What `tokenizer_config.json` says about tokens.

use super::{MOST_ADDED_BYTES, failed, frame};
use candle_core::{Error, Result};
use candle_sparse::{error::plain, input::check_json};
use serde_json::Value;
use tokenizers::{AddedToken, Tokenizer};

/// `tokenizer_config.json`, of which each field is used if it is what it should be: transformers wrote many forms of it.
#[derive(Debug)]
pub(crate) struct TokenizerConfig(Value);

/// Classes that leave everything to `tokenizer.json`.
const PLAIN_CLASSES: [&str; 2] = ["PreTrainedTokenizerFast", "TokenizersBackend"];

/// Fields that name a token which is not text.
const NAMED: [&str; 6] = ["bos_token", "eos_token", "unk_token", "sep_token", "cls_token", "mask_token"];
const LISTS: [&str; 2] = ["additional_special_tokens", "extra_special_tokens"];

impl TokenizerConfig {
    pub(crate) fn from_json(json: &[u8]) -> Result<Self> {
        check_json(json).map_err(|e| Error::Msg(format!("tokenizer_config.json {e}")))?;
        match serde_json::from_slice(json) {
            Ok(value @ Value::Object(_)) => Ok(Self(value)),
            Ok(_) => Err(Error::Msg("tokenizer_config.json: not an object".into())),
            Err(e) => Err(Error::Msg(format!("tokenizer_config.json: {}", plain(&e.to_string())))),
        }
    }

    /// The text of a token such as `bos_token`.
    pub(crate) fn token(&self, name: &str) -> Option<&str> {
        text(&self.0[name])
    }

    /// Chat templates beside the one called `default`, by name.
    pub(crate) fn more_templates(&self) -> Vec<(&str, &str)> {
        let all = self.0["chat_template"].as_array().map(Vec::as_slice).unwrap_or_default();
        let named = all.iter().filter_map(|t| Some((t["name"].as_str()?, t["template"].as_str()?)));
        named.filter(|(name, _)| *name != "default").collect()
    }

    /// Gives the tokenizer what the file says beyond it.
    pub(crate) fn apply(&self, tokenizer: &mut Tokenizer, notices: &mut Vec<String>) -> Result<()> {
        self.add_tokens(tokenizer)?;
        self.mark_special(tokenizer)?;
        self.set_frame(tokenizer, notices)
    }

    /// `added_tokens_decoder` knows tokens that a `tokenizer.json` may lack, and says how they are matched.
    fn add_tokens(&self, tokenizer: &mut Tokenizer) -> Result<()> {
        let Some(all) = self.0["added_tokens_decoder"].as_object() else { return Ok(()) };
        let known = tokenizer.get_added_tokens_decoder();
        let mut tokens: Vec<(u32, AddedToken)> =
            all.iter().filter_map(|(id, token)| Some((id.parse().ok()?, added(token)?))).collect();
        tokens.retain(|(id, token)| known.get(id) != Some(token));
        tokens.sort_by_key(|(id, _)| *id);
        // A token with the text of another one would take its place, and one behind a gap another id than it has.
        let mut next = tokenizer.get_vocab_size(true) as u32;
        tokens.retain(|(id, token)| match tokenizer.token_to_id(&token.content) {
            Some(old) => old == *id,
            None if *id == next => {
                next += 1;
                true
            }
            None => false,
        });
        let bytes: usize = tokens.iter().map(|(_, token)| token.content.len()).sum();
        if bytes > MOST_ADDED_BYTES {
            return Err(Error::Msg(format!(
                "tokenizer_config.json adds tokens of {bytes} bytes, {MOST_ADDED_BYTES} are possible"
            )));
        }
        tokenizer.add_tokens(tokens.into_iter().map(|(_, token)| token)).map_err(|e| failed(&*e))?;
        Ok(())
    }

    /// Tokens that are named here are special, also where `tokenizer.json` does not say so.
    fn mark_special(&self, tokenizer: &mut Tokenizer) -> Result<()> {
        let lists = LISTS.iter().filter_map(|name| self.0[*name].as_array()).flatten().filter_map(text);
        let names = NAMED.iter().filter_map(|name| self.token(name)).chain(lists);
        let known = tokenizer.get_added_tokens_decoder();
        let special = names.filter_map(|text| {
            let id = tokenizer.token_to_id(text)?;
            let token = known.get(&id).cloned();
            let token = token.unwrap_or_else(|| AddedToken::from(text.to_string(), true).normalized(false));
            (!token.special || !known.contains_key(&id)).then(|| token.special(true))
        });
        let special: Vec<_> = special.collect();
        tokenizer.add_special_tokens(special).map_err(|e| failed(&*e))?;
        Ok(())
    }

    /// The flags `add_bos_token` and `add_eos_token`, see the rule in [`crate::tokenizer`].
    fn set_frame(&self, tokenizer: &mut Tokenizer, notices: &mut Vec<String>) -> Result<()> {
        let class = self.0["tokenizer_class"].as_str().unwrap_or_default();
        let heeded = !PLAIN_CLASSES.contains(&class);
        let mut frame = frame(tokenizer)?;
        let mut changed = false;
        for (flag, token) in [("add_bos_token", "bos_token"), ("add_eos_token", "eos_token")] {
            let Some(wanted) = self.0[flag].as_bool() else { continue };
            let part = if token == "bos_token" { &mut frame.first } else { &mut frame.last };
            let id = self.token(token).and_then(|text| tokenizer.token_to_id(text));
            let has = id.map_or(!part.is_empty(), |id| part.contains(&id));
            if wanted == has {
                continue;
            }
            let adds = |yes: bool| if yes { "adds" } else { "does not add" };
            let (says, does) = (adds(wanted), adds(has));
            notices.push(match (heeded, wanted, id) {
                (false, ..) => format!(
                    "tokenizer_config.json {says} the {token}, tokenizer.json {does} it: for a {class} the latter decides"
                ),
                (true, true, None) => {
                    format!("tokenizer_config.json sets {flag}, but its {token} is no token: none is added")
                }
                _ => {
                    format!("tokenizer_config.json {says} the {token}, tokenizer.json {does} it: {flag} decides")
                }
            });
            match (heeded, wanted, id) {
                (true, true, Some(id)) => *part = vec![id],
                (true, false, _) => part.clear(),
                _ => continue,
            }
            changed = true;
        }
        if changed { frame.apply(tokenizer) } else { Ok(()) }
    }
}

/// A token is written as its text or as an object.
fn text(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token["content"].as_str()).filter(|text| !text.is_empty())
}

fn added(token: &Value) -> Option<AddedToken> {
    let is = |name: &str| token[name].as_bool();
    let special = is("special").unwrap_or(false);
    let token = AddedToken::from(text(token)?.to_string(), special)
        .single_word(is("single_word").unwrap_or(false))
        .lstrip(is("lstrip").unwrap_or(false))
        .rstrip(is("rstrip").unwrap_or(false))
        .normalized(is("normalized").unwrap_or(!special));
    Some(token)
}
