//! What can be set on a loaded model: which neurons and which positions it leaves out.

use super::{Decoder, DenseFfn, Ffn, Layer, Projection, Sparse};
use crate::tuning::FEW_ROWS;
use crate::{
    AttentionConfig, FastGrnnGate, FfnMode, SparseConfig, Weight, attention::Selector, sparse::ModelSelection,
};
use candle_core::{Error, Result, bail};
use candle_sparse_core::{Format, weights::check_shares};
use std::sync::Arc;

impl Decoder {
    /// The settings of the sparse FFN; `None` for a model that was loaded without a profile, or with one that is not used.
    #[must_use]
    pub fn sparse_config(&self) -> Option<SparseConfig> {
        self.sparse.as_ref().map(|s| s.plans.config)
    }

    /// This model with other settings of the sparse FFN; the weights are shared.
    ///
    /// Blocks that were loaded as dense ones, because leaving neurons out did not pay at the settings they were loaded with,
    /// stay dense; [`SparseConfig::force`] while loading keeps all of them that read fewer bytes.
    ///
    /// # Errors
    /// Settings that [`SparseConfig::check`] or [`SparseConfig::resolve`] refuses, or that the profile does not serve (a prediction
    /// of rank 0, for example); a model without a profile, or one all of whose blocks are dense, unless all neurons are wanted.
    pub fn with_sparse(&self, config: SparseConfig) -> Result<Self> {
        let Some(Sparse { points, .. }) = &self.sparse else {
            match &self.not_sparse {
                Some(_) if config.mode == FfnMode::Dense => return Ok(self.clone()),
                Some(why) => {
                    bail!("sparse: {why}; load it with SparseConfig::force to leave neurons out all the same")
                }
                None => bail!("sparse: the model was loaded without a profile: give LoadOptions one"),
            }
        };
        let plans = ModelSelection::new(config, points, self.layers.iter().map(|l| l.ffn.sparse()))?;
        let sparse = Some(Sparse { points: points.clone(), plans: Arc::new(plans) });
        Ok(Self { sparse, ..self.clone() })
    }

    /// The settings of sparse attention.
    #[must_use]
    pub fn attention_config(&self) -> &AttentionConfig {
        &self.attention
    }

    /// The gates of sparse attention, one per layer; none where the profile has none.
    #[must_use]
    pub fn gates(&self) -> &[FastGrnnGate] {
        &self.gates
    }

    /// How many times the budget of [`AttentionMode::Recall`](crate::AttentionMode::Recall) each key/value head has,
    /// `[layers][kv_heads]`; none where the profile does not say, then every head has the budget itself.
    #[must_use]
    pub fn recall_shares(&self) -> &[Vec<f32>] {
        &self.recall_shares
    }

    /// This model with other settings of attention; the weights are shared.
    ///
    /// # Errors
    /// Gated attention for a model that was loaded without gates.
    pub fn with_attention(&self, config: AttentionConfig) -> Result<Self> {
        Selector::new(config, &self.gates, self.layers.len())?;
        Ok(Self { attention: config, ..self.clone() })
    }

    /// This model with other gates, one per layer.
    ///
    /// # Errors
    /// Their number or shape is not the model's.
    pub fn with_gates(&self, gates: Vec<FastGrnnGate>) -> Result<Self> {
        let c = &self.config;
        if gates.len() != self.layers.len() {
            bail!("gates: {} for a model of {} layers", gates.len(), self.layers.len());
        }
        for (i, g) in gates.iter().enumerate() {
            g.check()?;
            if [g.hidden_size, g.kv_heads] != [c.hidden_size, c.num_key_value_heads] {
                bail!(
                    "gate of layer {i}: made for hidden_size {} and {} key/value heads, the model has {} and {}",
                    g.hidden_size,
                    g.kv_heads,
                    c.hidden_size,
                    c.num_key_value_heads
                );
            }
        }
        Ok(Self { gates: gates.into(), ..self.clone() })
    }

    /// This model with other shares of the budget of [`AttentionMode::Recall`](crate::AttentionMode::Recall), `[layers][kv_heads]`;
    /// none give every head as much. Their mean should be 1: then the budget is what a head recalls in the mean.
    ///
    /// # Errors
    /// Their number is not the model's, or one is negative or not finite.
    pub fn with_recall_shares(&self, shares: Vec<Vec<f32>>) -> Result<Self> {
        let c = &self.config;
        let (layers, heads) = (self.layers.len(), c.num_key_value_heads);
        if !shares.is_empty() && (shares.len() != layers || shares.iter().any(|s| s.len() != heads)) {
            bail!(
                "recall_shares: the model has {layers} layers of {heads} key/value heads: give one for each"
            );
        }
        shares.iter().try_for_each(|s| check_shares(s)).map_err(Error::wrap)?;
        Ok(Self { recall_shares: shares.into(), ..self.clone() })
    }

    pub(super) fn selector(&self) -> Selector<'_> {
        let checked = Selector::new(self.attention, &self.gates, self.layers.len());
        let checked = checked.expect("settings are checked where they are set, gates where they are given");
        checked.with_recall_shares(&self.recall_shares)
    }

    /// Tokens that a part of a prompt must have so that its numbers have the bits that they have in the whole: 1, or 8 where an FFN is
    /// held neuron by neuron, whose sums are cut in another way for few tokens. A prompt of fewer is a part by itself.
    #[must_use]
    pub fn least_part(&self) -> usize {
        if self.layers.iter().any(|l| l.ffn.sparse().is_some()) { FEW_ROWS } else { 1 }
    }

    /// Whether products round activations to 8 bits, as products with quantised matrices do.
    #[must_use]
    pub fn rounds_activations(&self) -> bool {
        let quantised = |p: &Projection| p.weight.formats().any(Format::is_quantized);
        let layer = |l: &Layer| {
            let ffn = match &l.ffn {
                Ffn::Dense(f) => f.up_proj.weight.format().is_quantized() || quantised(&f.down_proj),
                Ffn::Sparse(f) => f.gate.format().is_quantized(),
            };
            ffn || quantised(&l.qkv_proj) || quantised(&l.o_proj)
        };
        self.lm_head.format().is_quantized() || self.layers.iter().any(layer)
    }

    /// Whether an FFN has biases, which no profile serves.
    #[must_use]
    pub fn has_ffn_bias(&self) -> bool {
        let biased = |f: &DenseFfn| {
            let gate = f.gate_proj.as_ref().is_some_and(|p| p.bias.is_some());
            gate || f.up_proj.bias.is_some() || f.down_proj.bias.is_some()
        };
        self.layers.iter().any(|l| matches!(&l.ffn, Ffn::Dense(f) if biased(f)))
    }

    /// Elements of all matrices, a tied head counted once.
    #[must_use]
    pub fn parameters(&self) -> usize {
        let c = &self.config;
        let matrices = if c.gated_mlp { 3 } else { 2 };
        let layer = c.hidden_size * (2 * c.q_dim() + 2 * c.kv_dim() + matrices * c.intermediate_size);
        let heads = if self.embed_tokens.shares_memory(&self.lm_head) { 1 } else { 2 };
        self.layers.len() * layer + heads * c.vocab_size * c.hidden_size
    }

    /// This model with its matrices in another format: in F32 no product rounds its activations, in `Q4_0` it is a cheap guess at
    /// itself. The embedding, of which a token reads a row, stays as it is.
    ///
    /// Cost: the bytes of the new matrices.
    ///
    /// # Errors
    /// A block that leaves neurons out, or there is no memory for it.
    pub fn in_format(&self, format: Format) -> Result<Self> {
        let stack = |p: &Projection| -> Result<_> {
            Ok(Projection { weight: p.weight.to_format(format)?, bias: p.bias.clone() })
        };
        let single = |p: &Projection<Weight>| -> Result<_> {
            Ok(Projection { weight: p.weight.to_format(format)?, bias: p.bias.clone() })
        };
        let layer = |l: &Layer| -> Result<_> {
            let Ffn::Dense(f) = &l.ffn else {
                bail!(
                    "in {}: a block leaves neurons out: load it with all of them (ffn dense)",
                    format.name()
                )
            };
            let (gate_proj, up_proj) = (f.gate_proj.as_ref().map(single).transpose()?, single(&f.up_proj)?);
            Ok(Layer {
                input_layernorm: l.input_layernorm.clone(),
                qkv_proj: stack(&l.qkv_proj)?,
                o_proj: stack(&l.o_proj)?,
                post_attention_layernorm: l.post_attention_layernorm.clone(),
                ffn: Ffn::Dense(DenseFfn { gate_proj, up_proj, down_proj: stack(&f.down_proj)? }),
            })
        };
        let lm_head = self.lm_head.to_format(format)?;
        let layers = self.layers.iter().map(layer).collect::<Result<_>>()?;
        Ok(Self { lm_head, layers, ..self.clone() })
    }
}
