//! SmolLM2-135M-Instruct, a trained model as users pull it, against numbers from an independent forward pass in F32
//! (`examples/testdata/smollm2/reference.py`), and what settings may cost on it.
//!
//! The GGUF file (`Q4_1`) comes from `CANDLE_SPARSE_TEST_SMOLLM2`.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests")]

mod common;

use common::{Outcome, example, example_reading};
use serde_json::Value;
use std::path::Path;

/// `<|im_end|>`
const END: u64 = 2;

/// The file, or why there is none.
fn model() -> Option<String> {
    let path = std::env::var("CANDLE_SPARSE_TEST_SMOLLM2").ok();
    if path.is_none() {
        println!("skipped: CANDLE_SPARSE_TEST_SMOLLM2 is not set");
    }
    path
}

fn reference() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/smollm2/reference.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn run(args: &[&str]) -> Outcome {
    let out = example("llama-sparse", args);
    assert_eq!(out.code, Some(0), "{args:?}: {out:?}");
    out
}

fn numbers(json: &Value) -> Vec<f64> {
    json.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

#[test]
fn texts_have_the_tokens_of_its_tokenizer() {
    let Some(model) = model() else { return };
    for case in reference()["tokenizer"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let args = ["--model", &model, "--prompt", text, "-n", "0", "--json", "-q"];
        assert_eq!(run(&args).json()["token_ids"], case["ids"], "{text:?}");
    }
}

/// Weights as F32 round no activations: the numbers are those of the reference. As stored, they are near.
#[test]
fn logits_are_those_of_an_independent_forward_pass() {
    let Some(model) = model() else { return };
    let prompt = &reference()["prompt"];
    let ids: Vec<_> = numbers(&prompt["ids"]).iter().map(ToString::to_string).collect();
    let want = numbers(&prompt["first_logits"]);
    let count = want.len().to_string();
    let off = |dtype: &[&str]| {
        let common = [
            "--model",
            &model,
            "--prompt-ids",
            &ids.join(","),
            "-n",
            "1",
            "--json",
            "-q",
            "--logits",
            &count,
        ];
        let got = numbers(&run(&[&common, dtype].concat()).json()["prompt_logits"]);
        assert_eq!(got.len(), want.len());
        got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    };
    let exact = off(&["--dtype", "f32", "--kv", "f32"]);
    assert!(exact < 2e-3, "{exact}");
    let stored = off(&[]);
    assert!(stored > exact && stored < 1.0, "{stored}");
}

/// Greedy answers, up to the first token that leads the next best by less than rounding can move.
#[test]
fn it_answers_as_the_reference() {
    let Some(model) = model() else { return };
    for case in reference()["chat"].as_array().unwrap() {
        let (question, want) = (case["question"].as_str().unwrap(), case["ids"].as_array().unwrap());
        let args = [
            "--model",
            &model,
            "--chat",
            "--temperature",
            "0",
            "-n",
            "12",
            "--json",
            "-q",
            "--dtype",
            "f32",
            "--kv",
            "f32",
        ];
        let out = example_reading("llama-sparse", &args, &format!("{question}\n"));
        assert_eq!(out.code, Some(0), "{out:?}");
        let json = out.json();
        let read = json["turns"][0]["read"].as_u64().unwrap() as usize;
        let answer = &json["token_ids"].as_array().unwrap()[read..];
        let leads = numbers(&case["leads"]);
        let said = want.iter().take_while(|id| **id != END).zip(&leads).take_while(|(_, lead)| **lead > 0.01);
        let sure = said.count();
        assert!(sure >= 7, "{leads:?}");
        assert_eq!(answer[..sure], want[..sure], "{question}");
    }
}

/// What a setting costs beside the model as stored, on a text of this project.
#[test]
fn settings_cost_what_the_documents_say() {
    let Some(model) = model() else { return };
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/decisions.md").display().to_string();
    let cost = |setting: &[&str]| {
        let common = [
            "--model",
            &model,
            "--text",
            &text,
            "--context",
            "384",
            "--stride",
            "256",
            "--tokens",
            "700",
            "--json",
            "-q",
        ];
        let out = example("perplexity", &[&common, setting].concat());
        assert_eq!(out.code, Some(0), "{setting:?}: {out:?}");
        let json = out.json();
        let number = |key: &str| json[key].as_f64().unwrap();
        (number("ppl") / number("dense_ppl") - 1.0, number("kld"))
    };
    let (ppl, kld) = cost(&[]);
    assert!(ppl.abs() < 0.01 && kld < 0.006, "as stored: {ppl} {kld}");
    let (ppl, kld) = cost(&["--kv", "q8"]);
    assert!(ppl.abs() < 0.01 && kld < 0.006, "kv q8: {ppl} {kld}");
    let (ppl, kld) = cost(&["--kv", "tiered", "--hot", "32", "--warm", "64"]);
    assert!(ppl.abs() < 0.02 && kld < 0.02, "kv tiered: {ppl} {kld}");
}
