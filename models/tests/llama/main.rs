//! The drop-in Llama against candle's, and by itself.
#![allow(clippy::unwrap_used, reason = "tests")]

mod against_candle;
mod behaviour;
mod cases;
mod extremes;
mod origin;
mod sparse;
mod tap;
