//! The programs that a record's numbers and pictures come from.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use candle_sparse::profile::{LayerRule, Profile};
use common::{example, ok, one_line, tale, testdata};

#[test]
fn perplexity_counts_what_it_is_asked_to() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("tale.txt");
    std::fs::write(&text, tale(0)).unwrap();
    let text = text.display().to_string();
    let run = |more: &[&str]| {
        let args = ["--text", &text, "--context", "128", "--ffn", "dense", "--json"];
        ok("perplexity", &[&args, more].concat()).json()
    };
    // The model in Q8_0 beside itself, and beside what is stored.
    let q8 = ["--dtype", "q8_0", "--kv", "f32", "--stride", "128", "--count", "63", "--tokens", "189"];
    let same = run(&[&q8[..], &["--reference", "q8_0"]].concat());
    assert_eq!(
        (same["tokens"].as_u64(), same["kld"].as_f64().map(|k| k < 1e-7)),
        (Some(189), Some(true)),
        "{same}"
    );
    assert_eq!(
        (same["ppl_change"].as_f64(), same["top1_agreement"].as_f64()),
        (Some(0.0), Some(1.0)),
        "{same}"
    );
    let stored = run(&q8);
    assert!(stored["kld"].as_f64().unwrap() > 1e-6, "{stored}");
    assert_eq!(stored["ppl"], same["ppl"]);
    // Every token but the first of each window.
    assert_eq!(run(&["--stride", "128", "--tokens", "250"])["tokens"], 254);
    one_line(
        &example("perplexity", &["--text", &text, "--context", "64", "--count", "64"]),
        "--count 64 must be 1 to 63",
    );
}

#[test]
fn long_memory_asks_every_way_the_same() {
    let run = |args: &[&str]| {
        ok("long-memory", &[&["--sizes", "200", "--texts", "2", "--json"], args].concat()).json()
    };
    let json = run(&["--ways", "dense,window,gated"]);
    assert_eq!(json["ways"], serde_json::json!(["dense", "window", "gated"]));
    let rows = json["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 3, "{json}");
    assert!(
        rows.iter().all(|r| r["tokens"].as_u64() > Some(200) && r["right"].as_array().unwrap().len() == 3)
    );
    one_line(&example("long-memory", &["--attention", "recall"]), "give --ways");
    one_line(&example("long-memory", &["--texts", "0"]), "1 or more");
}

/// Logits of a window of 256 tokens are 2 MB here, of the longer text 37 MB.
#[test]
#[cfg(target_os = "linux")]
fn a_sweep_takes_no_more_memory_for_a_longer_text() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let mut profile = Profile::load(format!("{}/sparse.safetensors", testdata("tales-silu"))).unwrap();
    let hidden_size = profile.layers[0].p.len() / profile.layers[0].rank;
    // One share for every choice, the fifth.
    for rule in profile.layers.iter_mut().flat_map(|l| &mut l.rules) {
        let LayerRule { candidate, keep, share, hot, bias } = rule;
        for v in [candidate, keep, share] {
            *v = vec![v[4]];
        }
        *hot = vec![hot[4]];
        *bias = bias[4 * hidden_size..5 * hidden_size].to_vec();
    }
    (profile.shares, profile.fitted) = (vec![profile.shares[4]], [0; 3]);
    profile.save(path("one.safetensors")).unwrap();
    std::fs::write(path("text"), tale(0).repeat(6)).unwrap();
    let peak = |tokens: &str| {
        let (profile, text, plot) = (path("one.safetensors"), path("text"), path("sweep.svg"));
        let args = ["--profile", &profile, "--text", &text, "--tokens", tokens, "--sweep", &plot, "--json"];
        let json = ok("perplexity", &args).json();
        let points = json["points"].as_array().unwrap();
        assert_eq!(points.len(), 6, "{json}");
        (points[0]["tokens"].as_u64().unwrap(), json["peak_bytes"].as_f64().unwrap())
    };
    let ((few, short), (many, long)) = (peak("300"), peak("4600"));
    assert!(few < 300 && many > 4000, "{few} and {many} tokens");
    assert!(long < short + 12e6, "{few} tokens take {short:e} bytes, {many} take {long:e}");
}

#[test]
fn pictures_are_made_from_points() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let point = r#"{ "x": 5, "y": 0.2, "label": "here" }"#;
    let json = |y: &str| {
        let series = format!(
            r#"[{{ "name": "weights", "line": true, "points": [{point}, {{ "x": 8, "y": {y} }}] }}]"#
        );
        format!(
            r#"{{ "title": "quality", "x": "bits", "x_from": 4, "y": "KL", "log_y": true, "series": {series} }}"#
        )
    };
    std::fs::write(path("good.json"), json("0.001")).unwrap();
    std::fs::write(path("zero.json"), json("0")).unwrap();
    std::fs::write(path("none.json"), r#"{ "title": "quality" }"#).unwrap();
    ok("plot", &[&path("good.json"), "--out", &path("good.svg")]);
    let svg = std::fs::read_to_string(path("good.svg")).unwrap();
    assert!(["quality", "weights", "here", "KL"].iter().all(|text| svg.contains(text)), "{svg}");
    one_line(&example("plot", &[&path("zero.json"), "--out", &path("zero.svg")]), "not above 0");
    one_line(&example("plot", &[&path("none.json"), "--out", &path("none.svg")]), "\"x\" must be a text");
}
