//! `tokenizer.json` and `tokenizer_config.json`.

use crate::{bounded, memory, refused};
use candle_sparse_models::tokenizer::{from_json, prompt_tokens};
use serde_json::{Value, json};

fn bpe(vocab: Value, merges: Value) -> Value {
    json!({"version": "1.0", "model": {"type": "BPE", "vocab": vocab, "merges": merges}})
}

fn with(mut tokenizer: Value, key: &str, value: Value) -> Vec<u8> {
    tokenizer[key] = value;
    tokenizer.to_string().into_bytes()
}

fn added(id: u64, content: &str) -> Value {
    json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false})
}

/// What the crate takes for each byte of a text.
const TEXT_BYTES: usize = 40;

/// Reads a tokenizer and has it encode a text: an error or tokens, within the bounds.
fn reads(what: &str, json: &[u8], text: &str) {
    let read = bounded(what, json.len() + TEXT_BYTES * text.len(), || {
        let (tokenizer, _) = from_json(json, None)?;
        prompt_tokens(&tokenizer, text)
    });
    if let Err(e) = read {
        let e = e.to_string();
        let e = e.lines().next().unwrap();
        assert!(e.len() < 1000 && !e.contains(char::is_control), "{what}: {e}");
    }
}

#[test]
fn one_token_of_10_mb() {
    let _alone = memory::alone();
    let long = "ab".repeat(5_000_000);
    let vocab = json!({"a": 0, "b": 1, "ab": 2, long.as_str(): 3});
    reads("vocabulary", bpe(vocab, json!([["a", "b"]])).to_string().as_bytes(), "abab");
    let json = with(bpe(json!({"a": 0}), json!([])), "added_tokens", json!([added(1, &long)]));
    refused("added", json.len(), "bytes", || from_json(&json, None));
    let config = json!({"added_tokens_decoder": {"1": added(1, &long)}}).to_string();
    let json = bpe(json!({"a": 0}), json!([])).to_string();
    let _ =
        bounded("decoder", config.len(), || from_json(json.as_bytes(), Some(config.as_bytes())).map(drop));
}

#[test]
fn a_text_of_megabytes_without_a_blank() {
    let _alone = memory::alone();
    let vocab = json!({"a": 0, "aa": 1, "aaaa": 2});
    let json = bpe(vocab, json!([["a", "a"], ["aa", "aa"]])).to_string();
    reads("BPE", json.as_bytes(), &"a".repeat(2_000_000));
    let piece = json!({"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 1_000_000_000_u64, "vocab": {"[UNK]": 0, "a": 1, "##a": 2}});
    let json = json!({"version": "1.0", "model": piece}).to_string();
    reads("WordPiece", json.as_bytes(), &"a".repeat(100_000));
    let long = "a".repeat(10_000);
    let unigram =
        json!({"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], [long, -2.0]]});
    let json = json!({"version": "1.0", "model": unigram}).to_string();
    reads("Unigram", json.as_bytes(), &"a".repeat(100_000));
}

#[test]
fn expressions_that_never_end() {
    let _alone = memory::alone();
    for regex in
        ["(a+)+$", "(?=(a+)+b)a", "(a|a)*b", "((a{1000}){1000}){1000}", &"(".repeat(100_000), r"(a*)*\1b"]
    {
        let split =
            json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        let json = with(bpe(json!({"a": 0}), json!([])), "pre_tokenizer", split);
        reads(&regex[..regex.len().min(20)], &json, &"a".repeat(5_000));
        let replace = json!({"type": "Replace", "pattern": {"Regex": regex}, "content": "b"});
        let json = with(bpe(json!({"a": 0}), json!([])), "normalizer", replace);
        reads(&regex[..regex.len().min(20)], &json, &"a".repeat(5_000));
    }
}

#[test]
fn what_multiplies_a_text() {
    let _alone = memory::alone();
    let long = "b".repeat(1_000_000);
    let replace = json!({"type": "Replace", "pattern": {"String": "a"}, "content": long});
    let json = with(bpe(json!({"a": 0, "b": 1}), json!([])), "normalizer", replace);
    reads("replace", &json, &"a".repeat(1000));
    let each = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaa"});
    let normalizers: Vec<_> = (0..12).map(|_| each.clone()).collect();
    let sequence = json!({"type": "Sequence", "normalizers": normalizers});
    let json = with(bpe(json!({"a": 0}), json!([])), "normalizer", sequence);
    reads("again and again", &json, "aaaa");
    let prepend = json!({"type": "Prepend", "prepend": long});
    let json = with(bpe(json!({"a": 0, "b": 1}), json!([])), "normalizer", prepend);
    reads("prepend", &json, "a");
}

#[test]
fn ids_that_are_out_of_range() {
    let _alone = memory::alone();
    for id in [u64::from(u32::MAX), u64::from(u32::MAX) - 1, 1 << 32, u64::MAX] {
        let json = with(
            bpe(json!({"a": id}), json!([])),
            "added_tokens",
            json!([added(id, "<s>"), added(7, "</s>")]),
        );
        reads("ids", &json, "a<s>");
        let unigram = json!({"type": "Unigram", "unk_id": id, "vocab": [["<unk>", 0.0], ["a", -1.0]]});
        reads("unk_id", json!({"version": "1.0", "model": unigram}).to_string().as_bytes(), "abc");
        let processor = json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": id}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [id, id], "tokens": ["<s>"]}}});
        reads("template", &with(bpe(json!({"a": 0}), json!([])), "post_processor", processor), "a");
    }
    let none = json!({"type": "Unigram", "unk_id": null, "vocab": []});
    reads("no pieces", json!({"version": "1.0", "model": none}).to_string().as_bytes(), "abc");
    let charsmap = json!({"type": "Precompiled", "precompiled_charsmap": "/////w=="});
    reads("charsmap", &with(bpe(json!({"a": 0}), json!([])), "normalizer", charsmap), "abc é ﬁ");
    reads("nested", format!("{{\"normalizer\":{}", "[".repeat(1_000_000)).as_bytes(), "a");
}

#[test]
fn many_tokens_of_two_kinds_in_turn() {
    let _alone = memory::alone();
    let tokens: Vec<_> = (0..50_000_u64)
        .map(|i| {
            let mut token = added(i + 1, &format!("<{i:x}>"));
            token["special"] = (i % 2 == 0).into();
            token["normalized"] = (i % 3 == 0).into();
            token
        })
        .collect();
    let json = with(bpe(json!({"a": 0}), json!([])), "added_tokens", json!(tokens));
    reads("in turn", &json, "a<1>");
}

#[test]
fn what_is_put_around_a_text_and_is_not_there() {
    let _alone = memory::alone();
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let second = json!({"Sequence": {"id": "B", "type_id": 0}});
    let token = |id: &str| json!({"SpecialToken": {"id": id, "type_id": 0}});
    let special = json!({
        "<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]},
        "odd": {"id": "odd", "ids": [0, 0], "tokens": ["<s>"]},
        "many": {"id": "many", "ids": vec![0; 1000], "tokens": vec!["a"; 1000]},
    });
    let template = |single: &[Value]| json!({"type": "TemplateProcessing", "single": single, "pair": [text, second], "special_tokens": special});
    let sound = template(&[token("<s>"), text.clone()]);
    let with = |processor| with(bpe(json!({"a": 0}), json!([])), "post_processor", processor);
    for (what, processor) in [
        ("a token", template(&[token("</s>"), text.clone()])),
        ("a text", template(&[text.clone(), second.clone()])),
        ("tokens of other lengths", template(&[token("odd"), text.clone()])),
        ("many tokens", template(&[token("many"), text.clone()])),
        ("many texts", template(&vec![text.clone(); 100_000])),
        ("a template of parts", json!({"type": "Sequence", "processors": [sound, sound]})),
        ("a list as a template", json!(["TemplateProcessing", [token("</s>"), text], [], special])),
    ] {
        let json = with(processor);
        refused(what, json.len(), "", || from_json(&json, None));
    }
    let (tokenizer, _) = from_json(&with(sound), None).unwrap();
    assert_eq!(prompt_tokens(&tokenizer, "a").unwrap(), [0]);
}
