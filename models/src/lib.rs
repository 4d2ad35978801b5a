//! Drop-in models for candle apps: change the import, keep the rest.
//!
//! `use candle_transformers::models::llama` becomes `use candle_sparse_models::llama`, and so does `mistral`. Without a profile the logits are
//! the dense model's; weights are held once, the past is never copied, and decode uses all threads.

pub mod causal_lm;
pub mod chat;
pub mod decoder;
pub mod files;
pub mod generation;
pub mod gguf;
#[cfg(feature = "hub")]
pub mod hub;
pub mod llama;
pub mod mistral;
pub mod pretrained;
pub mod quality;
pub mod quantized_llama;
#[cfg(feature = "transformers")]
pub mod quantized_mistral;
pub mod simulate;

#[cfg(feature = "calibrate")]
pub mod calibrate;
