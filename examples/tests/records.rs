//! The programs that a record's numbers and pictures come from.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{example, ok, one_line, tale};

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
