//! Runs the example programs that `cargo test` builds beside the tests.

use std::{
    io::Write,
    path::PathBuf,
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
