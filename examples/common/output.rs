//! What programs say: their work on standard output, everything else on standard error.
//!
//! `print!` and its like panic where nobody reads any more. Here a closed standard error is ignored, since notes are not the
//! work, and a closed standard output ends the program as quietly as `head` ends `cat`.
#![allow(dead_code, reason = "not every program uses all of it")]

use anyhow::{Error, Result};
use std::{
    collections::BTreeSet,
    fmt::Display,
    io::{self, Write},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

/// The exit code of a shell's pipeline for a program that a closed pipe has ended.
const CLOSED_PIPE: u8 = 128 + 13;
/// The exit code for a program that Ctrl-C has ended.
pub(crate) const INTERRUPTED: u8 = 128 + 2;
/// The exit code for what the user can mend.
pub(crate) const FAILED: u8 = 2;

static QUIET: AtomicBool = AtomicBool::new(false);
/// Those that were said.
static NOTES: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// The program ends with this exit code, and all that is to be said of it was said.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("ended with exit code {0}")]
pub(crate) struct Ended(pub(crate) u8);

/// Whether an error is [`Ended`], and how.
pub(crate) fn ended(error: &Error) -> Option<Ended> {
    error.chain().find_map(|cause| {
        let inside = cause.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        cause.downcast_ref().or_else(|| inside?.downcast_ref()).copied()
    })
}

/// From now on nothing but errors goes to standard error.
pub(crate) fn be_quiet() {
    QUIET.store(true, Ordering::Relaxed);
}

/// Something to know, once, on standard error.
pub(crate) fn note(text: impl Display) {
    let text = text.to_string();
    if NOTES.lock().unwrap_or_else(PoisonError::into_inner).insert(text.clone()) {
        status(format_args!("note: {text}"));
    }
}

/// A line on standard error.
pub(crate) fn status(text: impl Display) {
    aside(format_args!("{text}\n"));
}

/// Text on standard error, without a line's end.
pub(crate) fn aside(text: impl Display) {
    if !QUIET.load(Ordering::Relaxed) {
        ignore(format_args!("{text}"));
    }
}

/// What went wrong, on standard error.
pub(crate) fn error(text: impl Display) {
    ignore(format_args!("error: {text}\n"));
}

/// One write, so that lines of several programs do not mix; whether anybody reads it does not matter.
fn ignore(text: std::fmt::Arguments<'_>) {
    let _ = io::stderr().write_all(text.to_string().as_bytes());
}

/// An error in one line: candle appends a backtrace to its messages where `RUST_BACKTRACE` is set.
pub(crate) fn one_line(error: &Error) -> String {
    let texts: Vec<_> = error.chain().map(ToString::to_string).collect();
    let mut causes: Vec<_> = texts.iter().filter_map(|text| text.lines().next()).collect();
    causes.dedup();
    causes.join(": ")
}

/// Standard output, whose errors say what is to become of the program.
#[derive(Debug)]
pub(crate) struct Stdout(io::StdoutLock<'static>);

/// Standard output.
pub(crate) fn stdout() -> Stdout {
    Stdout(io::stdout().lock())
}

/// Text on standard output, now.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut out = stdout();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// A line on standard output, now.
pub(crate) fn line(text: impl Display) -> Result<()> {
    print(&format!("{text}\n"))
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes).map_err(named)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().map_err(named)
    }
}

fn named(error: io::Error) -> io::Error {
    match error.kind() {
        // What a caller of `write_all` tries again.
        io::ErrorKind::Interrupted => error,
        io::ErrorKind::BrokenPipe => io::Error::other(Ended(CLOSED_PIPE)),
        kind => io::Error::new(kind, format!("cannot write to standard output: {error}")),
    }
}
