//! The tokenizer that a GGUF file carries in its metadata.

mod byte_level;
pub(crate) mod metadata;
pub(crate) mod own;
pub(crate) mod pieces;
mod sentencepiece;
pub(crate) mod splits;
pub(crate) mod vocabulary;

use crate::tokenizer::{Frame, end_tokens_by_text};
use candle_core::{Error, Result, quantized::gguf_file::Content};
use candle_sparse::error::plain;
use metadata::{Metadata, fail, flag, id, string};
use own::Own;
use tokenizers::Tokenizer;

const HINT: &str = "give the model's tokenizer.json (`--tokenizer FILE`)";
pub(crate) const BOS: &str = "tokenizer.ggml.bos_token_id";
pub(crate) const EOS: &str = "tokenizer.ggml.eos_token_id";
pub(crate) const EOT: &str = "tokenizer.ggml.eot_token_id";
pub(crate) const EOM: &str = "tokenizer.ggml.eom_token_id";
/// The keys of tokens that end an answer: of a text, a turn and a message.
const ENDS: [&str; 3] = [EOS, EOT, EOM];

/// Builds the tokenizer of a GGUF file: `tokenizer.ggml.model` is `llama` (`SentencePiece`: Llama 1 and 2, TinyLlama,
/// Mistral 7B) or `gpt2` (byte-level: Llama 3, `SmolLM`).
///
/// ```
/// use candle_sparse_models::gguf::{GgufFile, tokenizer::tokenizer};
///
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// # let temporary = tempfile::tempdir()?;
/// # let path = temporary.path().join("tales.gguf");
/// # let files = candle_sparse_models::files::ModelFiles::from_folder(folder)?;
/// # let layout = candle_sparse_models::convert::Layout::default();
/// # candle_sparse_models::convert::GgufModel::from_files(&files, layout)?.save(&path)?;
/// let read = tokenizer(GgufFile::open(&path)?.content())?;
/// let ids = |t: &tokenizers::Tokenizer| t.encode("Once upon a time", false).expect("a text").get_ids().to_vec();
/// assert_eq!(ids(&read), ids(&files.load_tokenizer()?));
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// Another kind of tokenizer, or metadata that are missing, of another type, or contradict each other.
pub fn tokenizer(content: &Content) -> Result<Tokenizer> {
    tokenizer_and_notices(content).map(|(tokenizer, _)| tokenizer)
}

/// As [`tokenizer`], with notices of what was taken for granted where the file does not say.
///
/// ```
/// use candle_sparse_models::gguf::{GgufFile, tokenizer::tokenizer_and_notices};
///
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// # let temporary = tempfile::tempdir()?;
/// # let path = temporary.path().join("tales.gguf");
/// # let files = candle_sparse_models::files::ModelFiles::from_folder(folder)?;
/// # let layout = candle_sparse_models::convert::Layout::default();
/// # candle_sparse_models::convert::GgufModel::from_files(&files, layout)?.save(&path)?;
/// let (tokenizer, notices) = tokenizer_and_notices(GgufFile::open(&path)?.content())?;
/// assert_eq!(tokenizer.get_vocab_size(true), 2048);
/// // The file says all that is needed.
/// assert!(notices.is_empty(), "{notices:?}");
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// As [`tokenizer`].
pub fn tokenizer_and_notices(content: &Content) -> Result<(Tokenizer, Vec<String>)> {
    from_metadata(&content.metadata)
}

pub(crate) fn from_metadata(metadata: &Metadata) -> Result<(Tokenizer, Vec<String>)> {
    let Some(kind) = string(metadata, "tokenizer.ggml.model")? else {
        return fail(format!("the GGUF file has no `tokenizer.ggml.model`: {HINT}"));
    };
    for key in [BOS].into_iter().chain(ENDS) {
        metadata::token_text(metadata, key)?;
    }
    let mut notices = Vec::new();
    let tokenizer = match kind {
        "llama" => sentencepiece::tokenizer(metadata, &mut notices)?,
        "gpt2" => byte_level::tokenizer(metadata, &mut notices)?,
        other => return fail(format!("GGUF tokenizers of the kind '{other}' are not supported: {HINT}")),
    };
    if named_ends(metadata).is_empty() && end_tokens_by_text(&tokenizer).is_empty() {
        notices.push(format!("GGUF metadata: `{EOS}` is missing: no token ends an answer"));
    }
    Ok((tokenizer, notices.iter().map(|notice| plain(notice)).collect()))
}

/// What is put around texts where a file does not say.
struct Defaults {
    adds_bos: bool,
    /// The first and the last token.
    ids: [Option<u32>; 2],
}

/// Puts the tokens around texts that the file's flags ask for.
fn around_texts(
    tokenizer: &mut Tokenizer,
    metadata: &Metadata,
    defaults: &Defaults,
    notices: &mut Vec<String>,
) -> Result<()> {
    let mut wanted = |flag_key: &str, default: bool, id_key: &str, default_id: Option<u32>| {
        let said = flag(metadata, flag_key)?;
        if !said.unwrap_or(default) {
            return Ok(Vec::new());
        }
        match (id(metadata, id_key)?, default_id) {
            (Some(id), _) => Ok(vec![id]),
            (None, Some(id)) => {
                let text = tokenizer.id_to_token(id).unwrap_or_default();
                notices.push(format!("GGUF metadata: `{id_key}` is missing: '{text}' is taken"));
                Ok(vec![id])
            }
            (None, None) if said == Some(true) => {
                fail(format!("GGUF metadata: `{flag_key}` is set, `{id_key}` is missing"))
            }
            (None, None) => {
                notices.push(format!("GGUF metadata: `{id_key}` is missing: no token is put before a text"));
                Ok(Vec::new())
            }
        }
    };
    let [bos, eos] = defaults.ids;
    let first = wanted("tokenizer.ggml.add_bos_token", defaults.adds_bos, BOS, bos)?;
    let last = wanted("tokenizer.ggml.add_eos_token", false, EOS, eos)?;
    Frame { first, last }.apply(tokenizer)
}

fn named_ends(metadata: &Metadata) -> Vec<u32> {
    let mut ids: Vec<_> = ENDS.iter().filter_map(|key| id(metadata, key).ok().flatten()).collect();
    ids.extend(Own::read(metadata).unwrap_or_default().end_tokens);
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// The tokens that end a text, a turn or a message, as far as the file names them.
///
/// ```
/// use candle_sparse_models::gguf::{GgufFile, tokenizer::eos_tokens};
///
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// # let temporary = tempfile::tempdir()?;
/// # let path = temporary.path().join("tales.gguf");
/// # let files = candle_sparse_models::files::ModelFiles::from_folder(folder)?;
/// # let layout = candle_sparse_models::convert::Layout::default();
/// # candle_sparse_models::convert::GgufModel::from_files(&files, layout)?.save(&path)?;
/// assert_eq!(eos_tokens(GgufFile::open(&path)?.content()), [1]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[must_use]
pub fn eos_tokens(content: &Content) -> Vec<u32> {
    named_ends(&content.metadata)
}

fn wrong(error: impl core::fmt::Display) -> Error {
    let text = error.to_string();
    Error::Msg(format!(
        "the tokenizer in the GGUF metadata: {}",
        plain(text.lines().next().unwrap_or_default())
    ))
}
