//! Flags that say how keys and values are kept and read.
#![allow(dead_code, reason = "not every program uses all of it")]

use super::cli::output;
use anyhow::{Result, bail};
use candle_core::DType;
use candle_sparse::{AttentionConfig, AttentionMode, KvConfig, kv_cache::KvDType};
use clap::{Args, ValueEnum};

/// How the past is kept, and what of it is read.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Memory")]
pub(crate) struct MemoryArgs {
    /// How keys and values are kept; as exact as the stored weights where not given
    #[arg(long)]
    pub(crate) kv: Option<Kv>,
    /// With --kv tiered: so many last positions stay in F16 [default: 256]
    #[arg(long)]
    hot: Option<usize>,
    /// With --kv tiered: so many last positions stay in F16 or Q8_0, the rest is Q4_1 [default: 2048]
    #[arg(long)]
    warm: Option<usize>,
    /// What a token reads of its past
    #[arg(long, default_value = "dense")]
    pub(crate) attention: Attention,
    /// With --attention other than dense: first positions that are always read [default: 4]
    #[arg(long)]
    sinks: Option<usize>,
    /// With --attention other than dense: last positions that are always read [default: 256]
    #[arg(long)]
    window: Option<usize>,
    /// With --attention gated or recall: positions between them that are read at most (recall with a profile that shares them out: in the mean of all heads); with sampled: that are drawn [default: 1536]
    #[arg(long)]
    budget: Option<usize>,
    /// With --attention gated or sampled: so many more that the query asks for [default: 256]
    #[arg(long)]
    recall: Option<usize>,
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
    /// F16, then Q8_0, then as q4
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
    /// And what the query may want most, and a random sample that stands for all the rest
    Sampled,
}

impl From<Attention> for AttentionMode {
    fn from(attention: Attention) -> Self {
        match attention {
            Attention::Dense => Self::Dense,
            Attention::Window => Self::Window,
            Attention::Gated => Self::Gated,
            Attention::Recall => Self::Recall,
            Attention::Sampled => Self::Sampled,
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
        Ok(config.with_hot(hot).with_warm(warm))
    }

    /// What a token reads.
    pub(crate) fn attention(&self) -> Result<AttentionConfig> {
        use Attention::{Gated, Recall, Sampled, Window};
        let flags = [
            ("--sinks", self.sinks, &[Window, Gated, Recall, Sampled][..]),
            ("--window", self.window, &[Window, Gated, Recall, Sampled]),
            ("--budget", self.budget, &[Gated, Recall, Sampled]),
            ("--recall", self.recall, &[Gated, Sampled]),
        ];
        for (name, _, modes) in flags.iter().filter(|(_, given, _)| given.is_some()) {
            if !modes.contains(&self.attention) {
                let modes = modes.iter().map(|mode| mode.name()).collect::<Vec<_>>().join(" or ");
                let now = self.attention.name();
                bail!("{name} belongs to --attention {modes}: with --attention {now} it changes nothing");
            }
        }
        let or = AttentionConfig::default();
        Ok(AttentionConfig::default()
            .with_mode(self.attention.into())
            .with_sinks(self.sinks.unwrap_or(or.sinks))
            .with_window(self.window.unwrap_or(or.window))
            .with_budget(self.budget.unwrap_or(or.budget))
            .with_recall(self.recall.unwrap_or(or.recall)))
    }

    /// Whether any flag was given.
    pub(crate) fn is_given(&self) -> bool {
        let sizes = [self.hot, self.warm, self.sinks, self.window, self.budget, self.recall];
        self.kv.is_some() || self.attention != Attention::Dense || sizes.iter().any(Option::is_some)
    }

    /// After a run of so many positions: what was asked for and had nothing to do yet.
    pub(crate) fn note_unused(&self, kv: &KvConfig, positions: usize) {
        if kv.is_tiered() && positions <= kv.hot {
            output::note(format_args!(
                "the run had {positions} positions, the last {} stay in F16: --kv {} changed nothing",
                kv.hot,
                self.kv.map_or("tiered", Kv::name)
            ));
        }
        let Ok(read) = self.attention() else { return };
        let between = if self.attention == Attention::Window { 0 } else { read.budget };
        let all = read.sinks.saturating_add(read.window).saturating_add(between);
        if self.attention != Attention::Dense && positions <= all {
            let name = self.attention.name();
            output::note(format_args!(
                "the run had {positions} positions, --attention {name} reads {all}: everything was read"
            ));
        }
    }
}

impl Kv {
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8 => "q8",
            Self::Q4 => "q4",
            Self::Tiered => "tiered",
        }
    }
}

impl Attention {
    /// Whether it uses what a profile says.
    pub(crate) fn reads_profile(self) -> bool {
        matches!(self, Self::Gated | Self::Recall)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Window => "window",
            Self::Gated => "gated",
            Self::Recall => "recall",
            Self::Sampled => "sampled",
        }
    }
}
