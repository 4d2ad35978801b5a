//! candle's model and ours side by side.

use crate::{Folder, common::example, number, ok, one_line};
use candle_core::quantized::gguf_file::{self, Value};
use std::fs::File;

const SHORT: [&str; 8] = ["-n", "16", "--rounds", "1", "--ffn", "dense", "--kv", "f32"];

#[test]
fn in_f32_no_token_differs() {
    let dir = Folder::new();
    let (path, _) = dir.convert("m.gguf", "tales-silu", &["--dtype", "f32"]);
    for model in [&["tales-silu", "--dtype", "f32", "--candle-dtype", "f32"][..], &[&path]] {
        let args = [&SHORT[..], &["--json", "--model"], model].concat();
        let json = ok("ab", &args).json();
        for side in ["candle", "ours"] {
            for key in ["load_s", "resident_bytes", "prefill_tokens_per_s", "decode_tokens_per_s"] {
                assert!(number(&json[side], key) > 0.0, "{side} {key}: {json}");
            }
        }
        let quantized = model.len() == 1;
        let name = json["candle"]["name"].as_str().unwrap();
        assert_eq!(name.contains("quantized_llama"), quantized, "{json}");
        assert!(json["ours"]["name"].as_str().unwrap().starts_with("candle-sparse, dense, "), "{json}");
        assert_eq!((&json["tokens"], &json["rounds"]), (&17.into(), &1.into()));
        assert!(number(&json, "prefill_ratio") > 0.0 && number(&json, "decode_ratio") > 0.0, "{json}");
        assert!(number(&json, "prompt_tokens") > 5.0, "{json}");
        assert!(json["first_difference"].is_null() && json.get("first_difference").is_some(), "{json}");
        assert!(number(&json, "kld").abs() < 1e-4 && number(&json, "top1_agreement") == 1.0, "{json}");
    }
    let out = ok("ab", &[&SHORT[..], &["--model", &path]].concat());
    assert!(
        out.stdout.contains("no token differs") && out.stdout.contains("candle quantized_llama"),
        "{out:?}"
    );
}

#[test]
fn blocks_and_sparse_settings_differ_by_little_and_it_is_said() {
    let dir = Folder::new();
    let (path, _) = dir.convert("m.gguf", "tales-silu", &["--dtype", "q8_0"]);
    let q8 = ok("ab", &[&SHORT[..], &["--json", "--model", &path]].concat()).json();
    let kld = number(&q8, "kld");
    assert!(kld > 0.0 && kld < 0.005, "{q8}");
    // With the profile that the file holds.
    let args = ["-n", "16", "--rounds", "2", "--json", "--force-sparse", "--model", &path];
    let sparse = ok("ab", &args).json();
    assert!(sparse["ours"]["name"].as_str().unwrap().contains("cascade"), "{sparse}");
    assert!(number(&sparse, "kld") > kld && number(&sparse, "kld") < 0.1, "{sparse}");
}

#[test]
fn what_candle_cannot_run_is_one_line() {
    let dir = Folder::new();
    let (path, _) = dir.convert("m.gguf", "tales-silu", &[]);
    let (relu, _) = dir.convert("relu.gguf", "tales-relu", &[]);
    let (neurons, _) = dir.convert("neurons.gguf", "tales-silu", &["--neuron-major"]);
    let [strange, cut] = ["strange.gguf", "cut.gguf"].map(|f| dir.path(f));
    let architecture = Value::String("qwen9".into());
    let metadata = [("general.architecture", &architecture)];
    gguf_file::write(&mut File::create(&strange).unwrap(), &metadata, &[]).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    let cases: [(&[&str], &str); 9] = [
        (&["--model", "tales-relu"], "knows SiLU alone"),
        (&["--model", &relu], "knows SiLU alone"),
        (&["--model", &neurons], "neuron-major"),
        (&["--model", &strange], "'qwen9'"),
        (&["--model", &cut], "truncated"),
        (&["--model", &path, "--candle-dtype", "f16"], "does not apply to GGUF"),
        (&["--model", "tales-silu", "--candle-dtype", "q8_0"], "must be f32, f16 or bf16"),
        (&["--rounds", "0"], "1 or more"),
        (&["--sample-len", "2000"], "context of 1024"),
    ];
    for (args, needle) in cases {
        one_line(&example("ab", args), needle);
    }
    one_line(&example("llama-sparse", &["--model", &strange]), "'qwen9'");
    one_line(&example("llama-sparse", &["--model", &cut]), "cut.gguf");
}
