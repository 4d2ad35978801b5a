//! Runs the example programs that `cargo test` builds beside the tests.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// What a program did.
#[derive(Debug)]
#[allow(dead_code, reason = "not every test binary reads all of it")]
pub(crate) struct Outcome {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Outcome {
    /// The JSON object on the last line of standard output.
    #[allow(dead_code, reason = "not every test binary reads JSON")]
    pub(crate) fn json(&self) -> serde_json::Value {
        let last = self.stdout.lines().last().unwrap_or_default();
        serde_json::from_str(last).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

/// Runs an example without network and without the caller's settings.
pub(crate) fn example(name: &str, args: &[&str]) -> Outcome {
    example_reading(name, args, "")
}

/// A program without network and without the caller's settings; its input and output are pipes.
pub(crate) fn program(name: &str) -> Command {
    let mut path: PathBuf = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    path.extend(["examples", name]);
    path.set_extension(std::env::consts::EXE_EXTENSION);
    assert!(path.exists(), "{} is not built: `cargo test` without a target filter builds it", path.display());
    let mut command = Command::new(path);
    command
        .env("HF_ENDPOINT", "http://127.0.0.1:9")
        .env_remove("HF_HUB_OFFLINE")
        .env_remove("CANDLE_SPARSE_LEVEL")
        .env_remove("CANDLE_NUM_THREADS")
        // Whether a profile pays is measured, and so not the same in each run.
        .env("CANDLE_SPARSE", "always")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// As [`example`], with `input` on its standard input.
pub(crate) fn example_reading(name: &str, args: &[&str], input: &str) -> Outcome {
    outcome(program(name).args(args), input.as_bytes())
}

/// Runs a program to its end.
pub(crate) fn outcome(command: &mut Command, input: &[u8]) -> Outcome {
    let mut child = command.spawn().unwrap();
    // A program that fails early, or reads nothing, closes the pipe.
    let _ = child.stdin.take().unwrap().write_all(input);
    let out = child.wait_with_output().unwrap();
    let text = |b: Vec<u8>| String::from_utf8_lossy(&b).into_owned();
    Outcome { code: out.status.code(), stdout: text(out.stdout), stderr: text(out.stderr) }
}

/// The folder of a built-in model, or a file in one.
#[allow(dead_code, reason = "not every test binary uses all of it")]
pub(crate) fn testdata(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/testdata").join(name).display().to_string()
}

/// Runs an example that must succeed.
#[allow(dead_code, reason = "not every test binary uses all of it")]
pub(crate) fn ok(name: &str, args: &[&str]) -> Outcome {
    let out = example(name, args);
    assert_eq!(out.code, Some(0), "{args:?}: {out:?}");
    out
}

/// That a program ended with exit code 2 and one line that says `needle`.
#[allow(dead_code, reason = "not every test binary uses all of it")]
pub(crate) fn one_line(out: &Outcome, needle: &str) {
    assert_eq!(out.code, Some(2), "{needle}: {out:?}");
    let lines: Vec<_> = out.stderr.lines().collect();
    assert!(
        lines.len() == 1 && lines[0].starts_with("error: ") && lines[0].contains(needle),
        "{needle}: {out:?}"
    );
}

/// A text by the built-in model, some 900 tokens.
#[allow(dead_code, reason = "not every test binary uses all of it")]
pub(crate) fn tale(seed: usize) -> String {
    let seed = seed.to_string();
    let args = [
        "-n",
        "900",
        "--temperature",
        "1",
        "--top-k",
        "0",
        "--top-p",
        "1",
        "--min-p",
        "0",
        "--repeat-penalty",
        "1.1",
        "--repeat-last-n",
        "128",
        "--seed",
        &seed,
        "--ffn",
        "dense",
        "--json",
    ];
    ok("llama-sparse", &args).json()["text"].as_str().unwrap().to_string()
}
