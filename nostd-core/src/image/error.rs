//! Why an image was refused.

use super::Role;
use core::fmt;

/// Why an image was refused.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The first bytes are not those of an image.
    NotAnImage,
    /// The image is of another version.
    Version(u32),
    /// The bytes do not begin at a multiple of [`super::ALIGNMENT`] in memory.
    Misaligned,
    /// The image goes on where the bytes end.
    Truncated {
        /// Bytes of the image.
        expected: u32,
        /// Bytes there are.
        got: usize,
    },
    /// The content is not what was written.
    Checksum {
        /// What the header says.
        expected: u32,
        /// What the bytes give.
        found: u32,
    },
    /// The table is too long, not sorted, or names places outside the image.
    Table,
    /// A tensor that every model has is not there.
    Missing {
        /// Which.
        role: Role,
        /// The decoder block it belongs to.
        layer: usize,
    },
    /// A tensor is in a format that it cannot have.
    Format {
        /// Which.
        role: Role,
        /// The decoder block it belongs to.
        layer: usize,
        /// The number of the format.
        format: u32,
    },
    /// A tensor ends behind the end of the image.
    Place {
        /// Which.
        role: Role,
        /// The decoder block it belongs to.
        layer: usize,
    },
    /// The vocabulary has more tokens than the model.
    Tokens {
        /// Tokens of the vocabulary.
        tokens: usize,
        /// Rows of the embedding.
        vocab_size: usize,
    },
    /// A buffer for the blocks has another length than the model has blocks.
    Layers {
        /// Blocks of the model.
        expected: usize,
        /// Blocks there is room for.
        got: usize,
    },
    /// The model that the image holds cannot be run.
    Model(crate::Error),
}

impl From<crate::Error> for Error {
    fn from(e: crate::Error) -> Self {
        Self::Model(e)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NotAnImage => write!(f, "this is no image of a model: make one with `export-embedded`"),
            Self::Version(v) => {
                write!(f, "the image is of version {v}, this program reads version {}", super::VERSION)
            }
            Self::Misaligned => {
                write!(f, "the image does not begin at a multiple of {} bytes in memory", super::ALIGNMENT)
            }
            Self::Truncated { expected, got } => {
                write!(f, "the image has {expected} bytes, only {got} are here: write it to flash again")
            }
            Self::Checksum { expected, found } => write!(
                f,
                "the image is damaged: its checksum is {found:08x}, not {expected:08x}: write it to flash again"
            ),
            Self::Table => write!(f, "the table of the image does not fit the image: export it again"),
            Self::Missing { role, layer } => write!(f, "the image lacks {} of block {layer}", role.name()),
            Self::Format { role, layer, format } => {
                write!(f, "{} of block {layer} is in format {format}, which it cannot have", role.name())
            }
            Self::Place { role, layer } => {
                write!(f, "{} of block {layer} ends behind the end of the image", role.name())
            }
            Self::Tokens { tokens, vocab_size } => {
                write!(f, "the vocabulary has {tokens} tokens, the model only {vocab_size}")
            }
            Self::Layers { expected, got } => {
                write!(f, "the model has {expected} blocks, there is room for {got}")
            }
            Self::Model(e) => write!(f, "the image holds a model that cannot be run: {e}"),
        }
    }
}

impl core::error::Error for Error {}
