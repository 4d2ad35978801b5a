//! Flags that say what a token reads of its past, and how that is kept.

use candle_sparse::Format;
use candle_sparse_core::{
    KvConfig,
    attention::{AttentionConfig, AttentionMode},
    image::Settings,
};
use clap::{Args, ValueEnum};

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attention {
    Dense,
    Window,
    Gated,
    Recall,
    Sampled,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kv {
    /// Every position in F32
    F32,
    /// Every position in F16
    F16,
    /// The last positions in F16, then Q8_0, then Q4_1
    Tiered,
}

/// What the image says about the past of a token.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Attention and cache")]
pub(crate) struct SettingsArgs {
    /// What a token reads: everything; first and last positions; and those that the profile's gates found salient; and those
    /// that may score highest
    #[arg(long, value_enum, default_value = "dense")]
    pub(crate) attention: Attention,
    /// First positions that are always read
    #[arg(long, default_value_t = 4)]
    sinks: usize,
    /// Last positions that are always read
    #[arg(long, default_value_t = 128)]
    window: usize,
    /// Positions that are read between them
    #[arg(long, default_value_t = 128)]
    budget: usize,
    /// Positions that are recalled beside those that gates chose
    #[arg(long, default_value_t = 0)]
    recall: usize,
    /// How keys and values are kept
    #[arg(long, value_enum, default_value = "tiered")]
    kv: Kv,
    /// With tiers: so many last positions in F16
    #[arg(long, default_value_t = 32)]
    hot: usize,
    /// With tiers: so many last positions in F16 or Q8_0
    #[arg(long, default_value_t = 128)]
    warm: usize,
    /// Positions that the cache holds before the oldest are dropped; at most the model's context
    #[arg(long, default_value_t = 512)]
    pub(crate) context: usize,
}

impl SettingsArgs {
    /// As an image has them.
    pub(crate) fn settings(&self, max_position_embeddings: usize) -> Settings {
        let mode = match self.attention {
            Attention::Dense => AttentionMode::Dense,
            Attention::Window => AttentionMode::Window,
            Attention::Gated => AttentionMode::Gated,
            Attention::Recall => AttentionMode::Recall,
            Attention::Sampled => AttentionMode::Sampled,
        };
        let Self { sinks, window, budget, recall, .. } = *self;
        let kv = match self.kv {
            Kv::F32 => KvConfig::exact(Format::F32),
            Kv::F16 => KvConfig::exact(Format::F16),
            Kv::Tiered => KvConfig::tiered(self.hot, self.warm),
        };
        let attention = AttentionConfig::new(mode)
            .with_sinks(sinks)
            .with_window(window)
            .with_budget(budget)
            .with_recall(recall);
        Settings { attention, kv, positions: self.context.min(max_position_embeddings) }
    }
}
