//! candle ops over candle-sparse weights, usable alone in any candle model.

pub mod matmul;
pub mod sparse_ffn;

pub use matmul::{Linear, matmul};
pub use sparse_ffn::{NeuronWeights, sparse_ffn};

#[cfg(test)]
mod testing;
