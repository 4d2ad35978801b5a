//! What the example programs make of a terminal, a pipe, and whatever is written on a command line.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;
#[path = "examples_terminal/flags.rs"]
mod flags;
#[path = "examples_terminal/sampling.rs"]
mod sampling;

use common::{example, example_reading, ok, one_line, outcome, program, testdata};
use std::path::Path;

/// A copy of a built-in model's files without its profile, and what its `generation_config.json` is to say.
fn model(generation: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let source = Path::new(&testdata("tales-silu")).to_path_buf();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(source.join(file), folder.path().join(file)).unwrap();
    }
    std::fs::write(folder.path().join("generation_config.json"), generation).unwrap();
    let path = folder.path().display().to_string();
    (folder, path)
}

fn text_file(folder: &tempfile::TempDir) -> String {
    let path = folder.path().join("-tale.txt");
    std::fs::write(&path, "There was once a king who had three sons. ".repeat(60)).unwrap();
    path.display().to_string()
}

/// Ends with the work done, or as `head` ends `cat`: no panic, and what could be said was said.
#[test]
fn nobody_has_to_read_standard_error() {
    let folder = tempfile::tempdir().unwrap();
    let (text, out) = (text_file(&folder), folder.path().join("m.gguf").display().to_string());
    let speed = ["--model", "tales-silu", "--steps", "1", "--prefill", "0", "--json"];
    let cases: [(&str, &[&str]); 6] = [
        ("llama-sparse", &["-n", "5", "--json"]),
        ("mistral-sparse", &["-n", "5", "--json"]),
        ("ab", &["-n", "2", "--rounds", "1", "--json"]),
        ("perplexity", &["--text", &text, "--context", "64", "--tokens", "70", "--ffn", "dense", "--json"]),
        ("decode-speed", &speed),
        ("convert", &["--model", "tales-silu", "--out", &out, "--json"]),
    ];
    for (name, args) in cases {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let out = outcome(program(name).args(args).stderr(writer), b"");
        assert_eq!(out.code, Some(0), "{name}: {out:?}");
        assert!(out.json().is_object(), "{name}: {out:?}");
    }
    for name in ["llama-sparse", "mistral-sparse", "ab", "decode-speed", "convert"] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let args = ["--model", "/no/such/model", "--out", "x"];
        let args = if name == "convert" { &args[..] } else { &args[..2] };
        let out = outcome(program(name).args(args).stderr(writer), b"");
        assert_eq!(out.code, Some(2), "{name}: {out:?}");
    }
}

#[test]
fn a_closed_standard_output_ends_a_program_quietly() {
    let folder = tempfile::tempdir().unwrap();
    let text = text_file(&folder);
    let cases: [(&str, &[&str]); 7] = [
        ("llama-sparse", &["-n", "5", "--prompt", "x"]),
        ("llama-sparse", &["-n", "5", "--json"]),
        ("llama-sparse", &["--prompt", "x", "-n", "1", "--compare"]),
        ("mistral-sparse", &["-n", "5"]),
        ("ab", &["-n", "2", "--rounds", "1"]),
        ("perplexity", &["--text", &text, "--context", "64", "--tokens", "70", "--ffn", "dense"]),
        ("decode-speed", &["--model", "tales-silu", "--steps", "1", "--prefill", "0"]),
    ];
    for (name, args) in cases {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let out = outcome(program(name).args(args).stdout(writer), b"");
        assert_eq!(out.code, Some(141), "{name}: {out:?}");
        assert!(!out.stderr.contains("panicked") && !out.stderr.contains("error"), "{name}: {out:?}");
    }
    let out = example("simple", &[&testdata("tales-relu"), "The wolf"]);
    assert!(out.code == Some(0) && out.stdout.split_whitespace().count() > 30, "{out:?}");
}

#[test]
fn whatever_takes_a_text_takes_any_text() {
    for text in ["- milk", "-5 degrees", "--- title", "-n", "--json"] {
        let json = ok("llama-sparse", &["--prompt", text, "-n", "0", "--json"]).json();
        assert_eq!(json["text"], text, "{json}");
        let json = ok("mistral-sparse", &["--prompt", text, "-n", "0", "--json"]).json();
        assert_eq!(json["text"], text, "{json}");
    }
    // Files too, also where several may be named.
    let folder = tempfile::tempdir().unwrap();
    text_file(&folder);
    let run = |args: &[&str]| outcome(program("perplexity").current_dir(folder.path()).args(args), b"");
    let rest = ["--context", "64", "--tokens", "70", "--ffn", "dense", "--json"];
    for files in [&["--text", "-tale.txt"][..], &["--text", "-tale.txt", "-tale.txt"], &["--text=-tale.txt"]]
    {
        let out = run(&[files, &rest].concat());
        assert_eq!(out.code, Some(0), "{out:?}");
    }
    for flag in ["--profile", "--tokenizer", "--model", "--file", "--chat-template"] {
        let more = if flag == "--chat-template" { &["--chat"][..] } else { &[] };
        one_line(&example("llama-sparse", &[&[flag, "-no-such-file"], more].concat()), "-no-such-file");
    }
    one_line(&run(&["--text", "-no.txt", "--json"]), "-no.txt");
    // A flag that takes several files has at least one.
    assert_eq!(run(&["--text", "--json"]).code, Some(2));
}

#[cfg(unix)]
#[test]
fn what_is_no_utf8_is_read_with_replacement_characters() {
    use std::os::unix::ffi::OsStrExt;
    let bytes = std::ffi::OsStr::from_bytes;
    let (folder, _) = model("{}");
    let path = folder.path().join(bytes(b"caf\xe9"));
    std::fs::create_dir(&path).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(folder.path().join(file), path.join(file)).unwrap();
    }
    let mut command = program("llama-sparse");
    command.arg("--model").arg(&path).arg("--prompt").arg(bytes(b"caf\xe9 noir"));
    let out = outcome(command.args(["-n", "0", "--json"]), b"");
    assert_eq!(out.json()["text"], "caf\u{fffd} noir", "{out:?}");
    assert!(out.stderr.contains("note: ") && out.stderr.contains("U+FFFD"), "{out:?}");
    let out =
        outcome(program("llama-sparse").args(["--prompt", "-", "-n", "0", "--json"]), b"caf\xe9 noir\n");
    assert_eq!(out.json()["text"], "caf\u{fffd} noir", "{out:?}");
    assert!(out.stderr.contains("standard input is no UTF-8 from byte 3 on"), "{out:?}");
    let tale = folder.path().join(bytes(b"\xe9.txt"));
    std::fs::write(&tale, b"Le caf\xe9 noir. ".repeat(60)).unwrap();
    let mut command = program("perplexity");
    command.args(["--context", "64", "--tokens", "70", "--ffn", "dense", "--json", "--text"]).arg(&tale);
    let out = outcome(&mut command, b"");
    assert!(out.json()["tokens"].as_u64() >= Some(70) && out.stderr.contains("from byte 6 on"), "{out:?}");
    let to = folder.path().join(bytes(b"\xe9.gguf"));
    let mut command = program("convert");
    let out = outcome(command.args(["--model", "tales-silu", "--json", "--out"]).arg(&to), b"");
    assert!(out.code == Some(0) && out.json()["out"].as_str().unwrap().ends_with("\u{fffd}.gguf"), "{out:?}");
    let out = outcome(program("llama-sparse").arg("--model").arg(bytes(b"/no/such/\xe9")), b"");
    one_line(&out, "there is no file or folder /no/such/\u{fffd}");
}

#[test]
fn prompts_come_from_files_and_from_standard_input() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompt.txt").display().to_string();
    std::fs::write(&file, "The wolf\nand the fox\n").unwrap();
    let args = ["-n", "9", "--temperature", "0", "--json"];
    let said = |more: &[&str], input: &str| {
        let out = example_reading("llama-sparse", &[&args[..], more].concat(), input);
        assert_eq!(out.code, Some(0), "{out:?}");
        out.json()["token_ids"].clone()
    };
    let expected = said(&["--prompt", "The wolf\nand the fox"], "");
    assert_eq!(said(&["--file", &file], ""), expected);
    assert_eq!(said(&["--file", "-"], "The wolf\nand the fox\n"), expected);
    assert_eq!(said(&["--prompt", "-"], "The wolf\nand the fox"), expected);
    one_line(&example("llama-sparse", &["--file", "/no/such/file"]), "/no/such/file");
    std::fs::write(&file, "").unwrap();
    assert!(
        example("llama-sparse", &["--prompt", "a", "--file", &file]).stderr.contains("cannot be used with")
    );
}

/// A model that writes so many tokens, most likely ones, and then meets one whose embedding is not a number.
fn failing_model(written: usize) -> (tempfile::TempDir, String) {
    use candle_core::{Device, Tensor, safetensors};
    let (folder, path) = model("{}");
    let args = ["--model", &path, "--prompt", "The wolf", "--temperature", "0", "-n", "40", "--json"];
    let json = ok("llama-sparse", &args).json();
    let prompt = usize::try_from(json["prompt_tokens"].as_u64().unwrap()).unwrap();
    let bad = usize::try_from(json["token_ids"][prompt + written - 1].as_u64().unwrap()).unwrap();
    let file = folder.path().join("model.safetensors");
    let mut tensors = safetensors::load(&file, &Device::Cpu).unwrap();
    let table = tensors["model.embed_tokens.weight"].clone();
    let (rows, width) = table.dims2().unwrap();
    let row = Tensor::full(f32::NAN, (1, width), &Device::Cpu).unwrap().to_dtype(table.dtype()).unwrap();
    let parts = [table.narrow(0, 0, bad), Ok(row), table.narrow(0, bad + 1, rows - bad - 1)];
    let parts: Vec<_> = parts.into_iter().map(Result::unwrap).collect();
    tensors.insert("model.embed_tokens.weight".into(), Tensor::cat(&parts, 0).unwrap());
    tensors.insert("lm_head.weight".into(), table);
    safetensors::save(&tensors, &file).unwrap();
    let config = folder.path().join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let untied = text.replace("\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false");
    assert_ne!(text, untied);
    std::fs::write(&config, untied).unwrap();
    (folder, path)
}

#[test]
fn what_was_done_is_reported_though_something_fails_later() {
    let (folder, path) = failing_model(20);
    let args = ["--model", &path, "--prompt", "The wolf", "--temperature", "0", "-n", "40", "--json"];
    for name in ["llama-sparse", "mistral-sparse"] {
        if name == "mistral-sparse" {
            let config = folder.path().join("config.json");
            let text = std::fs::read_to_string(&config).unwrap().replace("\"llama\"", "\"mistral\"");
            std::fs::write(&config, text).unwrap();
        }
        let out = example(name, &args);
        assert!(out.code == Some(2) && out.stderr.contains("error: the logits are not numbers"), "{out:?}");
        let json = out.json();
        assert_eq!((&json["generated_tokens"], &json["end"]), (&20.into(), &"failed".into()), "{json}");
        assert!(json["error"].as_str().unwrap().contains("not numbers"), "{json}");
        assert!(json["text"].as_str().unwrap().len() > 30, "{json}");
    }
}

/// The prompt is not shown again, which may be a book.
#[test]
fn a_prompt_past_the_context_is_one_line() {
    let long = "The king and the queen. ".repeat(400);
    for name in ["llama-sparse", "mistral-sparse"] {
        let out = example_reading(name, &["--prompt", "-"], &long);
        assert!(out.code == Some(2) && out.stdout.is_empty(), "{name}: {out:?}");
        assert_eq!(
            out.stderr.lines().filter(|l| l.contains("context of 1024")).count(),
            1,
            "{name}: {out:?}"
        );
    }
}

#[test]
fn programs_say_who_they_are_and_group_their_flags() {
    let programs =
        ["llama-sparse", "mistral-sparse", "ab", "perplexity", "decode-speed", "convert", "calibrate"];
    for name in programs {
        let version = ok(name, &["--version"]).stdout;
        assert_eq!(version, format!("{name} {}\n", env!("CARGO_PKG_VERSION")));
    }
    let help = ok("llama-sparse", &["--help"]).stdout;
    let headings = ["Prompt:", "Model:", "Memory:", "Sparse:", "Sampling:", "Chat:", "Output:", "Examples:"];
    let at = |heading| help.lines().position(|line| line == heading);
    let found: Vec<_> = headings.into_iter().map(at).collect();
    assert!(found.iter().all(Option::is_some) && found.is_sorted(), "{found:?}\n{help}");
    // A text may be given whole; a flag is under one heading.
    for (flag, heading) in [("--temperature", 4), ("--kv", 2), ("--ffn", 3), ("--system", 5), ("--json", 6)] {
        let line = help.lines().position(|l| l.trim_start().starts_with(flag)).unwrap();
        assert!(found[heading].unwrap() < line && line < found[heading + 1].unwrap(), "{flag}\n{help}");
    }
    assert!(ok("llama-sparse", &["-n", "3", "--quiet", "--kv", "tiered"]).stderr.is_empty());
    assert!(ok("llama-sparse", &["-n", "3", "--quiet", "--json"]).stderr.is_empty());
}
