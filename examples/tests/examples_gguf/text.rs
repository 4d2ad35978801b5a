//! Reading files: the text and the perplexity of the model that they were made from.

use crate::{
    Folder,
    common::{example, tale},
    number, ok, one_line,
};

const GREEDY: [&str; 10] =
    ["--ffn", "dense", "--kv", "f32", "--temperature", "0", "-n", "60", "--threads", "2"];

fn text(model: &str, more: &[&str]) -> String {
    let args = [&["--model", model, "--json"], &GREEDY[..], more].concat();
    let json = ok("llama-sparse", &args).json();
    assert_eq!(json["generated_tokens"], 60);
    json["text"].as_str().unwrap().to_string()
}

#[test]
fn the_text_is_that_of_the_safetensors_model() {
    let dir = Folder::new();
    for dtype in ["f32", "f16"] {
        let expected = text("tales-silu", &["--dtype", dtype]);
        let (path, _) = dir.convert("m.gguf", "tales-silu", &["--dtype", dtype]);
        assert_eq!(text(&path, &[]), expected, "{dtype}");
        assert_eq!(text(&path, &["--no-mmap"]), expected, "{dtype}, copied");
        assert_eq!(text(&path, &["--dtype", "f32"]), expected, "{dtype}, widened: the same numbers");
    }
    // As for files of other activations and in the order of the neurons, which is that of another sum.
    let (path, _) = dir.convert("relu.gguf", "tales-relu", &["--neuron-major"]);
    assert_eq!(text(&path, &[]), text("tales-relu", &[]));
}

#[test]
fn a_tokenizer_that_is_given_is_used() {
    let dir = Folder::new();
    let (path, _) = dir.convert("m.gguf", "tales-silu", &[]);
    let tokenizer = format!("{}/tokenizer.json", crate::testdata("tales-silu"));
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&tokenizer).unwrap()).unwrap();
    // A copy that begins a text with nothing: the same model reads one token less.
    let mut bare = json;
    bare["post_processor"] = serde_json::Value::Null;
    let other = dir.path("bare.json");
    std::fs::write(&other, bare.to_string()).unwrap();
    let tokens = |more: &[&str]| {
        let args = [&["--model", &path, "--prompt", "The wolf", "-n", "1", "--json"], more].concat();
        number(&ok("llama-sparse", &args).json(), "prompt_tokens")
    };
    assert_eq!(tokens(&["--tokenizer", &tokenizer]), tokens(&[]));
    assert_eq!(tokens(&["--tokenizer", &other]), tokens(&[]) - 1.0);
    one_line(&example("llama-sparse", &["--model", &path, "--tokenizer", "/no/such/file"]), "/no/such/file");
}

#[test]
fn perplexity_is_that_of_the_safetensors_model() {
    let dir = Folder::new();
    let file = dir.path("tale.txt");
    let tale = "There was once a king who had three sons, and the youngest was a simpleton. ";
    std::fs::write(&file, tale.repeat(40)).unwrap();
    let run = |model: &str| {
        let args = [
            "--model",
            model,
            "--text",
            &file,
            "--context",
            "128",
            "--tokens",
            "300",
            "--ffn",
            "dense",
            // The model as stored keeps them so: with F16 a rounded activation may fall to the other side.
            "--kv",
            "f32",
            "--json",
        ];
        ok("perplexity", &args).json()
    };
    let plain = run("tales-silu");
    for (dtype, bound) in [("f16", 1e-3), ("q8_0", 0.02)] {
        let json = run(&dir.convert("m.gguf", "tales-silu", &["--dtype", dtype]).0);
        let change = number(&json, "ppl") / number(&plain, "ppl") - 1.0;
        assert!(change.abs() < bound, "{dtype}: {json} {plain}");
        assert_eq!(json["tokens"], plain["tokens"]);
        // The dense model as stored is the file itself.
        assert!(number(&json, "kld") < 1e-6 && number(&json, "ppl") < 500.0, "{json}");
    }
}

#[test]
fn a_profile_is_fitted_to_a_file() {
    let dir = Folder::new();
    let (text, out) = (dir.path("tales.txt"), dir.path("sparse.safetensors"));
    std::fs::write(&text, (0..8).map(tale).collect::<Vec<_>>().join("<|endoftext|>")).unwrap();
    let (path, _) = dir.convert("bare.gguf", "tales-silu", &["--no-profile"]);
    let calibrate = |model: &str| {
        let args = [
            "--model",
            model,
            "--text",
            &text,
            "--target-sparsity",
            "0.5",
            "--rank",
            "16",
            "--out",
            &out,
            "--json",
        ];
        example("calibrate", &args)
    };
    let json = calibrate(&path).json();
    let cascade = &json["held_out"][2];
    assert!((number(cascade, "active_fraction") - 0.5).abs() < 0.07, "{json}");
    assert!(number(cascade, "kld") > 0.0 && number(cascade, "kld") < 0.05, "{json}");
    // It belongs to the file, and to the model that the file was made from.
    for model in [path.as_str(), "tales-silu"] {
        let args = ["--model", model, "--profile", &out, "-n", "60", "--temperature", "0", "--json"];
        let active = number(&ok("llama-sparse", &args).json(), "active_fraction");
        assert!((active - 0.5).abs() < 0.15, "{model}: {active}");
    }
    let (with, _) = dir.convert("with.gguf", &path, &["--profile", &out]);
    let args = ["--model", &with, "-n", "30", "--temperature", "0", "--json"];
    assert!(number(&ok("llama-sparse", &args).json(), "active_fraction") < 0.7);
    one_line(&calibrate(&with), "holds a profile already");
}
