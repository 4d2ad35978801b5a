//! Third-party checkpoints against numbers from an independent implementation, through the example program.
//!
//! The folder with the models comes from `CANDLE_SPARSE_TEST_MODELS`; each holds a checkpoint and a `reference.json`
//! with `prompt_ids`, `greedy_ids`, `check_ids` and `last_logits_first16`.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::example;

fn ids(json: &serde_json::Value) -> String {
    let ids: Vec<_> = json.as_array().unwrap().iter().map(ToString::to_string).collect();
    ids.join(",")
}

#[test]
fn every_reference_is_reproduced() {
    let Some(folder) = std::env::var_os("CANDLE_SPARSE_TEST_MODELS") else {
        println!("skipped: CANDLE_SPARSE_TEST_MODELS is not set");
        return;
    };
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let Ok(reference) = std::fs::read(path.join("reference.json")) else { continue };
        let reference: serde_json::Value = serde_json::from_slice(&reference).unwrap();
        let model = path.display().to_string();
        let greedy = reference["greedy_ids"].as_array().unwrap();
        let new = (greedy.len() - reference["prompt_ids"].as_array().unwrap().len()).to_string();
        let common =
            ["--temperature", "0", "--repeat-penalty", "1", "--json", "--logits", "16", "--model", &model];
        let run = |prompt: &str, n: &str| {
            let args: Vec<_> = common.into_iter().chain(["--prompt-ids", prompt, "-n", n]).collect();
            let out = example("llama-sparse", &args);
            assert_eq!(out.code, Some(0), "{out:?}");
            out.json()
        };
        let json = run(&ids(&reference["prompt_ids"]), &new);
        assert_eq!(json["token_ids"], reference["greedy_ids"], "{model}");
        let json = run(&ids(&reference["check_ids"]), "1");
        for (got, want) in json["prompt_logits"]
            .as_array()
            .unwrap()
            .iter()
            .zip(reference["last_logits_first16"].as_array().unwrap())
        {
            let (got, want) = (got.as_f64().unwrap(), want.as_f64().unwrap());
            assert!((got - want).abs() <= 1e-4 * want.abs().max(1.0), "{model}: {got} {want}");
        }
        seen += 1;
    }
    assert!(seen > 0, "CANDLE_SPARSE_TEST_MODELS holds no model with a reference.json");
}
