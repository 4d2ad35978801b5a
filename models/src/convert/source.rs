//! The tensors of a model in GGUF's names, layout and types.

use super::{
    GgufModel, Layout,
    metadata::{self, put},
};
use crate::gguf::{LAYER_NAMES, format, ggml_type};
use crate::{decoder::Checkpoint, llama::Config};
use candle_core::{
    Device, Result, Tensor, bail,
    quantized::{GgmlDType, QStorage, QTensor, gguf_file::Value},
};
use candle_sparse::{
    Format, Profile, Weight,
    weight::{Conversions, Part, dtype_of},
};
use std::{borrow::Cow, cell::RefCell, collections::HashMap};

/// ggml's number of its quantised blocks.
const QUANTIZATION_VERSION: u32 = 2;

/// Where the tensors come from.
pub(super) struct Source<'a> {
    pub(super) from: &'a Checkpoint<'a>,
    pub(super) config: &'a Config,
    pub(super) layout: Layout<'a>,
    /// Rows of q and k are turned with their neighbours already.
    pub(super) interleaved: bool,
    /// What became of matrices for which a format was asked.
    pub(super) conversions: RefCell<Conversions>,
}

impl Source<'_> {
    pub(super) fn model(&self, kept: HashMap<String, Value>) -> Result<GgufModel> {
        let c = self.config;
        let (table, shape) = ([c.vocab_size, c.hidden_size], c.to_core()?);
        let fingerprint = self
            .from
            .fingerprint(c.num_hidden_layers, c.hidden_size, c.intermediate_size)?
            .numbers()
            .to_vec();
        let embedding = self.quantized("model.embed_tokens", table)?;
        let metadata = metadata::metadata(kept, c, embedding.dtype(), self.layout.is_neuron_major())?;
        if self.layout.own_order && !c.hidden_act.has_exact_zeros() {
            bail!(
                "neuron-major without a profile serves activations that give exact zeros (relu, relu2, fatrelu, drelu): \
                 make a profile with `calibrate`"
            );
        }
        let mut file = GgufModel {
            metadata,
            tensors: Vec::new(),
            profile: None,
            fingerprint,
            shape,
            tokenizer: None,
            ends: None,
            notices: Vec::new(),
        };
        if let Some(profile) = self.layout.neuron_major {
            if profile.is_of_attention_alone() {
                bail!(
                    "neuron-major: the profile is of attention alone, it has no order of neurons: give one of the FFN"
                );
            }
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
        if let Some(wanted) = self.layout.format {
            file.notices = self.conversions.borrow().notices(wanted);
        }
        if file.tensors.iter().any(|(_, t)| format(t.dtype()).is_some_and(Format::is_quantized)) {
            put(&mut file.metadata, "general.quantization_version", Value::U32(QUANTIZATION_VERSION));
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
                "ffn_up_down" => {
                    if self.layout.is_neuron_major() {
                        self.neurons(i, out)?;
                    }
                    continue;
                }
                "ffn_down_rows" => continue,
                "ffn_gate" | "ffn_up" | "ffn_down" if self.layout.is_neuron_major() => continue,
                "ffn_gate" if !c.gated_mlp => continue,
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
            let needed = if gguf.starts_with("attn") { c.attention_bias } else { c.mlp_bias };
            let bias = format!("{from}.bias");
            // A GGUF file does not say which it must have.
            if self.from.vb.contains_tensor(&bias) || needed && !self.interleaved {
                let bias = self.from.vb.get(rows, &bias)?;
                let bias =
                    if turned { neighbours(&bias.reshape((rows, 1))?, heads)?.flatten_all()? } else { bias };
                out.push((format!("{to}.bias"), QTensor::quantize(&bias, GgmlDType::F32)?));
            }
        }
        Ok(())
    }

    /// The FFN of a layer, neuron-major.
    fn neurons(&self, i: usize, out: &mut Vec<(String, QTensor)>) -> Result<()> {
        let (hidden, inner) = (self.config.hidden_size, self.config.intermediate_size);
        let name = |part: &str| format!("model.layers.{i}.mlp.{part}_proj");
        let own: Vec<u32> = (0..inner as u32).collect();
        let order = self.layout.neuron_major.map_or(&own, |profile| &profile.layers[i].order);
        // Without a gate up stands in its place, and down alone.
        let (first, rest, parts) =
            if self.config.gated_mlp { ("gate", "up_down", 2) } else { ("up", "down_rows", 1) };
        let gate = self.part(&name(first), [inner, hidden])?;
        let (format, mut before) = (self.format(&gate, hidden), gate.bytes());
        let gate = Weight::interleaved(format, hidden, 1, order, |_| Ok(gate.clone()))?;
        let up_down = Weight::interleaved(format, hidden, parts, order, |part| {
            if part + 1 < parts {
                return self.part(&name("up"), [inner, hidden]).inspect(|part| before += part.bytes());
            }
            before += self.part(&name("down"), [hidden, inner])?.bytes();
            Ok(self.floats(&name("down"), [hidden, inner])?.t()?.into())
        })?;
        self.note(parts + 1, hidden, before, format, gate.bytes() + up_down.bytes());
        out.push((format!("blk.{i}.ffn_{first}.weight"), to_tensor(&gate)?));
        out.push((format!("blk.{i}.ffn_{rest}.weight"), to_tensor(&up_down)?));
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
                if part == "gate" && !c.gated_mlp {
                    continue;
                }
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

    fn format(&self, part: &Part, cols: usize) -> Format {
        match self.layout.format {
            Some(wanted) => part.fitting(wanted, cols),
            None => part.format().unwrap_or(Format::F16),
        }
    }

    fn weight(&self, part: Part, rows: usize, cols: usize) -> Result<Weight> {
        let (format, before) = (self.format(&part, cols), part.bytes());
        let weight = Weight::stacked(format, cols, &[rows], |_| Ok(part.clone()))?;
        self.note(1, cols, before, format, weight.bytes());
        Ok(weight)
    }

    fn note(&self, matrices: usize, cols: usize, before: usize, got: Format, after: usize) {
        if let Some(wanted) = self.layout.format {
            self.conversions.borrow_mut().note(wanted, matrices, cols, before, got, after);
        }
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
