//! A model's files as one GGUF file.

use super::{GgufModel, Layout};
use crate::{
    chat::{ChatTemplate, Message},
    files::{ModelFiles, Weights},
    gguf::GgufFile,
    llama::{Config, LlamaEosToks},
    message::first_line,
    pretrained,
    tokenizer::TokenizerConfig,
};
use candle_core::{Error, Result, quantized::gguf_file::Value};
use std::collections::HashMap;
use tokenizers::Tokenizer;

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
        let named = files.tokenizer_config.as_deref().and_then(|json| TokenizerConfig::from_json(json).ok());
        let config = config(files, &tokenizer, named.as_ref())?;
        let template = pretrained::chat_template(files, &config, &tokenizer)?;
        let vb = pretrained::var_builder(files, None)?;
        let mut model = Self::new(&vb, &config, layout, &files.name)?
            .with_tokenizer(&tokenizer, &config)
            .map_err(|e| refused(files, "tokenizer.json", &e))?;
        model.notices.extend(notices);
        let mut ends = end_list(&config);
        ends.retain(|id| (*id as usize) < config.vocab_size);
        ends.sort_unstable();
        model.ends = Some(ends);
        match &template {
            Some(template) => model.with_templates(files, template, named.as_ref()),
            None => Ok(model),
        }
    }

    /// With the template that loading takes, and others of the model by their names.
    fn with_templates(
        mut self,
        files: &ModelFiles,
        template: &ChatTemplate,
        named: Option<&TokenizerConfig>,
    ) -> Result<Self> {
        self = self.with_value(TEMPLATE, Value::String(template.source().to_string()));
        self.check_template(template).map_err(|e| refused(files, "tokenizer_config.json", &e))?;
        let more = named.map(TokenizerConfig::more_templates).unwrap_or_default();
        for (name, source) in &more {
            self = self.with_value(&format!("{TEMPLATE}.{name}"), Value::String((*source).to_string()));
        }
        if !more.is_empty() {
            let names = more.iter().map(|(name, _)| Value::String((*name).to_string()));
            self = self.with_value("tokenizer.chat_templates", Value::Array(names.collect()));
        }
        Ok(self)
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

/// The configuration with all end tokens; the one that templates know as `eos_token` comes first.
fn config(files: &ModelFiles, tokenizer: &Tokenizer, named: Option<&TokenizerConfig>) -> Result<Config> {
    let mut config = pretrained::config(files)?;
    let id = |name: &str| tokenizer.token_to_id(named?.token(name)?);
    config.bos_token_id = id("bos_token").or(config.bos_token_id);
    let first = id("eos_token").or_else(|| end_list(&config).first().copied());
    let mut ends = pretrained::end_tokens(files, tokenizer)?;
    ends.sort_by_key(|id| Some(*id) != first);
    config.eos_token_id = (!ends.is_empty()).then_some(LlamaEosToks::Multiple(ends));
    Ok(config)
}

fn end_list(config: &Config) -> Vec<u32> {
    match &config.eos_token_id {
        Some(LlamaEosToks::Single(id)) => vec![*id],
        Some(LlamaEosToks::Multiple(ids)) => ids.clone(),
        None => Vec::new(),
    }
}

/// A file that cannot be written as GGUF.
fn refused(files: &ModelFiles, name: &str, error: &Error) -> Error {
    let problem = first_line(error);
    match &files.folder {
        Some(folder) => candle_sparse::Error::File { path: folder.join(name), problem }.into(),
        None => Error::Msg(format!("{name} of `{}`: {problem}", files.name)),
    }
}
