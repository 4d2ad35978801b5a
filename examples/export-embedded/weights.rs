//! The weights of a model in the formats of an image.

use anyhow::{Context, Result};
use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use candle_sparse::{
    core::{
        Config, Format,
        image::{self, Role},
    },
    weight::Weight,
};

/// A tensor on its way into an image.
pub(crate) enum Held {
    Matrix(Role, u32, Weight),
    Vector(Role, u32, Vec<f32>),
    Bytes(Role, Vec<u8>),
}

impl Held {
    pub(crate) fn tensor(&self) -> Result<image::Tensor<'_>> {
        Ok(match self {
            Self::Matrix(role, layer, weight) => image::Tensor::matrix(*role, *layer, weight.matrix())?,
            Self::Vector(role, layer, values) => image::Tensor::vector(*role, *layer, values),
            Self::Bytes(role, bytes) => image::Tensor::bytes(*role, bytes),
        })
    }
}

/// All matrices in `format`, or in F16 where their rows are no whole blocks of it, and all norms.
pub(crate) fn weights(vb: &VarBuilder<'_>, c: &Config, tied: bool, format: Format) -> Result<Vec<Held>> {
    let mut all = Vec::new();
    let source = Source { vb, format };
    all.push(source.matrix(Role::EmbedTokens, 0, "model.embed_tokens.weight")?);
    all.push(source.vector(Role::Norm, 0, "model.norm.weight")?);
    if !tied {
        all.push(source.matrix(Role::LmHead, 0, "lm_head.weight")?);
    }
    for i in 0..c.num_hidden_layers {
        let at = |name: &str| format!("model.layers.{i}.{name}.weight");
        for (role, name) in VECTORS {
            all.push(source.vector(role, i as u32, &at(name))?);
        }
        for (role, name) in MATRICES {
            all.push(source.matrix(role, i as u32, &at(name))?);
        }
    }
    Ok(all)
}

const VECTORS: [(Role, &str); 2] = [
    (Role::InputLayernorm, "input_layernorm"),
    (Role::PostAttentionLayernorm, "post_attention_layernorm"),
];
const MATRICES: [(Role, &str); 7] = [
    (Role::QProj, "self_attn.q_proj"),
    (Role::KProj, "self_attn.k_proj"),
    (Role::VProj, "self_attn.v_proj"),
    (Role::OProj, "self_attn.o_proj"),
    (Role::GateProj, "mlp.gate_proj"),
    (Role::UpProj, "mlp.up_proj"),
    (Role::DownProj, "mlp.down_proj"),
];

struct Source<'a> {
    vb: &'a VarBuilder<'a>,
    format: Format,
}

impl Source<'_> {
    fn tensor(&self, name: &str) -> Result<Tensor> {
        self.vb.get_unchecked_dtype(name, DType::F32).with_context(|| format!("the model has no {name}"))
    }

    fn matrix(&self, role: Role, layer: u32, name: &str) -> Result<Held> {
        let t = self.tensor(name)?;
        let whole = t.dim(1)?.is_multiple_of(self.format.block_len());
        let format = if whole { self.format } else { Format::F16 };
        Ok(Held::Matrix(role, layer, Weight::from_tensor(&t, format)?))
    }

    fn vector(&self, role: Role, layer: u32, name: &str) -> Result<Held> {
        Ok(Held::Vector(role, layer, self.tensor(name)?.to_vec1()?))
    }
}
