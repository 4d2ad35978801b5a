//! Long-memory tasks with known answers, for a Llama whose weights are set by hand.
//!
//! For other tests and benches: `#[path = "<way to>/models/tests/memory/synthetic/mod.rs"] mod synthetic;`. It needs
//! `candle-core`, `candle-nn`, `candle-sparse-models` and `serde_json`.
//!
//! ```text
//! let llama = model::load()?;
//! let task = tasks::passkey(16_384, 0.5, seed);
//! let mut cache = Cache::new(true, DType::F16, &model::config(), &Device::Cpu)?;
//! let readings = ask::ask(&llama, &mut cache, &task)?;      // one per question
//! assert!(readings.iter().all(|r| r.margin > 0.0));
//! ```
#![allow(dead_code, unreachable_pub, reason = "every program that includes this uses a part of it")]
#![allow(missing_debug_implementations, clippy::unwrap_used, clippy::expect_used, reason = "tests")]

pub mod ask;
pub mod codes;
pub mod matrix;
pub mod model;
pub mod outliers;
pub mod random;
pub mod tasks;
