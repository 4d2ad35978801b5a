//! Checkpoint files, each written whole or not at all.

use anyhow::Result;
use candle_sparse::save::save;
use half::f16;
use safetensors::tensor::{Dtype, TensorView, serialize};
use std::{collections::HashMap, io::Write, path::Path};

use super::model::Llama;

/// Puts a text or a checkpoint in its place.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    Ok(save(path, |file| Ok(file.write_all(bytes)?))?)
}

/// Writes the weights in f16 and `config.json`.
pub(crate) fn save_weights(model: &Llama, dir: &Path) -> Result<()> {
    save_tensors(model, &dir.join("model.safetensors"), HashMap::new())?;
    let config = serde_json::to_string_pretty(&model.config.json())? + "\n";
    write_file(&dir.join("config.json"), config.as_bytes())
}

/// Writes the weights in f16, with `info` in the file's metadata.
pub(crate) fn save_tensors(model: &Llama, path: &Path, mut info: HashMap<String, String>) -> Result<()> {
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
    info.insert("format".to_string(), "pt".to_string());
    write_file(path, &serialize(views, Some(info))?)
}
