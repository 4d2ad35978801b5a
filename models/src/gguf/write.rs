//! Writing a model as a GGUF file.
//!
//! An ordinary file opens in llama.cpp and candle too; a profile stands behind the tensors, where others do not look. A
//! neuron-major file holds `ffn_up` and `ffn_down` as one tensor `ffn_up_down` `[2 · intermediate_size, hidden_size]`: up
//! row, then down column, neuron by neuron in the order of its profile, so that sparse decode uses the file in place. Others
//! cannot run it, and neither can they run activations that `llama` does not name, so such files have an architecture of
//! their own that others refuse.

mod metadata;
mod tokenizer;

use super::{
    GgufFile, PROFILE,
    shape::{ARCHITECTURES, LAYER_NAMES},
};
use crate::{decoder::Checkpoint, llama::Config};
use candle_core::{
    Device, Error, Result, Tensor, bail,
    quantized::{
        GgmlDType, QStorage, QTensor,
        gguf_file::{self, Value},
    },
};
use candle_nn::VarBuilder;
use candle_sparse::{
    Profile, Weight,
    core::{self, Format},
    sparse,
    weight::{Part, dtype_of, format_of},
};
use metadata::put;
use std::{
    borrow::Cow,
    collections::HashMap,
    io::{BufWriter, Seek, SeekFrom, Write},
    path::Path,
};
use tokenizers::Tokenizer;

/// A model in the form of a GGUF file, in memory: matrices in ggml types, norms in F32.
#[derive(Debug)]
pub struct GgufModel {
    metadata: Vec<(String, Value)>,
    tensors: Vec<(String, QTensor)>,
    /// As `safetensors`.
    profile: Option<Vec<u8>>,
    /// What a profile must have been made for.
    fingerprint: Vec<f32>,
    shape: core::Config,
}

/// How the weights are written.
#[derive(Clone, Copy, Debug, Default)]
pub struct Layout<'a> {
    /// Format of the matrices; `None`: the one that they have.
    pub format: Option<Format>,
    /// Neuron-major in the order of this profile, which is part of the file then.
    pub neuron_major: Option<&'a Profile>,
}

/// Where the tensors come from.
struct Source<'a> {
    from: &'a Checkpoint<'a>,
    config: &'a Config,
    layout: Layout<'a>,
    /// Rows of q and k are turned with their neighbours already.
    interleaved: bool,
}

impl GgufModel {
    /// A checkpoint with Hugging Face names. Tensors are taken one at a time, so that no more than one is held as floats.
    ///
    /// # Errors
    /// A tensor that is missing, a model that GGUF has no words for, or a profile that was made for another one.
    pub fn new(vb: &VarBuilder<'_>, config: &Config, layout: Layout<'_>, name: &str) -> Result<Self> {
        let from = Checkpoint::from(vb.clone());
        let source = Source { from: &from, config, layout, interleaved: false };
        let mut file = source.model(HashMap::from([("general.name".into(), Value::String(name.into()))]))?;
        if let Some(factors) = metadata::rope_freqs(config)? {
            let n = factors.len();
            let t = QTensor::quantize(&Tensor::from_vec(factors, n, &Device::Cpu)?, GgmlDType::F32)?;
            file.tensors.push(("rope_freqs.weight".into(), t));
        }
        Ok(file)
    }

    /// The model of another file with its metadata, tokenizer included. Matrices that keep their format keep their bytes.
    ///
    /// # Errors
    /// As [`Self::new`]; also a file that is neuron-major already.
    pub fn from_gguf(file: &GgufFile, layout: Layout<'_>) -> Result<Self> {
        let config = super::config(file.content())?;
        let from = file.model()?.checkpoint;
        if from.vb.contains_tensor("model.layers.0.mlp.up_down_proj.weight") {
            bail!("the file is neuron-major already: convert the one that it was made from");
        }
        let source = Source { from: &from, config: &config, layout, interleaved: true };
        let mut kept = file.content().metadata.clone();
        kept.retain(|key, _| key.starts_with("tokenizer.") || key.starts_with("general."));
        let mut model = source.model(kept)?;
        if let Some(factors) = &from.rope_freqs {
            let t = Tensor::new(factors.as_slice(), &Device::Cpu)?;
            model.tensors.push(("rope_freqs.weight".into(), QTensor::quantize(&t, GgmlDType::F32)?));
        }
        Ok(model)
    }

    /// With the tokenizer's vocabulary in the metadata.
    ///
    /// # Errors
    /// A kind of tokenizer that GGUF has no words for.
    pub fn with_tokenizer(mut self, tokenizer: &Tokenizer, config: &Config) -> Result<Self> {
        for (key, value) in tokenizer::metadata(tokenizer, config)? {
            put(&mut self.metadata, key, value);
        }
        Ok(self)
    }

    /// With a value in the metadata, such as a chat template.
    #[must_use]
    pub fn with_value(mut self, key: &str, value: Value) -> Self {
        put(&mut self.metadata, key, value);
        self
    }

    /// With a sparse profile in the file; one that is neuron-major has its own.
    ///
    /// # Errors
    /// The profile was made for another model, or cannot be written.
    pub fn with_profile(mut self, profile: &Profile) -> Result<Self> {
        if self.profile.is_none() {
            self.check(profile)?;
            self.set_profile(profile)?;
        }
        Ok(self)
    }

    /// What loading would refuse is not written.
    fn check(&self, profile: &Profile) -> Result<()> {
        sparse::check(profile, &self.shape)?;
        profile.belongs_to(&self.fingerprint)
    }

    fn set_profile(&mut self, profile: &Profile) -> Result<()> {
        let bytes = profile.to_bytes()?;
        put(&mut self.metadata, PROFILE, Value::U64(bytes.len() as u64));
        self.profile = Some(bytes);
        Ok(())
    }

    /// Whether llama.cpp and candle open the file too.
    #[must_use]
    pub fn is_ordinary(&self) -> bool {
        let ordinary = |v: &Value| matches!(v, Value::String(s) if s == ARCHITECTURES[0]);
        self.metadata.iter().any(|(k, v)| k == "general.architecture" && ordinary(v))
    }

    /// The matrices by name.
    pub fn matrices(&self) -> impl Iterator<Item = (&str, &QTensor)> {
        self.tensors.iter().filter(|(_, t)| t.rank() == 2).map(|(name, t)| (name.as_str(), t))
    }

    /// Writes the file.
    ///
    /// # Errors
    /// Writing fails.
    pub fn write(&self, out: impl Write + Seek) -> Result<()> {
        let metadata: Vec<_> = self.metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let tensors: Vec<_> = self.tensors.iter().map(|(k, t)| (k.as_str(), t)).collect();
        let mut out = BufWriter::new(out);
        gguf_file::write(&mut out, &metadata, &tensors)?;
        if let Some(profile) = &self.profile {
            out.seek(SeekFrom::End(0))?;
            out.write_all(profile)?;
        }
        Ok(out.flush()?)
    }

    /// Writes the file beside its place first, so that a run that fails leaves no half of it.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn save(&self, path: &Path) -> Result<()> {
        let part = path.with_extension("gguf.part");
        let written = || {
            self.write(std::fs::File::create(&part)?)?;
            Ok::<_, Error>(std::fs::rename(&part, path)?)
        };
        written().map_err(|e| {
            // What is there of it is of no use; that it cannot be removed either changes nothing.
            let _ = std::fs::remove_file(&part);
            Error::Msg(format!("cannot write {}: {e}", path.display()))
        })
    }
}

impl Source<'_> {
    fn model(&self, kept: HashMap<String, Value>) -> Result<GgufModel> {
        let c = self.config;
        let (table, shape) = ([c.vocab_size, c.hidden_size], c.to_core()?);
        let fingerprint = self
            .from
            .fingerprint(c.num_hidden_layers, c.hidden_size, c.intermediate_size)?
            .numbers()
            .to_vec();
        let embedding = self.quantized("model.embed_tokens", table)?;
        let metadata = metadata::metadata(kept, c, embedding.dtype(), self.layout.neuron_major.is_some())?;
        let mut file = GgufModel { metadata, tensors: Vec::new(), profile: None, fingerprint, shape };
        if let Some(profile) = self.layout.neuron_major {
            file.check(profile)?;
        }
        file.tensors.push(("token_embd.weight".into(), embedding));
        if !c.tie_word_embeddings {
            file.tensors.push(("output.weight".into(), self.quantized("lm_head", table)?));
        }
        for i in 0..c.num_hidden_layers {
            self.layer(i, &mut file.tensors)?;
        }
        self.vector("model.norm", c.hidden_size, "weight", "output_norm", &mut file.tensors)?;
        if let Some(profile) = self.layout.neuron_major {
            file.set_profile(&self.in_order(profile)?)?;
        }
        Ok(file)
    }

    fn layer(&self, i: usize, out: &mut Vec<(String, QTensor)>) -> Result<()> {
        let c = self.config;
        let (hidden, inner, core) = (c.hidden_size, c.intermediate_size, c.to_core()?);
        for (gguf, name) in LAYER_NAMES {
            let (to, from) = (format!("blk.{i}.{gguf}"), format!("model.layers.{i}.{name}"));
            let (rows, cols, heads) = match gguf {
                "attn_norm" | "ffn_norm" => {
                    self.vector(&from, hidden, "weight", &to, out)?;
                    continue;
                }
                "ffn_up_down" => match self.layout.neuron_major {
                    Some(profile) => {
                        self.neurons(i, &profile.layers[i].order, out)?;
                        continue;
                    }
                    None => continue,
                },
                "ffn_gate" | "ffn_up" | "ffn_down" if self.layout.neuron_major.is_some() => continue,
                "attn_q" => (core.q_dim(), hidden, core.num_attention_heads),
                "attn_k" => (core.kv_dim(), hidden, core.num_key_value_heads),
                "attn_v" => (core.kv_dim(), hidden, 0),
                "attn_output" => (hidden, core.q_dim(), 0),
                "ffn_down" => (hidden, inner, 0),
                _ => (inner, hidden, 0),
            };
            let turned = heads > 0 && !self.interleaved;
            let weight = if turned {
                let part = neighbours(&self.floats(&from, [rows, cols])?, heads)?;
                to_tensor(&self.weight(part.into(), rows, cols)?)?
            } else {
                self.quantized(&from, [rows, cols])?
            };
            out.push((format!("{to}.weight"), weight));
            let biased = if gguf.starts_with("attn") { c.attention_bias } else { c.mlp_bias };
            if biased {
                let bias = self.from.vb.get(rows, &format!("{from}.bias"))?;
                let bias =
                    if turned { neighbours(&bias.reshape((rows, 1))?, heads)?.flatten_all()? } else { bias };
                out.push((format!("{to}.bias"), QTensor::quantize(&bias, GgmlDType::F32)?));
            }
        }
        Ok(())
    }

    /// The FFN of a layer, neuron-major.
    fn neurons(&self, i: usize, order: &[u32], out: &mut Vec<(String, QTensor)>) -> Result<()> {
        let (hidden, inner) = (self.config.hidden_size, self.config.intermediate_size);
        let name = |part: &str| format!("model.layers.{i}.mlp.{part}_proj");
        let gate = self.part(&name("gate"), [inner, hidden])?;
        let format = self.format(&gate);
        let gate = Weight::interleaved(format, hidden, 1, order, |_| Ok(gate.clone()))?;
        let up_down = Weight::interleaved(format, hidden, 2, order, |part| match part {
            0 => self.part(&name("up"), [inner, hidden]),
            _ => Ok(self.floats(&name("down"), [hidden, inner])?.t()?.into()),
        })?;
        out.push((format!("blk.{i}.ffn_gate.weight"), to_tensor(&gate)?));
        out.push((format!("blk.{i}.ffn_up_down.weight"), to_tensor(&up_down)?));
        Ok(())
    }

    /// The profile of a file whose neurons stand in its order.
    fn in_order(&self, profile: &Profile) -> Result<Profile> {
        let (mut profile, c) = (profile.clone(), self.config);
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        let mut fingerprint = self.from.fingerprint(c.num_hidden_layers, hidden, inner)?;
        for (i, layer) in profile.layers.iter_mut().enumerate() {
            for (part, shape) in
                [("gate", [inner, hidden]), ("up", [inner, hidden]), ("down", [hidden, inner])]
            {
                let name = format!("model.layers.{i}.mlp.{part}_proj");
                fingerprint.note(&name, &self.part(&name, shape)?, Some(&layer.order))?;
            }
            layer.order = (0..layer.order.len() as u32).collect();
        }
        profile.fingerprint = fingerprint.numbers().to_vec();
        Ok(profile)
    }

    fn part(&self, name: &str, shape: [usize; 2]) -> Result<Part> {
        let name = format!("{name}.weight");
        Ok(match &self.from.stored {
            Some(stored) => stored.weight(&name, &shape)?.clone().into(),
            None => self.from.vb.get((shape[0], shape[1]), &name)?.into(),
        })
    }

    fn floats(&self, name: &str, shape: [usize; 2]) -> Result<Tensor> {
        self.from.vb.get((shape[0], shape[1]), &format!("{name}.weight"))
    }

    fn format(&self, part: &Part) -> Format {
        match (self.layout.format, part) {
            (Some(format), _) => format,
            (None, Part::Weight(w)) => w.format(),
            (None, Part::Tensor(t)) => format_of(t.dtype()).unwrap_or(Format::F16),
        }
    }

    fn weight(&self, part: Part, rows: usize, cols: usize) -> Result<Weight> {
        Weight::stacked(self.format(&part), cols, &[rows], |_| Ok(part.clone()))
    }

    fn quantized(&self, name: &str, shape: [usize; 2]) -> Result<QTensor> {
        to_tensor(&self.weight(self.part(name, shape)?, shape[0], shape[1])?)
    }

    fn vector(
        &self,
        from: &str,
        n: usize,
        kind: &str,
        to: &str,
        out: &mut Vec<(String, QTensor)>,
    ) -> Result<()> {
        let t = self.from.vb.get(n, &format!("{from}.{kind}"))?;
        out.push((format!("{to}.{kind}"), QTensor::quantize(&t, GgmlDType::F32)?));
        Ok(())
    }
}

/// Hugging Face turns row `i` of a head with row `i + head_dim / 2`, GGUF's llama with its neighbour.
fn neighbours(t: &Tensor, heads: usize) -> Result<Tensor> {
    let (rows, cols) = t.dims2()?;
    t.reshape((heads, 2, rows / heads / 2, cols))?.transpose(1, 2)?.contiguous()?.reshape((rows, cols))
}

/// Our bytes are ggml's.
fn to_tensor(weight: &Weight) -> Result<QTensor> {
    let dtype = ggml_type(weight.format());
    let shape = (weight.rows(), weight.cols());
    let plain = dtype_of(weight.format()).map(|dtype| {
        // candle makes float blocks of tensors only.
        let t = Tensor::from_raw_buffer(weight.as_bytes(), dtype, &[shape.0, shape.1], &Device::Cpu)?;
        QTensor::quantize(&t, ggml_type(weight.format()))
    });
    match plain {
        Some(t) => t,
        None => {
            QTensor::new(QStorage::from_data(Cow::Borrowed(weight.as_bytes()), &Device::Cpu, dtype)?, shape)
        }
    }
}

/// candle's name of a format.
#[must_use]
pub fn ggml_type(format: Format) -> GgmlDType {
    match format {
        Format::F32 => GgmlDType::F32,
        Format::F16 => GgmlDType::F16,
        Format::BF16 => GgmlDType::BF16,
        Format::Q8_0 => GgmlDType::Q8_0,
        Format::Q6K => GgmlDType::Q6K,
        Format::Q5_1 => GgmlDType::Q5_1,
        Format::Q5_0 => GgmlDType::Q5_0,
        Format::Q5K => GgmlDType::Q5K,
        Format::Q4_1 => GgmlDType::Q4_1,
        Format::Q4_0 => GgmlDType::Q4_0,
        Format::Q4K => GgmlDType::Q4K,
        Format::Q3K => GgmlDType::Q3K,
        Format::Q2K => GgmlDType::Q2K,
    }
}
