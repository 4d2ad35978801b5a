//! A model's files as one GGUF file.

use super::{GgufModel, Layout};
use crate::{
    chat::{ChatTemplate, Message},
    files::{ModelFiles, Weights},
    gguf::GgufFile,
    llama::LlamaEosToks,
    pretrained::{self, first_line},
    tokenizer::TokenizerConfig,
};
use candle_core::{Error, Result, quantized::gguf_file::Value};
use std::collections::HashMap;

const TEMPLATE: &str = "tokenizer.chat_template";

impl GgufModel {
    /// The model with all that its files say: tokenizer, tokens that begin and end texts, chat templates. Each is asked
    /// of the function that loads it, so that the file means what the files mean.
    ///
    /// # Errors
    /// As [`Self::new`], [`Self::from_gguf`] and [`Self::with_tokenizer`]; also a template that would render otherwise
    /// when it comes back.
    pub fn from_files(files: &ModelFiles, layout: Layout<'_>) -> Result<Self> {
        if let Weights::Gguf(path) = &files.weights {
            let mut model = Self::from_gguf(&GgufFile::open(path)?, layout)?;
            if let Some(tokenizer) = &model.tokenizer {
                model.ends = Some(pretrained::end_tokens(files, tokenizer)?);
            }
            return Ok(model);
        }
        let (tokenizer, notices) = files.load_tokenizer_and_notices()?;
        let mut config = pretrained::config(files)?;
        let named = files.tokenizer_config.as_deref().and_then(|json| TokenizerConfig::from_json(json).ok());
        let id = |name: &str| named.as_ref().and_then(|config| tokenizer.token_to_id(config.token(name)?));
        config.bos_token_id = id("bos_token").or(config.bos_token_id);
        let mut ends = pretrained::end_tokens(files, &tokenizer)?;
        let mut written = ends.clone();
        written.retain(|id| (*id as usize) < config.vocab_size);
        // The one that templates know as `eos_token` comes first.
        let of_config = match &config.eos_token_id {
            Some(LlamaEosToks::Single(id)) => Some(*id),
            Some(LlamaEosToks::Multiple(ids)) => ids.first().copied(),
            None => None,
        };
        let first = id("eos_token").or(of_config);
        ends.sort_by_key(|id| Some(*id) != first);
        config.eos_token_id = (!ends.is_empty()).then_some(LlamaEosToks::Multiple(ends));
        let template = pretrained::chat_template(files, &config, &tokenizer)?;
        let vb = pretrained::var_builder(files, None)?;
        let named_error = |e: Error| Error::Msg(format!("{}: {}", files.name, first_line(&e)));
        let mut model = Self::new(&vb, &config, layout, &files.name)?
            .with_tokenizer(&tokenizer, &config)
            .map_err(named_error)?;
        model.notices.extend(notices);
        model.ends = Some(written);
        if let Some(template) = &template {
            model = model.with_value(TEMPLATE, Value::String(template.source().to_string()));
            model.check_template(template).map_err(named_error)?;
            let more = named.as_ref().map(TokenizerConfig::more_templates).unwrap_or_default();
            for (name, source) in &more {
                model = model.with_value(&format!("{TEMPLATE}.{name}"), Value::String((*source).to_string()));
            }
            if !more.is_empty() {
                let names = more.iter().map(|(name, _)| Value::String((*name).to_string()));
                model = model.with_value("tokenizer.chat_templates", Value::Array(names.collect()));
            }
        }
        Ok(model)
    }

    /// The template in the metadata finds other tokens than the model's own where the file has other names for them.
    fn check_template(&self, own: &ChatTemplate) -> Result<()> {
        let metadata: HashMap<_, _> = self.metadata.iter().cloned().collect();
        let Some(written) = ChatTemplate::from_gguf(&metadata)? else { return Ok(()) };
        let talk = [Message::user("Who?"), Message::assistant("I."), Message::user("Why?")];
        for messages in [&talk[..1], &talk] {
            // A template that refuses these refuses them in the file too.
            if let (Ok(a), Ok(b)) = (own.render(messages, true), written.render(messages, true))
                && a != b
            {
                return Err(Error::Msg(format!(
                    "the chat template would not come back from a GGUF file as it is: it begins and ends texts with other \
                     tokens than the tokenizer's (\"{}\" instead of \"{}\")",
                    b.escape_debug(),
                    a.escape_debug()
                )));
            }
        }
        Ok(())
    }
}
