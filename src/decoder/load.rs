//! Loading a checkpoint with Hugging Face tensor names.

mod blocks;
mod profile;
mod tensors;

use super::{Checkpoint, Decoder, Extras, LoadOptions, Sparse, Stored, inventory::Inventory};
use crate::{
    AttentionConfig, FfnMode,
    kv_cache::Origin,
    profile::Fingerprint,
    sparse::{ModelSelection, Points},
    weight::{Conversions, format_of},
};
use blocks::SparseBlocks;
use candle_core::{Error, Result, bail};
use candle_sparse_core::Config;
use candle_sparse_kernels::Kernels;
use profile::profile;
use std::sync::Arc;
use tensors::{Hold, Loader, vector};

impl Decoder {
    /// Loads a checkpoint with Hugging Face tensor names.
    ///
    /// Each tensor is dropped before the next is read, the largest come first: peak memory stays near the model's size.
    /// Matrices that are stored in the format they are wanted in are not copied.
    ///
    /// # Errors
    /// A bad `config`, a missing or wrong-shaped tensor (named), tensors of another model such as `q_norm` or further layers
    /// (as far as `from` can be asked), a dtype or device that is not supported, a profile that does not fit or settings
    /// without one, or a `CANDLE_SPARSE_LEVEL` that this CPU lacks.
    pub fn load(from: &Checkpoint<'_>, config: Config, extras: Extras, options: LoadOptions) -> Result<Self> {
        config.validate().map_err(|e| Error::msg(format!("config: {e}")))?;
        let kernels = Kernels::get().map_err(|e| Error::msg(e.to_string()))?;
        let Checkpoint { vb, stored, rope_freqs } = from;
        let format = match (options.format, stored, format_of(vb.dtype())) {
            (None, None, None) => {
                bail!("dtype {:?} is not supported, use F32, F16 or BF16", vb.dtype())
            }
            (None, None, of_dtype) => of_dtype,
            (wanted, _, _) => wanted,
        };
        let inventory = Inventory::of(vb, &config, extras)?;
        let mut notices = Vec::new();
        let mut options = options;
        match stored {
            // A GGUF file has no configuration that could ask for biases, and its loader refuses what it does not know.
            Some(stored) => notices.extend(copied_notice(stored)),
            None => notices.extend(inventory.notices),
        }
        let found = Extras { mlp_bias: inventory.mlp_bias, ..extras };
        let learned = profile(vb, &mut options, &config, found, &mut notices)?;
        let profile = learned.clone().filter(|p| !p.is_of_attention_alone());
        let exact_zeros = config.hidden_act.has_exact_zeros() && !found.mlp_bias;
        let mut loader = Loader {
            root: vb.prefix(),
            fingerprint: Fingerprint::default(),
            format,
            stored: stored.as_deref(),
            optional_biases: inventory.optional_biases,
            conversions: Conversions::default(),
        };
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embed_tokens = loader.matrix(&vb.pp("model.embed_tokens"), vocab, hidden)?;
        let lm_head = if extras.tie_word_embeddings {
            embed_tokens.clone()
        } else {
            loader.matrix(&vb.pp("lm_head"), vocab, hidden)?
        };
        // Sizes are now those of tensors that exist.
        let inv_freq = inv_freq(&config, rope_freqs.as_deref())?;
        let mut origin = Origin {
            interleaved: config.rope.interleaved,
            inv_freq: turned(&inv_freq, config.rope.attention_factor()),
            fingerprint: Arc::default(),
        };
        let mut decoder = Self {
            inv_freq,
            config,
            kernels,
            threads: options.threads.unwrap_or_default(),
            embed_tokens,
            layers: Arc::default(),
            sparse: None,
            not_sparse: None,
            attention: AttentionConfig::default(),
            gates: Arc::default(),
            recall_shares: Arc::default(),
            norm: vector(&vb.pp("model.norm"), hidden, "weight")?,
            lm_head,
            notices: Vec::new(),
            origin: Arc::new(origin.clone()),
        };
        let blocks = decoder.config.num_hidden_layers;
        let source = blocks::Source { loader: &loader, vb, extras };
        let choice =
            SparseBlocks::choose(&source, &decoder, profile.as_deref(), exact_zeros, &options.sparse)?;
        let layers = (0..blocks).map(|i| {
            let of_block = profile.as_ref().map(|p| &p.layers[i]);
            let hold = if choice.sparse[i] { Hold::Neurons(of_block) } else { Hold::Dense };
            let layer = loader.layer(&decoder.config, extras, hold, &vb.pp(format!("model.layers.{i}")))?;
            // With what is known so far: a profile of another model is refused before all of this one is read.
            learned.as_ref().map_or(Ok(()), |p| p.belongs_to(loader.fingerprint.numbers()))?;
            Ok(layer)
        });
        decoder.layers = layers.collect::<Result<_>>()?;
        origin.fingerprint = loader.fingerprint.numbers().into();
        decoder.origin = Arc::new(origin);
        if let Some(wanted) = options.format {
            notices.extend(loader.conversions.notices(wanted));
        }
        let forced = options.sparse.force && options.sparse.mode != FfnMode::Dense;
        let any = forced || choice.sparse.contains(&true);
        if any && (profile.is_some() || exact_zeros) {
            let points = Points::of(profile.as_deref(), exact_zeros);
            let plans =
                ModelSelection::new(options.sparse, &points, decoder.layers.iter().map(|l| l.ffn.sparse()))?;
            decoder.sparse = Some(Sparse { points, plans: Arc::new(plans) });
        }
        // Who asked for all neurons knows it.
        notices.extend(choice.why_not.clone().filter(|_| options.sparse.mode != FfnMode::Dense));
        decoder.not_sparse = choice.why_not.filter(|_| !any);
        decoder.notices = notices;
        if let Some(learned) = learned {
            decoder = decoder.with_recall_shares(learned.recall_shares.clone())?;
            if !learned.gates.is_empty() {
                decoder = decoder.with_gates(learned.gates.clone())?;
            }
        }
        decoder.with_attention(options.attention)
    }
}

/// What was not possible of "used where they lie".
fn copied_notice(stored: &Stored) -> Option<String> {
    let n = stored.copied();
    (n > 0).then(|| {
        format!("{n} tensors are copied: they do not lie where their type can be read (general.alignment)")
    })
}

/// What rotation does to keys, see [`Origin::inv_freq`].
fn turned(inv_freq: &Arc<[f32]>, attention_factor: f32) -> Arc<[f32]> {
    if attention_factor == 1.0 {
        return Arc::clone(inv_freq);
    }
    inv_freq.iter().copied().chain([attention_factor]).collect()
}

/// Angle per position of each pair of a head.
fn inv_freq(c: &Config, factors: Option<&[f32]>) -> Result<Arc<[f32]>> {
    let half = c.head_dim / 2;
    if let Some(factors) = factors
        && (factors.len() != half || !factors.iter().all(|f| f.is_finite() && *f > 0.0))
    {
        bail!("rope_freqs: {} factors, {half} positive numbers are needed", factors.len());
    }
    let factor = |i: usize| factors.map_or(1.0, |f| f[i]);
    Ok((0..half).map(|i| c.rope.inv_freq(i, c.head_dim) / factor(i)).collect())
}
