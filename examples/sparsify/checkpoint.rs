//! The model that is read, and the folder that is written.

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device};
use candle_sparse_models::{files::ModelFiles, pretrained::var_builder};
use safetensors::SafeTensors;
use serde_json::Value;
use std::{collections::HashMap, path::Path};

use super::config::{Config, HiddenAct};
use super::model::Llama;
use super::save::{save_tensors, write_file};

const WEIGHTS: &str = "model.safetensors";
/// The entry of the weights' metadata that says how many steps were made.
const STEPS: &str = "sparsify_steps";

/// The teacher in F32, and its `config.json`.
pub(crate) fn read_teacher(files: &ModelFiles) -> Result<(Llama, Value)> {
    let Some(json) = &files.config else {
        bail!("{}: a GGUF file cannot be trained; give the folder or Hub id it was made from", files.name)
    };
    let json: Value = serde_json::from_slice(json).with_context(|| format!("{}: config.json", files.name))?;
    let config = config(&json).with_context(|| format!("{}: config.json", files.name))?;
    let vb = var_builder(files, Some(DType::F32))?;
    let mut teacher = Llama::from_lookup(&config, |name, shape| Ok(vb.get(shape, name)?))?;
    teacher.is_trained = |_| false;
    Ok((teacher, json))
}

/// What this program can train; a part that it would leave out is refused.
fn config(json: &Value) -> Result<Config> {
    let number = |name: &str| json[name].as_u64().map(|n| n as usize);
    let size = |name: &str| number(name).with_context(|| format!("{name} must be a number"));
    let token = |name: &str| json[name].as_u64().or_else(|| json[name][0].as_u64()).map(|id| id as u32);
    ensure!(json["model_type"] == "llama", "model_type {} is no llama", json["model_type"]);
    for absent in ["rope_scaling", "attention_bias", "mlp_bias", "quantization_config"] {
        let value = &json[absent];
        ensure!(value.is_null() || value == false, "{absent} {value} cannot be trained here");
    }
    let act = json["hidden_act"].as_str().context("hidden_act must be a name")?;
    let (hidden_size, heads) = (size("hidden_size")?, size("num_attention_heads")?);
    let bos_token_id =
        token("bos_token_id").context("bos_token_id, which begins every window, is missing")?;
    let config = Config {
        architectures: vec!["LlamaForCausalLM".into()],
        model_type: "llama".into(),
        vocab_size: size("vocab_size")?,
        hidden_size,
        intermediate_size: size("intermediate_size")?,
        num_hidden_layers: size("num_hidden_layers")?,
        num_attention_heads: heads,
        num_key_value_heads: number("num_key_value_heads").unwrap_or(heads),
        head_dim: number("head_dim").unwrap_or(hidden_size / heads.max(1)),
        max_position_embeddings: size("max_position_embeddings")?,
        rms_norm_eps: json["rms_norm_eps"].as_f64().context("rms_norm_eps must be a number")?,
        rope_theta: json["rope_theta"].as_f64().unwrap_or(10_000.0),
        hidden_act: HiddenAct::parse(act)?,
        gated_mlp: true,
        bos_token_id,
        eos_token_id: token("eos_token_id").unwrap_or(bos_token_id),
        tie_word_embeddings: json["tie_word_embeddings"] == true,
        attention_bias: false,
        mlp_bias: false,
        torch_dtype: "float16".into(),
    };
    config.check()?;
    Ok(config)
}

/// The teacher's weights under an activation with exact zeros; FFNs and the norms behind attention are trained.
pub(crate) fn student(teacher: &Llama) -> Result<Llama> {
    let mut config = teacher.config.clone();
    if config.hidden_act == HiddenAct::Silu {
        config.hidden_act = HiddenAct::Relu;
    }
    let mut student = Llama::from_lookup(&config, |name, _| {
        Ok(teacher.vars.get(name).with_context(|| format!("no tensor {name}"))?.as_detached_tensor())
    })?;
    student.is_trained = is_trained;
    Ok(student)
}

/// Attention and the embedding stay as they are, and with them what the model knows of its text.
fn is_trained(name: &str) -> bool {
    name.contains(".mlp.") || name.contains("post_attention_layernorm") || name == "model.norm.weight"
}

/// Whether a folder holds weights already.
pub(crate) fn exists(dir: &Path) -> bool {
    dir.join(WEIGHTS).exists()
}

/// Reads the student back from `dir`, and how many steps it was trained.
pub(crate) fn resume(config: &Config, dir: &Path) -> Result<(Llama, usize)> {
    let path = dir.join(WEIGHTS);
    let read = || -> Result<(Llama, usize)> {
        let bytes = std::fs::read(&path)?;
        let (_, header) = SafeTensors::read_metadata(&bytes)?;
        let steps = header.metadata().as_ref().and_then(|info| info.get(STEPS));
        let steps = steps.context("was not written by sparsify: give another folder as --out")?.parse()?;
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?;
        let mut student = Llama::from_tensors(config, &tensors)?;
        student.is_trained = is_trained;
        Ok((student, steps))
    };
    read().with_context(|| path.display().to_string())
}

/// Writes all but the weights: the tokenizer and the settings as they were, with the student's activation.
pub(crate) fn save_settings(files: &ModelFiles, mut json: Value, config: &Config, dir: &Path) -> Result<()> {
    json["hidden_act"] = config.hidden_act.name().into();
    // transformers writes the one or the other.
    for name in ["dtype", "torch_dtype"] {
        if !json[name].is_null() {
            json[name] = "float16".into();
        }
    }
    // Indexing has put what was missing.
    if let Some(fields) = json.as_object_mut() {
        fields.retain(|_, value| !value.is_null());
    }
    let text = serde_json::to_string_pretty(&json)? + "\n";
    write_file(&dir.join("config.json"), text.as_bytes())?;
    let rest = [
        ("tokenizer.json", files.tokenizer.as_deref()),
        ("generation_config.json", files.generation_config.as_deref()),
        ("tokenizer_config.json", files.tokenizer_config.as_deref()),
        ("chat_template.jinja", files.chat_template.as_deref()),
    ];
    for (name, bytes) in rest {
        if let Some(bytes) = bytes {
            write_file(&dir.join(name), bytes)?;
        }
    }
    Ok(())
}

/// Writes the student's weights in F16, and how many steps it was trained.
pub(crate) fn save(student: &Llama, steps: usize, dir: &Path) -> Result<()> {
    let info = HashMap::from([(STEPS.to_string(), steps.to_string())]);
    save_tensors(student, &dir.join(WEIGHTS), info)
}

#[cfg(test)]
mod tests {
    use super::super::config::tiny;
    use super::*;

    #[test]
    fn what_would_be_left_out_of_the_model_is_refused() {
        let good = tiny(HiddenAct::Silu);
        assert_eq!(config(&good.json()).unwrap(), good);
        let several: Value = serde_json::json!([1, 5]);
        let wrong = serde_json::json!({ "rope_type": "llama3", "factor": 8.0 });
        let with = |name: &str, value: &Value| {
            let mut json = good.json();
            json[name] = value.clone();
            config(&json)
        };
        assert_eq!(with("eos_token_id", &several).unwrap().eos_token_id, 1);
        let bad = [
            ("rope_scaling", wrong),
            ("mlp_bias", true.into()),
            ("model_type", "mistral".into()),
            ("hidden_act", "gelu".into()),
            ("bos_token_id", Value::Null),
        ];
        for (name, value) in bad {
            let message = format!("{:#}", with(name, &value).unwrap_err());
            assert!(message.contains(name) || message.contains("gelu"), "{name}: {message}");
        }
    }

    #[test]
    fn a_student_takes_the_weights_and_not_the_activation() {
        let teacher = Llama::new(&tiny(HiddenAct::Silu), &mut super::super::rng::Rng::new(1)).unwrap();
        let student = student(&teacher).unwrap();
        assert_eq!(student.config, tiny(HiddenAct::Relu));
        let trained: Vec<_> = student.vars.keys().filter(|name| (student.is_trained)(name)).collect();
        assert_eq!(trained.len(), 2 * 4 + 1, "{trained:?}");
    }
}
