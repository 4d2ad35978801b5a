//! Places that hold the files of a model, and the shards of its weights there.

use super::{CONFIG, WEIGHTS, WEIGHTS_INDEX, fail, has_extension};
#[cfg(feature = "hub")]
use crate::hub::HubRepo;
use candle_core::{Error, Result};
use candle_sparse::{
    error::plain,
    input::{self, Expected},
};
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

    /// An error of the whole place.
    fn error(&self, problem: String) -> Error {
        Error::Msg(format!("{self}: {}", plain(&problem)))
    }

    /// Whether there is such a file, as far as it can be told without fetching it.
    fn holds(&self, _file: &str) -> bool {
        false
    }
}

/// Weights in forms that are not read.
const OTHER_WEIGHTS: [&str; 6] = [
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "consolidated.safetensors",
    "consolidated.00.pth",
    "tf_model.h5",
    "flax_model.msgpack",
];

pub(super) struct Folder<'a>(pub(super) &'a Path);

impl fmt::Display for Folder<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "folder `{}`", self.0.display())
    }
}

impl Source for Folder<'_> {
    fn get(&self, file: &str) -> Result<PathBuf> {
        self.get_optional(file)?.ok_or_else(|| self.error(format!("`{file}` is missing")))
    }

    fn error(&self, problem: String) -> Error {
        candle_sparse::Error::File { path: self.0.into(), problem }.into()
    }

    fn holds(&self, file: &str) -> bool {
        self.0.join(file).exists()
    }

    fn get_optional(&self, file: &str) -> Result<Option<PathBuf>> {
        let path = self.0.join(file);
        // What is there is looked at where it is opened; a link to nothing is named there too.
        Ok(path.symlink_metadata().is_ok().then_some(path))
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
        let other = OTHER_WEIGHTS.iter().find(|file| source.holds(file));
        let other = other
            .map_or_else(String::new, |file| format!("; `{file}` must be converted to safetensors first"));
        return Err(source.error(format!("no weights: looked for `{WEIGHTS}` and `{WEIGHTS_INDEX}`{other}")));
    };
    let shards = shard_names(&index)?;
    shards.iter().map(|shard| source.get(shard)).collect()
}

/// The model in a folder that holds none as on the Hub, but one in a GGUF file (or in the parts of one).
pub(super) fn only_gguf(folder: &Path) -> Result<Option<PathBuf>> {
    let entries = std::fs::read_dir(folder).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    let entries =
        entries.map_err(|e| Error::Msg(format!("cannot list the folder {}: {e}", folder.display())))?;
    let mut models: Vec<_> =
        entries.iter().map(|entry| entry.path()).filter(|path| has_extension(path, "gguf")).collect();
    models.sort();
    let parts = models.first().and_then(|first| crate::gguf::part_names(first.file_name()?.to_str()?));
    let of_first = |path: &PathBuf| {
        parts.as_ref().is_some_and(|parts| {
            parts.iter().any(|part| path.file_name().is_some_and(|n| n == part.as_str()))
        })
    };
    match models.as_slice() {
        [] => Ok(None),
        [first] => Ok(Some(first.clone())),
        [first, rest @ ..] if rest.iter().all(of_first) => Ok(Some(first.clone())),
        [first, ..] => fail(format!(
            "the folder {} holds no `{CONFIG}`, but {} GGUF files: give one of them, such as {}",
            folder.display(),
            models.len(),
            first.display()
        )),
    }
}

#[derive(Deserialize)]
struct WeightsIndex {
    weight_map: BTreeMap<String, String>,
}

fn shard_names(index: &Path) -> Result<BTreeSet<String>> {
    let bad = |problem: String| candle_sparse::Error::File { path: index.into(), problem }.into();
    let parsed: WeightsIndex = serde_json::from_slice(&input::read(index, Expected::Json)?)
        .map_err(|error| bad(format!("not an index of shards: {error}")))?;
    let shards: BTreeSet<String> = parsed.weight_map.into_values().collect();
    if shards.is_empty() {
        return Err(bad("the weight_map is empty".into()));
    }
    // The names come from outside: none may lead out of the model's folder.
    let outside = |name: &&String| {
        name.contains(['/', '\\', ':']) || name.contains("..") || name.contains(char::is_control)
    };
    match shards.iter().find(|name| outside(name) || !name.ends_with(".safetensors")) {
        Some(name) => Err(bad(format!("`{name}` is not the name of a .safetensors shard"))),
        None => Ok(shards),
    }
}
