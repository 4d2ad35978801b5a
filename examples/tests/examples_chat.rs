//! Conversations with the example program.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../llama-sparse/commands.rs"]
#[allow(dead_code, reason = "its tests are run here, for those of a program are not")]
mod commands;
mod common;

use common::{Outcome, example, example_reading, outcome, program};
use serde_json::Value;
use std::path::Path;

const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}\
    {% if add_generation_prompt %}assistant: {% endif %}";

/// A folder that lives as long as the test, with a template in it.
fn template(source: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("chat.jinja");
    std::fs::write(&path, source).unwrap();
    (folder, path.display().to_string())
}

/// A greedy conversation whose cache holds the same whether tokens come one by one or together.
fn chat(template: &str, args: &[&str], input: &str) -> Outcome {
    let common = ["--chat", "--chat-template", template, "--ffn", "dense", "--temperature", "0", "--json"];
    let out = example_reading("llama-sparse", &[&common, args].concat(), input);
    assert_eq!(out.code, Some(0), "{out:?}");
    out
}

fn count(turn: &Value, key: &str) -> usize {
    usize::try_from(turn[key].as_u64().unwrap()).unwrap()
}

#[test]
fn a_turn_reads_only_what_is_new() {
    let (_folder, template) = template(TEMPLATE);
    let args =
        ["--system", "Tell tales of kings and of their daughters.", "--repeat-penalty", "1", "-n", "12"];
    let out = chat(&template, &args, "Who is he?\n\nWho is he?\nWho is he?\n");
    let json = out.json();
    let turns = json["turns"].as_array().unwrap();
    let read: Vec<_> = turns.iter().map(|turn| count(turn, "read")).collect();
    assert!(turns.len() == 3 && turns.iter().all(|turn| turn["end"] == "length"), "{json}");
    // The system's message is read once, and each line's tokens are the same.
    assert!(read[0] > read[1] + 5 && read[1] == read[2], "{json}");
    let written = turns.iter().map(|turn| count(turn, "written")).sum::<usize>();
    assert_eq!(json["token_ids"].as_array().unwrap().len(), read.iter().sum::<usize>() + written);
    assert_eq!(out.stderr.matches("tokens/s, cut off by --sample-len]").count(), 3, "{out:?}");
    assert!(out.stderr.contains(&format!("[read {} tokens", read[1])), "{out:?}");

    // All that was said before the last answer, read at once, is answered alike.
    let ids: Vec<_> = json["token_ids"].as_array().unwrap().iter().map(ToString::to_string).collect();
    let before = ids.len() - count(&turns[2], "written");
    let prompt = ids[..before].join(",");
    let args = ["--prompt-ids", &prompt, "-n", "12", "--temperature", "0", "--repeat-penalty", "1"];
    let at_once = example("llama-sparse", &[&args[..], &["--ffn", "dense", "--json"]].concat()).json();
    assert_eq!(at_once["token_ids"], json["token_ids"]);
}

/// What was cut off is not remembered, and the rest as if nothing had followed.
#[test]
fn a_stop_ends_an_answer_and_is_forgotten() {
    let (_folder, template) = template(TEMPLATE);
    let whole = chat(&template, &["-n", "30"], "Who is he?\n").json();
    let text = whole["turns"][0]["text"].as_str().unwrap();
    let stop: String = text.chars().skip(31).take(5).collect();
    let kept = &text[..text.find(&stop).unwrap()];
    let json = chat(&template, &["-n", "30", "--stop", &stop], "Who is he?\nAnd she?\n").json();
    let turns = json["turns"].as_array().unwrap();
    assert_eq!((&turns[0]["text"], &turns[0]["end"]), (&kept.into(), &"stop".into()), "{stop:?} {text:?}");
    let ids: Vec<_> = json["token_ids"].as_array().unwrap().iter().map(ToString::to_string).collect();
    let taken: usize = turns.iter().map(|turn| count(turn, "read") + count(turn, "written")).sum();
    assert_eq!(ids.len(), taken, "{json}");
    let prompt = ids[..ids.len() - count(&turns[1], "written")].join(",");
    let args = [
        "--prompt-ids",
        &prompt,
        "-n",
        "30",
        "--temperature",
        "0",
        "--stop",
        &stop,
        "--ffn",
        "dense",
        "--json",
    ];
    let at_once = example("llama-sparse", &args).json();
    assert_eq!(at_once["token_ids"], json["token_ids"]);
    assert!(at_once["text"].as_str().unwrap().contains(&format!("assistant: {kept}")), "{at_once}");
}

/// A copy of a built-in model's files.
fn model() -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/testdata/tales-silu");
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(source.join(file), folder.path().join(file)).unwrap();
    }
    let path = folder.path().display().to_string();
    (folder, path)
}

#[test]
fn an_answer_ends_with_the_token_that_the_template_writes_behind_it() {
    let (folder, path) = model();
    let (_a, plain) = template(TEMPLATE);
    let args = ["--model", &path, "-n", "30"];
    let before = chat(&plain, &args, "Who is he?\n").json();
    assert_eq!(before["turns"][0]["end"], "length");
    // A word that the model says becomes a special token, and what the template writes behind an answer. Such words
    // are spelt with a letter for their blank, so none is in the prompt.
    let file = folder.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
    let word = |id: &Value| vocab.iter().find(|(_, i)| *i == id).unwrap().0.clone();
    let answer = &before["token_ids"].as_array().unwrap()[count(&before["turns"][0], "read")..];
    let at = answer.iter().position(|id| word(id).starts_with('\u{120}') && word(id).len() > 2).unwrap();
    let (id, content) = (answer[at].clone(), word(&answer[at]));
    let mut added = tokenizer["added_tokens"][0].clone();
    (added["id"], added["content"]) = (id, content.as_str().into());
    tokenizer["added_tokens"].as_array_mut().unwrap().push(added);
    std::fs::write(&file, tokenizer.to_string()).unwrap();
    let end = format!("{{{{ '{content}' if m.role == 'assistant' }}}}\n{{% endfor %}}");
    let (_b, ending) = template(&TEMPLATE.replace("\n{% endfor %}", &end));
    let after = chat(&ending, &args, "Who is he?\n").json();
    assert_eq!(
        (&after["turns"][0]["end"], &after["turns"][0]["written"]),
        (&"token".into(), &at.into()),
        "{content}"
    );
}

/// What was said before and what comes later is answered.
#[test]
fn a_turn_without_room_is_left_out_alone() {
    let (_folder, template) = template(TEMPLATE);
    let long = "Once upon a time there was a king. ".repeat(200);
    let args = ["--chat", "--chat-template", &template, "--temperature", "0", "-n", "5", "--ffn", "dense"];
    let run = |input: &str| example_reading("llama-sparse", &[&args[..], &["--json"]].concat(), input);
    let out = run(&format!("Who is he?\n{long}\nWho is he?\n"));
    // A script is told by the exit code.
    assert_eq!(out.code, Some(2), "{out:?}");
    assert!(out.stderr.contains("error: the context of 1024 tokens is full: it holds "), "{out:?}");
    let json = out.json();
    let turns = json["turns"].as_array().unwrap();
    assert_eq!(turns.len(), 3, "{json}");
    assert!(turns[1]["error"].as_str().unwrap().contains("is full") && turns[1]["text"].is_null(), "{json}");
    let without = run("Who is he?\nWho is he?\n");
    assert_eq!(without.code, Some(0), "{without:?}");
    assert_eq!(json["token_ids"], without.json()["token_ids"], "as if it had not been said");
    // An answer ends where the context does.
    let args = ["--chat", "--chat-template", &template, "--json"];
    let json = example_reading("llama-sparse", &args, "Who is he?\n").json();
    let end = &json["turns"][0]["end"];
    assert!(
        *end == "token" || *end == "context" && json["token_ids"].as_array().unwrap().len() == 1024,
        "{json}"
    );
}

#[test]
fn a_line_that_is_no_utf8_costs_no_other_line() {
    let (_folder, template) = template(TEMPLATE);
    let args = ["--chat", "--chat-template", &template, "--temperature", "0", "-n", "5", "--json"];
    let out = outcome(program("llama-sparse").args(args), b"Say hi.\ncaf\xe9\r\nBye.");
    assert_eq!(out.code, Some(0), "{out:?}");
    let json = out.json();
    let users: Vec<_> =
        json["turns"].as_array().unwrap().iter().map(|t| t["user"].as_str().unwrap()).collect();
    assert_eq!(users, ["Say hi.", "caf\u{fffd}", "Bye."]);
    assert!(out.stderr.contains("note: this line is no UTF-8 from byte 3 on"), "{out:?}");
}

#[test]
fn several_lines_are_one_message() {
    let (_folder, template) = template(TEMPLATE);
    let input = "One \\\ntwo.\n\"\"\"Three\n\nfour.\"\"\"\n\"\"\"\nfive\n\"\"\"\n \"\"\"a\"\"\"\n";
    let json = chat(&template, &["-n", "2"], input).json();
    let users: Vec<_> =
        json["turns"].as_array().unwrap().iter().map(|t| t["user"].as_str().unwrap()).collect();
    assert_eq!(users, ["One \ntwo.", "Three\n\nfour.", "five", "a"]);
}

#[test]
fn commands_do_what_help_says() {
    let (folder, template) = template(TEMPLATE);
    let file = folder.path().join("talk.json").display().to_string();
    let run = |input: &str| {
        let args = ["--chat", "--chat-template", &template, "--system", "Be brief.", "--temperature", "0"];
        example_reading(
            "llama-sparse",
            &[&args[..], &["--ffn", "dense", "-n", "5", "--json"]].concat(),
            input,
        )
    };
    let whole = run("Who is he?\nAnd she?\n");
    let saved = run(&format!("Who is he?\n/save {file}\n/help\n/exit\nnot read\n"));
    assert_eq!(saved.code, Some(0), "{saved:?}");
    assert!(
        saved.stderr.contains("/load FILE") && saved.json()["turns"].as_array().unwrap().len() == 1,
        "{saved:?}"
    );
    let talk: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let roles: Vec<_> =
        talk["messages"].as_array().unwrap().iter().map(|m| m["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["system", "user", "assistant"]);
    assert_eq!(talk["messages"][1]["content"], "Who is he?");
    // It goes on as if it had never been left; all of it is read again.
    let loaded = run(&format!("Something else.\n/load {file}\nAnd she?\n")).json();
    assert_eq!(loaded["token_ids"], whole.json()["token_ids"]);
    // A conversation that is forgotten leaves its instructions.
    let cleared = run("Something else.\n/clear\nWho is he?\nAnd she?\n").json();
    assert_eq!(cleared["token_ids"], whole.json()["token_ids"]);
    // What is no command, or does not work, is an error of that line.
    std::fs::write(folder.path().join("no.json"), "{}").unwrap();
    let no = folder.path().join("no.json").display().to_string();
    for (line, needle) in [
        ("/quit", "there is no command /quit; /help lists the commands"),
        ("/save", "/save needs the name of a file"),
        ("/load /no/such/file", "/no/such/file"),
        ("/save /no/such/file", "/no/such/file: cannot be written"),
        ("/save /dev/null", "/dev/null"),
        (&format!("/load {no}"), "no conversation written by /save"),
    ] {
        let out = run(&format!("Who is he?\n{line}\nAnd she?\n"));
        assert_eq!(out.code, Some(2), "{line}: {out:?}");
        assert!(
            out.stderr.lines().any(|l| l.starts_with("error: ") && l.contains(needle)),
            "{line}: {out:?}"
        );
        assert_eq!(out.json()["token_ids"], whole.json()["token_ids"], "{line}");
    }
    let path = chat(&template, &["-n", "1"], "/usr/bin is full\n /exit\n").json();
    assert_eq!(path["turns"].as_array().unwrap().len(), 2, "{path}");
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_an_answer_and_not_the_conversation() {
    use std::io::{Read, Write};
    let (_folder, template) = template(TEMPLATE);
    let args = ["--chat", "--chat-template", &template, "--threads", "1", "--dtype", "f32", "--ffn", "dense"];
    let mut child = program("llama-sparse").args(args).args(["--temperature", "0"]).spawn().unwrap();
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let signal = |child: &std::process::Child| {
        let kill = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
        assert!(kill.unwrap().success());
    };
    stdin.write_all(b"Who is he?\n").unwrap();
    stdout.read_exact(&mut [0; 8]).unwrap();
    signal(&child);
    stdin.write_all(b"And she?\n").unwrap();
    drop(stdin);
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    let out = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(0), "{stderr}");
    assert_eq!(stderr.matches("cut off by Ctrl-C]").count(), 1, "{stderr}");
    assert_eq!(stderr.matches("[read ").count(), 2, "{stderr}");
    // While nothing is written it ends the program, which says what was said; so does a single text that is cut off.
    let mut child = program("llama-sparse").args(args).args(["-n", "5", "--json"]).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"Who is he?\n").unwrap();
    let (mut shown, mut stderr) = (Vec::new(), child.stderr.take().unwrap());
    while !String::from_utf8_lossy(&shown).contains("tokens/s") {
        let mut byte = [0];
        stderr.read_exact(&mut byte).unwrap();
        shown.push(byte[0]);
    }
    std::thread::sleep(std::time::Duration::from_millis(300));
    signal(&child);
    let mut json = String::new();
    child.stdout.take().unwrap().read_to_string(&mut json).unwrap();
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["turns"].as_array().map(Vec::len), Some(1), "{json}");
    assert_eq!(child.wait().unwrap().code(), Some(130));
    drop(stdin);
    let mut child = program("llama-sparse")
        .args(["--dtype", "f32", "--threads", "1", "-n", "1000", "--json"])
        .spawn()
        .unwrap();
    child.stderr.take().unwrap().read_exact(&mut [0; 120]).unwrap();
    signal(&child);
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(130));
    let json: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(json["end"], "interrupted", "{json}");
}

#[test]
fn what_cannot_be_a_conversation_is_one_line() {
    let run = |args: &[&str]| example_reading("llama-sparse", &[&["--chat"], args].concat(), "a\n");
    let (_a, refusing) = template("{{ raise_exception('no system') if messages[0].role == 'system' }}");
    let (_b, broken) = template("{% for");
    let (_c, pointer) = template("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n");
    for (args, needle) in [
        (vec![], "--chat-template FILE"),
        (vec!["--chat-template", "/no/such/file"], "/no/such/file"),
        (vec!["--chat-template", &broken], "cannot be read"),
        (vec!["--chat-template", &pointer], "Git LFS pointer"),
        (vec!["--chat-template", &refusing, "--system", "s"], "refuses this conversation: no system"),
        (vec!["--chat-template", &refusing], "no text"),
    ] {
        let out = run(&args);
        assert_eq!(out.code, Some(2), "{out:?}");
        assert!(out.stderr.starts_with("error: ") && out.stderr.contains(needle), "{out:?}");
        assert_eq!(out.stderr.lines().count(), 1, "{out:?}");
    }
    // Without a conversation a broken template does not matter.
    let (folder, path) = model();
    std::fs::write(folder.path().join("chat_template.jinja"), "{% for").unwrap();
    assert_eq!(example("llama-sparse", &["--model", &path, "-n", "1"]).code, Some(0));
    let out = run(&["--model", &path]);
    assert!(out.code == Some(2) && out.stderr.contains("cannot be read"), "{out:?}");
}
