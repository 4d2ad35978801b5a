//! Tokens to text, as they come.

use super::{Kind, Tokenizer};
use core::fmt::{Result, Write};

/// The text of tokens as they come: bytes that make no character are U+FFFD, and nothing is an error.
///
/// All pieces together, [`Self::finish`] included, are the text of all tokens, without special ones. A piece waits only for
/// the rest of its last character.
#[derive(Clone, Copy, Debug)]
pub struct TextStream {
    /// The beginning of a character.
    pending: [u8; 4],
    len: usize,
    /// Whether no byte came yet.
    at_start: bool,
}

impl Default for TextStream {
    fn default() -> Self {
        Self { pending: [0; 4], len: 0, at_start: true }
    }
}

impl TextStream {
    /// Writes the text that this token completes, maybe none.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn push(&mut self, tokenizer: &Tokenizer<'_>, id: u32, out: &mut impl Write) -> Result {
        let Some(token) = tokenizer.token(id).filter(|_| !tokenizer.is_special(id)) else { return Ok(()) };
        let Kind::Pieces { strip, .. } = tokenizer.parts.kind else {
            return token.iter().try_for_each(|&byte| self.byte(byte, false, out));
        };
        if let Some(byte) = byte_of(token).filter(|b| tokenizer.parts.bytes[usize::from(*b)] == id) {
            return self.byte(byte, strip, out);
        }
        let mut rest = token;
        while let Some((&byte, behind)) = rest.split_first() {
            let blank = rest.strip_prefix("\u{2581}".as_bytes());
            self.byte(if blank.is_some() { b' ' } else { byte }, strip, out)?;
            rest = blank.unwrap_or(behind);
        }
        Ok(())
    }

    /// Writes U+FFFD for a character that did not come to its end.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn finish(self, out: &mut impl Write) -> Result {
        if self.len > 0 { out.write_char(char::REPLACEMENT_CHARACTER) } else { Ok(()) }
    }

    fn byte(&mut self, byte: u8, strip: bool, out: &mut impl Write) -> Result {
        if core::mem::take(&mut self.at_start) && strip && byte == b' ' {
            return Ok(());
        }
        // A character has at most four bytes, and what cannot become one is taken out below: there is always room.
        self.pending[self.len] = byte;
        self.len += 1;
        while self.len > 0 {
            let done = match core::str::from_utf8(&self.pending[..self.len]) {
                Ok(text) => {
                    out.write_str(text)?;
                    self.len
                }
                Err(e) => match e.error_len() {
                    None => break,
                    Some(bad) => {
                        out.write_char(char::REPLACEMENT_CHARACTER)?;
                        bad
                    }
                },
            };
            self.pending.copy_within(done..self.len, 0);
            self.len -= done;
        }
        Ok(())
    }
}

/// The byte of a token such as `<0x0A>`.
fn byte_of(token: &[u8]) -> Option<u8> {
    let digits = token.strip_prefix(b"<0x")?.strip_suffix(b">").filter(|digits| digits.len() == 2)?;
    u8::from_str_radix(core::str::from_utf8(digits).ok()?, 16).ok()
}
