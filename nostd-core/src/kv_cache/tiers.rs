//! Which positions are kept how.

use super::page::PAGE_LEN;
use crate::format::Format;

/// Where a page is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
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
