//! `calibrate`, interrupted and run again.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{example, ok, one_line, program, tale};
use std::{
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

/// Runs the program until its checkpoint is another than `before`, and kills it.
fn kill_after_a_checkpoint(args: &[&str], checkpoint: &Path, before: &[u8]) -> Vec<u8> {
    let mut child = program("calibrate").args(args).spawn().unwrap();
    let start = Instant::now();
    loop {
        if let Ok(now) = std::fs::read(checkpoint)
            && now != before
        {
            child.kill().unwrap();
            child.wait().unwrap();
            // It may have written another one in the meantime.
            return std::fs::read(checkpoint).expect("the program ended before it was killed");
        }
        assert!(child.try_wait().unwrap().is_none(), "the program ended before it was killed");
        assert!(start.elapsed() < Duration::from_secs(300), "no checkpoint");
        sleep(Duration::from_millis(2));
    }
}

#[test]
fn an_interrupted_calibration_goes_on_and_gives_the_same_profile() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (text, whole, out) = (path("tales.txt"), path("whole.safetensors"), path("sparse.safetensors"));
    std::fs::write(&text, (0..8).map(tale).collect::<Vec<_>>().join("<|endoftext|>")).unwrap();
    let args = |out| ["--text", &text, "--max-ppl-loss", "2", "--rank", "32", "--out", out, "--json"];
    // Whether a target is kept is not what is asked here.
    let done = example("calibrate", &args(&whole));
    assert!(matches!(done.code, Some(0 | 3)), "{done:?}");

    let (args, checkpoint) = (args(&out), dir.path().join("sparse.safetensors.checkpoint"));
    let mut kept = Vec::new();
    for _ in 0..3 {
        kept = kill_after_a_checkpoint(&args, &checkpoint, &kept);
        assert!(!Path::new(&out).exists(), "an interrupted run has written a profile");
    }
    let other = ["--text", &text, "--max-ppl-loss", "3", "--rank", "32", "--out", &out];
    one_line(&example("calibrate", &other), "another model, text, setting");
    let again = example("calibrate", &args);
    assert_eq!(again.code, done.code, "{again:?}");
    assert!(again.stderr.contains("going on from a checkpoint"), "{again:?}");
    assert!(!again.stderr.contains("fitting blocks"), "what was kept was done again: {again:?}");
    assert!(!checkpoint.exists(), "the checkpoint is left over");
    assert!(std::fs::read(&out).unwrap() == std::fs::read(&whole).unwrap(), "the profiles differ");
}

#[test]
fn attention_alone_is_calibrated_and_used() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (text, out) = (path("tales.txt"), path("sparse.safetensors"));
    std::fs::write(&text, (0..12).map(tale).collect::<Vec<_>>().join("<|endoftext|>")).unwrap();
    let args = ["--model", "tales-silu", "--text", &text, "--attention-only", "--out", &out, "--json"];
    let json = ok("calibrate", &args).json();
    let shares: Vec<f64> = json["recall"]["shares"].as_array().unwrap().iter().flat_map(numbers).collect();
    assert_eq!(shares.len(), 8, "{json}");
    assert!(
        (shares.iter().sum::<f64>() / 8.0 - 1.0).abs() < 1e-3 && shares.iter().any(|s| *s > 1.2),
        "{json}"
    );
    let [uniform, shared] = numbers(&json["recall"]["losses"])[..] else { panic!("{json}") };
    assert!(shared < 0.95 * uniform, "{json}");
    // As many positions are read, and the model is nearer to what it says when it reads all.
    let kld = |profile: &[&str]| {
        let read =
            format!("--model tales-silu --text {text} --context 900 --tokens 3600 --ffn dense --kv f32");
        let memory = "--attention recall --window 64 --budget 128 --json";
        let args: Vec<&str> =
            read.split(' ').chain(memory.split(' ')).chain(profile.iter().copied()).collect();
        let done = ok("perplexity", &args);
        assert!(!done.stderr.contains("without effect"), "{done:?}");
        done.json()["kld"].as_f64().unwrap()
    };
    let (alike, shared) = (kld(&[]), kld(&["--profile", &out]));
    assert!(shared > 0.0 && shared < 0.9 * alike, "{shared} {alike}");
    // What needs the FFN's part says so.
    let gate = ["--model", "tales-silu", "--profile", &out, "--ffn", "gate"];
    one_line(&example("llama-sparse", &gate), "this one is of attention alone");
    one_line(
        &example("perplexity", &["--profile", &out, "--text", &text, "--sweep", &path("plot.svg")]),
        "a profile of the FFN",
    );
    let converted = path("model.gguf");
    let neurons = ["--model", "tales-silu", "--profile", &out, "--neuron-major", "--out", &converted];
    one_line(&example("convert", &neurons), "of attention alone");
    // In a file it is found as any profile.
    ok("convert", &["--model", "tales-silu", "--profile", &out, "--out", &converted]);
    ok("llama-sparse", &["--model", &converted, "--attention", "recall", "-n", "4", "--prompt", "once"]);
}

fn numbers(json: &serde_json::Value) -> Vec<f64> {
    json.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}
