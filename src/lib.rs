//! candle-sparse: the candle side. Weights held once, the KV cache, attention, sparse FFNs, the decoder that runs on them,
//! and candle ops over them.
//!
//! The drop-in models live in `candle-sparse-models`; the kernels in [`candle_sparse_kernels`]; the mathematics without
//! `std` in [`candle_sparse_core`]. Modules are listed in the order in which data passes through them.

pub use candle_core as candle;
pub use candle_sparse_core;
pub use candle_sparse_kernels;

mod deadline;
pub mod error;

mod team;
mod threads;
mod tuning;

pub mod buffer;

pub mod weight;

pub mod input;

pub mod mapped_file;

pub mod loading;

pub mod save;

mod gate;

pub mod profile;

pub mod sparse;

pub mod kv_cache;

pub mod attention;

pub mod decoder;

#[cfg(feature = "calibrate")]
pub mod calibrate;

pub mod quality;

pub mod simulate;

pub mod ops;

pub use attention::{AttentionConfig, AttentionMode};
pub use candle_sparse_core::{Activation, Config, Format, GluActivation};
pub use deadline::DeadlineExceeded;
pub use error::Error;
pub use gate::{CellWeight, FastGrnnGate};
pub use kv_cache::{KvCache, KvConfig, KvDType};
pub use profile::Profile;
pub use sparse::{FfnMode, Guard, Selection, SparseConfig};
pub use threads::Threads;
pub use weight::Weight;

/// Examples that are compiled and run as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
#[doc = include_str!("../docs/other-candle-models.md")]
struct Readme;
