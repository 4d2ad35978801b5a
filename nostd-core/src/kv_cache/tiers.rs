//! Which positions are kept how.

use super::page::PAGE_LEN;
use crate::format::{BLOCK_LEN, BlockQ4_1, Format};

/// Where a page is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    /// In the cache's own format, written token by token.
    Hot,
    /// `Q8_0`, 8.5 bits per element.
    Warm,
    /// `Q4_1`, 5 bits per element.
    Cold,
}

impl Tier {
    /// From hot to cold.
    pub const ALL: [Self; 3] = [Self::Hot, Self::Warm, Self::Cold];

    /// The format of its pages, `hot` being that of hot ones.
    #[must_use]
    pub const fn format(self, hot: Format) -> Format {
        match self {
            Self::Hot => hot,
            Self::Warm => Format::Q8_0,
            Self::Cold => Format::Q4_1,
        }
    }
}

/// How old positions become cold, in whole pages of 32.
///
/// A page of layer l of L goes to its next tier `32 · l / L` positions later than it could, so that no token waits for all
/// layers. Which tier a page is in depends on the number of positions alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ageing {
    /// At least so many of the last positions stay hot.
    pub hot: usize,
    /// At least so many of the last positions stay hot or warm; what is older is cold.
    pub warm: usize,
}

impl Ageing {
    /// Every position stays hot.
    pub const NEVER: Self = Self { hot: usize::MAX, warm: usize::MAX };

    /// Pages at the front of a layer that are at least as cold as warm and as cold, of a sequence of `len` positions.
    #[must_use]
    pub fn cooled(self, (layer, layers): (usize, usize), len: usize) -> [usize; 2] {
        let len = len.saturating_sub(PAGE_LEN * layer / layers.max(1));
        // The page being written is hot whatever the settings say.
        let pages = |kept: usize| len.saturating_sub(kept) / PAGE_LEN;
        [pages(self.hot), pages(self.hot.max(self.warm))]
    }

    /// Whether pages go from hot to cold without being warm.
    #[must_use]
    pub const fn skips_warm(self) -> bool {
        self.warm <= self.hot
    }
}

/// How a block is rounded.
#[derive(Clone, Copy, Debug)]
pub enum Rounding {
    /// To the nearest level.
    Nearest,
    /// Up or down at random, without bias, by the random numbers of this state.
    Stochastic(u64),
}

impl Rounding {
    /// Of block `at` of a page, by the generator of `seed` where there is one.
    #[must_use]
    pub fn of(seed: Option<u64>, layer: usize, page: usize, at: usize) -> Self {
        let Some(seed) = seed else { return Self::Nearest };
        let parts = [layer as u64, page as u64, at as u64];
        Self::Stochastic(parts.iter().fold(seed, |s, &p| splitmix(s ^ p.wrapping_mul(0x9e37_79b9_7f4a_7c15))))
    }

    /// The block, rounded.
    #[must_use]
    pub fn quantize(self, x: &[f32; BLOCK_LEN]) -> BlockQ4_1 {
        let mut block = BlockQ4_1::quantize(x);
        let (Self::Stochastic(mut state), d) = (self, block.d.to_f32()) else { return block };
        if d == 0.0 || !d.is_finite() {
            return block;
        }
        let mut level = |v: f32| {
            state = splitmix(state);
            let chance = (state >> 40) as f32 / (1_u64 << 24) as f32;
            ((v - block.m.to_f32()) / d + chance).clamp(0.0, 15.0) as u8
        };
        let levels = x.map(&mut level);
        for (j, q) in block.qs.iter_mut().enumerate() {
            *q = levels[j] | levels[j + BLOCK_LEN / 2] << 4;
        }
        block
    }
}

/// One step of splitmix64 (Steele, Lea and Flood 2014).
fn splitmix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}
