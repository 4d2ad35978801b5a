//! The mathematics of candle-sparse without `std`, without allocation and without unsafe code.
//!
//! Data flows config → weights → per layer (norm → attention over the KV cache → norm → FFN) → norm → logits;
//! the modules are listed in that order. Every function in [`kernel`] is the *definition* of an operation: it is
//! what a microcontroller runs and what each SIMD level is tested against.
#![no_std]
#![forbid(unsafe_code)]

// Weights are used as they lie in a file or in flash, which is little endian.
#[cfg(target_endian = "big")]
compile_error!("candle-sparse runs on little-endian machines only: weights are read in place");

#[cfg(test)]
extern crate std;

mod settings;

pub mod error;

pub mod config;

pub mod format;

pub mod matrix;

pub mod kernel;

pub mod weights;

pub mod kv_cache;

pub mod attention;

pub mod ffn;

pub mod scratch;

pub mod forward;

pub mod sampler;

pub mod tokenizer;

pub mod image;

pub use config::{Activation, Config, Rope, RopeScaling};
pub use error::Error;
pub use format::{
    ActivationGroup, BLOCK_LEN, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1,
    BlockQ5K, BlockQ6K, BlockQ8_0, Format, GROUP_LEN, SUPER_BLOCK_LEN,
};
pub use forward::Model;
pub use kernel::{GluActivation, KernelSet, Neurons, Scalar};
pub use kv_cache::{KvCache, KvConfig};
pub use matrix::{Columns, Matrix, Rows};
pub use scratch::Scratch;
