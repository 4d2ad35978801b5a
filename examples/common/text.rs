//! Texts as windows of tokens.

use super::cli::input;
use anyhow::Result;
use candle_sparse_models::tokenizer::prompt_tokens;
use std::path::PathBuf;
use tokenizers::Tokenizer;

/// What separates documents in a text file.
const SEPARATOR: &str = "<|endoftext|>";
/// Shorter windows say little.
const SHORTEST: usize = 32;

/// The texts as windows of at most `context` tokens; none spans two documents, each begins as the tokenizer begins a text.
pub(crate) fn windows(tokenizer: &Tokenizer, paths: &[PathBuf], context: usize) -> Result<Vec<Vec<u32>>> {
    // No end token: what goes on behind a window is text.
    let start = prompt_tokens(tokenizer, "")?;
    let mut all = Vec::new();
    for path in paths {
        let text = input::text(path)?;
        for document in text.split(SEPARATOR) {
            let ids = prompt_tokens(tokenizer, document.trim())?;
            let ids = ids.strip_prefix(start.as_slice()).unwrap_or(&ids);
            for piece in ids.chunks(context - start.len()).filter(|p| p.len() >= SHORTEST) {
                all.push([&start, piece].concat());
            }
        }
    }
    Ok(all)
}

/// Whole windows until they hold `tokens`, spread over all.
pub(crate) fn some(windows: &[Vec<u32>], tokens: usize) -> Vec<Vec<u32>> {
    let all: usize = windows.iter().map(Vec::len).sum();
    if all <= tokens {
        return windows.to_vec();
    }
    let share = tokens as f64 / all as f64;
    let chosen = |i: usize| ((i + 1) as f64 * share) as usize > (i as f64 * share) as usize;
    windows.iter().enumerate().filter(|(i, _)| chosen(*i)).map(|(_, w)| w.clone()).collect()
}
