//! Where the measured weights come from: a checkpoint, or random numbers in a shape.

use super::{Cli, model};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use candle_sparse::Format;
use candle_sparse_models::{
    files::{ModelFiles, Weights},
    llama,
    pretrained::{self, var_builder},
};
use half::{bf16, f16};
use std::path::Path;

/// Where configuration and weights come from.
pub(crate) struct Source {
    from: Origin,
    /// What the weights are to become; `None`: what they are.
    pub(crate) format: Option<Format>,
}

enum Origin {
    /// Random weights for a `config.json`.
    Shape(String),
    Files(Box<ModelFiles>),
}

impl Source {
    pub(crate) fn new(cli: &Cli) -> Result<Self> {
        let from = match &cli.model {
            None => Origin::Shape(cli.shape.config(cli.drawn()?.map_or(0.0, |d| d.gate_shift()))),
            Some(name) => Origin::Files(Box::new(model::resolve(name, None)?)),
        };
        Ok(Self { from, format: cli.format() })
    }

    /// Random weights for a `config.json`.
    #[cfg(test)]
    pub(crate) fn random(config: String, format: Format) -> Self {
        Self { from: Origin::Shape(config), format: Some(format) }
    }

    /// The GGUF file, if it is one.
    pub(crate) fn gguf_file(&self) -> Option<&Path> {
        let Origin::Files(files) = &self.from else { return None };
        match &files.weights {
            Weights::Gguf(path) => Some(path),
            _ => None,
        }
    }

    /// Whether candle needs its model for quantised weights.
    pub(crate) fn is_quantized(&self) -> bool {
        self.format.map_or(self.gguf_file().is_some(), Format::is_quantized)
    }

    pub(crate) fn config(&self) -> Result<llama::Config> {
        match &self.from {
            Origin::Shape(json) => {
                let config: llama::LlamaConfig = serde_json::from_str(json).context("config.json")?;
                Ok(config.into_config(false))
            }
            Origin::Files(files) => Ok(pretrained::config(files)?),
        }
    }

    /// `config.json`, which a GGUF file has not.
    pub(crate) fn config_json(&self) -> Result<&[u8]> {
        match &self.from {
            Origin::Shape(json) => Ok(json.as_bytes()),
            Origin::Files(files) => files.config.as_deref().with_context(|| {
                format!("{}: candle runs a GGUF file in blocks alone: leave out --dtype", files.name)
            }),
        }
    }

    /// For all engines: candle's memory map would need unsafe code, and changes the load alone.
    pub(crate) fn var_builder(&self) -> Result<VarBuilder<'static>> {
        let dtype = self.format.map(load_dtype);
        Ok(match &self.from {
            Origin::Shape(_) => {
                VarBuilder::from_backend(Box::new(Random), dtype.unwrap_or(DType::F16), Device::Cpu)
            }
            Origin::Files(files) => var_builder(files, dtype)?,
        })
    }

    /// The dtype of a cache.
    pub(crate) fn cache_dtype(&self) -> Result<DType> {
        let stored = match (self.format, self.gguf_file()) {
            (Some(format), _) => format,
            (None, Some(_)) => Format::F16,
            (None, None) => return Ok(self.var_builder()?.dtype()),
        };
        Ok(if stored == Format::F32 { DType::F32 } else { DType::F16 })
    }
}

fn load_dtype(format: Format) -> DType {
    match format {
        Format::F32 => DType::F32,
        Format::BF16 => DType::BF16,
        // Quantised weights are made from F16 ones.
        _ => DType::F16,
    }
}

/// Weights are uniform in −`WIDTH`/2 .. `WIDTH`/2.
pub(crate) const WIDTH: f32 = 0.05;

/// Weights that are quick to make; small, so that no sum overflows in f16.
struct Random;

impl SimpleBackend for Random {
    fn get(
        &self,
        shape: Shape,
        _: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let n = shape.elem_count();
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 40) as f32 / (1 << 24) as f32 - 0.5) * WIDTH
        };
        if shape.rank() == 1 {
            return Tensor::ones(shape, dtype, device);
        }
        match dtype {
            DType::F16 => {
                Tensor::from_vec((0..n).map(|_| f16::from_f32(next())).collect::<Vec<_>>(), shape, device)
            }
            DType::BF16 => {
                Tensor::from_vec((0..n).map(|_| bf16::from_f32(next())).collect::<Vec<_>>(), shape, device)
            }
            _ => Tensor::from_vec((0..n).map(|_| next()).collect::<Vec<_>>(), shape, device)?.to_dtype(dtype),
        }
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("random weights need a shape for {name}")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        // Whatever is asked for is made, but for what a Llama may have and need not.
        !name.ends_with(".bias")
    }
}
