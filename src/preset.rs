//! Settings that belong together, by where a model runs.

use crate::{
    AttentionConfig, AttentionMode, KvConfig,
    kv_cache::{KvDType, PAGE_LEN},
};

/// A machine, or what is like it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// Much memory, long conversations, answers must be exact: F16, everything is read.
    Server,
    /// Tiers of F16, `Q8_0` and `Q4_1`; everything is read.
    Laptop,
    /// A Raspberry Pi Zero 2 W, 512 MB: a window of 64 positions in F16 and what the query asks for.
    PiZero2w,
    /// A microcontroller of some megabytes: the last page in F16, the rest in `Q4_1`, a window of 64.
    Esp32s3,
}

impl Preset {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Server, Self::Laptop, Self::PiZero2w, Self::Esp32s3];

    /// How keys and values are kept.
    #[must_use]
    pub const fn kv(self) -> KvConfig {
        match self {
            Self::Server => KvConfig::exact(KvDType::F16),
            Self::Laptop => KvConfig::tiered(),
            Self::PiZero2w => KvConfig { max_bytes: Some(64 << 20), ..KvConfig::exact(KvDType::F16) },
            Self::Esp32s3 => KvConfig { max_bytes: Some(2 << 20), ..KvConfig::q4() },
        }
    }

    /// What a token reads of its past.
    #[must_use]
    pub const fn attention(self) -> AttentionConfig {
        let (window, recall) = (2 * PAGE_LEN, 0);
        match self {
            Self::Server | Self::Laptop => AttentionConfig {
                mode: AttentionMode::Dense,
                sinks: 4,
                window: 256,
                budget: 1536,
                recall: 256,
            },
            Self::PiZero2w => {
                AttentionConfig { mode: AttentionMode::Recall, sinks: 4, window, budget: 256, recall }
            }
            Self::Esp32s3 => {
                AttentionConfig { mode: AttentionMode::Window, sinks: 4, window, budget: 0, recall }
            }
        }
    }
}
