//! Flags that say how keys and values are kept and read.
#![allow(dead_code, reason = "not every program uses all of it")]

use anyhow::{Result, bail};
use candle_core::DType;
use candle_sparse::{AttentionConfig, AttentionMode, KvConfig, kv_cache::KvDType};
use clap::{Args, ValueEnum};

/// How the past is kept, and what of it is read.
#[derive(Args, Clone, Debug)]
pub(crate) struct MemoryArgs {
    /// How keys and values are kept; as exact as the stored weights where not given
    #[arg(long)]
    pub(crate) kv: Option<Kv>,
    /// With --kv tiered: so many last positions stay in F16
    #[arg(long)]
    hot: Option<usize>,
    /// With --kv tiered: so many last positions stay in F16 or Q8_0, the rest is Q4_1
    #[arg(long)]
    warm: Option<usize>,
    /// What a token reads of its past
    #[arg(long, default_value = "dense")]
    pub(crate) attention: Attention,
    /// First positions that are always read
    #[arg(long, default_value_t = AttentionConfig::default().sinks)]
    sinks: usize,
    /// Last positions that are always read
    #[arg(long, default_value_t = AttentionConfig::default().window)]
    window: usize,
    /// Positions between them that are read at most
    #[arg(long, default_value_t = AttentionConfig::default().budget)]
    budget: usize,
    /// With --attention gated: so many more that the query asks for
    #[arg(long, default_value_t = AttentionConfig::default().recall)]
    recall: usize,
}

/// Names of [`KvConfig`]s.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kv {
    F32,
    F16,
    Bf16,
    /// Q8_0, the last page in F16
    Q8,
    /// Q4_1, the last page in F16
    Q4,
    /// F16, then Q8_0, then Q4_1
    Tiered,
}

/// Names of [`AttentionMode`].
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attention {
    /// Everything
    Dense,
    /// The first and the last positions
    Window,
    /// And what the profile's gate found salient
    Gated,
    /// And what the query may want most
    Recall,
}

impl From<Attention> for AttentionMode {
    fn from(attention: Attention) -> Self {
        match attention {
            Attention::Dense => Self::Dense,
            Attention::Window => Self::Window,
            Attention::Gated => Self::Gated,
            Attention::Recall => Self::Recall,
        }
    }
}

impl MemoryArgs {
    /// How keys and values are kept, by the flags or else in `dtype`.
    pub(crate) fn kv(&self, dtype: DType) -> Result<KvConfig> {
        let config = match self.kv {
            None => KvConfig::exact(KvDType::try_from(dtype)?),
            Some(Kv::F32) => KvConfig::exact(KvDType::F32),
            Some(Kv::F16) => KvConfig::exact(KvDType::F16),
            Some(Kv::Bf16) => KvConfig::exact(KvDType::BF16),
            Some(Kv::Q8) => KvConfig::q8(),
            Some(Kv::Q4) => KvConfig::q4(),
            Some(Kv::Tiered) => KvConfig::tiered(),
        };
        if self.kv != Some(Kv::Tiered) && (self.hot.is_some() || self.warm.is_some()) {
            bail!("--hot and --warm are sizes of tiers: add --kv tiered");
        }
        let (hot, warm) = (self.hot.unwrap_or(config.hot), self.warm.unwrap_or(config.warm));
        Ok(KvConfig { hot, warm, ..config })
    }

    /// What a token reads.
    pub(crate) fn attention(&self) -> AttentionConfig {
        let Self { sinks, window, budget, recall, .. } = *self;
        AttentionConfig { mode: self.attention.into(), sinks, window, budget, recall }
    }
}
