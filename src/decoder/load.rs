//! Loading a checkpoint with Hugging Face tensor names.

mod blocks;
mod profile;

use super::{Decoder, DenseFfn, Ffn, Layer, Projection, Sparse, Stored, inventory::Inventory};
use crate::{
    AttentionConfig, FfnMode, Profile, SparseConfig, Threads, Weight,
    kv_cache::Origin,
    profile::{Fingerprint, LayerProfile, fingerprint},
    sparse::{Plans, Points, SparseFfn},
    weight::{Conversions, Part, Stack, format_of},
};
use blocks::SparseBlocks;
use candle_core::{DType, Error, Result, bail};
use candle_nn::VarBuilder;
use candle_sparse_core::{Config, Format};
use candle_sparse_kernels::Kernels;
use profile::profile;
use std::sync::Arc;

/// How to hold and run a model.
#[derive(Clone, Debug, Default)]
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

/// Biases that a checkpoint must have, and head sharing, which the shape does not tell. Biases that are there are used always.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extras {
    /// q, k, v and o have biases.
    pub attention_bias: bool,
    /// gate, up and down have biases.
    pub mlp_bias: bool,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
}

/// A checkpoint with Hugging Face tensor names.
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

struct Loader<'a> {
    /// Names of tensors that begin with it, and a point, are the model's.
    root: String,
    /// Of the tensors that were read.
    fingerprint: Fingerprint,
    /// What the matrices become; `None`: what they are.
    format: Option<Format>,
    stored: Option<&'a Stored>,
    /// Biases are used where there are any, whatever the configuration says.
    optional_biases: bool,
    conversions: Conversions,
}

impl Loader<'_> {
    /// Rows that stand under a name, as they are stored.
    fn part(&mut self, vb: &VarBuilder<'_>, shape: [usize; 2]) -> Result<Part> {
        let part = match self.stored {
            Some(stored) => stored.weight(&format!("{}.weight", vb.prefix()), &shape)?.into(),
            None => vb.get((shape[0], shape[1]), "weight")?.into(),
        };
        self.note(vb, &part)?;
        Ok(part)
    }

    fn norm(&mut self, vb: &VarBuilder<'_>, n: usize) -> Result<Vec<f32>> {
        let norm = vb.get(n, "weight")?;
        self.note(vb, &norm.clone().into())?;
        norm.to_dtype(DType::F32)?.to_vec1()
    }

    fn note(&mut self, vb: &VarBuilder<'_>, part: &Part) -> Result<()> {
        let name = vb.prefix();
        let name = name.strip_prefix(&self.root).unwrap_or(&name);
        self.fingerprint.note(name.strip_prefix('.').unwrap_or(name), part, None)
    }

    /// What parts become that are to be one weight.
    fn format_of(&self, part: &Part) -> Format {
        match (self.format, part) {
            (Some(format), _) => format,
            (None, Part::Weight(w)) => w.format(),
            (None, Part::Tensor(t)) => format_of(t.dtype()).unwrap_or(Format::F32),
        }
    }

    fn matrix(&mut self, vb: &VarBuilder<'_>, rows: usize, cols: usize) -> Result<Weight> {
        let part = self.part(vb, [rows, cols])?;
        let (format, stored) = (part.fitting(self.format_of(&part), cols), part.bytes());
        if let Part::Weight(w) = &part
            && w.format() == format
        {
            self.note_format(1, cols, stored, format, stored);
            return Ok(w.clone());
        }
        let weight = Weight::stacked(format, cols, &[rows], |_| Ok(part.clone()))?;
        if let Part::Weight(w) = part {
            w.release();
        }
        self.note_format(1, cols, stored, weight.format(), weight.bytes());
        Ok(weight)
    }

    fn projection(
        &mut self,
        vb: &VarBuilder<'_>,
        cols: usize,
        parts: &[(&str, usize)],
        bias: bool,
    ) -> Result<Projection> {
        let bias = self.bias(vb, parts, bias)?;
        let weight = match self.format {
            Some(format) if self.stored.is_none() => {
                let rows: Vec<usize> = parts.iter().map(|p| p.1).collect();
                let part = |i: usize| self.part(&vb.pp(parts[i].0), [rows[i], cols]);
                let weight = Weight::stacked(format, cols, &rows, part)?;
                let stored = rows.iter().sum::<usize>() * cols * vb.dtype().size_in_bytes();
                self.note_format(parts.len(), cols, stored, weight.format(), weight.bytes());
                weight.into()
            }
            _ => {
                let parts = parts.iter().map(|(name, rows)| self.matrix(&vb.pp(name), *rows, cols));
                Stack::new(parts.collect::<Result<_>>()?)?
            }
        };
        Ok(Projection { weight, bias })
    }

    /// The biases of rows that are one matrix; where only some have one, as q, k and v may, the others have zeros.
    fn bias(&self, vb: &VarBuilder<'_>, parts: &[(&str, usize)], needed: bool) -> Result<Option<Vec<f32>>> {
        let there = |name: &str| self.optional_biases && vb.pp(name).contains_tensor("bias");
        if !needed && !parts.iter().any(|(name, _)| there(name)) {
            return Ok(None);
        }
        let all = parts.iter().map(|(name, n)| {
            if needed || there(name) { vector(&vb.pp(name), *n, "bias") } else { Ok(vec![0.0; *n]) }
        });
        Ok(Some(all.collect::<Result<Vec<_>>>()?.concat()))
    }

    fn layer(
        &mut self,
        c: &Config,
        extras: Extras,
        profile: Option<&LayerProfile>,
        vb: &VarBuilder<'_>,
    ) -> Result<Layer> {
        let attn = vb.pp("self_attn");
        let (hidden, q, kv) = (c.hidden_size, c.q_dim(), c.kv_dim());
        let qkv = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)];
        Ok(Layer {
            input_layernorm: self.norm(&vb.pp("input_layernorm"), hidden)?,
            qkv_proj: self.projection(&attn, hidden, &qkv, extras.attention_bias)?,
            o_proj: self.projection(&attn, q, &[("o_proj", hidden)], extras.attention_bias)?,
            post_attention_layernorm: self.norm(&vb.pp("post_attention_layernorm"), hidden)?,
            ffn: match profile {
                Some(profile) => Ffn::Sparse(self.sparse_ffn(c, profile, &vb.pp("mlp"))?),
                None => Ffn::Dense(self.dense_ffn(c, extras.mlp_bias, &vb.pp("mlp"))?),
            },
        })
    }

    /// Whether a GGUF file holds an FFN as `convert --neuron-major` writes it.
    fn is_neuron_major(&self, vb: &VarBuilder<'_>) -> bool {
        let name = format!("{}.up_down_proj.weight", vb.prefix());
        self.stored.is_some_and(|stored| stored.contains(&name))
    }

    fn dense_ffn(&mut self, c: &Config, bias: bool, vb: &VarBuilder<'_>) -> Result<DenseFfn> {
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        if self.is_neuron_major(vb) {
            bail!(
                "{}: up_proj and down_proj are stored neuron by neuron, for sparse use alone: load the model with the \
                 profile of its file (CANDLE_SPARSE=off is not possible here; FfnMode::Dense is)",
                vb.prefix()
            );
        }
        let mut half = |name: &str| -> Result<Projection<Weight>> {
            let bias = self.bias(vb, &[(name, inner)], bias)?;
            Ok(Projection { weight: self.matrix(&vb.pp(name), inner, hidden)?, bias })
        };
        Ok(DenseFfn {
            gate_proj: half("gate_proj")?,
            up_proj: half("up_proj")?,
            down_proj: self.projection(vb, inner, &[("down_proj", hidden)], bias)?,
        })
    }

    fn sparse_ffn(&mut self, c: &Config, profile: &LayerProfile, vb: &VarBuilder<'_>) -> Result<SparseFfn> {
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        if self.is_neuron_major(vb) {
            if !profile.order.iter().enumerate().all(|(i, n)| i == *n as usize) {
                bail!(
                    "{}: the neurons of this file stand in the order of its own profile: give no other",
                    vb.prefix()
                );
            }
            let gate = self.matrix(&vb.pp("gate_proj"), inner, hidden)?;
            let up_down = self.matrix(&vb.pp("up_down_proj"), 2 * inner, hidden)?;
            return SparseFfn::new(gate, up_down, profile);
        }
        let gate = self.part(&vb.pp("gate_proj"), [inner, hidden])?;
        // One format for all rows, whatever they are stored in.
        let format = gate.fitting(self.format_of(&gate), hidden);
        drop(gate);
        let mut before = 0;
        let ffn = SparseFfn::load(format, hidden, profile, |name| {
            let shape = if name == "down_proj" { [hidden, inner] } else { [inner, hidden] };
            self.part(&vb.pp(name), shape).inspect(|part| before += part.bytes())
        })?;
        if let Some(stored) = self.stored {
            for name in ["gate_proj", "up_proj"] {
                stored.release(&format!("{}.{name}.weight", vb.prefix()));
            }
        }
        let after = ffn.gate.bytes() + ffn.up_down.bytes();
        self.note_format(3, hidden, before, ffn.gate.format(), after);
        Ok(ffn)
    }

    /// What became of matrices for which a format was asked.
    fn note_format(&mut self, matrices: usize, cols: usize, before: usize, got: Format, after: usize) {
        if let Some(wanted) = self.format {
            self.conversions.note(wanted, matrices, cols, before, got, after);
        }
    }
}

fn vector(vb: &VarBuilder<'_>, n: usize, name: &str) -> Result<Vec<f32>> {
    vb.get(n, name)?.to_dtype(DType::F32)?.to_vec1()
}

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
        let profile = profile(vb, &mut options, &config, found, &mut notices)?;
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
            inv_freq: Arc::clone(&inv_freq),
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
            norm: vector(&vb.pp("model.norm"), hidden, "weight")?,
            lm_head,
            notices: Vec::new(),
            origin: Arc::new(origin.clone()),
        };
        let blocks = decoder.config.num_hidden_layers;
        let choice = match &profile {
            Some(profile) => {
                let source = blocks::Source { loader: &loader, vb, extras };
                SparseBlocks::choose(&source, &decoder, profile, &options.sparse)?
            }
            None => SparseBlocks { sparse: vec![false; blocks], why_not: None },
        };
        let layers = (0..blocks).map(|i| {
            let of_block = profile.as_ref().filter(|_| choice.sparse[i]).map(|p| &p.layers[i]);
            let layer =
                loader.layer(&decoder.config, extras, of_block, &vb.pp(format!("model.layers.{i}")))?;
            // With what is known so far: a profile of another model is refused before all of this one is read.
            profile.as_ref().map_or(Ok(()), |p| p.belongs_to(loader.fingerprint.numbers()))?;
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
        if let Some(points) = profile.as_deref().filter(|_| any).map(Points::from) {
            let plans = Plans::new(options.sparse, &points, decoder.layers.iter().map(|l| l.ffn.sparse()))?;
            decoder.sparse = Some(Sparse { points, plans: Arc::new(plans) });
        }
        // Who asked for all neurons knows it.
        notices.extend(choice.why_not.clone().filter(|_| options.sparse.mode != FfnMode::Dense));
        decoder.not_sparse = choice.why_not.filter(|_| !any);
        decoder.notices = notices;
        match profile.filter(|p| !p.gates.is_empty()) {
            Some(profile) => decoder.with_gates(profile.gates.clone())?.with_attention(options.attention),
            None => decoder.with_attention(options.attention),
        }
    }
}

/// What was not possible of "used where they lie".
fn copied_notice(stored: &Stored) -> Option<String> {
    let n = stored.copied();
    (n > 0).then(|| {
        format!("{n} tensors are copied: they do not lie where their type can be read (general.alignment)")
    })
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
