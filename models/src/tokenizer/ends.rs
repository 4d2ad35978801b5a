//! Tokens that end a text or a turn by their name.

use tokenizers::Tokenizer;

/// Texts of control tokens that end an answer whatever the model, from llama.cpp's [`special_eog_ids`] (without those that
/// only code models write between files), and of Llama 4's and Command R's vocabularies.
///
/// [`special_eog_ids`]: https://github.com/ggml-org/llama.cpp/blob/00ad355e009e83abf98f96a6ded7193b95763681/src/llama-vocab.cpp
const ENDS: [&str; 22] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<|eot|>",
    "<|END_OF_TURN_TOKEN|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<|end_of_turn|>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
];

/// The control tokens of a vocabulary whose text says that they end a text, a turn or a message, such as `<|im_end|>`: what
/// ends an answer where a model's files name fewer tokens than it was trained with.
///
/// ```
/// use candle_sparse_models::{files::ModelFiles, tokenizer::end_tokens_by_text};
/// use tokenizers::AddedToken;
///
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// let mut tokenizer = ModelFiles::from_folder(folder)?.load_tokenizer()?;
/// tokenizer.add_special_tokens([AddedToken::from("<|im_end|>", true), AddedToken::from("<|user|>", true)]);
/// let ends = end_tokens_by_text(&tokenizer);
/// assert!(ends.contains(&tokenizer.token_to_id("<|im_end|>").unwrap()));
/// assert!(!ends.contains(&tokenizer.token_to_id("<|user|>").unwrap()));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[must_use]
pub fn end_tokens_by_text(tokenizer: &Tokenizer) -> Vec<u32> {
    let added = tokenizer.get_added_tokens_decoder();
    let special = added.iter().filter(|(_, token)| token.special);
    let mut ends: Vec<(u32, &str)> = special
        .filter(|(_, token)| ENDS.contains(&token.content.as_str()))
        .map(|(&id, token)| (id, token.content.as_str()))
        .collect();
    // Models that end with these write `<|end|>` between the parts of an answer.
    let has = |text: &str| ends.iter().any(|(_, end)| *end == text);
    if has("<|return|>") && has("<|call|>") || has("<|flush|>") && has("<|calls|>") {
        ends.retain(|(_, end)| *end != "<|end|>");
    }
    ends.sort_unstable();
    ends.into_iter().map(|(id, _)| id).collect()
}
