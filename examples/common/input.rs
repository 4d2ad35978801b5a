//! Texts that come from outside: files and standard input, which may hold anything.
#![allow(dead_code, reason = "not every program uses all of it")]

use super::cli::output;
use anyhow::{Context, Result};
use std::{
    io::{BufRead, Read},
    path::Path,
};

/// The next line, without its end; what is no UTF-8 is read with U+FFFD. `None` where there are no more.
pub(crate) fn line(input: &mut impl BufRead) -> Result<Option<String>> {
    let mut bytes = Vec::new();
    if input.read_until(b'\n', &mut bytes).context("cannot read standard input")? == 0 {
        return Ok(None);
    }
    let line = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    Ok(Some(lossy(line.to_vec(), "this line")))
}

/// The text of a file, or of standard input where the file is `-`; an editor's last line end is no part of it.
pub(crate) fn file(path: &Path) -> Result<String> {
    let (bytes, name) = if path.as_os_str() == "-" {
        let mut bytes = Vec::new();
        std::io::stdin().lock().read_to_end(&mut bytes).context("cannot read standard input")?;
        (bytes, "standard input".to_string())
    } else {
        (output::read(path)?, path.display().to_string())
    };
    let mut text = lossy(bytes, &name);
    if text.ends_with('\n') {
        text.pop();
    }
    Ok(text)
}

/// Bytes as text.
fn lossy(bytes: Vec<u8>, name: &str) -> String {
    String::from_utf8(bytes).unwrap_or_else(|error| {
        let at = error.utf8_error().valid_up_to();
        output::note(format_args!("{name} is no UTF-8 from byte {at} on: read with U+FFFD"));
        String::from_utf8_lossy(error.as_bytes()).into_owned()
    })
}
