//! What a GGUF file says about its model.

use crate::gguf::{ARCEE, LLAMA, OWN};
use crate::llama::{Config, Llama3RopeType, YarnRope};
use candle_core::{
    Result,
    quantized::{GgmlDType, gguf_file::Value},
};
use candle_sparse_core::{Activation, Rope, RopeScaling};
use std::collections::HashMap;

/// Sets a value, whether it was there or not.
pub(super) fn put(metadata: &mut Vec<(String, Value)>, key: impl Into<String>, value: Value) {
    let key = key.into();
    metadata.retain(|(k, _)| *k != key);
    metadata.push((key, value));
}

/// The shape of the model, beside what is `kept`.
pub(super) fn metadata(
    kept: HashMap<String, Value>,
    c: &Config,
    dtype: GgmlDType,
    neuron_major: bool,
) -> Result<Vec<(String, Value)>> {
    let core = c.to_core()?;
    let architecture = if neuron_major { OWN } else { architecture(&core) };
    let text = |s: &str| Value::String(s.to_string());
    let count = |n: usize| Value::U32(n as u32);
    let mut all: Vec<_> = kept.into_iter().collect();
    // The order of a map is random, files need not be.
    all.sort_by(|a, b| a.0.cmp(&b.0));
    for (key, value) in [
        ("vocab_size", count(core.vocab_size)),
        ("context_length", count(core.max_position_embeddings)),
        ("embedding_length", count(core.hidden_size)),
        ("block_count", count(core.num_hidden_layers)),
        ("feed_forward_length", count(core.intermediate_size)),
        ("attention.head_count", count(core.num_attention_heads)),
        ("attention.head_count_kv", count(core.num_key_value_heads)),
        ("attention.key_length", count(core.head_dim)),
        ("attention.value_length", count(core.head_dim)),
        ("attention.layer_norm_rms_epsilon", Value::F32(core.rms_norm_eps)),
        ("rope.dimension_count", count(core.head_dim)),
        ("rope.freq_base", Value::F32(core.rope.theta)),
    ] {
        put(&mut all, format!("{architecture}.{key}"), value);
    }
    if let Some(window) = core.sliding_window {
        put(&mut all, format!("{architecture}.attention.sliding_window"), count(window));
    }
    for (key, value) in rope_scaling(core.rope.scaling) {
        put(&mut all, format!("{architecture}.rope.scaling.{key}"), value);
    }
    if architecture == OWN {
        put(&mut all, format!("{architecture}.gated_mlp"), Value::Bool(c.gated_mlp));
        let (name, param) = crate::llama::activation_name(c.hidden_act);
        put(&mut all, format!("{architecture}.hidden_act"), text(name));
        for (key, value) in
            [("hidden_act_param", param), ("gate_shift", Some(c.gate_shift)), ("norm_shift", c.norm_shift)]
        {
            if let Some(value) = value {
                put(&mut all, format!("{architecture}.{key}"), Value::F32(value));
            }
        }
    }
    put(&mut all, "general.architecture", text(architecture));
    put(&mut all, "general.file_type", Value::U32(file_type(dtype)));
    if !all.iter().any(|(key, _)| key == "tokenizer.ggml.model") {
        put(&mut all, "tokenizer.ggml.model", text(super::NO_TOKENIZER));
    }
    Ok(all)
}

/// The architecture that runs such a model elsewhere too, or our own.
fn architecture(c: &candle_sparse_core::Config) -> &'static str {
    let uncut = matches!(c.rope.scaling, RopeScaling::Yarn { truncate: false, .. });
    if c.gate_shift != 0.0 || c.norm_shift.is_some() || uncut {
        return OWN;
    }
    match (c.hidden_act, c.gated_mlp) {
        (Activation::Silu, true) => LLAMA,
        (Activation::Relu2, false) => ARCEE,
        _ => OWN,
    }
}

/// What stands behind `rope.scaling.`; what is usual is left out, as llama.cpp's converter does.
fn rope_scaling(scaling: RopeScaling) -> Vec<(&'static str, Value)> {
    let text = |s: &str| Value::String(s.to_string());
    match scaling {
        RopeScaling::None | RopeScaling::Llama3 { .. } => Vec::new(),
        RopeScaling::Linear { factor } => vec![("type", text("linear")), ("factor", Value::F32(factor))],
        RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            original_max_position_embeddings,
            attention_factor,
            truncate,
        } => {
            let original = Value::U32(original_max_position_embeddings as u32);
            let mut all = vec![
                ("type", text("yarn")),
                ("factor", Value::F32(factor)),
                ("original_context_length", original),
            ];
            let [fast, slow] = YarnRope::BETA;
            let on_top = attention_factor / YarnRope::mscale(factor, 1.0);
            for (key, value, usual) in [
                ("attn_factor", on_top, 1.0),
                ("yarn_beta_fast", beta_fast, fast),
                ("yarn_beta_slow", beta_slow, slow),
            ] {
                if value != usual {
                    all.push((key, Value::F32(value)));
                }
            }
            if !truncate {
                all.push(("yarn_truncate", Value::Bool(false)));
            }
            all
        }
    }
}

/// GGUF has no words for Llama 3's stretching of frequencies: it writes their factors.
pub(super) fn rope_freqs(c: &Config) -> Result<Option<Vec<f32>>> {
    if c.rope_scaling.as_ref().is_none_or(|s| s.rope_type != Llama3RopeType::Llama3) {
        return Ok(None);
    }
    let core = c.to_core()?;
    let plain = Rope { scaling: RopeScaling::None, ..core.rope };
    let factor = |i| plain.inv_freq(i, core.head_dim) / core.rope.inv_freq(i, core.head_dim);
    Ok(Some((0..core.head_dim / 2).map(factor).collect()))
}

/// llama.cpp's number for files whose matrices have a type.
fn file_type(dtype: GgmlDType) -> u32 {
    match dtype {
        GgmlDType::F32 => 0,
        GgmlDType::F16 => 1,
        GgmlDType::Q4_0 => 2,
        GgmlDType::Q4_1 => 3,
        GgmlDType::Q8_0 => 7,
        GgmlDType::Q5_0 => 8,
        GgmlDType::Q5_1 => 9,
        GgmlDType::Q2K => 10,
        GgmlDType::Q3K => 11,
        GgmlDType::Q4K => 14,
        GgmlDType::Q5K => 16,
        GgmlDType::Q6K => 18,
        GgmlDType::BF16 => 32,
        // Not written by us: llama.cpp guesses.
        GgmlDType::Q8_1 | GgmlDType::Q8K => 1024,
    }
}
