//! What comes from outside: files and standard input, which may hold anything.
#![allow(dead_code, reason = "not every program uses all of it")]

use super::output;
use anyhow::{Context, Result};
use candle_sparse::input::Expected;
use std::{
    io::{BufRead, Read},
    path::Path,
};

/// Reads a text that is named on the command line; what plainly is something else, such as an archive, is refused.
pub(crate) fn text(path: &Path) -> Result<String> {
    Ok(lossy(candle_sparse::input::read(path, Expected::Text)?, &path.display().to_string()))
}

/// The text of a file, or of standard input where the file is `-`; an editor's last line end is no part of it.
pub(crate) fn prompt(path: &Path) -> Result<String> {
    let mut all = if path.as_os_str() == "-" {
        let mut bytes = Vec::new();
        std::io::stdin().lock().read_to_end(&mut bytes).context("cannot read standard input")?;
        lossy(bytes, "standard input")
    } else {
        text(path)?
    };
    for end in ['\n', '\r'] {
        if all.ends_with(end) {
            all.pop();
        }
    }
    Ok(all)
}

/// The bytes of the next line, without its end. `None` where there are no more.
pub(crate) fn line(input: &mut impl BufRead) -> Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    if input.read_until(b'\n', &mut line).context("cannot read standard input")? == 0 {
        return Ok(None);
    }
    for end in [b'\n', b'\r'] {
        if line.last() == Some(&end) {
            line.pop();
        }
    }
    Ok(Some(line))
}

/// Bytes as text: what is no UTF-8 is read with U+FFFD.
pub(crate) fn lossy(bytes: Vec<u8>, name: &str) -> String {
    String::from_utf8(bytes).unwrap_or_else(|error| {
        let at = error.utf8_error().valid_up_to();
        // Said for each, since several lines may be alike in this.
        output::status(format_args!("note: {name} is no UTF-8 from byte {at} on: read with U+FFFD"));
        String::from_utf8_lossy(error.as_bytes()).into_owned()
    })
}
