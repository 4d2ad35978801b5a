//! The errors that a caller may want to tell apart.

use crate::DeadlineExceeded;
use std::path::PathBuf;

/// Why a file, a setting or a step was refused.
///
/// Functions of this crate return candle's error, as candle's own do, so that `?` works in an app. [`Error::of`] finds the
/// reason in it:
///
/// ```
/// use candle_sparse::Error;
///
/// let error = candle_sparse::loading::SafetensorsFiles::open(&["no-such-file.safetensors"]).unwrap_err();
/// match Error::of(&error) {
///     Some(Error::File { path, .. }) => assert_eq!(path.display().to_string(), "no-such-file.safetensors"),
///     other => panic!("{other:?}"),
/// }
/// ```
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file is missing, damaged, or something else than its name says.
    #[error("{}: {}", path.display(), plain(problem))]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and how to mend it.
        problem: String,
    },
    /// A setting makes no sense, or asks for what this model or machine has not.
    #[error("{name}: {}", plain(problem))]
    Setting {
        /// The field or flag.
        name: &'static str,
        /// What is wrong with it, and what may be given.
        problem: String,
    },
    /// A profile, a saved cache or a tokenizer belongs to another model.
    #[error("{what} belongs to another model: {}", plain(problem))]
    WrongModel {
        /// What was given.
        what: &'static str,
        /// Where the two differ.
        problem: String,
    },
    /// A file did not come from the Hub.
    #[error("{}: {}", plain(what), plain(problem))]
    Download {
        /// The file, and the model it is of.
        what: String,
        /// Why, and how to mend it.
        problem: String,
    },
    /// A step needs more positions than the model's context has, or more memory than the budget allows.
    #[error("{}", plain(problem))]
    Full {
        /// What it needs, what there is, and what can be done.
        problem: String,
    },
    /// A step ran out of the time it was given.
    #[error(transparent)]
    Deadline(#[from] DeadlineExceeded),
}

impl Error {
    /// The reason that an error of candle carries, if it came from here.
    #[must_use]
    pub fn of(error: &candle_core::Error) -> Option<&Self> {
        match error {
            candle_core::Error::Io(io) => io.get_ref()?.downcast_ref(),
            candle_core::Error::WithBacktrace { inner, .. }
            | candle_core::Error::Context { inner, .. }
            | candle_core::Error::WithPath { inner, .. } => Self::of(inner),
            _ => None,
        }
    }
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        // Of candle's variants this one alone shows a foreign error as it is and gives it back: `Msg` keeps the text only,
        // `WrappedContext` prints it as `{:?}`.
        Self::Io(std::io::Error::other(error))
    }
}

/// What stands at the beginning and the end of a long message: what is wrong, and how to mend it.
const START: usize = 600;
const END: usize = 200;

/// A message that may quote a file or a server, made fit for a terminal and for a reader: control characters are written as
/// escapes, and of a long message the middle is left out.
///
/// ```
/// use candle_sparse::error::plain;
///
/// assert_eq!(plain("no tensor \u{1b}[2J"), r"no tensor \u{1b}[2J");
/// assert!(plain(&"x".repeat(10_000)).len() < 1000);
/// ```
#[must_use]
pub fn plain(message: &str) -> String {
    let mut out = String::new();
    for c in message.chars() {
        if c.is_control() { out.extend(c.escape_debug()) } else { out.push(c) }
    }
    if out.len() > START + END {
        let end = out.split_off(out.ceil_char_boundary(out.len() - END));
        out.truncate(out.floor_char_boundary(START));
        out = format!("{out} […] {end}");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_found_in_candles_error() {
        let reason = Error::Setting { name: "--window", problem: "0 is no length".into() };
        let error = candle_core::Error::from(reason).context("loading");
        assert!(matches!(Error::of(&error), Some(Error::Setting { name: "--window", .. })), "{error:?}");
        let plain =
            candle_core::Error::from(Error::Setting { name: "--window", problem: "0 is no length".into() });
        assert_eq!(plain.to_string(), "--window: 0 is no length");
        assert!(Error::of(&candle_core::Error::Msg("other".into())).is_none());
    }
}
