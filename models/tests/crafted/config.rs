//! Configurations, and the index of shards.

use crate::{bounded, memory, refused};
use candle_sparse_models::{
    KvConfig, KvDType,
    files::ModelFiles,
    llama::{Cache, LoadOptions},
    pretrained::{self, Pretrained},
};
use std::{fs, path::Path};

/// Bytes of the built-in model, which counts where a configuration is wrong.
const MODEL: usize = 6_000_000;

/// A folder with the built-in model, whose `file` is replaced by `text`.
fn folder(dir: &Path, file: &str, text: &str) {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu");
    for name in ["config.json", "model.safetensors", "tokenizer.json", "sparse.safetensors"] {
        fs::copy(format!("{model}/{name}"), dir.join(name)).unwrap();
    }
    fs::write(dir.join(file), text).unwrap();
}

fn config_with(changes: &[(&str, &str)]) -> String {
    let text = include_str!("../../testdata/tales-silu/config.json");
    let mut json: serde_json::Map<_, _> = serde_json::from_str(text).unwrap();
    for (key, _) in changes {
        json.remove(*key);
    }
    let rest = serde_json::to_string(&json).unwrap();
    let changes: String = changes.iter().map(|(key, value)| format!("\"{key}\":{value},")).collect();
    format!("{{{changes}{}", &rest[1..])
}

#[test]
fn sizes_of_a_configuration() {
    let _alone = memory::alone();
    let dir = tempfile::tempdir().unwrap();
    for (key, value, needle) in [
        ("hidden_size", "9223372036854775808", ""),
        ("hidden_size", "18446744073709551615", ""),
        ("hidden_size", "18446744073709551616", "config.json"),
        ("hidden_size", "-1", "config.json"),
        ("hidden_size", "1e400", "config.json"),
        ("hidden_size", "0", "hidden_size"),
        ("intermediate_size", "9223372036854775808", ""),
        ("vocab_size", "18446744073709551615", ""),
        ("num_hidden_layers", "18446744073709551615", "num_hidden_layers"),
        ("num_hidden_layers", "1000000000", "num_hidden_layers"),
        ("num_attention_heads", "18446744073709551615", ""),
        ("num_key_value_heads", "0", "num_key_value_heads"),
        ("head_dim", "18446744073709551614", "head_dim"),
        ("max_position_embeddings", "0", "max_position_embeddings"),
        ("rms_norm_eps", "-1.0", "rms_norm_eps"),
        ("rope_theta", "-1.0", "theta"),
        ("hidden_act", r#""constructor""#, "hidden_act"),
        ("hidden_act", "\"si\u{7f}u\"", r"si\u{7f}u"),
        ("hidden_act", r#""\u001b[2J\nsilu""#, r"\u{1b}[2J"),
        ("model_type", r#""\u0085""#, r"\u{85}"),
        ("rope_scaling", r#"{"rope_type":"\u001b","factor":2.0}"#, r"\u{1b}"),
        ("hidden_act", &format!("{:?}", "x".repeat(1 << 20)), "hidden_act"),
        ("rms_norm_eps", r#""\u001b""#, "config.json"),
        ("quantization_config", &"[".repeat(1000), "config.json"),
    ] {
        let text = config_with(&[(key, value)]);
        folder(dir.path(), "config.json", &text);
        let files = ModelFiles::from_folder(dir.path()).unwrap();
        let what = format!("{key} {}", &value[..value.len().min(40)]);
        // The small files beside it count as well.
        refused(&what, MODEL + text.len(), needle, || Pretrained::load(&files, LoadOptions::default()));
    }
}

#[test]
fn frequencies_without_sense_end_in_an_error_or_a_model() {
    let _alone = memory::alone();
    let dir = tempfile::tempdir().unwrap();
    let llama3 = |factor: &str| {
        format!(
            r#"{{"rope_type":"llama3","factor":{factor},"low_freq_factor":0.0,"high_freq_factor":0.0,"original_max_position_embeddings":0}}"#
        )
    };
    for (key, value) in [
        ("rope_theta", "1e-320".to_string()),
        ("rope_theta", "3e38".into()),
        ("rope_scaling", llama3("0.0")),
        ("rope_scaling", llama3("1e-40")),
        ("rope_scaling", r#"{"rope_type":"yarn","factor":1e-30,"original_max_position_embeddings":18446744073709551615}"#.into()),
        ("rope_scaling", r#"{"rope_type":"yarn","factor":3e38,"beta_fast":1e-40,"beta_slow":3e38,"original_max_position_embeddings":1}"#.into()),
    ] {
        let text = config_with(&[(key, &value)]);
        folder(dir.path(), "config.json", &text);
        let files = ModelFiles::from_folder(dir.path()).unwrap();
        bounded(&value, 2 * MODEL, || {
            let Ok(loaded) = Pretrained::load(&files, LoadOptions::default()) else { return };
            let mut cache = Cache::of(&loaded.model, KvConfig::exact(KvDType::F16));
            let mut logits = vec![0.0; loaded.config.vocab_size];
            for position in 0..40 {
                loaded.model.decode(1, position, &mut cache, &mut logits).unwrap();
            }
        });
    }
}

#[test]
fn what_is_not_read_does_not_inflate() {
    let _alone = memory::alone();
    let dir = tempfile::tempdir().unwrap();
    let numbers = vec!["0"; 30_000_000].join(",");
    for text in [
        format!("[{numbers}]"),
        config_with(&[("quantization_config", &format!("[{numbers}]"))]),
        config_with(&[("architectures", &format!("[{numbers}]"))]),
        config_with(&[("eos_token_id", &format!("[{numbers}]"))]),
    ] {
        folder(dir.path(), "config.json", &text);
        let read = || ModelFiles::from_folder(dir.path()).and_then(|files| pretrained::config(&files));
        refused("config.json", text.len(), "config.json", read);
    }
    for file in ["generation_config.json", "tokenizer_config.json", "tokenizer.json"] {
        let text = format!("{{\"a\":[{numbers}]}}");
        folder(dir.path(), file, &text);
        let read = || {
            ModelFiles::from_folder(dir.path())
                .and_then(|files| Pretrained::load(&files, LoadOptions::default()))
        };
        refused(file, MODEL + text.len(), file, read);
        fs::remove_file(dir.path().join(file)).unwrap();
    }
}

#[test]
fn shards_of_an_index() {
    let _alone = memory::alone();
    let dir = tempfile::tempdir().unwrap();
    for name in [
        "../m.safetensors",
        "/etc/m.safetensors",
        "a/../../m.safetensors",
        "C:\\\\m.safetensors",
        "..\\\\m.safetensors",
        "m.safetensors:stream.safetensors",
        "m\\u0000.safetensors",
        "m\\n.safetensors",
        ".safetensors/..",
        "model.safetensors.index.json",
        "",
    ] {
        let text = format!(r#"{{"weight_map":{{"a":"{name}"}}}}"#);
        folder(dir.path(), "model.safetensors.index.json", &text);
        fs::remove_file(dir.path().join("model.safetensors")).unwrap();
        let what = &name[..name.len().min(40)];
        refused(what, text.len(), "model.safetensors.index.json", || ModelFiles::from_folder(dir.path()));
    }
    let map: Vec<_> = (0..3_000_000).map(|i| format!("\"{i:x}\":\"\"")).collect();
    let text = format!(r#"{{"weight_map":{{{}}}}}"#, map.join(","));
    folder(dir.path(), "model.safetensors.index.json", &text);
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    refused("many", text.len(), "model.safetensors.index.json", || ModelFiles::from_folder(dir.path()));
}

#[cfg(unix)]
#[test]
fn links_that_lead_in_a_circle() {
    let _alone = memory::alone();
    let dir = tempfile::tempdir().unwrap();
    let index = r#"{"weight_map":{"a":"round.safetensors"}}"#;
    folder(dir.path(), "model.safetensors.index.json", index);
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    std::os::unix::fs::symlink("round.safetensors", dir.path().join("round.safetensors")).unwrap();
    let load =
        || ModelFiles::from_folder(dir.path()).and_then(|f| Pretrained::load(&f, LoadOptions::default()));
    refused("a link to itself", MODEL + index.len(), "round.safetensors", load);
}
