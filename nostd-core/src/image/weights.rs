//! The weights of an image as the forward pass takes them.

use super::{Error, Image, Role};
use crate::{
    forward::{LayerWeights, Weights},
    matrix::Matrix,
};

/// A block without weights, to make the buffer of [`Image::weights`] of.
#[must_use]
pub fn empty_layer() -> LayerWeights<'static> {
    let none = Matrix::empty();
    LayerWeights {
        input_layernorm: &[],
        q_proj: none,
        k_proj: none,
        v_proj: none,
        o_proj: none,
        post_attention_layernorm: &[],
        gate_proj: none,
        up_proj: none,
        down_proj: none,
    }
}

impl<'a> Image<'a> {
    /// The weights, in place; the blocks are listed in `layers`, which has as many elements as the model has blocks.
    ///
    /// # Errors
    /// Another number of elements; nothing else for an image that was opened.
    pub fn weights<'b>(&self, layers: &'b mut [LayerWeights<'a>]) -> Result<Weights<'b>, Error>
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
        self.with_layers(layers)
    }

    /// Checks the shapes of all weights, block by block: no buffer is needed.
    pub(super) fn check_weights(&self) -> Result<(), Error> {
        for i in 0..self.config().num_hidden_layers {
            let layers = [self.layer(i)?];
            let one = crate::Config { num_hidden_layers: 1, ..*self.config() };
            self.with_layers(&layers)?.validate(&one)?;
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
        Ok(LayerWeights {
            input_layernorm: self.needed_vector(Role::InputLayernorm, i)?,
            q_proj: self.needed(Role::QProj, i)?,
            k_proj: self.needed(Role::KProj, i)?,
            v_proj: self.needed(Role::VProj, i)?,
            o_proj: self.needed(Role::OProj, i)?,
            post_attention_layernorm: self.needed_vector(Role::PostAttentionLayernorm, i)?,
            gate_proj: self.needed(Role::GateProj, i)?,
            up_proj: self.needed(Role::UpProj, i)?,
            down_proj: self.needed(Role::DownProj, i)?,
        })
    }

    fn needed(&self, role: Role, layer: usize) -> Result<Matrix<'a>, Error> {
        self.matrix(role, layer)?.ok_or(Error::Missing { role, layer })
    }

    fn needed_vector(&self, role: Role, layer: usize) -> Result<&'a [f32], Error> {
        self.vector(role, layer)?.ok_or(Error::Missing { role, layer })
    }
}
