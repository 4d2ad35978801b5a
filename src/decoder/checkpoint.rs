//! What a model is loaded from, and how it is to be held.

use super::Stored;
use crate::{
    AttentionConfig, Profile, SparseConfig, Threads,
    profile::{Fingerprint, fingerprint},
};
use candle_core::Result;
use candle_nn::VarBuilder;
use candle_sparse_core::Format;
use candle_sparse_core::with_methods;
use std::sync::Arc;

/// How to hold and run a model: format, threads, profile, and what is left out.
///
/// ```
/// use candle_sparse::{AttentionConfig, AttentionMode, Format, Threads, decoder::LoadOptions};
///
/// let options = LoadOptions::default()
///     .with_format(Some(Format::Q8_0))
///     .with_threads(Some(Threads::new(1)?))
///     .with_attention(AttentionConfig::new(AttentionMode::Window));
/// assert_eq!(options.format, Some(Format::Q8_0));
/// // Left as it was: the profile of the checkpoint, if there is one.
/// assert!(options.profile.is_none());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct LoadOptions {
    /// Format of the projections and the embedding; `None` keeps the dtype of the `VarBuilder`.
    pub format: Option<Format>,
    /// Threads to use; `None` uses all of candle's pool.
    pub threads: Option<Threads>,
    /// What calibration learned: FFNs are held so that neurons can be left out, where that is measured to be faster on this
    /// machine (in some 0.3 s) or [forced](SparseConfig::force). `None` takes the profile among the tensors of the
    /// checkpoint, if there is one; `CANDLE_SPARSE=off` ignores both, `CANDLE_SPARSE=always` forces both.
    pub profile: Option<Arc<Profile>>,
    /// Which neurons are left out.
    pub sparse: SparseConfig,
    /// What a token reads of its past; gated attention takes the gates of the profile.
    pub attention: AttentionConfig,
}

with_methods!(LoadOptions {
    with_format: format: Option<Format>,
    with_threads: threads: Option<Threads>,
    with_sparse: sparse: SparseConfig,
    with_attention: attention: AttentionConfig,
});

impl LoadOptions {
    /// The same with another [`profile`](Self::profile).
    #[must_use]
    pub fn with_profile(self, profile: Option<Arc<Profile>>) -> Self {
        Self { profile, ..self }
    }
}

/// What the shape of a model does not tell: biases that its checkpoint must have, and whether the head is the embedding.
///
/// Biases that a checkpoint has are used whatever this says.
///
/// ```
/// use candle_sparse::decoder::Extras;
///
/// // Llama 3.2 1B shares its embedding, Qwen 2 has biases in attention.
/// let llama = Extras::default().with_tie_word_embeddings(true);
/// let qwen = Extras::default().with_attention_bias(true);
/// assert!(llama.tie_word_embeddings && !llama.attention_bias && qwen.attention_bias);
/// ```
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct Extras {
    /// q, k, v and o have biases.
    pub attention_bias: bool,
    /// gate, up and down have biases.
    pub mlp_bias: bool,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
}

with_methods!(Extras {
    with_attention_bias: attention_bias: bool,
    with_mlp_bias: mlp_bias: bool,
    with_tie_word_embeddings: tie_word_embeddings: bool,
});

/// A checkpoint with Hugging Face tensor names.
///
/// ```
/// use candle_core::Device;
/// use candle_sparse::decoder::{Checkpoint, Decoder, Extras, LoadOptions};
///
/// # let json = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu/config.json"));
/// # let config: candle_sparse_models::llama::LlamaConfig = serde_json::from_slice(json).map_err(candle_core::Error::wrap)?;
/// # let config = config.into_config(false).to_core()?;
/// let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu/model.safetensors");
/// let checkpoint = Checkpoint::from(candle_sparse::loading::var_builder(&[path], None, &Device::Cpu)?);
/// let fingerprint = checkpoint.fingerprint(config.num_hidden_layers, config.hidden_size, config.intermediate_size)?;
///
/// let extras = Extras::default().with_tie_word_embeddings(true);
/// let decoder = Decoder::load(&checkpoint, config, extras, LoadOptions::default())?;
/// assert_eq!(fingerprint.numbers(), &*decoder.origin().fingerprint);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone)]
pub struct Checkpoint<'a> {
    /// Gives tensors as floats.
    pub vb: VarBuilder<'a>,
    /// The tensors in the form in which they are stored, where that is not what `vb` gives.
    pub stored: Option<Arc<Stored>>,
    /// Factors of the rotary frequencies, `[head_dim / 2]`: pair i turns by `inv_freq(i) / rope_freqs[i]` per position.
    pub rope_freqs: Option<Vec<f32>>,
}

impl<'a> From<VarBuilder<'a>> for Checkpoint<'a> {
    fn from(vb: VarBuilder<'a>) -> Self {
        Self { vb, stored: None, rope_freqs: None }
    }
}

impl Checkpoint<'_> {
    /// The model's [`Fingerprint`], of the tensors as they are stored.
    ///
    /// # Errors
    /// A tensor is missing.
    pub fn fingerprint(
        &self,
        num_hidden_layers: usize,
        hidden_size: usize,
        inner: usize,
    ) -> Result<Fingerprint> {
        let Some(stored) = &self.stored else {
            return Ok(Fingerprint::new(fingerprint(&self.vb, num_hidden_layers, hidden_size, inner)?));
        };
        let mut all = Fingerprint::default();
        for (name, weight) in stored.weights() {
            all.note(name.strip_suffix(".weight").unwrap_or(name), &weight?.into(), None)?;
        }
        Ok(all)
    }
}

impl core::fmt::Debug for Checkpoint<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Checkpoint").field("stored", &self.stored).finish_non_exhaustive()
    }
}
