//! Checkpoint files, each written whole or not at all.

use anyhow::{Context, Result};
use half::f16;
use safetensors::tensor::{Dtype, TensorView, serialize};
use std::collections::HashMap;
use std::path::Path;

use crate::model::Llama;

/// Writes a file by way of a neighbour, so that an interrupt leaves the old file or the new one.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let name = path.file_name().context("a file name is missing")?.to_string_lossy();
    let temp = path.with_file_name(format!(".{name}.{}.tmp", std::process::id()));
    let written = std::fs::write(&temp, bytes).and_then(|()| std::fs::rename(&temp, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&temp);
    }
    written.with_context(|| format!("cannot write {}", path.display()))
}

/// Writes the weights in f16 and `config.json`.
pub(crate) fn save_weights(model: &Llama, dir: &Path) -> Result<()> {
    let mut data = Vec::with_capacity(model.vars.len());
    for (name, var) in &model.vars {
        let values = var.flatten_all()?.to_vec1::<f32>()?;
        let bytes: Vec<u8> = values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
        data.push((name.as_str(), var.dims().to_vec(), bytes));
    }
    let mut views = Vec::with_capacity(data.len());
    for (name, shape, bytes) in &data {
        views.push((*name, TensorView::new(Dtype::F16, shape.clone(), bytes)?));
    }
    // transformers refuses files without this entry.
    let info = HashMap::from([("format".to_string(), "pt".to_string())]);
    write_atomic(&dir.join("model.safetensors"), &serialize(views, Some(info))?)?;
    let config = serde_json::to_string_pretty(&model.config.json())? + "\n";
    write_atomic(&dir.join("config.json"), config.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn atomic_write_replaces_and_leaves_nothing_else() {
        let dir = std::env::temp_dir().join(format!("train-tiny-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let file = dir.join("a.txt");
        write_atomic(&file, b"old").unwrap();
        write_atomic(&file, b"new").unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1);
        assert!(write_atomic(&dir.join("none/a.txt"), b"x").is_err());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
