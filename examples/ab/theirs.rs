//! candle's model of the same files.

use anyhow::{Context, Result, bail};
use candle_core::{
    Device,
    quantized::gguf_file::{self, Value},
};
use candle_sparse::{Format, weight::dtype_of};
use candle_sparse_core::Activation;
use candle_sparse_models::{
    causal_lm::{CandleLlama, CandleMistral, CandleQuantizedLlama, CausalLm},
    files::{ModelFiles, Weights},
    pretrained,
};
use candle_transformers::models::{llama, mistral, quantized_llama};
use std::{fs::File, io::BufReader};

/// Loads it as candle's examples do.
pub(crate) fn load(files: &ModelFiles, dtype: Option<Format>) -> Result<(String, Box<dyn CausalLm>)> {
    let config = pretrained::config(files)?;
    if config.hidden_act != Activation::Silu || config.norm_shift.is_some() || config.gate_shift != 0.0 {
        bail!("candle's llama knows SiLU alone: it would run {} as something else", files.name);
    }
    if let Weights::Gguf(path) = &files.weights {
        if dtype.is_some() {
            bail!("--candle-dtype does not apply to GGUF files");
        }
        let mut file = BufReader::new(File::open(path)?);
        let content = gguf_file::Content::read(&mut file)?;
        if !matches!(content.metadata.get("general.architecture"), Some(Value::String(s)) if s == "llama") {
            bail!(
                "{} is neuron-major, which candle cannot open: give the file that it was made from",
                files.name
            );
        }
        let model = quantized_llama::ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?;
        return Ok(("candle quantized_llama".to_string(), Box::new(CandleQuantizedLlama::new(model))));
    }
    let dtype = match dtype.map(|f| dtype_of(f).context("--candle-dtype must be f32, f16 or bf16")) {
        Some(dtype) => dtype?,
        None => pretrained::var_builder(files, None)?.dtype(),
    };
    let vb = pretrained::var_builder(files, Some(dtype))?;
    let json = files.config.as_deref().context("config.json")?;
    let kind: serde_json::Value = serde_json::from_slice(json).context("config.json")?;
    let name = |kind: &str| format!("candle {kind}, {}", dtype.as_str());
    if kind["model_type"] == "mistral" {
        let config: mistral::Config = serde_json::from_slice(json).context("candle's mistral::Config")?;
        let model = mistral::Model::new(&config, vb)?;
        return Ok((name("mistral"), Box::new(CandleMistral::new(model))));
    }
    let config: llama::LlamaConfig = serde_json::from_slice(json).context("candle's LlamaConfig")?;
    let config = config.into_config(false);
    let model = llama::Llama::load(vb, &config)?;
    Ok((name("llama"), Box::new(CandleLlama::new(model, config, dtype)?)))
}
