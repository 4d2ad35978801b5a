//! The drop-in Llama against candle's, against the core forward pass over every kernel level, and by itself.
#![allow(clippy::unwrap_used, reason = "tests")]

mod against_candle;
mod behaviour;
mod cases;
mod core_forward;
mod extremes;
mod origin;
mod sparse;
mod tap;
