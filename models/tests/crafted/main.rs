//! Files that somebody made to do harm. Each is refused by an error that says what is wrong, in seconds and in memory that is
//! bounded by the size of the file.
#![allow(clippy::unwrap_used, reason = "tests")]

mod chat;
mod config;
mod gguf;
mod gguf_tokenizer;
mod memory;
mod names;
mod safetensors;
mod tokenizer;

use candle_core::Result;
use std::time::{Duration, Instant};

/// More is never needed to refuse a file: three times what it has, and 100 MB.
const MOST_MEMORY: usize = 100_000_000;
const MOST_TIME: Duration = Duration::from_secs(10);
/// A message is read by a person.
const LONGEST_MESSAGE: usize = 1000;

/// Runs `read` on an input of `len` bytes within the bounds; gives what it says.
fn bounded<T>(what: &str, len: usize, read: impl FnOnce() -> T) -> T {
    let (start, (result, peak)) = (Instant::now(), memory::peak_of(read));
    let took = start.elapsed();
    assert!(took < MOST_TIME, "{what}: {took:?}");
    assert!(peak <= 3 * len + MOST_MEMORY, "{what}: {} MB for {} MB", peak / 1_000_000, len / 1_000_000);
    result
}

/// Runs `read`, which must fail within the bounds, by a message of one line that has `needle`.
fn refused<T>(what: &str, len: usize, needle: &str, read: impl FnOnce() -> Result<T>) {
    let Err(error) = bounded(what, len, read) else { panic!("{what}: is taken") };
    let error = error.to_string();
    // A backtrace is the developer's own wish.
    let error = error.lines().next().unwrap_or_default();
    assert!(error.contains(needle), "{what}: {error}");
    assert!(error.len() <= LONGEST_MESSAGE, "{what}: {} bytes: {}", error.len(), &error[..200]);
    assert!(!error.contains(char::is_control), "{what}: {error:?}");
}
