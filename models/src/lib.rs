//! Drop-in models for candle apps: change the import, keep the rest.
//!
//! `use candle_transformers::models::llama` becomes `use candle_sparse_models::llama`, and so does `mistral`. Without a profile the logits are
//! the dense model's; weights are held once, the past is never copied, and decode uses all threads.
//!
//! Settings and errors are those of `candle-sparse`, named here too, so that an app depends on this crate alone:
//!
//! ```
//! use candle_sparse_models::{
//!     AttentionConfig, AttentionMode, Error, KvConfig,
//!     files::ModelFiles,
//!     llama::{Cache, LoadOptions},
//!     pretrained::Pretrained,
//! };
//!
//! # fn main() -> candle_core::Result<()> {
//! let options = LoadOptions::default().with_attention(AttentionConfig::new(AttentionMode::Recall));
//! # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
//! let loaded = Pretrained::load(&ModelFiles::from_folder(folder)?, options)?;
//! let mut cache = Cache::of(&loaded.model, KvConfig::q4().with_max_bytes(Some(1 << 20)));
//! let mut logits = vec![0.0; loaded.config.vocab_size];
//! let full = (0..).find_map(|position| loaded.model.decode(5, position, &mut cache, &mut logits).err());
//! assert!(matches!(full.as_ref().and_then(Error::of), Some(Error::Full { .. })));
//! # Ok(())
//! # }
//! ```

#[cfg(feature = "calibrate")]
pub use candle_sparse::calibrate;
pub use candle_sparse::{
    AttentionConfig, AttentionMode, DeadlineExceeded, Error, FastGrnnGate, FfnMode, Format, Guard, KvCache,
    KvConfig, KvDType, Profile, Selection, SparseConfig, Threads, Weight, ops,
};
pub use candle_sparse::{decoder, kv_cache, quality, simulate};

pub mod causal_lm;
pub mod chat;
pub mod convert;
pub mod engine;
pub mod files;
pub mod generate;
pub mod generation;
pub mod gguf;
#[cfg(feature = "hub")]
pub mod hub;
pub mod llama;
mod message;
pub mod mistral;
pub mod pretrained;
pub mod quantized_llama;
#[cfg(feature = "transformers")]
pub mod quantized_mistral;
pub mod sampling;
pub mod speculation;
pub mod tokenizer;
