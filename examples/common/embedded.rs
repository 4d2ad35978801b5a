//! The two models that are part of the programs: 2.8 million parameters each, made by `train-tiny`.

use anyhow::{Result, bail};
use candle_sparse_models::{
    files::{EmbeddedModel, ModelFiles},
    hub::HubSettings,
};
use std::path::Path;

macro_rules! embedded {
    ($name:literal) => {
        EmbeddedModel {
            name: $name,
            config: include_bytes!(concat!("../../models/testdata/", $name, "/config.json")),
            tokenizer: include_bytes!(concat!("../../models/testdata/", $name, "/tokenizer.json")),
            weights: include_bytes!(concat!("../../models/testdata/", $name, "/model.safetensors")),
            sparse_profile: include_bytes!(concat!("../../models/testdata/", $name, "/sparse.safetensors")),
        }
    };
}

/// The built-in models; the first is the programs' default.
pub(crate) const EMBEDDED: [EmbeddedModel; 2] = [embedded!("tales-silu"), embedded!("tales-relu")];

/// The files of the model that a user means: a built-in one, or what [`ModelFiles::resolve`] finds.
pub(crate) fn resolve(name: &str, revision: Option<&str>) -> Result<ModelFiles> {
    if let Some(model) = EMBEDDED.iter().find(|model| model.name == name) {
        if let Some(revision) = revision {
            bail!("`{name}` is not on the Hub: revision `{revision}` does not apply to it");
        }
        return Ok(ModelFiles::from_embedded(model));
    }
    let settings = HubSettings::from_env();
    ModelFiles::resolve(name, revision, &settings).map_err(|e| {
        // Without a slash it may be a misspelt name.
        if name.contains('/') || Path::new(name).exists() {
            return e.into();
        }
        let names = EMBEDDED.map(|model| format!("`{}`", model.name)).join(", ");
        anyhow::Error::from(e).context(format!("no model `{name}`; built-in models: {names}"))
    })
}
