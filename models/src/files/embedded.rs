//! Models that are part of a program.

use core::fmt;

/// A small model that is part of the program.
///
/// ```
/// use candle_sparse_models::files::{EmbeddedModel, ModelFiles};
///
/// const TALES: EmbeddedModel = EmbeddedModel {
///     name: "tales-silu",
///     config: include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu/config.json")),
///     tokenizer: include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu/tokenizer.json")),
///     weights: include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu/model.safetensors")),
///     sparse_profile: include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu/sparse.safetensors")),
/// };
/// let files = ModelFiles::from_embedded(&TALES);
/// assert_eq!(files.name, "tales-silu");
/// assert!(files.folder.is_none());
/// ```
#[derive(Clone, Copy)]
pub struct EmbeddedModel {
    /// The name to ask for it by.
    pub name: &'static str,
    /// Content of its `config.json`.
    pub config: &'static [u8],
    /// Content of its `tokenizer.json`.
    pub tokenizer: &'static [u8],
    /// Content of its `model.safetensors`.
    pub weights: &'static [u8],
    /// Content of its `sparse.safetensors`.
    pub sparse_profile: &'static [u8],
}

impl fmt::Debug for EmbeddedModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedModel").field("name", &self.name).finish_non_exhaustive()
    }
}
