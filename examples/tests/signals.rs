//! SIGINT and SIGTERM end every program: the exit code tells which, no half file is left, and the terminal is as it was.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests")]

mod common;

use common::program;
use std::{
    fs,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Command, ExitStatus, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

const SIGNALS: [(&str, i32); 2] = [("TERM", 143), ("INT", 130)];

/// Those that a child can feel: what a shell runs in the background begins with SIGINT ignored, and so do its children.
fn signals() -> &'static [(&'static str, i32)] {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.map_or(0, |mask| u64::from_str_radix(mask.trim(), 16).unwrap());
    if ignored & 1 << 1 == 0 {
        return &SIGNALS;
    }
    println!("skipped: SIGINT, which is ignored here");
    &SIGNALS[..1]
}

/// What stood in the place of the file before.
const OLD: &[u8] = b"old";

/// As a shell tells it.
fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap())
}

/// Runs a program for a while, then sends it a signal; how it ended.
fn interrupted(name: &str, args: &[&str], after: Duration, signal: &str) -> i32 {
    let mut command = program(name);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    sleep(after);
    // It may have ended.
    let id = child.id().to_string();
    Command::new("kill").args(["-s", signal, &id]).stderr(Stdio::null()).status().unwrap();
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return code(status);
        }
        assert!(start.elapsed() < Duration::from_secs(30), "{name} does not end on {signal}");
        sleep(Duration::from_millis(5));
    }
}

fn parts(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.extension().is_some_and(|e| e == "part")).count()
}

/// What is done before it writes takes no longer than a second: it is interrupted at many places, also after its end.
#[test]
fn what_is_written_in_a_moment_is_old_or_whole() {
    let cases: [(&str, &[&str]); 2] = [
        ("convert", &["--model", "tales-silu", "--out"]),
        (
            "llama-sparse",
            &["-n", "5", "--temperature", "0", "--ffn", "dense", "--threads", "1", "--save-cache"],
        ),
    ];
    for (name, args) in cases {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out").display().to_string();
        let args = [args, &[&path]].concat();
        assert_eq!(code(program(name).args(&args).output().unwrap().status), 0, "{name}");
        let new = fs::read(&path).unwrap();
        assert_ne!(new, OLD);
        let mut seen = [0, 0];
        for round in 0..12 {
            fs::write(&path, OLD).unwrap();
            // Ctrl-C cuts a text off, and its cache is one of fewer tokens.
            let (signal, expected) =
                signals()[if name == "llama-sparse" { 0 } else { round % signals().len() }];
            let code = interrupted(name, &args, Duration::from_millis(20 + 17 * round as u64), signal);
            assert!([0, expected].contains(&code), "{name}, {signal}: exit code {code}");
            let found = fs::read(&path).unwrap();
            assert!(found == OLD || found == new, "{name}, {signal}: {} bytes", found.len());
            assert!(code != 0 || found == new, "{name}");
            seen[usize::from(found == new)] += 1;
        }
        println!("{name}: {seen:?} old and new");
        // What the last one left is gone with the next.
        fs::write(&path, OLD).unwrap();
        assert_eq!(code(program(name).args(&args).output().unwrap().status), 0);
        assert!(fs::read(&path).unwrap() == new, "{name}");
        assert_eq!(parts(folder.path()), 0, "{name}");
    }
}

/// These work for minutes before they write.
#[test]
fn what_takes_long_ends_at_once_and_leaves_what_was_there() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let text = at("text.txt");
    fs::write(&text, "There was once a king who had three sons. ".repeat(20_000)).unwrap();
    let (out, sparsified) = (at("out"), at("sparsified"));
    let server = ["--port", "0", "--threads", "1"];
    let random = ["--shape", "tinyllama-1.1b", "--dtype", "q4_0", "--write-gguf", &out];
    let cases: [(&str, Vec<&str>); 4] = [
        ("decode-speed", random.to_vec()),
        ("calibrate", vec!["--model", "tales-silu", "--text", &text, "--out", &out]),
        ("sparsify", vec!["--text", &text, "--out", &sparsified]),
        ("serve", server.to_vec()),
    ];
    for (name, args) in cases {
        for &(signal, expected) in signals() {
            fs::write(&out, OLD).unwrap();
            let code = interrupted(name, &args, Duration::from_millis(700), signal);
            // A server that listens already, and has nothing to do, ends well.
            assert!(code == expected || name == "serve" && code == 0, "{name}, {signal}: {code}");
            assert_eq!(fs::read(&out).unwrap(), OLD, "{name}, {signal}");
        }
    }
}

/// Results that are there are whole, and another run goes on behind them.
#[test]
fn a_batch_goes_on_where_a_signal_ended_it() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    // More than the fastest machine writes in the time of all signals.
    let lines: String = (0..2000)
        .map(|i| format!("{{\"id\": {i}, \"prompt\": \"The king\", \"max_tokens\": 200}}\n"))
        .collect();
    fs::write(at("in.jsonl"), lines).unwrap();
    let (input, out) = (at("in.jsonl"), at("out.jsonl"));
    let args = ["--input", &input, "--out", &out, "--threads", "1", "--dtype", "f32"];
    let mut before = 0;
    for &(signal, expected) in signals() {
        assert_eq!(interrupted("batch", &args, Duration::from_millis(1500), signal), expected, "{signal}");
        let text = fs::read_to_string(&out).unwrap();
        let whole =
            text.lines().filter(|line| serde_json::from_str::<serde_json::Value>(line).is_ok()).count();
        assert!(whole >= before && whole + 1 >= text.lines().count(), "{signal}: {whole} whole lines");
        before = whole;
    }
}

/// While a line is edited the terminal is in a mode that nobody can work with.
#[test]
fn a_conversation_leaves_the_terminal_as_it_was() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/terminal.py");
    let folder = tempfile::tempdir().unwrap();
    let template = folder.path().join("chat.jinja").display().to_string();
    fs::write(&template, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}").unwrap();
    let chat = program("llama-sparse");
    // Ctrl-C is a key there, no signal.
    for (signal, expected) in &SIGNALS[..1] {
        let mut python = Command::new("python3");
        python.arg(script).arg(signal).arg(chat.get_program());
        let out = match python.args(["--chat", "--chat-template", &template]).output() {
            Ok(out) => out,
            Err(error) => {
                println!("skipped: python3: {error}");
                return;
            }
        };
        let said = String::from_utf8_lossy(&out.stdout);
        assert_eq!(said.trim(), format!("code {expected}, edited True, restored True"), "{out:?}");
    }
}
