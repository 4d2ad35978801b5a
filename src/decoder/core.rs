//! The same model for a forward pass without candle: weights and settings as [`candle_sparse_core`] takes them.

use super::{Decoder, Ffn, Layer, Projection};
use crate::{FastGrnnGate, KvConfig, Weight, gate::CellWeight, sparse::BlockSelection};
use candle_core::{Error, Result, bail};
use candle_sparse_core::{
    Matrix, Rows,
    forward::Model,
    kernel::fast_grnn::Salience,
    kv_cache,
    weights::{self, AttentionGate, GateMatrix, LayerWeights, Weights},
};
use std::ops::Range;

impl Decoder {
    /// The weights of every block, borrowed, with the gate of its attention and how its FFN chooses neurons.
    ///
    /// # Errors
    /// Rotary frequencies of the checkpoint's own, which the core has no place for.
    pub fn core_layers(&self) -> Result<Vec<LayerWeights<'_>>> {
        let c = &self.config;
        if (0..c.head_dim / 2).any(|i| self.inv_freq[i].to_bits() != c.rope.inv_freq(i, c.head_dim).to_bits())
        {
            bail!("core: the checkpoint has rotary frequencies of its own (rope_freqs)");
        }
        self.layers.iter().enumerate().map(|(i, layer)| self.core_layer(i, layer)).collect()
    }

    /// The whole model over [`Self::core_layers`], with this model's attention and a cache as `kv` says; its budget is the
    /// memory that the core's cache is given.
    ///
    /// # Errors
    /// As [`Model::with_settings`].
    pub fn core_model<'a>(&'a self, layers: &'a [LayerWeights<'a>], kv: KvConfig) -> Result<Model<'a>> {
        let weights = Weights {
            embed_tokens: self.embed_tokens.matrix(),
            layers,
            norm: &self.norm,
            lm_head: self.lm_head.matrix(),
        };
        let kv = kv_cache::KvConfig { dtype: kv.dtype.format(), ageing: kv.ageing() };
        Model::with_settings(self.config, weights, self.attention, kv).map_err(Error::wrap)
    }

    fn core_layer<'a>(&'a self, i: usize, layer: &'a Layer) -> Result<LayerWeights<'a>> {
        let (q, kv) = (self.config.q_dim(), self.config.kv_dim());
        let qkv = &layer.qkv_proj;
        let ffn = match &layer.ffn {
            Ffn::Dense(f) => weights::Ffn::Dense(weights::DenseFfn {
                gate_proj: f.gate_proj.as_ref().map(single),
                up_proj: single(&f.up_proj),
                down_proj: part(&f.down_proj, 0..f.down_proj.weight.rows())?,
            }),
            Ffn::Sparse(f) => {
                let plan =
                    self.sparse.as_ref().and_then(|s| s.plans.layers.get(i)).and_then(BlockSelection::rule);
                weights::Ffn::Sparse(f.view(), plan)
            }
        };
        Ok(LayerWeights {
            input_layernorm: &layer.input_layernorm,
            q_proj: part(qkv, 0..q)?,
            k_proj: part(qkv, q..q + kv)?,
            v_proj: part(qkv, q + kv..q + 2 * kv)?,
            o_proj: part(&layer.o_proj, 0..layer.o_proj.weight.rows())?,
            post_attention_layernorm: &layer.post_attention_layernorm,
            gate: self.gates.get(i).map(gate).transpose()?,
            recall_shares: self.recall_shares.get(i).map(Vec::as_slice),
            ffn,
        })
    }
}

fn part(p: &Projection, rows: Range<usize>) -> Result<weights::Projection<'_>> {
    let bias = p.bias.as_deref().map(|b| &b[rows.clone()]);
    Ok(weights::Projection { weight: p.weight.part(rows)?, bias })
}

fn single(p: &Projection<Weight>) -> weights::Projection<'_> {
    weights::Projection { weight: p.weight.matrix(), bias: p.bias.as_deref() }
}

fn gate(g: &FastGrnnGate) -> Result<AttentionGate<'_>> {
    let matrix = |rows: usize, values| float(rows, values).map(GateMatrix::Float);
    let cell = match &g.cell {
        Some(cell) => {
            let all = cell.matrices().map(|(_, w)| w);
            all.iter().try_for_each(|w| float(w.rows, &w.values).map(drop))?;
            Some(cell.view(held))
        }
        None => None,
    };
    let readout = if g.readout.is_empty() { None } else { Some(matrix(g.kv_heads, &g.readout)?) };
    let ridge = matrix(g.kv_heads, &g.ridge)?;
    Ok(Salience { ridge, bias: &g.bias, threshold: &g.threshold, cell, readout })
}

fn float(rows: usize, values: &[f32]) -> Result<Matrix<'_>> {
    Matrix::new(rows, values.len() / rows.max(1), Rows::F32(values)).map_err(Error::wrap)
}

/// A matrix of a gate that was checked.
fn held(w: &CellWeight) -> GateMatrix<'_> {
    GateMatrix::Float(float(w.rows, &w.values).expect("gates are checked where they are given"))
}
