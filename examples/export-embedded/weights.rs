//! The weights of a model in the formats of an image.

use crate::choice;
use anyhow::{Context, Result, ensure};
use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use candle_sparse::{FfnMode, Format, profile::LayerProfile, weight::Weight};
use candle_sparse_core::{
    Config,
    image::{self, Role},
};

/// A tensor on its way into an image.
pub(crate) enum Held {
    Matrix(Role, u32, Weight),
    Vector(Role, u32, Vec<f32>),
    Bytes(Role, u32, Vec<u8>),
}

impl Held {
    pub(crate) fn tensor(&self) -> Result<image::Tensor<'_>> {
        Ok(match self {
            Self::Matrix(role, layer, weight) => image::Tensor::matrix(*role, *layer, weight.matrix())?,
            Self::Vector(role, layer, values) => image::Tensor::vector(*role, *layer, values),
            Self::Bytes(role, layer, bytes) => image::Tensor::bytes(*role, *layer, bytes),
        })
    }
}

/// How one block computes its FFN.
pub(crate) enum BlockFfn<'a> {
    /// All neurons.
    Dense,
    /// Those that the activation does not shut to an exact 0.
    ExactZero,
    /// Those that a rule of a profile chooses, at its fitted point.
    Chosen(FfnMode, &'a LayerProfile, usize),
}

/// Reads a checkpoint by names.
pub(crate) struct Source<'a> {
    pub(crate) vb: &'a VarBuilder<'a>,
    pub(crate) config: Config,
    /// Of all matrices whose rows are whole blocks of it; the others are in F16.
    pub(crate) format: Format,
}

const MATRICES: [(Role, Role, &str); 4] = [
    (Role::QProj, Role::QBias, "q_proj"),
    (Role::KProj, Role::KBias, "k_proj"),
    (Role::VProj, Role::VBias, "v_proj"),
    (Role::OProj, Role::OBias, "o_proj"),
];

impl Source<'_> {
    /// What belongs to no block.
    pub(crate) fn frame(&self, tied: bool) -> Result<Vec<Held>> {
        let mut all = vec![
            self.matrix(Role::EmbedTokens, 0, "model.embed_tokens.weight")?,
            self.vector(Role::Norm, 0, "model.norm.weight")?,
        ];
        if !tied {
            all.push(self.matrix(Role::LmHead, 0, "lm_head.weight")?);
        }
        Ok(all)
    }

    /// One block.
    pub(crate) fn block(&self, layer: u32, ffn: &BlockFfn<'_>) -> Result<Vec<Held>> {
        let at = |name: &str| format!("model.layers.{layer}.{name}");
        let mut all = vec![
            self.vector(Role::InputLayernorm, layer, &at("input_layernorm.weight"))?,
            self.vector(Role::PostAttentionLayernorm, layer, &at("post_attention_layernorm.weight"))?,
        ];
        for (role, bias, name) in MATRICES {
            all.push(self.matrix(role, layer, &at(&format!("self_attn.{name}.weight")))?);
            let name = at(&format!("self_attn.{name}.bias"));
            if self.vb.contains_tensor(&name) {
                all.push(self.vector(bias, layer, &name)?);
            }
        }
        all.extend(self.ffn(layer, ffn)?);
        Ok(all)
    }

    fn ffn(&self, layer: u32, ffn: &BlockFfn<'_>) -> Result<Vec<Held>> {
        let at = |name: &str| format!("model.layers.{layer}.mlp.{name}.weight");
        let (inner, gated) = (self.config.intermediate_size, self.config.gated_mlp);
        let own = || (0..inner as u32).collect::<Vec<_>>();
        for name in ["gate_proj", "up_proj", "down_proj"] {
            let bias = format!("model.layers.{layer}.mlp.{name}.bias");
            ensure!(!self.vb.contains_tensor(&bias), "the model has {bias}, which an image has no place for");
        }
        match ffn {
            BlockFfn::Dense if inner.is_multiple_of(self.format.block_len()) => {
                let all =
                    [(Role::GateProj, "gate_proj"), (Role::UpProj, "up_proj"), (Role::DownProj, "down_proj")];
                let there = all.into_iter().filter(|(role, _)| gated || *role != Role::GateProj);
                there.map(|(role, name)| self.matrix(role, layer, &at(name))).collect()
            }
            // Neuron by neuron every row is quantised along hidden_size, whatever the number of neurons.
            BlockFfn::Dense => self.neurons(layer, &own()),
            BlockFfn::ExactZero => {
                let mut all = self.neurons(layer, &own())?;
                all.push(choice::exact_zeros(layer));
                Ok(all)
            }
            BlockFfn::Chosen(mode, profile, point) => {
                let mut all = self.neurons(layer, &profile.order)?;
                all.extend(choice::tensors(layer, *mode, profile, *point, self.format)?);
                Ok(all)
            }
        }
    }

    /// Gates, and up row and down column of each neuron side by side, neurons in an order; without gates ups, and down columns.
    fn neurons(&self, layer: u32, order: &[u32]) -> Result<Vec<Held>> {
        let hidden = self.config.hidden_size;
        let format = self.fitting(hidden);
        let read = |name: &str| {
            self.vb.get_unchecked_dtype(&format!("model.layers.{layer}.mlp.{name}.weight"), DType::F32)
        };
        let down = || read("down_proj")?.t()?.contiguous();
        let first = if self.config.gated_mlp { "gate_proj" } else { "up_proj" };
        let gate = Weight::interleaved(format, hidden, 1, order, |_| read(first))?;
        if !self.config.gated_mlp {
            let rows = Weight::interleaved(format, hidden, 1, order, |_| down())?;
            return Ok(vec![
                Held::Matrix(Role::UpProj, layer, gate),
                Held::Matrix(Role::DownRows, layer, rows),
            ]);
        }
        let up_down = Weight::interleaved(format, hidden, 2, order, |part| match part {
            0 => read("up_proj"),
            _ => down(),
        })?;
        Ok(vec![Held::Matrix(Role::GateProj, layer, gate), Held::Matrix(Role::UpDown, layer, up_down)])
    }

    fn fitting(&self, cols: usize) -> Format {
        if cols.is_multiple_of(self.format.block_len()) { self.format } else { Format::F16 }
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        self.vb.get_unchecked_dtype(name, DType::F32).with_context(|| format!("the model has no {name}"))
    }

    fn matrix(&self, role: Role, layer: u32, name: &str) -> Result<Held> {
        let t = self.tensor(name)?;
        let format = self.fitting(t.dim(1)?);
        Ok(Held::Matrix(role, layer, Weight::from_tensor(&t, format)?))
    }

    fn vector(&self, role: Role, layer: u32, name: &str) -> Result<Held> {
        Ok(Held::Vector(role, layer, self.tensor(name)?.to_vec1()?))
    }
}
