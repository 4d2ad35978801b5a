//! How much a JSON text may take once it is read.

use candle_core::{Error, Result};

/// What one part of a text (an element, a field, a list) takes in memory at most; most take less.
const PART_BYTES: usize = 80;
/// Small files may have as many parts as they like.
const FREE_BYTES: usize = 100_000_000;

/// Refuses a JSON text that takes more memory than three times its length and 100 MB: lists of small numbers take 40 bytes for
/// each two of the text, whoever reads them.
///
/// ```
/// use candle_sparse::input::check_json;
///
/// assert!(check_json(br#"{"hidden_size": 64}"#).is_ok());
/// let numbers = format!("[{}0]", "0,".repeat(2_000_000));
/// assert!(check_json(numbers.as_bytes()).is_err());
/// ```
///
/// # Errors
/// It has too many parts. Whether it is JSON at all is not looked at.
pub fn check_json(text: &[u8]) -> Result<()> {
    let most = (3 * text.len() + FREE_BYTES) / PART_BYTES;
    let (mut parts, mut quoted, mut escaped) = (0_usize, false, false);
    for byte in text {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b',' | b':' | b'[' | b'{' if !quoted => parts += 1,
            _ => {}
        }
    }
    if parts > most {
        return Err(Error::Msg(format!(
            "has {parts} parts in {} MB, {most} are possible: no model needs so many",
            text.len() / 1_000_000
        )));
    }
    Ok(())
}
