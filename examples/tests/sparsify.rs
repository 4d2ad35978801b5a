//! A few steps of `sparsify` on the built-in model: what it writes, and that others can run it.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;
/// The program, for the tests in it.
#[path = "../sparsify/main.rs"]
#[allow(dead_code, reason = "its tests alone are run here")]
mod program;

use common::{example, ok, one_line, tale, testdata};
use std::{fs, path::Path};

/// Five steps are too few for a good model, and enough to see it come nearer.
fn sparsify(text: &str, out: &str, steps: &str, more: &[&str]) -> serde_json::Value {
    let args = ["--text", text, "--out", out, "--steps", steps, "--batch", "2", "--context", "64", "--json"];
    ok("sparsify", &[&args, more].concat()).json()
}

#[test]
fn a_few_steps_bring_the_student_nearer_and_others_can_run_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (text, out) = (path("tales.txt"), path("sparse"));
    fs::write(&text, tale(1) + "\n\n" + &tale(2)).unwrap();
    let json = sparsify(&text, &out, "5", &[]);
    let value = |at: &str, key: &str| json[at][key].as_f64().unwrap();
    assert_eq!(json["steps"], 5);
    assert!(value("after", "kld") < value("before", "kld") && value("after", "kld") > 0.0, "{json}");
    assert!(value("after", "ppl") < value("before", "ppl"), "{json}");
    assert_eq!(value("after", "teacher_ppl"), value("before", "teacher_ppl"), "{json}");
    let active = json["after"]["active_fraction_by_block"].as_array().unwrap();
    assert!(active.len() == 4 && active.iter().all(|a| (0.05..0.9).contains(&a.as_f64().unwrap())), "{json}");

    let file = |name: &str| fs::read(Path::new(&out).join(name)).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&file("config.json")).unwrap();
    assert_eq!(config["hidden_act"], "relu");
    assert_eq!(file("tokenizer.json"), fs::read(testdata("tales-silu") + "/tokenizer.json").unwrap());
    // Only what is trained differs from the model it came from.
    let tensors = |bytes: &[u8], name: &str| {
        safetensors::SafeTensors::deserialize(bytes).unwrap().tensor(name).unwrap().data().to_vec()
    };
    let (new, old) =
        (file("model.safetensors"), fs::read(testdata("tales-silu") + "/model.safetensors").unwrap());
    let changed = |name: &str| tensors(&new, name) != tensors(&old, name);
    assert!(!changed("model.embed_tokens.weight") && !changed("model.layers.1.self_attn.q_proj.weight"));
    assert!(changed("model.layers.1.mlp.gate_proj.weight") && changed("model.norm.weight"));

    let spoken = ok("llama-sparse", &["--model", &out, "-n", "20", "--temperature", "0", "--json"]).json();
    assert!(spoken["active_fraction"].as_f64().unwrap() < 0.95, "{spoken}");
    let dense = ["--model", &out, "-n", "20", "--temperature", "0", "--json", "--ffn", "dense"];
    assert_eq!(ok("llama-sparse", &dense).json()["token_ids"], spoken["token_ids"]);
}

#[test]
fn a_run_goes_on_where_it_was_left() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (text, out) = (path("tales.txt"), path("sparse"));
    fs::write(&text, tale(3) + "\n\n" + &tale(4)).unwrap();
    let first = sparsify(&text, &out, "5", &[]);
    let more = sparsify(&text, &out, "8", &["--resume"]);
    assert_eq!((&more["before"], &more["steps"]), (&first["after"], &8.into()), "{first} {more}");

    let args = ["--text", &text, "--out"];
    let run = |more: &[&str]| example("sparsify", &[&args[..], more].concat());
    one_line(&run(&[&out]), "--resume goes on with it");
    one_line(&run(&[&path("new"), "--resume"]), "model.safetensors");
    one_line(&run(&[&testdata("tales-relu"), "--resume"]), "was not written by sparsify");
    one_line(&run(&[&path("new"), "--context", "2000"]), "exceeds the 1024 positions");
    one_line(&run(&[&path("new"), "--penalty=-1"]), "--penalty -1");
}
