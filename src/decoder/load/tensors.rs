//! Tensors of a checkpoint, one at a time, and the blocks that are made of them.

use crate::{
    Weight,
    decoder::{DenseFfn, Extras, Ffn, Layer, Projection, Stored},
    profile::{Fingerprint, LayerProfile},
    sparse::SparseFfn,
    weight::{Conversions, Part, Stack, format_of},
};
use candle_core::{DType, Result, bail};
use candle_nn::VarBuilder;
use candle_sparse_core::{Config, Format};

/// What `convert --neuron-major` calls up and down rows side by side, and down rows alone.
const UP_DOWN: &str = "up_down_proj";
const DOWN_ROWS: &str = "down_rows";

/// How the FFN of a block is to be held.
#[derive(Clone, Copy)]
pub(super) enum Hold<'a> {
    /// As it is.
    Dense,
    /// Neuron by neuron, judged as a profile says, or by exact zeros alone.
    Neurons(Option<&'a LayerProfile>),
}

/// Takes the tensors of a checkpoint and makes blocks of them.
pub(super) struct Loader<'a> {
    /// Names of tensors that begin with it, and a point, are the model's.
    pub(super) root: String,
    /// Of the tensors that were read.
    pub(super) fingerprint: Fingerprint,
    /// What the matrices become; `None`: what they are.
    pub(super) format: Option<Format>,
    pub(super) stored: Option<&'a Stored>,
    /// Biases are used where there are any, whatever the configuration says.
    pub(super) optional_biases: bool,
    pub(super) conversions: Conversions,
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

    pub(super) fn matrix(&mut self, vb: &VarBuilder<'_>, rows: usize, cols: usize) -> Result<Weight> {
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

    pub(super) fn layer(
        &mut self,
        c: &Config,
        extras: Extras,
        hold: Hold<'_>,
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
            ffn: match hold {
                Hold::Neurons(profile) => Ffn::Sparse(self.sparse_ffn(c, profile, &vb.pp("mlp"))?),
                Hold::Dense => Ffn::Dense(self.dense_ffn(c, extras.mlp_bias, &vb.pp("mlp"))?),
            },
        })
    }

    /// Whether a GGUF file holds an FFN as `convert --neuron-major` writes it.
    pub(super) fn is_neuron_major(&self, vb: &VarBuilder<'_>) -> bool {
        let there = |stored: &Stored, name: &str| stored.contains(&format!("{}.{name}.weight", vb.prefix()));
        self.stored.is_some_and(|stored| there(stored, UP_DOWN) || there(stored, DOWN_ROWS))
    }

    /// Whether the values of an FFN that is held neuron by neuron are others than those that are stored: blocks of the rows of
    /// `down_proj` are no blocks of its columns, so they are rounded anew.
    pub(super) fn rounds_anew(&self, vb: &VarBuilder<'_>) -> bool {
        let down = |stored: &Stored| stored.format(&format!("{}.down_proj.weight", vb.prefix()));
        let blocks = self.stored.and_then(|stored| down(stored).ok()).is_some_and(Format::is_quantized);
        blocks && !self.is_neuron_major(vb)
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
            gate_proj: c.gated_mlp.then(|| half("gate_proj")).transpose()?,
            up_proj: half("up_proj")?,
            down_proj: self.projection(vb, inner, &[("down_proj", hidden)], bias)?,
        })
    }

    pub(super) fn sparse_ffn(
        &mut self,
        c: &Config,
        profile: Option<&LayerProfile>,
        vb: &VarBuilder<'_>,
    ) -> Result<SparseFfn> {
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        let first = if c.gated_mlp { "gate_proj" } else { "up_proj" };
        if self.is_neuron_major(vb) {
            let in_order = |p: &LayerProfile| p.order.iter().enumerate().all(|(i, n)| i == *n as usize);
            if !profile.is_none_or(in_order) {
                bail!(
                    "{}: the neurons of this file stand in the order of its own profile: give no other",
                    vb.prefix()
                );
            }
            let gate = self.matrix(&vb.pp(first), inner, hidden)?;
            let (name, rows) = if c.gated_mlp { (UP_DOWN, 2 * inner) } else { (DOWN_ROWS, inner) };
            let up_down = self.matrix(&vb.pp(name), rows, hidden)?;
            return SparseFfn::new(gate, up_down, profile);
        }
        let gate = self.part(&vb.pp(first), [inner, hidden])?;
        // One format for all rows, whatever they are stored in.
        let format = gate.fitting(self.format_of(&gate), hidden);
        drop(gate);
        let mut before = 0;
        let ffn = SparseFfn::load(format, [inner, hidden], c.gated_mlp, profile, |name| {
            let shape = if name == "down_proj" { [hidden, inner] } else { [inner, hidden] };
            self.part(&vb.pp(name), shape).inspect(|part| before += part.bytes())
        })?;
        if let Some(stored) = self.stored {
            for name in [first, "up_proj"] {
                stored.release(&format!("{}.{name}.weight", vb.prefix()));
            }
        }
        let after = ffn.gate.bytes() + ffn.up_down.bytes();
        self.note_format(if c.gated_mlp { 3 } else { 2 }, hidden, before, ffn.gate.format(), after);
        Ok(ffn)
    }

    /// What became of matrices for which a format was asked.
    fn note_format(&mut self, matrices: usize, cols: usize, before: usize, got: Format, after: usize) {
        if let Some(wanted) = self.format {
            self.conversions.note(wanted, matrices, cols, before, got, after);
        }
    }
}

pub(super) fn vector(vb: &VarBuilder<'_>, n: usize, name: &str) -> Result<Vec<f32>> {
    vb.get(n, name)?.to_dtype(DType::F32)?.to_vec1()
}
