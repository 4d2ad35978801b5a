//! The example programs as a user runs them.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{example, ok, one_line, tale, testdata};
use std::path::Path;

#[test]
fn llama_sparse_speaks_without_any_flag() {
    let out = ok("llama-sparse", &[]);
    assert!(out.stdout.split_whitespace().count() > 50, "{out:?}");
    assert!(out.stderr.contains("tokens/s"), "{out:?}");
}

#[test]
fn mistral_sparse_speaks_without_any_flag() {
    let out = ok("mistral-sparse", &[]);
    assert!(out.stdout.split_whitespace().count() > 50, "{out:?}");
    assert!(out.stderr.contains("sliding window of 256") && out.stderr.contains("tokens/s"), "{out:?}");
    one_line(&example("mistral-sparse", &["--model", "tales-relu"]), "no Mistral");
    one_line(&example("mistral-sparse", &["--temperature=-1"]), "--temperature -1");
    one_line(&example("mistral-sparse", &["--model", &testdata("tales-silu")]), "model_type 'llama'");
}

#[test]
fn llama_sparse_json_holds_what_it_promises() {
    let args = [
        "--model",
        "tales-relu",
        "--prompt",
        "The wolf",
        "-n",
        "20",
        "--temperature",
        "0",
        "--json",
        "--force-sparse",
    ];
    let out = ok("llama-sparse", &args);
    let json = out.json();
    for key in [
        "text",
        "prompt_tokens",
        "generated_tokens",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "active_fraction",
        "kv_bytes",
        "rss_bytes",
        "level",
        "threads",
    ] {
        assert!(!json[key].is_null(), "{key}: {json}");
    }
    assert_eq!(json["generated_tokens"], 20);
    assert!(json["text"].as_str().unwrap().starts_with("The wolf"));
    // The same from a folder, and with one thread: the text may not depend on either.
    let folder = testdata("tales-relu");
    let mut args = args;
    args[1] = &folder;
    let args: Vec<_> = args.into_iter().chain(["--threads", "1"]).collect();
    assert_eq!(ok("llama-sparse", &args).json()["token_ids"], json["token_ids"]);
}

#[test]
fn generation_stops_at_the_context() {
    let out = ok("llama-sparse", &["-n", "2000", "--json", "--temperature", "1.5"]);
    let json = out.json();
    let all = json["prompt_tokens"].as_u64().unwrap() + json["generated_tokens"].as_u64().unwrap();
    assert!(all <= 1025, "{json}");
}

#[test]
fn perplexity_tells_a_setting_from_the_dense_model() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("tale.txt");
    std::fs::write(
        &text,
        "There was once a king who had three sons, and the youngest was a simpleton. ".repeat(40),
    )
    .unwrap();
    let run = |dtype: &str| {
        let text = text.display().to_string();
        let args = ["--text", &text, "--context", "128", "--dtype", dtype, "--ffn", "dense", "--json"];
        ok("perplexity", &args).json()
    };
    let (same, q8, q4) = (run("f16"), run("q8_0"), run("q4_0"));
    let value = |json: &serde_json::Value, key: &str| json[key].as_f64().unwrap();
    assert!(value(&same, "kld") < 1e-4 && value(&same, "top1_agreement") > 0.99, "{same}");
    assert!(value(&q8, "kld") > 0.0 && value(&q8, "kld") < value(&q4, "kld"), "{q8} {q4}");
    assert!(value(&q4, "kld") < 0.5 && value(&same, "ppl") < 500.0, "{q4}");
    assert_eq!(same["tokens"], q4["tokens"]);
}

/// Texts by the built-in model, some 900 tokens each.
fn tales(n: usize) -> String {
    (0..n).map(tale).collect::<Vec<_>>().join("<|endoftext|>")
}

#[test]
fn a_calibrated_profile_keeps_the_quality_it_promises() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (text, out, plot) = (path("tales.txt"), path("sparse.safetensors"), path("sweep.svg"));
    std::fs::write(&text, tales(12)).unwrap();
    let args = ["--text", &text, "--target-sparsity", "0.5", "--rank", "32", "--out", &out, "--json"];
    let done = ok("calibrate", &args);
    assert!(done.stderr.contains("fitting blocks ("), "a log shows no progress: {done:?}");
    let json = done.json();
    let cascade = &json["held_out"][2];
    assert!((cascade["active_fraction"].as_f64().unwrap() - 0.5).abs() < 0.05, "{json}");
    assert!(cascade["kld"].as_f64().unwrap() < 0.02, "{json}");
    let gates = json["gates"].as_array().unwrap();
    assert!(gates.len() == 4 && gates.iter().all(|g| g["r2_ridge"].as_f64().unwrap() > 0.1), "{json}");
    // The same when it decodes, and at another share.
    let decode = |extra: &[&str]| {
        let args = ["--profile", &out, "--text", &text, "--context", "256", "--tokens", "1500", "--json"];
        ok("perplexity", &[&args, extra].concat()).json()
    };
    let fitted = decode(&[]);
    let (kld, active) = (fitted["kld"].as_f64().unwrap(), fitted["active_fraction"].as_f64().unwrap());
    assert!(kld > 0.0 && kld < 0.02 && (active - 0.5).abs() < 0.05, "{fitted}");
    let fewer = decode(&["--sparsity", "0.8"]);
    assert!(fewer["kld"].as_f64().unwrap() > 2.0 * kld, "{fewer}");
    assert_eq!(decode(&["--ffn", "dense"])["active_fraction"], 1.0);
    // Random choices must be visibly bad, and knowing the outcome better than not.
    let args = ["--profile", &out, "--text", &text, "--tokens", "1500", "--sweep", &plot, "--json"];
    let sweep = ok("perplexity", &args);
    assert!(!sweep.stderr.contains("without effect"), "{sweep:?}");
    let sweep = sweep.json();
    let share = |name: &str| sweep["share_at_1_percent"][name].as_f64().unwrap();
    assert!(share("random") > 0.8 && share("oracle") < 0.6 && share("cascade") < 0.7, "{sweep}");
    assert!(std::fs::read_to_string(&plot).unwrap().contains("cascade"));
    one_line(&example("llama-sparse", &["--model", "tales-relu", "--profile", &out]), "another model");
    one_line(&example("llama-sparse", &["--profile", &text]), "tales.txt");
}

#[test]
fn without_flags_all_modes_are_compared() {
    let json = ok("llama-sparse", &["--compare", "-n", "5", "--json"]).json();
    let rows = json["compare"].as_array().unwrap();
    let of = |ffn: &str, key: &str| rows.iter().find(|r| r["ffn"] == ffn).unwrap()[key].as_f64().unwrap();
    assert_eq!((of("Dense", "active_fraction"), of("Dense", "kld")), (1.0, 0.0));
    for ffn in ["Gate", "LowRank", "Cascade"] {
        assert!(of(ffn, "active_fraction") < 0.5 && of(ffn, "kld") > 0.0 && of(ffn, "kld") < 0.03, "{json}");
        assert!(of(ffn, "weight_bytes_per_token") < of("Dense", "weight_bytes_per_token"), "{json}");
    }
}

#[test]
fn a_long_memory_costs_what_perplexity_says() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("t.txt");
    std::fs::write(&text, tales(1)).unwrap();
    let base = [
        "--text",
        text.to_str().unwrap(),
        "--context",
        "512",
        "--stride",
        "256",
        "--tokens",
        "700",
        "--json",
    ];
    let run = |more: &[&str]| ok("perplexity", &[&base[..], &["--ffn", "dense"], more].concat()).json();
    let change = |json: &serde_json::Value| {
        (json["ppl"].as_f64().unwrap() / json["dense_ppl"].as_f64().unwrap() - 1.0).abs()
    };
    let tiered = run(&["--kv", "tiered", "--hot", "32", "--warm", "64"]);
    let exact = run(&["--kv", "f16"]);
    assert!(change(&tiered) < 0.01, "{tiered}");
    // Pages that wait for their next use are counted too.
    assert!(tiered["kv_bytes"].as_f64() < exact["kv_bytes"].as_f64().map(|b| 0.65 * b), "{tiered} {exact}");
    let window = run(&["--kv", "f16", "--attention", "window", "--window", "32"]);
    let recall = run(&["--kv", "f16", "--attention", "recall", "--window", "32", "--budget", "192"]);
    assert!(window["kld"].as_f64() > recall["kld"].as_f64(), "{window} {recall}");
    assert!(recall["kld"].as_f64() > exact["kld"].as_f64(), "{recall} {exact}");
    // With the gates of the built-in profile.
    let gated =
        run(&["--kv", "f16", "--attention", "gated", "--window", "32", "--budget", "192", "--recall", "0"]);
    assert!(window["kld"].as_f64() > gated["kld"].as_f64(), "{window} {gated}");
}

#[test]
fn decode_speed_counts_bytes_and_labels_random_weights() {
    let args = ["--model", "tales-silu", "--steps", "3", "--prefill", "16", "--json", "--against", "candle"];
    let json = ok("decode-speed", &args).json();
    assert_eq!(json["weights"], "checkpoint");
    // Two bytes per parameter; the tied embedding is read once, as the head.
    assert_eq!(json["weight_bytes_per_token"], json["engines"][1]["weight_bytes_per_token"]);
    assert!(json["decode_ratio"].as_f64().unwrap() > 0.0);
    assert!(json["stream_gb_per_s"].as_f64().unwrap() > 0.1);
}

#[test]
fn wrong_input_is_one_line_and_exit_code_two() {
    let dir = tempfile::tempdir().unwrap();
    let copy = |name: &str| {
        let folder = dir.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        for file in ["config.json", "tokenizer.json", "model.safetensors"] {
            std::fs::copy(Path::new(&testdata("tales-silu")).join(file), folder.join(file)).unwrap();
        }
        folder
    };
    let edit = |folder: &Path, file: &str, f: &dyn Fn(Vec<u8>) -> Vec<u8>| {
        let path = folder.join(file);
        std::fs::write(&path, f(std::fs::read(&path).unwrap())).unwrap();
        folder.display().to_string()
    };
    let replace = |from: &'static str, to: &'static str| {
        move |b: Vec<u8>| String::from_utf8(b).unwrap().replace(from, to).into_bytes()
    };
    let cases = [
        (edit(&copy("act"), "config.json", &replace("silu", "swish2")), "unknown hidden_act 'swish2'"),
        (edit(&copy("type"), "config.json", &replace("\"llama\"", "\"gpt2\"")), "model_type 'gpt2'"),
        (edit(&copy("json"), "config.json", &|b| b[..40].to_vec()), "config.json"),
        (edit(&copy("vocab"), "config.json", &replace("2048", "2047")), "do not belong together"),
        (
            edit(
                &copy("shape"),
                "config.json",
                &replace("\"intermediate_size\": 512", "\"intermediate_size\": 544"),
            ),
            "gate_proj",
        ),
        (edit(&copy("cut"), "model.safetensors", &|b| b[..b.len() / 2].to_vec()), "truncated"),
        (edit(&copy("tokenizer"), "tokenizer.json", &|b| b[..b.len() / 2].to_vec()), "tokenizer.json"),
        ("no-such-model".to_string(), "tales-silu"),
        ("./no/such/folder".to_string(), "no/such/folder"),
    ];
    for (model, needle) in &cases {
        let out = example("llama-sparse", &["--model", model]);
        one_line(&out, needle);
    }
    for (args, needle) in [
        (["--prompt-ids", "1,2,70000"], "token id 70000"),
        (["--temperature", "-1"], "--temperature -1"),
        (["--top-p", "2"], "--top-p 2"),
        (["--threads", "9999"], "CANDLE_NUM_THREADS"),
        (["--revision", "v1"], "revision"),
        (["--sparsity", "1.5"], "--sparsity 1.5"),
        (["--profile", "/no/such/file"], "/no/such/file"),
    ] {
        one_line(&example("llama-sparse", &args), needle);
    }
    let tokenizer = dir.path().join("tok.json").display().to_string();
    for (text, needle) in
        [("version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"), ("{}", "tok.json")]
    {
        std::fs::write(&tokenizer, text).unwrap();
        for program in ["llama-sparse", "calibrate"] {
            let args = ["--tokenizer", &tokenizer, "--text", &tokenizer];
            one_line(&example(program, if program == "calibrate" { &args } else { &args[..2] }), needle);
        }
    }
    let long = vec!["7"; 1025].join(",");
    one_line(&example("llama-sparse", &["--prompt-ids", &long]), "context of 1024");
    one_line(&example("perplexity", &["--text", "/no/such/file"]), "/no/such/file");
    assert_eq!(example("llama-sparse", &["--dtype", "q3"]).code, Some(2));
}

/// Weights of 65 MB and more, so that the process itself does not count.
#[test]
fn loading_peaks_near_the_size_of_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let config = r#"{"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
        "num_key_value_heads": 4, "vocab_size": 8000, "tie_word_embeddings": false, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048}"#;
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    std::fs::copy(
        Path::new(&testdata("tales-silu")).join("tokenizer.json"),
        dir.path().join("tokenizer.json"),
    )
    .unwrap();
    write_checkpoint(&dir.path().join("model.safetensors"));
    let model = dir.path().display().to_string();
    for dtype in ["f32", "f16", "q8_0", "q4_0"] {
        let args = [
            "--model",
            &model,
            "--dtype",
            dtype,
            "--prefill",
            "0",
            "--steps",
            "1",
            "--threads",
            "1",
            "--json",
        ];
        let json = ok("decode-speed", &args).json();
        let weights = json["weight_bytes"].as_f64().unwrap();
        let peak = json["load_peak_bytes"].as_f64().unwrap();
        // 12 MB: the program, its libraries and stacks. The allocator may keep one freed tensor of 16 MB for the next.
        assert!(peak <= 1.15 * weights + 12e6 + 16.4e6, "{dtype}: peak {peak:e}, weights {weights:e}");
    }
}

fn write_checkpoint(path: &Path) {
    use candle_core::{DType, Device, Tensor};
    let mut all = std::collections::HashMap::new();
    let mut put = |name: &str, dims: &[usize]| {
        all.insert(
            name.to_string(),
            Tensor::full(0.01_f32, dims, &Device::Cpu).unwrap().to_dtype(DType::F16).unwrap(),
        );
    };
    put("model.embed_tokens.weight", &[8000, 1024]);
    put("lm_head.weight", &[8000, 1024]);
    put("model.norm.weight", &[1024]);
    for l in 0..8 {
        for (name, dims) in [
            ("input_layernorm", vec![1024]),
            ("post_attention_layernorm", vec![1024]),
            ("self_attn.q_proj", vec![1024, 1024]),
            ("self_attn.k_proj", vec![256, 1024]),
            ("self_attn.v_proj", vec![256, 1024]),
            ("self_attn.o_proj", vec![1024, 1024]),
            ("mlp.gate_proj", vec![2816, 1024]),
            ("mlp.up_proj", vec![2816, 1024]),
            ("mlp.down_proj", vec![1024, 2816]),
        ] {
            put(&format!("model.layers.{l}.{name}.weight"), &dims);
        }
    }
    candle_core::safetensors::save(&all, path).unwrap();
}
