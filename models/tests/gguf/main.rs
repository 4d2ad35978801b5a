//! GGUF and GGML files against candle's own quantised Llama, and files that are not what they should be.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests")]

mod convert;
mod damaged;
mod files;
mod ggml;
mod logits;
mod options;
mod pretrained;
mod swap;
