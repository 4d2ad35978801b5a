//! The program that answers the lines of a file: resuming, shards, errors.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;
#[path = "../batch/results.rs"]
mod results;

use common::{Outcome, example, ok, one_line, outcome, program};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// A folder with an input of so many tales to write.
fn input(lines: usize) -> (tempfile::TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let prompts = ["Once upon a time", "The king had three sons", "In the forest there lived a wolf who"];
    let line = |i| {
        json!({ "id": i, "prompt": prompts[i % 3], "max_tokens": 20 + 7 * (i % 5), "seed": i }).to_string()
    };
    let text: String = (0..lines).map(|i| line(i) + "\n").collect();
    let path = folder.path().join("in.jsonl");
    fs::write(&path, text).unwrap();
    let out = folder.path().join("out.jsonl");
    (folder, path, out)
}

fn batch(input: &Path, out: &Path, args: &[&str]) -> Outcome {
    let (input, out) = (input.display().to_string(), out.display().to_string());
    example("batch", &[&["--input", &input, "--out", &out, "--json"], args].concat())
}

fn results(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Results by id; each is there once.
fn by_id(path: &Path) -> BTreeMap<u64, Value> {
    let all = results(path);
    let count = all.len();
    let map: BTreeMap<_, _> =
        all.into_iter().map(|result| (result["id"].as_u64().unwrap(), result)).collect();
    assert_eq!(map.len(), count);
    map
}

/// Without what depends on who came first.
fn texts(path: &Path) -> BTreeMap<u64, (Value, Value)> {
    by_id(path).into_iter().map(|(id, r)| (id, (r["text"].clone(), r["finish_reason"].clone()))).collect()
}

#[test]
fn each_line_has_the_text_that_llama_sparse_writes() {
    let (_folder, input, out) = input(9);
    let run = batch(&input, &out, &["--max-sequences", "4"]);
    assert_eq!(
        (run.code, &run.json()["written"], &run.json()["failed"]),
        (Some(0), &json!(9), &json!(0)),
        "{run:?}"
    );
    for (id, result) in by_id(&out) {
        let line: Value =
            serde_json::from_str(fs::read_to_string(&input).unwrap().lines().nth(id as usize).unwrap())
                .unwrap();
        let (prompt, tokens) = (line["prompt"].as_str().unwrap(), line["max_tokens"].to_string());
        let alone =
            ok("llama-sparse", &["--prompt", prompt, "-n", &tokens, "--seed", &id.to_string(), "--json"]);
        let text = format!("{prompt}{}", result["text"].as_str().unwrap());
        assert_eq!(alone.json()["text"], text, "{id}");
        assert_eq!(result["usage"]["completion_tokens"], line["max_tokens"]);
    }
    // Again there is nothing to do.
    let before = fs::read(&out).unwrap();
    let again = batch(&input, &out, &[]);
    assert_eq!((&again.json()["skipped"], again.code), (&json!(9), Some(0)));
    assert_eq!(fs::read(&out).unwrap(), before);
}

#[test]
fn a_killed_run_is_gone_on_with() {
    let (_folder, input, out) = input(60);
    let whole = out.with_file_name("whole.jsonl");
    assert_eq!(batch(&input, &whole, &[]).code, Some(0));
    let paths = [input.display().to_string(), out.display().to_string()];
    let args = ["--input", &paths[0], "--out", &paths[1], "--threads", "1", "--max-sequences", "2"];
    let mut kills = 0;
    // Killed twice, each time when there is something more.
    for least in [2, 5] {
        let mut child = program("batch").args(args).spawn().unwrap();
        let start = Instant::now();
        let lines = || fs::read_to_string(&out).map_or(0, |text| text.lines().count());
        while lines() < least && child.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(2));
        }
        // SIGKILL on Unix.
        kills += usize::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert_eq!(kills, 2, "it was done before it was killed");
    let held = results(&out).len();
    assert!((5..60).contains(&held), "{held}");
    // A kill in the middle of a line.
    let mut text = fs::read_to_string(&out).unwrap();
    text.truncate(text.len() - 9);
    fs::write(&out, text).unwrap();
    let run = batch(&input, &out, &[]);
    assert_eq!((run.code, &run.json()["skipped"]), (Some(0), &json!(held - 1)), "{run:?}");
    assert_eq!(texts(&out), texts(&whole));
}

#[test]
#[cfg(unix)]
fn ctrl_c_ends_a_run_that_can_be_gone_on_with() {
    let (_folder, input, out) = input(60);
    let mut command = program("batch");
    command.args([
        "--input",
        input.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
        "--threads",
        "1",
        "--json",
    ]);
    let child = command.spawn().unwrap();
    while fs::read_to_string(&out).map_or(0, |text| text.lines().count()) < 2 {
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(
        std::process::Command::new("kill")
            .args(["-s", "INT", &child.id().to_string()])
            .status()
            .unwrap()
            .success()
    );
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("the same command does the rest"), "{stderr}");
    assert_eq!(batch(&input, &out, &[]).code, Some(0));
    assert_eq!(by_id(&out).len(), 60);
}

#[test]
fn shards_do_each_line_once() {
    let (folder, input, out) = input(11);
    assert_eq!(batch(&input, &out, &[]).code, Some(0));
    let mut all = String::new();
    for i in 0..3 {
        let part = folder.path().join(format!("part.{i}"));
        let run = batch(&input, &part, &["--shard", &format!("{i}/3")]);
        assert_eq!(
            (run.code, &run.json()["written"]),
            (Some(0), &json!(if i < 2 { 4 } else { 3 })),
            "{run:?}"
        );
        all.push_str(&fs::read_to_string(&part).unwrap());
    }
    let joined = folder.path().join("joined");
    fs::write(&joined, all).unwrap();
    assert_eq!(texts(&joined), texts(&out));
}

#[test]
fn a_line_that_is_wrong_has_an_error_and_the_others_a_text() {
    let (_folder, input, out) = input(2);
    let more = [
        "{\"id\": \"a\", \"prompt\": \"The sea\", \"max_tokens\": 3, \"temprature\": 1}",
        "not json",
        "",
        "{\"id\": \"c\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}",
        "{\"id\": 1, \"prompt\": \"The id of another line\"}",
        "{\"id\": \"d\"}",
        "{\"prompt\": \"Without an id\", \"max_tokens\": 4}",
        "{\"id\": \"e\", \"prompt\": [\"one\", \"two\"]}",
    ];
    let text = fs::read_to_string(&input).unwrap() + &more.join("\n");
    fs::write(&input, text).unwrap();
    let run = batch(&input, &out, &[]);
    assert_eq!(
        (run.code, &run.json()["written"], &run.json()["failed"]),
        (Some(2), &json!(3), &json!(6)),
        "{run:?}"
    );
    assert!(run.stderr.contains("line 7: an earlier line has the id 1 too"), "{run:?}");
    let all = results(&out);
    let error = |id: Value| {
        let result = all.iter().find(|r| r["id"] == id).unwrap_or_else(|| panic!("{id}: {all:?}"));
        result["error"]["message"].as_str().unwrap().to_string()
    };
    assert!(error(json!("a")).contains("line 3: temprature"), "{}", error(json!("a")));
    assert!(error(json!({ "line": 4 })).contains("no JSON"));
    assert!(error(json!("c")).contains("no chat template"));
    assert!(error(json!("d")).contains("either prompt or messages"));
    assert!(error(json!("e")).contains("one text to a line"));
    assert!(
        all.iter().any(|r| r["id"] == json!({ "line": 9 }) && r["usage"]["completion_tokens"] == 4),
        "{all:?}"
    );
    // Done is done, unless errors are to be tried again.
    let again = batch(&input, &out, &[]).json();
    assert_eq!((&again["skipped"], &again["failed"]), (&json!(8), &json!(1)));
    let fixed = fs::read_to_string(&input).unwrap().replace("temprature", "temperature");
    fs::write(&input, fixed).unwrap();
    let again = batch(&input, &out, &["--retry-errors"]).json();
    assert_eq!((&again["written"], &again["failed"]), (&json!(1), &json!(5)), "{again}");
}

#[test]
fn what_cannot_be_done_is_one_line() {
    let (folder, input, out) = input(1);
    one_line(&batch(Path::new("/no/such"), &out, &[]), "/no/such");
    one_line(&batch(&input, Path::new("/no/such/folder/out"), &[]), "/no/such/folder/out");
    let notes = folder.path().join("notes.txt");
    fs::write(&notes, "mine\n").unwrap();
    one_line(&batch(&input, &notes, &[]), "is no result");
    assert_eq!(fs::read_to_string(&notes).unwrap(), "mine\n");
    for shard in ["3/3", "1", "a/b", "0/0"] {
        assert_eq!(batch(&input, &out, &["--shard", shard]).code, Some(2), "{shard}");
    }
    // Standard input is read once, so its length is not known.
    let text = fs::read(&input).unwrap();
    let mut command = program("batch");
    let run = outcome(command.args(["--input", "-", "--out", out.to_str().unwrap()]), &text);
    assert_eq!((run.code, by_id(&out).len()), (Some(0), 1), "{run:?}");
    assert_eq!(by_id(&out).into_keys().collect::<BTreeSet<_>>(), BTreeSet::from([0]));
}
