//! What an image says about the past of a token.

use super::Error;
use crate::{
    attention::{AttentionConfig, AttentionMode},
    error::Error as Reason,
    format::Format,
    kv_cache::{KvConfig, tiers::Ageing},
};

/// How a model is meant to be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// What a token reads of its past.
    pub attention: AttentionConfig,
    /// How the past is kept.
    pub kv: KvConfig,
    /// Positions that the cache is to hold before the first is dropped.
    pub positions: usize,
}

impl Default for Settings {
    /// Everything, in F16, for 512 positions.
    fn default() -> Self {
        Self { attention: AttentionConfig::default(), kv: KvConfig::exact(Format::F16), positions: 512 }
    }
}

/// Words of settings.
const WORDS: usize = 12;

/// The bytes of settings, for [`super::Tensor::bytes`]. More positions than 32 bits count mean no limit.
///
/// # Errors
/// A cold tier that is rounded at random: an image has no words for it.
pub fn settings_bytes(s: &Settings) -> Result<[u8; 4 * WORDS], Error> {
    let n = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let AttentionConfig { mode, sinks, window, budget, recall } = s.attention;
    let (dtype, Ageing { hot, warm }) = (super::format_number(s.kv.dtype), s.kv.ageing);
    let words =
        [mode as u32, n(sinks), n(window), n(budget), n(recall), dtype, n(hot), n(warm), n(s.positions)];
    let mut all = [0; WORDS];
    all[..words.len()].copy_from_slice(&words);
    Ok(bytemuck::cast(all))
}

pub(super) fn read(bytes: &[u8]) -> Result<Settings, Error> {
    let bad = |what| Error::Model(Reason::OutOfRange(what));
    let words: &[u32] = bytemuck::try_cast_slice(bytes).map_err(|_| bad("settings bytes"))?;
    let w: &[u32; WORDS] = words.try_into().map_err(|_| bad("settings length"))?;
    let n = |i: usize| if w[i] == u32::MAX { usize::MAX } else { w[i] as usize };
    let mode = match w[0] {
        0 => AttentionMode::Dense,
        1 => AttentionMode::Window,
        2 => AttentionMode::Gated,
        3 => AttentionMode::Recall,
        4 => AttentionMode::Sampled,
        _ => return Err(bad("attention mode")),
    };
    let dtype = super::format_of(w[5]).ok_or(bad("kv cache dtype"))?;
    Ok(Settings {
        attention: AttentionConfig { mode, sinks: n(1), window: n(2), budget: n(3), recall: n(4) },
        kv: KvConfig { dtype, ageing: Ageing { hot: n(6), warm: n(7) } },
        positions: n(8),
    })
}
