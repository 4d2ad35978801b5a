//! The one error type of the crate.

use core::fmt;

/// Why a configuration, a weight or a request was refused.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// A size that must be positive is zero.
    Zero(&'static str),
    /// `num_attention_heads` is not a multiple of `num_key_value_heads`.
    HeadGroups {
        /// `num_attention_heads`
        heads: usize,
        /// `num_key_value_heads`
        kv_heads: usize,
    },
    /// RoPE rotates pairs, so `head_dim` must be even.
    OddHeadDim(usize),
    /// A number is out of its range or not finite.
    OutOfRange(&'static str),
    /// The product of two sizes does not fit the address space.
    TooLarge(&'static str),
    /// A buffer or tensor has the wrong number of elements.
    Length {
        /// What was looked at.
        what: &'static str,
        /// Elements it must have.
        expected: usize,
        /// Elements it has.
        got: usize,
    },
    /// A matrix has another shape than the configuration asks for.
    Shape {
        /// The tensor's name.
        what: &'static str,
        /// The decoder block it belongs to, if any.
        layer: Option<usize>,
        /// `[rows, cols]` it must have.
        expected: [usize; 2],
        /// `[rows, cols]` it has.
        got: [usize; 2],
    },
    /// `cols` is not a multiple of the format's block length.
    BlockMultiple {
        /// Columns of the matrix.
        cols: usize,
        /// Elements per block.
        block: usize,
    },
    /// A token id is not below `vocab_size`.
    TokenId {
        /// The token.
        token: usize,
        /// The vocabulary's size.
        vocab_size: usize,
    },
    /// A position is past the end of the cache, the scratch or the model's context.
    Position {
        /// The position asked for.
        position: usize,
        /// Positions there are.
        limit: usize,
    },
    /// A position leaves a gap behind the cached ones.
    Gap {
        /// The position asked for.
        position: usize,
        /// Positions the cache holds.
        len: usize,
    },
    /// A token at a position would see positions that the ring of pages has dropped.
    Dropped {
        /// The position asked for.
        position: usize,
        /// The first one, beside 0 to 31, at which a token can still stand.
        least: usize,
    },
    /// It was made for another model, or for other settings.
    WrongModel(&'static str),
    /// A setting needs something that the model has not.
    Missing(&'static str),
    /// The input of an FFN is not finite: the weights are damaged, or a format is too narrow for them.
    NotFinite {
        /// The decoder block.
        layer: usize,
    },
    /// The caller's time was over before the step was; the cache is as it was before.
    Deadline,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Zero(what) => write!(f, "{what} is 0, it must be positive"),
            Self::HeadGroups { heads, kv_heads } => {
                write!(f, "num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
            }
            Self::OddHeadDim(n) => write!(f, "head_dim {n} is odd, rotary embedding needs pairs"),
            Self::OutOfRange(what) => write!(f, "{what} is out of range or not finite"),
            Self::TooLarge(what) => write!(f, "{what} is too large for this machine"),
            Self::Length { what, expected, got } => {
                write!(f, "{what}: {got} elements, expected {expected}")
            }
            Self::Shape { what, layer, expected, got } => {
                if let Some(layer) = layer {
                    write!(f, "layer {layer}: ")?;
                }
                write!(f, "{what} has shape {got:?}, expected {expected:?}")
            }
            Self::BlockMultiple { cols, block } => {
                write!(f, "{cols} columns are not a multiple of the block length {block}")
            }
            Self::TokenId { token, vocab_size } => {
                write!(f, "token id {token} is not below vocab_size {vocab_size}")
            }
            Self::Position { position, limit } => {
                write!(f, "position {position} is past the limit of {limit} positions")
            }
            Self::Gap { position, len } => {
                write!(f, "position {position} leaves a gap, the cache holds {len} positions")
            }
            Self::Dropped { position, least } => write!(
                f,
                "position {position} is too far back, the cache has dropped what it sees: begin again before position 32, or \
                 at {least} or later"
            ),
            Self::WrongModel(what) => write!(f, "{what} was made for another model, or for other settings"),
            Self::Missing(what) => write!(f, "the model lacks {what}"),
            Self::NotFinite { layer } => write!(
                f,
                "layer {layer}: the input of the FFN is not finite (NaN or infinity): is the checkpoint damaged, or its format \
                 too narrow?"
            ),
            Self::Deadline => f.write_str("out of time before the step was over; the cache is as before it"),
        }
    }
}

impl core::error::Error for Error {}
