//! Models as GGUF files.

pub mod tokenizer;
