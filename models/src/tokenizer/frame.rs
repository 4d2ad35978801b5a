//! What a tokenizer puts around a text.

use super::{encode, failed};
use candle_core::{Error, Result};
use tokenizers::{
    Tokenizer,
    processors::template::{SpecialToken, TemplateProcessing},
};

/// Tokens before and behind a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) first: Vec<u32>,
    pub(crate) last: Vec<u32>,
}

/// What the tokenizer's post-processor puts around every text.
pub(crate) fn frame(tokenizer: &Tokenizer) -> Result<Frame> {
    // Any text that has tokens shows it.
    for probe in ["a", ".", "0", "\u{2581}"] {
        let (plain, whole) = (encode(tokenizer, probe, false)?, encode(tokenizer, probe, true)?);
        let fits = |&at: &usize| !plain.is_empty() && whole[at..].starts_with(&plain);
        if let Some(at) = (0..whole.len()).find(fits) {
            let last = whole[at + plain.len()..].to_vec();
            return Ok(Frame { first: whole[..at].to_vec(), last });
        }
    }
    Ok(Frame { first: encode(tokenizer, "", true)?, last: Vec::new() })
}

impl Frame {
    /// Makes the tokenizer put these tokens around a text, and nothing else.
    pub(crate) fn apply(&self, tokenizer: &mut Tokenizer) -> Result<()> {
        if *self == Self::default() {
            tokenizer.with_post_processor(None::<TemplateProcessing>);
            return Ok(());
        }
        let mut tokens = Vec::new();
        let mut names = |ids: &[u32]| -> Result<Vec<String>> {
            let mut add = |&id: &u32| {
                let Some(text) = tokenizer.id_to_token(id) else {
                    return Err(Error::Msg(format!("the tokenizer has no token {id} to put around texts")));
                };
                // A name of our own: one with a colon or a dollar would be read as something else.
                let name = format!("t{id}");
                tokens.push(SpecialToken::new(name.clone(), vec![id], vec![text]).map_err(|e| failed(&*e))?);
                Ok(name)
            };
            ids.iter().map(&mut add).collect()
        };
        let (first, last) = (names(&self.first)?, names(&self.last)?);
        let around = |text: &str, segment: usize| -> Vec<String> {
            let names = first.iter().map(String::as_str).chain([text]).chain(last.iter().map(String::as_str));
            names.map(|name| format!("{name}:{segment}")).collect()
        };
        let invalid = |e: String| Error::Msg(format!("the tokenizer: {e}"));
        let mut template = TemplateProcessing::builder();
        template.try_single(around("$A", 0)).map_err(|e| invalid(e.to_string()))?;
        template.try_pair([around("$A", 0), around("$B", 1)].concat()).map_err(|e| invalid(e.to_string()))?;
        template.special_tokens(tokens);
        let template = template.build().map_err(|e| invalid(e.to_string()))?;
        tokenizer.with_post_processor(Some(template));
        Ok(())
    }
}
