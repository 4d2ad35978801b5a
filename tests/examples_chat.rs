//! Conversations with the example program.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Outcome, example, example_reading};
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

/// A copy of a built-in model's files.
fn model() -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/testdata/tales-silu");
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

#[test]
fn a_full_context_ends_the_conversation_with_a_word() {
    let (_folder, template) = template(TEMPLATE);
    let line = "Once upon a time there was a king. ".repeat(30);
    let out = chat(&template, &["-n", "600"], &format!("{line}\n").repeat(9));
    let json = out.json();
    let turns = json["turns"].as_array().unwrap();
    assert!(!turns.is_empty() && turns.len() < 9, "{json}");
    assert!(json["token_ids"].as_array().unwrap().len() <= 1024, "{json}");
    assert!(out.stderr.contains("the context of 1024 tokens is full: it holds "), "{out:?}");
}

#[test]
fn what_cannot_be_a_conversation_is_one_line() {
    let run = |args: &[&str]| example_reading("llama-sparse", &[&["--chat"], args].concat(), "a\n");
    let (_a, refusing) = template("{{ raise_exception('no system') if messages[0].role == 'system' }}");
    let (_b, broken) = template("{% for");
    for (args, needle) in [
        (vec![], "--chat-template FILE"),
        (vec!["--chat-template", "/no/such/file"], "/no/such/file"),
        (vec!["--chat-template", &broken], "cannot be read"),
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
