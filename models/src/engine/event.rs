//! What an engine tells of its sequences.

use super::SequenceId;

/// Something happened to a sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Whose it is.
    pub id: SequenceId,
    /// What.
    pub kind: EventKind,
}

/// What happened to a sequence.
#[derive(Clone, Debug, PartialEq)]
pub enum EventKind {
    /// A token was written.
    Token {
        /// The token.
        id: u32,
        /// The text that it completes: empty while a character is not whole, or a stop text may be coming; always without a
        /// tokenizer.
        text: String,
        /// How likely it was, where that was [asked for](super::Request::top_logprobs).
        logprobs: Option<TokenLogprobs>,
    },
    /// Nothing follows.
    Finished(Finished),
}

/// How likely a token was, by the model's own logits: without temperature, penalty and filters.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The natural logarithm of its probability.
    pub logprob: f32,
    /// The most likely tokens and theirs, the most likely one first.
    pub top: Vec<(u32, f32)>,
}

/// How a sequence ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// Why.
    pub reason: FinishReason,
    /// Text that was held back until now.
    pub text: String,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, tokens that were not read anew since others had the same prefix.
    pub cached_tokens: usize,
    /// Tokens that were written; one that ended the text is not counted.
    pub completion_tokens: usize,
    /// What went wrong, with [`FinishReason::Failed`].
    pub error: Option<String>,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FinishReason {
    /// A token that ends texts was chosen.
    EndToken,
    /// A stop text was written.
    StopText,
    /// As many tokens were written as were asked for.
    Length,
    /// The model's context is full.
    Context,
    /// Its time was over.
    Deadline,
    /// Somebody called [`Engine::cancel`](super::Engine::cancel).
    Cancelled,
    /// An error; others went on.
    Failed,
}

impl FinishReason {
    /// A word for it: `end_token`, `stop_text`, `length`, `context`, `deadline`, `cancelled`, `failed`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::EndToken => "end_token",
            Self::StopText => "stop_text",
            Self::Length => "length",
            Self::Context => "context",
            Self::Deadline => "deadline",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        }
    }
}
