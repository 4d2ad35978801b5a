//! candle ops over candle-sparse weights, usable alone in any candle model.

mod low_rank_predict;
mod matmul;
mod paged_attention;
mod rows;
mod sparse_attention;
mod sparse_ffn;
mod sparse_mlp;

pub use low_rank_predict::{LowRankPredictor, Wanted, low_rank_predict};
pub use matmul::{Linear, matmul};
pub use paged_attention::PagedAttention;
pub use sparse_attention::{SparseAttention, sparse_attention};
pub use sparse_ffn::{NeuronWeights, sparse_ffn};
pub use sparse_mlp::SparseMlp;

#[cfg(test)]
mod testing;
