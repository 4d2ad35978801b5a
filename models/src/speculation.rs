//! Several tokens for the price of about one: the next tokens are guessed, and verified together.
//!
//! A step that reads the model's weights for one token can read them for several. So tokens are **drafted**, cheaply, and one step
//! computes the logits after each of them. Tokens are then drawn from those logits as ever, one after the other with the same random
//! numbers; where a token is drawn that was not drafted, the rest of the draft is thrown away. The logits have the bits of steps of
//! one token, so **the text is the same, token by token, with every setting**, greedy or sampled; only its speed differs.
//!
//! Drafts come from the text itself (what followed where its last tokens stood before: copying, editing, code) and from a
//! **copy** of the same weights in fewer bits. How often they are right and what steps cost is measured while the text is written, and
//! nothing is drafted that does not pay.

mod costs;
mod drafter;
mod lookup;
mod measured;
mod speculative;

use crate::llama::Llama;
pub(crate) use costs::Costs;
pub use drafter::Decoding;
pub(crate) use drafter::{Drafter, Expected};
pub use speculative::Speculative;

/// Where drafts come from. The tokens that are written are the same with every setting.
///
/// ```
/// use candle_sparse_models::{
///     Format, KvConfig, KvDType,
///     causal_lm::LlamaSession,
///     generate::{Generate, GenerateOptions},
///     speculation::{Speculation, Speculative},
///     tokenizer::prompt_tokens,
/// };
/// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::Pretrained};
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// # let dense = candle_sparse_models::SparseConfig::default().with_mode(candle_sparse_models::FfnMode::Dense);
/// # let options = LoadOptions::default().with_sparse(dense);
/// let loaded = Pretrained::load(&ModelFiles::from_folder(folder)?, options)?;
/// let prompt = prompt_tokens(&loaded.tokenizer, "Once upon a time")?;
/// let text = |speculation| -> candle_core::Result<String> {
///     let session = LlamaSession::new(&loaded.model, KvConfig::exact(KvDType::F16));
///     let mut session = Speculative::new(session, speculation);
///     let options = GenerateOptions::of(&loaded).with_max_tokens(40);
///     session.generate(&prompt, options)?.map(|token| Ok(token?.text)).collect()
/// };
/// let copy = loaded.model.in_format(Format::Q4_0)?;
/// assert_eq!(text(Speculation::auto().with_copy(Some(copy)))?, text(Speculation::off())?);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Speculation {
    /// From the text itself.
    pub lookup: bool,
    /// From the same model in fewer bits, see [`Llama::in_format`]. It reads the keys and values of the model itself.
    pub copy: Option<Llama>,
    /// So many tokens always, whether that pays or not: for measurements. `None`: as many as pay.
    pub tokens: Option<usize>,
}

impl Speculation {
    /// The same with another [`lookup`](Self::lookup).
    #[must_use]
    pub fn with_lookup(self, lookup: bool) -> Self {
        Self { lookup, ..self }
    }

    /// The same with another [`copy`](Self::copy).
    #[must_use]
    pub fn with_copy(self, copy: Option<Llama>) -> Self {
        Self { copy, ..self }
    }

    /// The same with other [`tokens`](Self::tokens).
    #[must_use]
    pub fn with_tokens(self, tokens: Option<usize>) -> Self {
        Self { tokens, ..self }
    }

    /// No drafts.
    #[must_use]
    pub fn off() -> Self {
        Self::default()
    }

    /// Drafts from the text itself, as many as pay.
    #[must_use]
    pub fn auto() -> Self {
        Self { lookup: true, ..Self::default() }
    }

    /// Whether nothing is drafted.
    #[must_use]
    pub fn is_off(&self) -> bool {
        !self.lookup && self.copy.is_none() || self.tokens == Some(0)
    }
}

/// What became of drafts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpeculationStats {
    /// Steps of the model.
    pub steps: usize,
    /// Tokens that were drafted and verified.
    pub drafted: usize,
    /// Those of them that were written.
    pub accepted: usize,
}
