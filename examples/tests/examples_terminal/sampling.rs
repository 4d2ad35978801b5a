//! How tokens are chosen, and what ends a text.

use crate::{common::example, model, ok, one_line};
use serde_json::Value;

fn said(args: &[&str]) -> Value {
    let length = if args.contains(&"-n") { &[][..] } else { &["-n", "40"] };
    let args = [&["--prompt", "The wolf", "--ffn", "dense", "--json"], length, args].concat();
    ok("llama-sparse", &args).json()
}

fn ids(args: &[&str]) -> Value {
    said(args)["token_ids"].clone()
}

#[test]
fn flags_choose_and_seeds_repeat() {
    let greedy = ids(&["--temperature", "0"]);
    // One token to choose from, in every way to say it.
    for args in
        [["--top-k", "1"], ["--top-p", "0.000001"], ["--min-p", "0.999999"], ["--temperature", "0.000000001"]]
    {
        assert_eq!(ids(&args), greedy, "{args:?}");
    }
    let [one, again, two] = ["1", "1", "2"].map(|seed| ids(&["--seed", seed]));
    assert!(one == again && one != two && one != greedy, "{one} {two}");
    // What is not given is this.
    let defaults = [
        "--temperature",
        "0.8",
        "--top-k",
        "40",
        "--top-p",
        "0.95",
        "--min-p",
        "0.05",
        "--repeat-penalty",
        "1",
    ];
    assert_eq!(ids(&[&defaults[..], &["--seed", "1"]].concat()), one);
    // Each of them matters.
    for args in [
        ["--top-k", "2"],
        ["--top-p", "0.3"],
        ["--min-p", "0.5"],
        ["--temperature", "2"],
        ["--repeat-penalty", "3"],
    ] {
        assert_ne!(ids(&[&args[..], &["--seed", "1"]].concat()), one, "{args:?}");
    }
    // 0 and 1 are no limits.
    let free = ["--top-k", "0", "--top-p", "1", "--min-p", "0", "--temperature", "1.5"];
    assert_ne!(ids(&[&free[..], &["--seed", "1"]].concat()), ids(&["--temperature", "1.5", "--seed", "1"]));
    for args in [["--top-p", "0"], ["--temperature", "nan"], ["--min-p", "-1"], ["--repeat-penalty", "0"]] {
        one_line(&example("llama-sparse", &args), args[0]);
        one_line(&example("mistral-sparse", &args), args[0]);
    }
}

#[test]
fn the_penalty_is_on_what_the_model_wrote() {
    let prompt = "The king the king the king";
    let run = |args: &[&str]| {
        let args = [&["--prompt", prompt, "--temperature", "0", "-n", "1", "--json"], args].concat();
        ok("llama-sparse", &args).json()["token_ids"].clone()
    };
    assert_eq!(run(&["--repeat-penalty", "5"]), run(&[]), "nothing was written before the first token");
    let long = |args: &[&str]| ids(&[&["--temperature", "0", "-n", "200"], args].concat());
    assert_ne!(long(&["--repeat-penalty", "1.5"]), long(&[]));
    assert_eq!(long(&["--repeat-penalty", "1.5", "--repeat-last-n", "0"]), long(&[]));
}

#[test]
fn a_model_says_how_it_wants_to_be_sampled() {
    let run = |generation: &str, args: &[&str]| {
        let (_folder, path) = model(generation);
        ids(&[&["--model", &path], args].concat())
    };
    let greedy = run("{}", &["--temperature", "0"]);
    assert_eq!(run(r#"{"do_sample": false, "temperature": 0.9}"#, &[]), greedy);
    assert_eq!(run(r#"{"do_sample": true, "top_k": 1}"#, &[]), greedy);
    let warm = run("{}", &["--temperature", "1.5", "--top-k", "0", "--top-p", "1", "--min-p", "0"]);
    let generation = r#"{"do_sample": true, "temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}"#;
    assert_eq!(run(generation, &[]), warm);
    assert_eq!(run(generation, &["--temperature", "0"]), greedy, "a flag stands before it");
    let varied = run(r#"{"repetition_penalty": 1.5}"#, &["--temperature", "0"]);
    assert_eq!(varied, run("{}", &["--temperature", "0", "--repeat-penalty", "1.5"]));
    let (_folder, path) = model(r#"{"temperature": -3}"#);
    one_line(&example("llama-sparse", &["--model", &path]), "generation_config.json: temperature -3");
    let (_folder, path) = model(r#"{"do_sample": false}"#);
    let out = ok("llama-sparse", &["--model", &path, "--top-k", "3", "-n", "2"]);
    assert!(out.stderr.contains("--top-k without effect: the model's own settings"), "{out:?}");
}

#[test]
fn a_stop_ends_a_text_and_is_not_shown() {
    let greedy = ["--temperature", "0", "-n", "60"];
    let all = said(&greedy);
    let text = all["text"].as_str().unwrap();
    let written = &text["The wolf".len()..];
    // Parts of words, so that they begin and end within tokens; and one that never comes.
    let start = written.char_indices().nth(21).unwrap().0;
    let stop: String = written[start..].chars().take(7).collect();
    let expected = &written[..written.find(&stop).unwrap()];
    let json = said(&[&greedy[..], &["--stop", "never written", "--stop", &stop]].concat());
    assert_eq!(json["text"], format!("The wolf{expected}"), "{stop:?}");
    assert_eq!(json["end"], "stop");
    let json = said(&[&greedy[..], &["--stop", "never written"]].concat());
    assert_eq!((&json["text"], &json["end"]), (&all["text"], &"length".into()));
    let out = ok("mistral-sparse", &["--prompt", "The wolf", "--temperature", "0", "--stop", " "]);
    assert_eq!(out.stdout.trim_end().split(' ').count(), 2, "{out:?}");
}
