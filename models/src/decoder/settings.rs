//! What can be set on a loaded model: which neurons and which positions it leaves out.

use super::{Decoder, Sparse};
use candle_core::{Result, bail};
use candle_sparse::{AttentionConfig, FastGrnnGate, SparseConfig, attention::Selector, sparse::Plans};
use std::sync::Arc;

impl Decoder {
    /// The settings of the sparse FFN; `None` for a model that was loaded without a profile.
    #[must_use]
    pub fn sparse_config(&self) -> Option<SparseConfig> {
        self.sparse.as_ref().map(|s| s.plans.config)
    }

    /// This model with other settings of the sparse FFN; the weights are shared.
    ///
    /// Blocks that were loaded as dense ones, because leaving neurons out [did not pay](candle_sparse::sparse::pays) at the
    /// settings they were loaded with, stay dense.
    ///
    /// # Errors
    /// As [`Plans::new`]; also a model that was loaded without a profile.
    pub fn with_sparse(&self, config: SparseConfig) -> Result<Self> {
        let Some(Sparse { points, .. }) = &self.sparse else {
            bail!("sparse: the model was loaded without a profile: give LoadOptions one");
        };
        let plans = Plans::new(config, points, self.layers.iter().map(|l| l.ffn.sparse()))?;
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

    pub(super) fn selector(&self) -> Selector<'_> {
        let checked = Selector::new(self.attention, &self.gates, self.layers.len());
        checked.expect("settings are checked where they are set, gates where they are given")
    }
}
