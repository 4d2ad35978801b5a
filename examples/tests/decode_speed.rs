//! The unit tests of `examples/decode-speed`: an example with `test = true` is not built as a program, which
//! `examples.rs` runs.

#[allow(dead_code, reason = "tests do not enter by main")]
#[path = "../decode-speed/main.rs"]
mod program;
