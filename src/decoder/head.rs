//! How a decoded token's logits are computed.

/// Which rows of the head a decoded token computes exactly. A prompt's logits always are exact.
///
/// A head in `Q8_0` is held in halves then: a first look at all rows reads the upper four bits of each element, and rows
/// that it finds likely are computed from all eight, with the bits that they have in [`Self::Exact`]. The logits of the others stay
/// those of the first look. `docs/head.md` has what this costs and saves.
///
/// ```
/// use candle_sparse::decoder::{HeadMode, LoadOptions};
///
/// let options = LoadOptions::default().with_head(HeadMode::Certified);
/// assert_eq!((options.head, LoadOptions::default().head), (HeadMode::Certified, HeadMode::Exact));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum HeadMode {
    /// All rows.
    #[default]
    Exact,
    /// Those of tokens that a first look finds at least 2⁻¹⁶ likely.
    Shortlist,
    /// Also those that could have the largest logit by the largest error that a first look can have: greedy decoding chooses
    /// what [`Self::Exact`] does, proven for each token.
    Certified,
}
