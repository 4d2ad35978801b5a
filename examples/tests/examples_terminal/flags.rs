//! A flag without effect is an error or a note.

use crate::{
    common::{Outcome, example, outcome, program},
    model, ok, one_line, text_file,
};

#[test]
fn flags_that_would_change_nothing_are_refused() {
    let (folder, bare) = model("{}");
    let text = text_file(&folder);
    let out = folder.path().join("m.gguf").display().to_string();
    let llama: [(&[&str], &str); 21] = [
        (&["--model", &bare, "--ffn", "cascade"], "--ffn needs a profile"),
        (&["--model", &bare, "--sparsity", "0.5"], "--sparsity needs a profile"),
        (&["--model", &bare, "--compare"], "--compare needs a profile"),
        (&["--ffn", "dense", "--sparsity", "0.5"], "--sparsity leaves nothing out"),
        (&["--sinks", "4"], "--sinks belongs to --attention window or gated or recall or sampled"),
        (&["--window", "64"], "--window belongs to --attention"),
        (&["--budget", "64"], "--budget belongs to --attention gated or recall or sampled"),
        (&["--recall", "64"], "--recall belongs to --attention gated or sampled"),
        (&["--attention", "window", "--budget", "64"], "--budget belongs to"),
        (&["--attention", "recall", "--recall", "64"], "--recall belongs to"),
        (&["--hot", "64"], "add --kv tiered"),
        (&["--kv", "q8", "--warm", "64"], "add --kv tiered"),
        (&["--system", "s"], "--system belongs to a conversation: add --chat"),
        (&["--system", "s", "--prompt", "hi"], "--system belongs to a conversation: add --chat"),
        (&["--chat-template", "f", "--prompt", "hi"], "--chat-template belongs to a conversation"),
        (&["--chat", "--prompt", "hi"], "--prompt does not go with --chat"),
        (&["--chat", "--file", "f"], "--file does not go with --chat"),
        (&["--chat", "--prompt-ids", "1"], "--prompt-ids does not go with --chat"),
        (&["--chat", "--compare"], "--compare does not go with --chat"),
        (&["--stop", ""], "--stop needs a text"),
        (&["--min-p", "1"], "--min-p 1"),
    ];
    for (args, needle) in llama {
        one_line(&example("llama-sparse", args), needle);
    }
    let others: [(&str, &[&str], &str); 7] = [
        ("mistral-sparse", &["--budget", "64"], "--budget belongs to"),
        ("ab", &["--model", &bare, "--ffn", "gate"], "--ffn needs a profile"),
        ("perplexity", &["--model", &bare, "--text", &text, "--ffn", "gate"], "--ffn needs a profile"),
        ("perplexity", &["--text", &text, "--sweep", &out, "--kv", "q8"], "leave out --ffn"),
        ("decode-speed", &["--window", "64"], "--window belongs to"),
        ("decode-speed", &["--engine", "dense", "--kv", "q8"], "which is not measured"),
        ("decode-speed", &["--engine", "candle", "--active", "0.5"], "which is not measured"),
    ];
    for (name, args, needle) in others {
        one_line(&example(name, args), needle);
    }
    // These clap says, with the usage below.
    let said: [(&str, &[&str], &str); 6] = [
        ("llama-sparse", &["--logits", "3"], "--json"),
        ("perplexity", &["--text", &text, "--sweep", &out, "--stride", "9"], "--stride"),
        ("decode-speed", &["--ffn", "gate"], "--active"),
        ("decode-speed", &["--activity", "uniform"], "--active"),
        ("decode-speed", &["--rank", "8"], "--active"),
        ("decode-speed", &["--write-gguf", &out, "--depth", "9"], "--depth"),
    ];
    for (name, args, needle) in said {
        let out = example(name, args);
        assert!(
            out.code == Some(2) && out.stderr.contains(needle) && out.stdout.is_empty(),
            "{args:?}: {out:?}"
        );
    }
    assert!(!std::path::Path::new(&out).exists());
}

fn notes_of(out: &Outcome) -> Vec<&str> {
    out.stderr.lines().filter(|line| line.starts_with("note: ")).collect()
}

#[test]
fn flags_that_happen_to_change_nothing_are_noted() {
    let cases: [(&[&str], &str); 11] = [
        (&["--kv", "tiered"], "positions, the last 256 stay in F16: --kv tiered changed nothing"),
        (&["--kv", "q8"], "the last 32 stay in F16: --kv q8 changed nothing"),
        (&["--attention", "window"], "--attention window reads 260: everything was read"),
        (&["--attention", "gated"], "--attention gated reads 1796: everything was read"),
        (&["--temperature", "0", "--seed", "1"], "--seed without effect: with --temperature 0"),
        (&["--temperature", "0", "--top-k", "5", "--min-p", "0.1"], "--top-k, --min-p without effect"),
        (&["--repeat-last-n", "9"], "--repeat-last-n without effect"),
        (&["--no-mmap"], "--no-mmap without effect"),
        (&["--dtype", "f16"], "--dtype f16 without effect: the model is stored so"),
        (&["--dtype", "f32"], "makes the weights larger, not better"),
        (&["--threads", "1"], ""),
    ];
    for (args, needle) in cases {
        let out = ok("llama-sparse", &[&["--prompt", "The", "-n", "5"], args].concat());
        let notes = notes_of(&out);
        assert_eq!(notes.len(), usize::from(!needle.is_empty()), "{args:?}: {out:?}");
        assert!(notes.iter().all(|note| note.contains(needle)), "{args:?}: {out:?}");
    }
    // Where they do something nothing is said.
    for args in [
        &["--kv", "tiered", "--hot", "32", "-n", "60"][..],
        &["--attention", "window", "--window", "32", "-n", "60"],
        &["--dtype", "q8_0", "-n", "5"],
        &["--temperature", "0.5", "--seed", "1", "--top-k", "3", "-n", "5"],
    ] {
        let out = ok("llama-sparse", &[&["--prompt", "The"], args].concat());
        assert!(notes_of(&out).is_empty(), "{args:?}: {out:?}");
    }
    let profile = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/testdata/tales-silu/sparse.safetensors");
    let out = ok("llama-sparse", &["-n", "2", "--prompt", "a", "--ffn", "dense", "--profile", profile]);
    assert!(notes_of(&out).len() == 1 && out.stderr.contains("--profile without effect"), "{out:?}");
    let run = |args: &[&str], value: &str| {
        outcome(program("llama-sparse").args(["-n", "2"]).args(args).env("CANDLE_SPARSE", value), b"")
    };
    let out = run(&["--ffn", "cascade"], "off");
    assert!(out.code == Some(0) && out.stderr.contains("--ffn without effect: CANDLE_SPARSE=off"), "{out:?}");
}

#[test]
fn the_number_of_threads_is_a_number() {
    for name in ["llama-sparse", "mistral-sparse", "decode-speed"] {
        for value in ["x", "0", "-1", "1.5"] {
            let out = outcome(program(name).env("CANDLE_NUM_THREADS", value), b"");
            one_line(&Outcome { stderr: last_line(&out), ..out }, &format!("CANDLE_NUM_THREADS={value}"));
        }
    }
    let out = outcome(program("llama-sparse").env("RAYON_NUM_THREADS", "many"), b"");
    one_line(&out, "RAYON_NUM_THREADS=many");
    let many = std::thread::available_parallelism().unwrap().get() + 2;
    let run = |value: &str| {
        let mut command = program("llama-sparse");
        outcome(command.args(["-n", "2", "--prompt", "a"]).env("CANDLE_NUM_THREADS", value), b"")
    };
    let out = run(&many.to_string());
    assert!(out.code == Some(0) && out.stderr.contains(&format!("note: {many} threads on ")), "{out:?}");
    let empty = run("");
    assert!(empty.code == Some(0) && notes_of(&empty).is_empty(), "{empty:?}");
}

/// What the built-in model says about itself comes first.
fn last_line(out: &Outcome) -> String {
    out.stderr.lines().last().unwrap_or_default().to_string()
}

#[test]
fn decode_speed_takes_gguf_files() {
    let (folder, bare) = model("{}");
    let path = folder.path().join("m.gguf").display().to_string();
    ok("convert", &["--model", &bare, "--dtype", "q8_0", "--out", &path]);
    let args = ["--model", &path, "--steps", "3", "--prefill", "16", "--against", "candle", "--json"];
    let json = ok("decode-speed", &args).json();
    assert_eq!((&json["weights"], &json["dtype"]), (&"checkpoint".into(), &"as stored".into()));
    let engines = json["engines"].as_array().unwrap();
    assert_eq!(engines[0]["weight_bytes_per_token"], engines[1]["weight_bytes_per_token"], "{json}");
    let size = std::fs::metadata(&path).unwrap().len() as f64;
    let held = engines[0]["weight_bytes"].as_f64().unwrap();
    assert!(held > 0.8 * size && held <= size, "{json} {size}");
    let f32 =
        ok("decode-speed", &["--model", &path, "--steps", "1", "--prefill", "0", "--dtype", "f32", "--json"])
            .json();
    assert!(f32["weight_bytes"].as_f64().unwrap() > 3.0 * held, "{f32}");
    one_line(
        &example("decode-speed", &["--model", &path, "--dtype", "f32", "--engine", "candle"]),
        "leave out --dtype",
    );
    one_line(&example("decode-speed", &["--model", &path, "--depth", "2000"]), "1024 positions");
    let written = folder.path().join("w.gguf").display().to_string();
    let json = ok("decode-speed", &["--dtype", "q4_0", "--write-gguf", &written, "--json"]).json();
    assert_eq!(json["bytes"].as_u64(), std::fs::metadata(&written).ok().map(|m| m.len()));
}
