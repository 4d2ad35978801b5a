//! Places that hold the files of a model, and the shards of its weights there.

use super::{WEIGHTS, WEIGHTS_INDEX, fail, read};
#[cfg(feature = "hub")]
use crate::hub::HubRepo;
use candle_core::{Error, Result};
use core::fmt;
use serde::Deserialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

/// A place that holds the files of a model under the names they have on the Hub.
pub(super) trait Source: fmt::Display {
    fn get(&self, file: &str) -> Result<PathBuf>;
    fn get_optional(&self, file: &str) -> Result<Option<PathBuf>>;
}

pub(super) struct Folder<'a>(pub(super) &'a Path);

impl fmt::Display for Folder<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "folder `{}`", self.0.display())
    }
}

impl Source for Folder<'_> {
    fn get(&self, file: &str) -> Result<PathBuf> {
        let missing = || Error::Msg(format!("`{file}` is missing in {self}"));
        self.get_optional(file)?.ok_or_else(missing)
    }

    fn get_optional(&self, file: &str) -> Result<Option<PathBuf>> {
        let path = self.0.join(file);
        Ok(path.is_file().then_some(path))
    }
}

#[cfg(feature = "hub")]
impl Source for HubRepo {
    fn get(&self, file: &str) -> Result<PathBuf> {
        Self::get(self, file)
    }

    fn get_optional(&self, file: &str) -> Result<Option<PathBuf>> {
        Self::get_optional(self, file)
    }
}

pub(super) fn weight_files<S: Source>(source: &S) -> Result<Vec<PathBuf>> {
    if let Some(single) = source.get_optional(WEIGHTS)? {
        return Ok(vec![single]);
    }
    let Some(index) = source.get_optional(WEIGHTS_INDEX)? else {
        return fail(format!("no weights in {source}: looked for `{WEIGHTS}` and `{WEIGHTS_INDEX}`"));
    };
    let shards = shard_names(&index)?;
    shards.iter().map(|shard| source.get(shard)).collect()
}

#[derive(Deserialize)]
struct WeightsIndex {
    weight_map: BTreeMap<String, String>,
}

fn shard_names(index: &Path) -> Result<BTreeSet<String>> {
    let place = index.display();
    let parsed: WeightsIndex = serde_json::from_slice(&read(index)?)
        .map_err(|error| Error::Msg(format!("{place}: not an index of shards: {error}")))?;
    let shards: BTreeSet<String> = parsed.weight_map.into_values().collect();
    if shards.is_empty() {
        return fail(format!("{place}: the weight_map is empty"));
    }
    // The names come from outside: none may lead out of the model's folder.
    let outside = |name: &&String| name.contains(['/', '\\', ':']) || name.contains("..");
    match shards.iter().find(|name| outside(name) || !name.ends_with(".safetensors")) {
        Some(bad) => fail(format!("{place}: `{bad}` is not the name of a .safetensors shard")),
        None => Ok(shards),
    }
}
