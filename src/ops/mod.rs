//! candle ops over candle-sparse weights, usable alone in any candle model.

pub mod matmul;

pub use matmul::{Linear, matmul};
