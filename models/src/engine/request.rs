//! What an engine is asked for.

use crate::sampling::Sampling;
use candle_sparse_core::with_methods;
use core::fmt;
use std::time::Instant;

/// A request of an [`Engine`](super::Engine), for as long as the engine lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub(super) u64);

impl fmt::Display for SequenceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A prompt, and how it is to be continued.
///
/// ```
/// use candle_sparse_models::{engine::Request, sampling::Sampling};
///
/// let request = Request::new([0, 5, 6])
///     .with_sampling(Sampling::greedy())
///     .with_max_tokens(20)
///     .with_end_tokens(vec![1])
///     .with_stop(vec!["\n\n".to_string()]);
/// assert_eq!((request.prompt.len(), request.priority), (3, 0));
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Request {
    /// The tokens to be continued: at least one.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens to write at most; the context may end the text before.
    pub max_tokens: usize,
    /// Tokens that end the text; they are not part of it.
    pub end_tokens: Vec<u32>,
    /// Texts that end it where they are written, and are not part of it either. The engine needs a tokenizer for them.
    pub stop: Vec<String>,
    /// When it ends at the latest, whether it was begun or not.
    pub deadline: Option<Instant>,
    /// Larger ones come first; of equal ones clients take turns.
    pub priority: i32,
    /// Who asks: any number that is its own. Clients share the places evenly, whatever number of requests each has added.
    pub client: u64,
    /// Of each token that is written its log-probability and those of so many of the most likely ones.
    pub top_logprobs: Option<usize>,
}

impl Request {
    /// A prompt that is continued by 256 tokens at most, as [`Sampling::default`] has it.
    #[must_use]
    pub fn new(prompt: impl Into<Vec<u32>>) -> Self {
        Self {
            prompt: prompt.into(),
            sampling: Sampling::default(),
            max_tokens: 256,
            end_tokens: Vec::new(),
            stop: Vec::new(),
            deadline: None,
            priority: 0,
            client: 0,
            top_logprobs: None,
        }
    }

    /// The same with other [`end_tokens`](Self::end_tokens).
    #[must_use]
    pub fn with_end_tokens(self, end_tokens: Vec<u32>) -> Self {
        Self { end_tokens, ..self }
    }

    /// The same with other [`stop`](Self::stop) texts.
    #[must_use]
    pub fn with_stop(self, stop: Vec<String>) -> Self {
        Self { stop, ..self }
    }
}

with_methods!(Request {
    with_sampling: sampling: Sampling,
    with_max_tokens: max_tokens: usize,
    with_deadline: deadline: Option<Instant>,
    with_priority: priority: i32,
    with_client: client: u64,
    with_top_logprobs: top_logprobs: Option<usize>,
});
