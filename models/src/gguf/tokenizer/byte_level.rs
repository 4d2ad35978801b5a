//! Byte-level vocabularies by candle's own reader, which knows fewer names of pre-tokenizers than the files use.

use super::{
    HINT,
    metadata::{fail, string},
    wrong,
};
use candle_core::{
    Result,
    quantized::{
        gguf_file::{Content, Value},
        tokenizer::TokenizerFromGguf,
    },
};
use std::collections::HashMap;
use tokenizers::{
    PreTokenizerWrapper, Tokenizer,
    pre_tokenizers::{byte_level::ByteLevel, digits::Digits, sequence::Sequence},
};

const PRE: &str = "tokenizer.ggml.pre";

/// The tokenizer of the file, with what llama.cpp knows about its pre-tokenizer ([`llama_vocab::impl::load`]).
///
/// [`llama_vocab::impl::load`]: https://github.com/ggml-org/llama.cpp/blob/eb6a99c6fab2e530114a5fc996629ba17ec85096/src/llama-vocab.cpp
pub(super) fn tokenizer(content: &Content) -> Result<Tokenizer> {
    let mut metadata = content.metadata.clone();
    let pre = string(&content.metadata, PRE)?.unwrap_or("gpt-2");
    let byte_level = || ByteLevel::new(false, true, true);
    let pre_tokenizer: Option<PreTokenizerWrapper> = match pre {
        "llama-bpe" | "llama3" | "llama-v3" => {
            metadata.insert(PRE.to_string(), Value::String("llama3".to_string()));
            for key in ["tokenizer.ggml.ignore_merges", "tokenizer.ggml.add_bos_token"] {
                metadata.entry(key.to_string()).or_insert(Value::Bool(true));
            }
            None
        }
        "qwen2" | "smaug-bpe" | "lfm2" => None,
        "smollm" => Some(Sequence::new(vec![Digits::new(true).into(), byte_level().into()]).into()),
        // candle would put a blank before each text.
        "gpt-2" => Some(byte_level().into()),
        other => {
            return fail(format!(
                "GGUF tokenizers with the pre-tokenizer '{other}' are not supported: {HINT}"
            ));
        }
    };
    let content = Content {
        magic: content.magic,
        metadata,
        tensor_infos: HashMap::new(),
        tensor_data_offset: content.tensor_data_offset,
    };
    let mut tokenizer = Tokenizer::from_gguf(&content).map_err(wrong)?;
    if pre_tokenizer.is_some() {
        tokenizer.with_pre_tokenizer(pre_tokenizer);
    }
    Ok(tokenizer)
}
