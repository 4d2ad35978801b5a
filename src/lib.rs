//! candle-sparse: the candle side. Threads, weights held once, the KV cache, attention, and candle ops over them.
//!
//! The drop-in models live in `candle-sparse-models`; the kernels in [`kernels`]; the mathematics without `std` in
//! [`core`]. Modules are listed in the order in which data passes through them.

pub use candle_core as candle;
pub use candle_sparse_core as core;
pub use candle_sparse_kernels as kernels;

pub mod error;

pub mod threads;

pub mod team;

pub mod buffer;

pub mod weight;

pub mod input;

pub mod mapped_file;

pub mod loading;

pub mod save;

pub mod gate;

pub mod profile;

pub mod sparse;

#[cfg(feature = "calibrate")]
pub mod calibrate;

pub mod deadline;

pub mod kv_cache;

pub mod attention;

pub mod ops;

pub mod preset;

pub use attention::{AttentionConfig, AttentionMode};
pub use deadline::DeadlineExceeded;
pub use error::Error;
pub use gate::FastGrnnGate;
pub use kv_cache::{KvCache, KvConfig, KvDType};
pub use preset::Preset;
pub use profile::Profile;
pub use sparse::{FfnMode, Guard, Selection, SparseConfig};
pub use threads::Threads;
pub use weight::Weight;

/// Its examples are compiled and run as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
