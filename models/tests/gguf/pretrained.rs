//! Models with tokenizer, template and end tokens out of one file.

use crate::{
    convert::Built,
    files::{Gguf, VOCAB},
};
use candle_core::quantized::{GgmlDType, gguf_file::Value};
use candle_sparse_models::{
    chat::Message,
    convert::{GgufModel, Layout},
    decoder::LoadOptions,
    files::ModelFiles,
    pretrained::{self, Pretrained, first_line},
};
use std::path::Path;

fn text(s: &str) -> Value {
    Value::String(s.to_string())
}

/// The built-in model in a file that says more about itself.
fn saved(change: impl FnOnce(GgufModel) -> GgufModel, path: &Path) -> ModelFiles {
    change(Built::new("tales-silu").model(Layout::default())).save(path).unwrap();
    ModelFiles::from_gguf(path).unwrap()
}

fn load(files: &ModelFiles) -> Pretrained {
    Pretrained::load(files, LoadOptions::default()).unwrap()
}

#[test]
fn a_tokenizer_that_is_given_stands_before_the_files_own() {
    let dir = tempfile::tempdir().unwrap();
    let mut files = saved(|m| m, &dir.path().join("m.gguf"));
    let own = load(&files).tokenizer;
    assert!(own.get_vocab_size(true) <= 2048);
    let ids = |t: &tokenizers::Tokenizer, s: &str| t.encode(s, true).unwrap().get_ids().to_vec();
    // The built-in tokenizer with one more special token in the place of a word.
    let json = Built::new("tales-silu").files.tokenizer.unwrap().into_owned();
    let mut json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let mut added = json["added_tokens"][0].clone();
    (added["id"], added["content"]) = (2048.into(), "<|extra|>".into());
    json["added_tokens"].as_array_mut().unwrap().push(added);
    files.tokenizer = Some(json.to_string().into_bytes().into());
    let given = load(&files).tokenizer;
    assert_eq!(ids(&given, "The wolf"), ids(&own, "The wolf"));
    assert!(ids(&given, "<|extra|>").contains(&2048) && !ids(&own, "<|extra|>").contains(&2048));
    // One that is broken, or of a larger model, is an error though the file's own would do.
    files.tokenizer = Some(b"{".to_vec().into());
    let e = Pretrained::load(&files, LoadOptions::default()).unwrap_err().to_string();
    assert!(e.contains("not a tokenizer file"), "{e}");
}

#[test]
fn without_a_tokenizer_one_must_be_given_that_fits() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    Gguf::llama(|_| GgmlDType::Q4_0, false).save(&path);
    let mut files = ModelFiles::from_gguf(&path).unwrap();
    let error =
        |files: &ModelFiles| first_line(&Pretrained::load(files, LoadOptions::default()).unwrap_err());
    assert!(error(&files).contains("--tokenizer FILE"));
    let bytes = Built::new("tales-silu").files.tokenizer.unwrap();
    files.tokenizer = Some(bytes);
    let e = error(&files);
    assert!(e.contains("m.gguf") && e.contains(&format!("2048 tokens, the model only {VOCAB}")), "{e}");
    let json = r#"{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1},
        "unk_token": "a"}}"#;
    files.tokenizer = Some(json.as_bytes().to_vec().into());
    assert_eq!(load(&files).tokenizer.encode("b", true).unwrap().get_ids(), [1]);
}

#[test]
fn the_chat_template_of_the_file_is_found_unless_another_is_given() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let talk = [Message::user("Who is he?")];
    let rendered = |files: &ModelFiles| {
        let loaded = load(files);
        loaded.chat_template().unwrap().map(|t| t.render(&talk, true).unwrap())
    };
    assert_eq!(rendered(&saved(|m| m, &path)), None);
    let template =
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}";
    let mut files = saved(|m| m.with_value("tokenizer.chat_template", text(template)), &path);
    let own = rendered(&files).unwrap();
    let loaded = load(&files);
    let [bos, eos] = [0, 1].map(|id| loaded.tokenizer.id_to_token(id).unwrap());
    assert_eq!(own, format!("{bos}user: Who is he?{eos}"));
    files.chat_template = Some(b"{{ bos_token }}[{{ messages[0].content }}]{{ eos_token }}".to_vec());
    assert_eq!(rendered(&files).unwrap(), format!("{bos}[Who is he?]{eos}"), "with the tokens of the file");
    // A broken one is an error for those alone who chat.
    let loaded = load(&saved(|m| m.with_value("tokenizer.chat_template", text("{% for")), &path));
    let e = loaded.chat_template().unwrap_err().to_string();
    assert!(e.contains("m.gguf") && e.contains("cannot be read") && !e.contains('\n'), "{e}");
}

#[test]
fn ends_of_turns_end_the_text_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let plain = load(&saved(|m| m, &path));
    assert!(plain.is_eos(1) && !plain.is_eos(7) && !plain.is_eos(9));
    let files = saved(
        |m| {
            m.with_value("tokenizer.ggml.eot_token_id", Value::U32(7))
                .with_value("tokenizer.ggml.eom_token_id", Value::U32(9))
        },
        &path,
    );
    let loaded = load(&files);
    assert!([1, 7, 9].iter().all(|id| loaded.is_eos(*id)) && ![0, 2, 8].iter().any(|id| loaded.is_eos(*id)));
    let config = pretrained::config(&files).unwrap();
    assert_eq!(format!("{:?}", config.eos_token_id), "Some(Multiple([1, 7, 9]))");
}
