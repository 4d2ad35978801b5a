//! The tokenizer that a GGUF file carries in its metadata.

mod byte_level;
pub(crate) mod metadata;
mod sentencepiece;

use candle_core::{Error, Result, quantized::gguf_file::Content};
use metadata::{fail, id, string};
use tokenizers::Tokenizer;

const HINT: &str = "give the model's tokenizer.json (`--tokenizer FILE`)";
const BOS: &str = "tokenizer.ggml.bos_token_id";
const EOS: &str = "tokenizer.ggml.eos_token_id";
/// The keys of tokens that end an answer: of a text, a turn and a message.
const ENDS: [&str; 3] = [EOS, "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

/// Builds the tokenizer of a GGUF file: `tokenizer.ggml.model` is `llama` (`SentencePiece`: Llama 1 and 2, TinyLlama,
/// Mistral 7B) or `gpt2` (byte-level: Llama 3, `SmolLM`).
///
/// # Errors
/// Another kind of tokenizer, or metadata that are missing, of another type, or contradict each other.
pub fn tokenizer(content: &Content) -> Result<Tokenizer> {
    let Some(kind) = string(&content.metadata, "tokenizer.ggml.model")? else {
        return fail(format!("the GGUF file has no `tokenizer.ggml.model`: {HINT}"));
    };
    for key in [BOS].into_iter().chain(ENDS) {
        metadata::token_text(&content.metadata, key)?;
    }
    match kind {
        "llama" => sentencepiece::tokenizer(&content.metadata),
        "gpt2" => byte_level::tokenizer(content),
        other => fail(format!("GGUF tokenizers of the kind '{other}' are not supported: {HINT}")),
    }
}

/// The tokens that end a text, a turn or a message, as far as the file names them.
#[must_use]
pub fn eos_tokens(content: &Content) -> Vec<u32> {
    let mut ids: Vec<_> = ENDS.iter().filter_map(|key| id(&content.metadata, key).ok().flatten()).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn wrong(error: impl core::fmt::Display) -> Error {
    let text = error.to_string();
    Error::Msg(format!("the tokenizer in the GGUF metadata: {}", text.lines().next().unwrap_or_default()))
}
