//! Loading a checkpoint with Hugging Face tensor names.

use super::{Decoder, DenseFfn, Ffn, Layer, Projection, Sparse, Stored};
use candle_core::{DType, Error, Result, bail};
use candle_nn::VarBuilder;
use candle_sparse::{
    AttentionConfig, FfnMode, Profile, SparseConfig, Threads, Weight,
    core::{Config, Format},
    kernels::Kernels,
    kv_cache::Origin,
    profile::{Fingerprint, LayerProfile, fingerprint},
    sparse::{self, Plans, Points, SparseFfn},
    weight::{Part, Stack, format_of},
};
use std::sync::Arc;

/// How to hold and run a model.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// Format of the projections and the embedding; `None` keeps the dtype of the `VarBuilder`.
    pub format: Option<Format>,
    /// Copies the weights of a mapped file into memory of our own, in huge pages where the system has them: loading reads the
    /// whole file, decode may be faster. The memory in use is the same, but no longer shared with other processes.
    pub copy_mapped: bool,
    /// Threads to use; `None` uses all of candle's pool.
    pub threads: Option<Threads>,
    /// What calibration learned: FFNs are held so that neurons can be left out. `None` takes the profile among the tensors
    /// of the checkpoint, if there is one; `CANDLE_SPARSE=off` ignores both.
    pub profile: Option<Arc<Profile>>,
    /// Which neurons are left out.
    pub sparse: SparseConfig,
    /// What a token reads of its past; gated attention takes the gates of the profile.
    pub attention: AttentionConfig,
}

/// Biases and head sharing of a checkpoint, which the shape does not tell.
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
            all.note(name.strip_suffix(".weight").unwrap_or(name), &weight.clone().into(), None)?;
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
    copy_mapped: bool,
    notices: &'a mut Vec<String>,
}

impl Loader<'_> {
    /// Rows that stand under a name, as they are stored.
    fn part(&mut self, vb: &VarBuilder<'_>, shape: [usize; 2]) -> Result<Part> {
        let part = match self.stored {
            Some(stored) => stored.weight(&format!("{}.weight", vb.prefix()), &shape)?.clone().into(),
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
        let format = self.format_of(&part);
        if let Part::Weight(w) = &part
            && w.format() == format
            && !(self.copy_mapped && w.is_mapped())
        {
            return Ok(w.clone());
        }
        let weight = Weight::stacked(format, cols, &[rows], |_| Ok(part.clone()))?;
        if let Part::Weight(w) = part {
            w.release();
        }
        self.note_format(&vb.prefix(), cols, weight.format());
        Ok(weight)
    }

    fn projection(
        &mut self,
        vb: &VarBuilder<'_>,
        cols: usize,
        parts: &[(&str, usize)],
        bias: bool,
    ) -> Result<Projection> {
        let bias = bias.then(|| -> Result<Vec<f32>> {
            let all = parts.iter().map(|(name, n)| vector(&vb.pp(name), *n, "bias"));
            Ok(all.collect::<Result<Vec<_>>>()?.concat())
        });
        let weight = match self.format {
            Some(format) if self.stored.is_none() => {
                let rows: Vec<usize> = parts.iter().map(|p| p.1).collect();
                let part = |i: usize| self.part(&vb.pp(parts[i].0), [rows[i], cols]);
                let weight = Weight::stacked(format, cols, &rows, part)?;
                self.note_format(&vb.pp(parts[0].0).prefix(), cols, weight.format());
                weight.into()
            }
            _ => {
                let parts = parts.iter().map(|(name, rows)| self.matrix(&vb.pp(name), *rows, cols));
                Stack::new(parts.collect::<Result<_>>()?)?
            }
        };
        Ok(Projection { weight, bias: bias.transpose()? })
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
            let bias = if bias { Some(vector(&vb.pp(name), inner, "bias")?) } else { None };
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
        let format = self.format_of(&gate);
        drop(gate);
        let ffn = SparseFfn::load(format, hidden, profile, |name| {
            let shape = if name == "down_proj" { [hidden, inner] } else { [inner, hidden] };
            self.part(&vb.pp(name), shape)
        })?;
        if let Some(stored) = self.stored {
            for name in ["gate_proj", "up_proj"] {
                stored.weight(&format!("{}.{name}.weight", vb.prefix()), &[inner, hidden])?.release();
            }
        }
        self.note_format(&vb.prefix(), hidden, ffn.gate.format());
        Ok(ffn)
    }

    /// A notice where rows could not be quantised.
    fn note_format(&mut self, name: &str, cols: usize, got: Format) {
        if let Some(wanted) = self.format.filter(|wanted| *wanted != got) {
            let (wanted, got, block) = (wanted.name(), got.name(), wanted.block_len());
            self.notices.push(format!(
                "{name}: {cols} columns are no multiple of {block}, kept in {got} instead of {wanted}"
            ));
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
    /// A bad `config`, a missing or wrong-shaped tensor (named), a dtype or device that is not supported, a profile that
    /// does not fit or settings without one, or a `CANDLE_SPARSE_LEVEL` that this CPU lacks.
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
        let mut notices = Vec::new();
        let profile = profile(vb, &options, &config, extras, &mut notices)?;
        let mut loader = Loader {
            root: vb.prefix(),
            fingerprint: Fingerprint::default(),
            format,
            stored: stored.as_deref(),
            copy_mapped: options.copy_mapped,
            notices: &mut notices,
        };
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embed_tokens = loader.matrix(&vb.pp("model.embed_tokens"), vocab, hidden)?;
        let lm_head = if extras.tie_word_embeddings {
            embed_tokens.clone()
        } else {
            loader.matrix(&vb.pp("lm_head"), vocab, hidden)?
        };
        let mut dense = Vec::new();
        let layers: Arc<[Layer]> = (0..config.num_hidden_layers)
            .map(|i| {
                let vb = vb.pp(format!("model.layers.{i}"));
                let fixed = loader.is_neuron_major(&vb.pp("mlp"));
                let pays = |p: &&Arc<Profile>| fixed || sparse::pays(&options.sparse, p, i);
                let layer_profile = profile.as_ref().filter(pays).map(|p| &p.layers[i]);
                if profile.is_some() && layer_profile.is_none() {
                    dense.push(i);
                }
                let layer = loader.layer(&config, extras, layer_profile, &vb)?;
                // With what is known so far: a profile of another model is refused before all of this one is read.
                profile.as_ref().map_or(Ok(()), |p| p.belongs_to(loader.fingerprint.numbers()))?;
                Ok(layer)
            })
            .collect::<Result<_>>()?;
        // Sizes are now those of tensors that exist.
        let inv_freq = inv_freq(&config, rope_freqs.as_deref())?;
        let fingerprint = loader.fingerprint.numbers().into();
        let origin =
            Origin { interleaved: config.rope.interleaved, inv_freq: Arc::clone(&inv_freq), fingerprint };
        let sparse = match profile.as_deref().map(Points::from) {
            Some(points) => {
                let plans = Plans::new(options.sparse, &points, layers.iter().map(|l| l.ffn.sparse()))?;
                Some(Sparse { points, plans: Arc::new(plans) })
            }
            None => None,
        };
        if !dense.is_empty() {
            notices.push(format!(
                "blocks {dense:?}: more than {:.0} % of the neurons are expected to be active, they are dense",
                100.0 * sparse::BREAK_EVEN
            ));
        }
        let norm = vector(&vb.pp("model.norm"), hidden, "weight")?;
        let threads = options.threads.unwrap_or_default();
        let (attention, gates) = (AttentionConfig::default(), Arc::default());
        let decoder = Self {
            config,
            inv_freq,
            kernels,
            threads,
            embed_tokens,
            layers,
            sparse,
            attention,
            gates,
            norm,
            lm_head,
            notices,
            origin: Arc::new(origin),
        };
        match profile.filter(|p| !p.gates.is_empty()) {
            Some(profile) => decoder.with_gates(profile.gates.clone())?.with_attention(options.attention),
            None => decoder.with_attention(options.attention),
        }
    }
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

/// The profile to load with, checked; `None` also where the environment says so.
fn profile(
    vb: &VarBuilder<'_>,
    options: &LoadOptions,
    c: &Config,
    extras: Extras,
    notices: &mut Vec<String>,
) -> Result<Option<Arc<Profile>>> {
    options.sparse.check()?;
    if !wanted(std::env::var("CANDLE_SPARSE").ok().as_deref())? {
        if options.profile.is_some() {
            notices.push("CANDLE_SPARSE=off: the profile is ignored".to_string());
        }
        return Ok(None);
    }
    let profile = match &options.profile {
        Some(profile) => Arc::clone(profile),
        None => match Profile::from_tensors(vb)? {
            Some(profile) => Arc::new(profile),
            None if options.sparse == SparseConfig::default() || options.sparse.mode == FfnMode::Dense => {
                return Ok(None);
            }
            None => bail!(
                "sparse: settings without a profile: give LoadOptions one, or calibrate the model first"
            ),
        },
    };
    if extras.mlp_bias {
        bail!("profile: it serves FFNs without biases, the model has mlp_bias: load it without the profile");
    }
    sparse::check(&profile, c)?;
    Ok(Some(profile))
}

/// What `CANDLE_SPARSE` says.
fn wanted(value: Option<&str>) -> Result<bool> {
    match value {
        None | Some("on") => Ok(true),
        Some("off") => Ok(false),
        Some(other) => bail!("CANDLE_SPARSE={other}: say on or off, or leave it unset"),
    }
}

#[cfg(test)]
mod tests {
    use super::wanted;

    #[test]
    fn the_environment_says_on_or_off() {
        assert!(wanted(None).unwrap() && wanted(Some("on")).unwrap() && !wanted(Some("off")).unwrap());
        let err = wanted(Some("0")).unwrap_err().to_string();
        assert!(err.contains("CANDLE_SPARSE=0") && err.contains("on or off"), "{err}");
    }
}
