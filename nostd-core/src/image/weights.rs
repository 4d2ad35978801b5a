//! The weights of an image as the forward pass takes them.

use super::{Error, Image, Role};
use crate::{
    ffn::{FfnPlan, Learned, Predictor, Rule, SparseFfn},
    forward::Model,
    kernel::fast_grnn::Cell,
    matrix::Matrix,
    weights::{AttentionGate, DenseFfn, Ffn, GateMatrix, LayerWeights, Projection, Weights},
};

/// A block without weights, to make the buffer of [`Image::model`] of.
#[must_use]
pub fn empty_layer() -> LayerWeights<'static> {
    let none = Projection::from(Matrix::empty());
    LayerWeights {
        input_layernorm: &[],
        q_proj: none,
        k_proj: none,
        v_proj: none,
        o_proj: none,
        post_attention_layernorm: &[],
        gate: None,
        recall_shares: None,
        ffn: Ffn::Dense(DenseFfn { gate_proj: Some(none), up_proj: none, down_proj: none }),
    }
}

impl<'a> Image<'a> {
    /// The model, its weights in place, with the settings of the image; the blocks are listed in `layers`, which has as many
    /// elements as the model has blocks.
    ///
    /// # Errors
    /// Another number of elements; nothing else for an image that was opened.
    pub fn model<'b>(&self, layers: &'b mut [LayerWeights<'a>]) -> Result<Model<'b>, Error>
    where
        'a: 'b,
    {
        let (expected, got) = (self.config().num_hidden_layers, layers.len());
        if expected != got {
            return Err(Error::Layers { expected, got });
        }
        for (i, layer) in layers.iter_mut().enumerate() {
            *layer = self.layer(i)?;
        }
        let (weights, settings) = (self.with_layers(layers)?, self.settings());
        Ok(Model::with_settings(*self.config(), weights, settings.attention, settings.kv)?)
    }

    /// Checks all weights and settings, block by block: no buffer is needed.
    pub(super) fn check_weights(&self) -> Result<(), Error> {
        let (one, settings) = (crate::Config { num_hidden_layers: 1, ..*self.config() }, self.settings());
        for i in 0..self.config().num_hidden_layers {
            let layers = [self.layer(i)?];
            Model::with_settings(one, self.with_layers(&layers)?, settings.attention, settings.kv)?;
        }
        Ok(())
    }

    fn with_layers<'b>(&self, layers: &'b [LayerWeights<'a>]) -> Result<Weights<'b>, Error>
    where
        'a: 'b,
    {
        let embed_tokens = self.needed(Role::EmbedTokens, 0)?;
        Ok(Weights {
            embed_tokens,
            layers,
            norm: self.needed_vector(Role::Norm, 0)?,
            lm_head: self.matrix(Role::LmHead, 0)?.unwrap_or(embed_tokens),
        })
    }

    fn layer(&self, i: usize) -> Result<LayerWeights<'a>, Error> {
        let projection = |role, bias| -> Result<Projection<'a>, Error> {
            Ok(Projection { weight: self.needed(role, i)?, bias: self.vector(bias, i)? })
        };
        Ok(LayerWeights {
            input_layernorm: self.needed_vector(Role::InputLayernorm, i)?,
            q_proj: projection(Role::QProj, Role::QBias)?,
            k_proj: projection(Role::KProj, Role::KBias)?,
            v_proj: projection(Role::VProj, Role::VBias)?,
            o_proj: projection(Role::OProj, Role::OBias)?,
            post_attention_layernorm: self.needed_vector(Role::PostAttentionLayernorm, i)?,
            gate: self.gate(i)?,
            recall_shares: self.vector(Role::RecallShares, i)?,
            ffn: self.ffn(i)?,
        })
    }

    fn ffn(&self, i: usize) -> Result<Ffn<'a>, Error> {
        let gated = self.config().gated_mlp;
        let gate = self.needed(if gated { Role::GateProj } else { Role::UpProj }, i)?;
        let Some(up_down) = self.matrix(if gated { Role::UpDown } else { Role::DownRows }, i)? else {
            return Ok(Ffn::Dense(DenseFfn {
                gate_proj: gated.then(|| gate.into()),
                up_proj: self.needed(Role::UpProj, i)?.into(),
                down_proj: self.needed(Role::DownProj, i)?.into(),
            }));
        };
        let or_none = |role| -> Result<&'a [f32], Error> { Ok(self.vector(role, i)?.unwrap_or_default()) };
        let learned = Learned {
            gate_deviation: or_none(Role::GateDeviation)?,
            up_variance: or_none(Role::UpVariance)?,
            up_square: or_none(Role::UpSquare)?,
            importance_squared: or_none(Role::Importance)?,
        };
        let predictor = match self.matrix(Role::PredictorP, i)? {
            Some(p) => Some(Predictor {
                p,
                q_gate: self.needed(Role::PredictorGate, i)?,
                q_up: self.needed(Role::PredictorUp, i)?,
            }),
            None => None,
        };
        Ok(Ffn::Sparse(SparseFfn { gate, up_down, predictor, learned }, self.plan(i)?))
    }

    fn plan(&self, i: usize) -> Result<Option<FfnPlan<'a>>, Error> {
        let Some(bytes) = self.bytes(Role::Plan, i)? else { return Ok(None) };
        let bad = Error::Format { role: Role::Plan, layer: i, format: super::BYTES };
        let words: &[u32] = bytemuck::try_cast_slice(bytes).map_err(|_| bad)?;
        let &[rule, top, hot] = words else { return Err(bad) };
        let rule = match rule {
            0 => Rule::Gate,
            1 => Rule::LowRank,
            2 => Rule::Cascade,
            3 => Rule::ExactZero,
            _ => return Err(bad),
        };
        Ok(Some(FfnPlan {
            rule,
            top: (top as usize).checked_sub(1),
            hot: hot as usize,
            candidate: self.vector(Role::Candidate, i)?.unwrap_or_default(),
            keep: self.vector(Role::Keep, i)?.unwrap_or_default(),
            bias: match rule {
                Rule::ExactZero => &[],
                _ => self.needed_vector(Role::Skipped, i)?,
            },
        }))
    }

    fn gate(&self, i: usize) -> Result<Option<AttentionGate<'a>>, Error> {
        if self.matrix(Role::Ridge, i)?.is_none() {
            return Ok(None);
        }
        let floats = |role| self.gate_matrix(role, i);
        let numbers = |role| self.needed_vector(role, i);
        let cell = match self.vector(Role::CellZetaNu, i)? {
            Some(&[zeta, nu]) => Some(Cell::FastGrnn {
                w1: floats(Role::CellW1)?,
                w2: floats(Role::CellW2)?,
                u1: floats(Role::CellU1)?,
                u2: floats(Role::CellU2)?,
                b_z: numbers(Role::CellBz)?,
                b_h: numbers(Role::CellBh)?,
                zeta,
                nu,
            }),
            Some(_) => return Err(Error::Place { role: Role::CellZetaNu, layer: i }),
            None => None,
        };
        let readout = self.matrix(Role::Readout, i)?.map(|_| floats(Role::Readout)).transpose()?;
        let (bias, threshold) = (numbers(Role::RidgeBias)?, numbers(Role::Threshold)?);
        Ok(Some(AttentionGate { ridge: floats(Role::Ridge)?, bias, threshold, cell, readout }))
    }

    /// Matrices of gates are floats: their products take nothing else.
    fn gate_matrix(&self, role: Role, layer: usize) -> Result<GateMatrix<'a>, Error> {
        let m = self.needed(role, layer)?;
        if m.format().is_quantized() {
            return Err(Error::Format { role, layer, format: super::format_number(m.format()) });
        }
        Ok(GateMatrix::Float(m))
    }

    fn needed(&self, role: Role, layer: usize) -> Result<Matrix<'a>, Error> {
        self.matrix(role, layer)?.ok_or(Error::Missing { role, layer })
    }

    fn needed_vector(&self, role: Role, layer: usize) -> Result<&'a [f32], Error> {
        self.vector(role, layer)?.ok_or(Error::Missing { role, layer })
    }
}
