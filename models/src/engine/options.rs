//! What an engine is allowed to use.

use crate::{KvConfig, KvDType, decoder::Decoder, speculation::Speculation};
use candle_core::Result;
use candle_sparse::Error;
use std::path::PathBuf;

/// How an [`Engine`](super::Engine) shares its model.
///
/// ```
/// use candle_sparse_models::{KvConfig, engine::EngineOptions};
///
/// let options = EngineOptions::default()
///     .with_kv(KvConfig::tiered().with_max_bytes(Some(1 << 30)))
///     .with_max_sequences(4)
///     .with_prefix_folder(Some("prefixes".into()));
/// assert_eq!((options.max_sequences, options.prompt_chunk), (4, 128));
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct EngineOptions {
    /// How keys and values are kept; [`max_bytes`](KvConfig::max_bytes) is the budget of all sequences and of the prefix store
    /// together.
    pub kv: KvConfig,
    /// Sequences that are read and written at a time at most.
    pub max_sequences: usize,
    /// Requests that may wait for their turn at most.
    pub max_queued: usize,
    /// Positions of a prompt that are read between two tokens of the others at most.
    pub prompt_chunk: usize,
    /// Bytes of keys and values that are kept for prompts to come at most; 0: none.
    pub prefix_bytes: usize,
    /// Where they are kept across runs, too.
    pub prefix_folder: Option<PathBuf>,
    /// Bytes that its files may take at most.
    pub prefix_folder_bytes: u64,
    /// Whether keys and values of tokens that were written, not read, serve prompts to come, too: the next turn of a conversation
    /// is then read from where the answer ended. Off, a text depends on its request alone: writing rounds otherwise than
    /// reading does, and leaves neurons out where the model has a profile.
    pub reuse_written: bool,
    /// Whether tokens are guessed and verified together.
    pub speculation: Speculation,
}

impl Default for EngineOptions {
    /// 8 sequences, 64 requests that wait, chunks of 128 positions, F16 keys and values without a budget, 256 MiB for prefixes.
    fn default() -> Self {
        Self {
            kv: KvConfig::exact(KvDType::F16),
            max_sequences: 8,
            max_queued: 64,
            prompt_chunk: 128,
            prefix_bytes: 256 << 20,
            prefix_folder: None,
            prefix_folder_bytes: 4 << 30,
            reuse_written: false,
            speculation: Speculation::off(),
        }
    }
}

candle_sparse_core::with_methods!(EngineOptions {
    with_kv: kv: KvConfig,
    with_max_sequences: max_sequences: usize,
    with_max_queued: max_queued: usize,
    with_prompt_chunk: prompt_chunk: usize,
    with_prefix_bytes: prefix_bytes: usize,
    with_prefix_folder_bytes: prefix_folder_bytes: u64,
    with_reuse_written: reuse_written: bool,
});

impl EngineOptions {
    /// The same with another [`speculation`](Self::speculation).
    #[must_use]
    pub fn with_speculation(self, speculation: Speculation) -> Self {
        Self { speculation, ..self }
    }

    /// The same with another [`prefix_folder`](Self::prefix_folder).
    #[must_use]
    pub fn with_prefix_folder(self, prefix_folder: Option<PathBuf>) -> Self {
        Self { prefix_folder, ..self }
    }

    /// # Errors
    /// [`Error::Setting`]: a number that leaves nothing to do.
    pub(super) fn check(&self, decoder: &Decoder) -> Result<()> {
        let wrong = |name, problem: &str| Err(Error::Setting { name, problem: problem.into() }.into());
        if self.max_sequences == 0 {
            return wrong("max_sequences", "0 sequences: give at least 1");
        }
        if self.prompt_chunk < decoder.least_part() {
            let (given, least) = (self.prompt_chunk, decoder.least_part());
            let problem =
                format!("{given} positions: this model needs at least {least}, 128 is a good number");
            return wrong("prompt_chunk", &problem);
        }
        if self.prefix_folder.is_some() && self.prefix_bytes == 0 {
            return wrong(
                "prefix_folder",
                "without effect where prefix_bytes is 0: give bytes, or no folder",
            );
        }
        Ok(())
    }
}
