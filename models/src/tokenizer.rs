//! Tokenizers, read so that they mean what transformers means by the same files.
//!
//! **A `tokenizer.json` keeps how it was used last.** Its `truncation` and `padding` are left out: a text is read whole, and
//! nothing is put around it but the tokens below.
//!
//! **What is put around a text** is said in two places. The post-processor of `tokenizer.json` decides, as in transformers 5,
//! unless `tokenizer_config.json` says `add_bos_token` or `add_eos_token`: then that flag decides, as in `LlamaTokenizerFast` of
//! transformers 4, with the text of `bos_token` or `eos_token`. A flag that is not there changes nothing, and so does one in
//! the file of a `PreTrainedTokenizerFast` or `TokenizersBackend`, which no version of transformers heeds. Where the two places
//! disagree a notice says what was taken. In a GGUF file the flags `tokenizer.ggml.add_bos_token` and `add_eos_token` decide.
//!
//! **A prompt** ([`prompt_tokens`]) is a text to be continued: an end token is never put behind it, and a first token
//! that the text brings along (a template that writes its own, a prompt that begins with `<s>`) is not put there twice.

mod check;
mod config;
mod ends;
mod frame;
mod stop_texts;
mod text_stream;

pub(crate) use check::MOST_ADDED_BYTES;
pub(crate) use config::TokenizerConfig;
pub use ends::end_tokens_by_text;
pub(crate) use frame::{Frame, frame};
pub use stop_texts::StopTexts;
pub use text_stream::TextStream;
pub(crate) use text_stream::bytes_of;

use candle_core::{Error, Result};
use candle_sparse::error::plain;
use tokenizers::Tokenizer;

/// Reads a `tokenizer.json`, together with the `tokenizer_config.json` beside it: the tokenizer, and notices of what was
/// decided between the two.
///
/// ```
/// use candle_sparse_models::tokenizer;
///
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// let json = std::fs::read(folder.join("tokenizer.json"))?;
/// let (tokenizer, notices) = tokenizer::from_json(&json, None)?;
/// assert_eq!(tokenizer.get_vocab_size(true), 2048);
/// assert!(notices.is_empty());
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// `tokenizer_json` is no tokenizer, or one that would do harm: take all memory, or fail on a text.
pub fn from_json(
    tokenizer_json: &[u8],
    tokenizer_config_json: Option<&[u8]>,
) -> Result<(Tokenizer, Vec<String>)> {
    check::check(tokenizer_json)?;
    let mut tokenizer = Tokenizer::from_bytes(tokenizer_json).map_err(|e| failed(&*e))?;
    check::check_read(&tokenizer)?;
    tokenizer.with_truncation(None).map_err(|e| failed(&*e))?;
    tokenizer.with_padding(None);
    let mut notices = Vec::new();
    if let Some(json) = tokenizer_config_json {
        match TokenizerConfig::from_json(json) {
            Ok(config) => config.apply(&mut tokenizer, &mut notices)?,
            Err(e) => notices.push(format!("{e}: what it says about tokens is not used")),
        }
    }
    Ok((tokenizer, notices.iter().map(|notice| plain(notice)).collect()))
}

/// The tokens of a text that the model is to continue: see the rule for prompts [above](self).
///
/// ```
/// use candle_sparse_models::{files::ModelFiles, tokenizer::prompt_tokens};
///
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// let tokenizer = ModelFiles::from_folder(folder)?.load_tokenizer()?;
/// let tokens = prompt_tokens(&tokenizer, "Once upon a time")?;
/// // No end token follows the text: it is to be continued.
/// assert!(tokens.len() > 1 && tokens.last() != Some(&1));
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// What the tokenizer cannot encode.
pub fn prompt_tokens(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let plain = encode(tokenizer, text, false)?;
    let first = frame(tokenizer)?.first;
    Ok(if plain.starts_with(&first) { plain } else { [first, plain].concat() })
}

pub(crate) fn encode(tokenizer: &Tokenizer, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
    let encoding = tokenizer.encode(text, add_special_tokens).map_err(|e| failed(&*e))?;
    Ok(encoding.get_ids().to_vec())
}

fn failed(error: &(dyn core::error::Error + 'static)) -> Error {
    let text = error.to_string();
    Error::Msg(format!("the tokenizer: {}", plain(text.lines().next().unwrap_or_default())))
}
