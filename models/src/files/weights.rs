//! Where weights and profile of a model are.

use crate::gguf::GgufFile;
use candle_core::Result;
use candle_sparse::profile::Profile;
use core::fmt;
use std::path::PathBuf;

/// Where the weights of a model are.
///
/// ```
/// use candle_sparse_models::files::{ModelFiles, Weights};
///
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// match ModelFiles::from_folder(folder)?.weights {
///     Weights::Files(shards) => assert!(shards[0].ends_with("model.safetensors")),
///     other => panic!("{other:?}"),
/// }
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone)]
pub enum Weights {
    /// One `safetensors` file, or the shards in the order of their names.
    Files(Vec<PathBuf>),
    /// The content of one `safetensors` file.
    Embedded(&'static [u8]),
    /// A GGUF file, which may hold configuration, tokenizer and profile too; any part of a split model.
    Gguf(PathBuf),
    /// A GGUF file that is open, mapped perhaps.
    Opened(GgufFile),
}

/// Where a sparse profile is.
///
/// ```
/// use candle_sparse_models::files::{ModelFiles, SparseProfile};
///
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
/// let profile = ModelFiles::from_folder(folder)?.sparse_profile.expect("tales-silu is calibrated");
/// assert!(matches!(profile, SparseProfile::File(_)));
/// assert_eq!(profile.load()?.layers.len(), 4);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
pub enum SparseProfile {
    /// A file.
    File(PathBuf),
    /// The content of one.
    Embedded(&'static [u8]),
}

impl SparseProfile {
    /// Reads the profile.
    ///
    /// # Errors
    /// It is no profile, truncated or corrupt.
    pub fn load(&self) -> Result<Profile> {
        match self {
            Self::File(path) => Profile::load(path),
            Self::Embedded(bytes) => Profile::from_bytes(bytes),
        }
    }
}

impl fmt::Debug for SparseProfile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Embedded(bytes) => write!(f, "Embedded({} bytes)", bytes.len()),
        }
    }
}

impl fmt::Debug for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Files(paths) => f.debug_tuple("Files").field(paths).finish(),
            Self::Embedded(bytes) => write!(f, "Embedded({} bytes)", bytes.len()),
            Self::Gguf(path) => f.debug_tuple("Gguf").field(path).finish(),
            Self::Opened(file) => f.debug_tuple("Opened").field(&file.path()).finish(),
        }
    }
}
