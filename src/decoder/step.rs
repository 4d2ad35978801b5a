//! What a forward call is given: tokens or embeddings, their place, working memory.

use super::{SparseStats, decode, prefill, state};
use crate::attention::Plan;
use std::time::Duration;

/// Working memory of a step; grows to the largest step and stays.
#[derive(Default)]
pub struct Scratch {
    pub(super) prefill: prefill::Scratch,
    pub(super) decode: decode::Scratch,
    pub(super) state: state::State,
    pub(super) plan: Plan,
    pub(super) time_limit: Option<Duration>,
}

impl Scratch {
    /// What the sparse FFNs did, see [`SparseStats`].
    #[must_use]
    pub fn sparse_stats(&self) -> SparseStats {
        self.state.stats()
    }

    /// How long a step may take; `None`: as long as it takes.
    pub fn set_time_limit(&mut self, limit: Option<Duration>) {
        self.time_limit = limit;
    }

    /// Begins to count anew; what the guard has learned stays.
    pub fn reset_sparse_stats(&mut self) {
        self.state.reset();
    }
}

impl core::fmt::Debug for Scratch {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Scratch").finish_non_exhaustive()
    }
}

impl Clone for Scratch {
    /// A clone starts without working memory; only the state of the sparse FFNs outlives a step.
    fn clone(&self) -> Self {
        Self { state: self.state.clone(), time_limit: self.time_limit, ..Self::default() }
    }
}

/// What enters the first layer.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Token ids `[batch, seq_len]`.
    Ids(&'a [u32]),
    /// Embeddings `[batch, seq_len, hidden_size]`.
    Embeddings(&'a [f32]),
}

/// For which positions logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// The last of each sequence: `[batch, vocab_size]`.
    Last,
    /// All: `[batch, seq_len, vocab_size]`.
    All,
}

/// One forward call: `batch` sequences of `seq_len` tokens from position `index_pos`.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Sequences.
    pub batch: usize,
    /// Tokens per sequence.
    pub seq_len: usize,
    /// Position of the first token of each.
    pub index_pos: usize,
}
