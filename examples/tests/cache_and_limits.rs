//! Keys and values kept as a file, a limit of time, and the guard, as a user of `llama-sparse` meets them.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{example, example_reading, ok, one_line, testdata};

/// Arguments of a short greedy text.
const SHORT: [&str; 7] = ["--temperature", "0", "-n", "12", "--ffn", "dense", "--json"];

fn with<'a>(args: &[&'a str]) -> Vec<&'a str> {
    [args, &SHORT].concat()
}

#[test]
fn a_saved_text_is_not_read_again_and_changes_no_token() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tale.safetensors").display().to_string();
    let (first, second) = ("Once there was a king", "Once there was a king who had three sons");
    let saved = ok("llama-sparse", &with(&["--prompt", first, "--save-cache", &file]));
    assert!(saved.stderr.contains("written to"), "{saved:?}");
    let plain = ok("llama-sparse", &with(&["--prompt", second])).json();
    let loaded = ok("llama-sparse", &with(&["--prompt", second, "--load-cache", &file]));
    assert!(loaded.stderr.contains("tokens were in"), "{loaded:?}");
    let loaded = loaded.json();
    assert_eq!(plain["cached_tokens"], 0);
    let held = loaded["cached_tokens"].as_u64().unwrap();
    assert!(held >= 3 && held < loaded["prompt_tokens"].as_u64().unwrap(), "{held}");
    assert_eq!(loaded["token_ids"], plain["token_ids"]);
    // The whole text again: its last token alone is read.
    let same = ok("llama-sparse", &with(&["--prompt", first, "--load-cache", &file])).json();
    assert_eq!(same["token_ids"], saved.json()["token_ids"]);
    assert_eq!(same["cached_tokens"].as_u64().unwrap() + 1, same["prompt_tokens"].as_u64().unwrap());
}

#[test]
fn a_conversation_goes_on_where_a_file_has_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("chat.safetensors").display().to_string();
    let template = folder.path().join("template.jinja").display().to_string();
    std::fs::write(&template, "{% for m in messages %}{{ m.content }}\n{% endfor %}").unwrap();
    let chat = |more: &[&str], said: &str| {
        let args = [
            &[
                "--chat",
                "--chat-template",
                &template,
                "--temperature",
                "0",
                "--ffn",
                "dense",
                "-n",
                "6",
                "--json",
            ],
            more,
        ]
        .concat();
        let out = example_reading("llama-sparse", &args, said);
        assert_eq!(out.code, Some(0), "{out:?}");
        out.json()
    };
    let plain = chat(&["--save-cache", &file], "A king had a daughter\nWhat was she called\n");
    let again = chat(&["--load-cache", &file], "A king had a daughter\nWhat was she called\n");
    assert_eq!(again["token_ids"], plain["token_ids"]);
    let read = |json: &serde_json::Value| json["turns"][0]["read"].as_u64().unwrap();
    assert!(read(&plain) > 1 && read(&again) == 1, "{plain} {again}");
}

#[test]
fn a_file_that_does_not_serve_is_refused_or_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tale.safetensors").display().to_string();
    ok("llama-sparse", &with(&["--prompt", "A king", "--save-cache", &file]));
    let other = ok("llama-sparse", &with(&["--prompt-ids", "5,6", "--load-cache", &file]));
    assert!(other.stderr.contains("--load-cache") && other.stderr.contains("begins otherwise"), "{other:?}");
    let relu = ["--model", "tales-relu", "--load-cache", &file];
    one_line(&example("llama-sparse", &relu), "belongs to another model");
    one_line(&example("llama-sparse", &["--load-cache", "/nowhere/x"]), "/nowhere/x");
    one_line(&example("llama-sparse", &["--save-cache", "/nowhere/x"]), "/nowhere");
    let profile = testdata("tales-silu/sparse.safetensors");
    one_line(&example("llama-sparse", &["--load-cache", &profile]), "is no saved kv cache");
}

#[test]
fn time_that_is_over_ends_a_text() {
    let out =
        ok("llama-sparse", &["--time-limit", "1", "--prompt", "A king", "-n", "100000", "--json"]).json();
    // A fast machine may fill the context first.
    assert!(out["end"] == "time" || out["end"] == "context", "{out}");
    let unread = example("llama-sparse", &["--time-limit", "0.000001", "--prompt", "A king"]);
    assert_eq!(unread.code, Some(2));
    assert!(unread.stderr.contains("before the prompt was read"), "{unread:?}");
    for limit in ["0", "-1", "NaN", "1e300"] {
        one_line(&example("llama-sparse", &[&format!("--time-limit={limit}")]), "--time-limit");
    }
}

#[test]
fn the_guard_reports_what_it_found() {
    let guarded = |limit: &str| {
        let args = [
            "--guard", limit, "--ffn", "cascade", "-n", "400", "--seed", "3", "--prompt", "A king", "--json",
        ];
        ok("llama-sparse", &args).json()
    };
    let (strict, lax) = (guarded("0.0001"), guarded("100"));
    assert!(lax["guard"]["comparisons"].as_u64().unwrap() > 0, "{lax}");
    assert_eq!(lax["guard"]["least_scale"], 1.0);
    assert!(strict["guard"]["least_scale"].as_f64().unwrap() < 1.0, "{strict}");
    one_line(&example("llama-sparse", &["--guard", "0"]), "--guard 0 must be above 0");
    one_line(&example("llama-sparse", &["--guard", "0.3", "--ffn", "dense"]), "with --ffn dense none are");
}
