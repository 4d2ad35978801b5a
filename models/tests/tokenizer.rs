//! What a tokenizer's files say, and text out of tokens.
#![allow(clippy::unwrap_used, reason = "tests")]

use candle_sparse_models::tokenizer::{TextStream, end_tokens_by_text, from_json, prompt_tokens};
use serde_json::{Value, json};
use tokenizers::Tokenizer;

/// `<unk>`, `<s>`, `</s>`, all bytes, then from 259 on these.
const PIECES: [&str; 8] = ["\u{2581}", "h", "e", "\u{2581}h", "he", "\u{2581}he", "o", "lo"];

/// A `tokenizer.json` of pieces that puts `first` before a text.
fn pieces(first: Option<&str>) -> Value {
    let bytes = (0..=255_u8).map(|byte| format!("<0x{byte:02X}>"));
    let all = ["<unk>", "<s>", "</s>"].map(str::to_string).into_iter().chain(bytes);
    let vocab: serde_json::Map<String, Value> =
        all.chain(PIECES.map(str::to_string)).enumerate().map(|(id, token)| (token, json!(id))).collect();
    let added = ["<unk>", "<s>", "</s>"].iter().enumerate().map(|(id, content)| added(id, content, true));
    let special = |name: &str| json!({"SpecialToken": {"id": name, "type_id": 0}});
    let around = |segment: &str| {
        let text = json!({"Sequence": {"id": segment, "type_id": 0}});
        first.map(special).into_iter().chain([text]).collect::<Vec<_>>()
    };
    let tokens = first.map(|name| (name.to_string(), json!({"id": name, "ids": [1], "tokens": [name]})));
    let pair = [around("A"), around("B")].concat();
    let post_processor = first.map(|_| {
        json!({
            "type": "TemplateProcessing", "single": around("A"), "pair": pair,
            "special_tokens": tokens.into_iter().collect::<serde_json::Map<_, _>>(),
        })
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u{2581}"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"},
        ]},
        "pre_tokenizer": null, "post_processor": post_processor,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
            "merges": ["h e", "\u{2581} h", "\u{2581} he"],
        },
    })
}

fn added(id: usize, content: &str, special: bool) -> Value {
    json!({
        "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": special,
    })
}

fn read(json: &Value, config: Option<Value>) -> (Tokenizer, Vec<String>) {
    let config = config.map(|c| c.to_string());
    from_json(json.to_string().as_bytes(), config.as_deref().map(str::as_bytes)).unwrap()
}

fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(text, true).unwrap().get_ids().to_vec()
}

#[test]
fn how_a_tokenizer_was_used_last_is_forgotten() {
    let mut json = pieces(Some("<s>"));
    json["truncation"] =
        json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = json!({
        "strategy": {"Fixed": 16}, "direction": "Left", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<unk>",
    });
    assert_eq!(ids(&read(&json, None).0, "he he"), [1, 264, 264]);
}

/// What transformers 4.57 (`LlamaTokenizerFast`) and 5.24 (where `tokenizer.json` says the same) put around a text.
#[test]
fn flags_and_post_processor_agree_by_the_rule() {
    let names = json!({"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>"});
    let (adds, plain) = (pieces(Some("<s>")), pieces(None));
    let llama = "LlamaTokenizerFast";
    let cases: [(&Value, Value, &str, &[u32], &str); 10] = [
        (&adds, json!({}), llama, &[1, 264], ""),
        (&plain, json!({}), llama, &[264], ""),
        (&adds, json!({"add_bos_token": true}), llama, &[1, 264], ""),
        (&plain, json!({"add_bos_token": true}), llama, &[1, 264], "add_bos_token decides"),
        (&adds, json!({"add_bos_token": false}), llama, &[264], "add_bos_token decides"),
        (&adds, json!({"add_eos_token": true}), llama, &[1, 264, 2], "add_eos_token decides"),
        (&adds, json!({"add_bos_token": false}), "PreTrainedTokenizerFast", &[1, 264], "the latter decides"),
        (&plain, json!({"add_bos_token": true, "bos_token": null}), llama, &[264], "none is added"),
        (&plain, json!({"add_bos_token": true, "bos_token": "<bos>"}), llama, &[264], "none is added"),
        (&plain, json!({"add_bos_token": "yes"}), llama, &[264], ""),
    ];
    for (json, config, class, expected, needle) in cases {
        let mut all = names.clone();
        all["tokenizer_class"] = json!(class);
        all.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
        let (tokenizer, notices) = read(json, Some(all));
        assert_eq!(ids(&tokenizer, "he"), expected, "{class} {config}");
        let said =
            notices.len() == usize::from(!needle.is_empty()) && notices.iter().all(|n| n.contains(needle));
        assert!(said, "{class} {config}: {notices:?}");
    }
}

#[test]
fn a_broken_tokenizer_config_is_said_and_not_used() {
    for config in ["[", "3", r#"{"add_bos_token": "#] {
        let (tokenizer, notices) =
            from_json(pieces(None).to_string().as_bytes(), Some(config.as_bytes())).unwrap();
        assert_eq!(ids(&tokenizer, "he"), [264]);
        assert!(notices.len() == 1 && notices[0].contains("tokenizer_config.json"), "{notices:?}");
    }
    assert!(from_json(b"{}", None).is_err());
}

#[test]
fn tokens_that_the_config_names_are_special_and_matched_as_it_says() {
    let mut json = pieces(None);
    json["added_tokens"].as_array_mut().unwrap().push(added(267, "<end>", false));
    let config = json!({
        "eos_token": "<end>",
        "added_tokens_decoder": {
            "268": {"content": "<tool>", "lstrip": false, "rstrip": true, "normalized": false, "special": false},
            "900": {"content": "<far>", "special": false},
        },
    });
    let (tokenizer, notices) = read(&json, Some(config));
    assert!(notices.is_empty(), "{notices:?}");
    assert_eq!(ids(&tokenizer, "he<end>he"), [264, 267, 264]);
    assert_eq!(tokenizer.decode(&[264, 267, 264], true).unwrap(), "he he");
    // Blanks behind the tool's token belong to it, and no token gets another id than the file says.
    assert_eq!(ids(&tokenizer, "<tool>  he"), [268, 264]);
    assert_eq!(tokenizer.token_to_id("<far>"), None);
}

#[test]
fn a_prompt_begins_once_and_does_not_end() {
    let config = |bos: bool, eos: bool| json!({"add_bos_token": bos, "add_eos_token": eos, "bos_token": "<s>", "eos_token": "</s>"});
    for (bos, eos, text, expected) in [
        (true, true, "he", &[1_u32, 264][..]),
        (true, false, "he", &[1, 264]),
        (false, true, "he", &[264]),
        (false, false, "he", &[264]),
        (true, true, "<s>he", &[1, 264]),
        (true, true, "<s>", &[1]),
        (true, true, "", &[1]),
        (false, true, "", &[]),
        // What the text says itself is kept.
        (true, true, "<s><s>he</s>", &[1, 1, 264, 2]),
    ] {
        let tokenizer = read(&pieces(None), Some(config(bos, eos))).0;
        assert_eq!(prompt_tokens(&tokenizer, text).unwrap(), expected, "{bos} {eos} {text:?}");
    }
}

#[test]
fn control_tokens_end_answers_by_their_text() {
    let mut json = pieces(None);
    let more = [("<|im_end|>", true), ("<|eot_id|>", false), ("<|im_start|>", true), ("<|end|>", true)];
    let list = json["added_tokens"].as_array_mut().unwrap();
    list.extend(more.iter().zip(267..).map(|((content, special), id)| added(id, content, *special)));
    assert_eq!(end_tokens_by_text(&read(&json, None).0), [2, 267, 270]);
    let list = json["added_tokens"].as_array_mut().unwrap();
    list.extend(["<|return|>", "<|call|>"].iter().zip(271..).map(|(content, id)| added(id, content, true)));
    assert_eq!(
        end_tokens_by_text(&read(&json, None).0),
        [2, 267, 271, 272],
        "<|end|> stands inside an answer"
    );
}

fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> (Vec<String>, String) {
    let mut stream = TextStream::new(tokenizer);
    let pieces: Vec<String> = ids.iter().map(|id| stream.push(*id)).collect();
    let whole = pieces.concat() + &stream.finish();
    (pieces, whole)
}

#[test]
fn bytes_that_are_no_character_are_replaced_and_the_text_goes_on() {
    let tokenizer = read(&pieces(None), None).0;
    let byte = |b: u8| 3 + u32::from(b);
    let bytes = |bytes: &[u8]| bytes.iter().map(|b| byte(*b)).collect::<Vec<_>>();
    // A line end, half of an emoji, a word: the line end stays, and nothing waits for what does not come.
    let ids = [vec![264], bytes(&[b'\n', 0xF0, 0x9F]), vec![264, 265]].concat();
    let (pieces, whole) = streamed(&tokenizer, &ids);
    assert_eq!(pieces, ["he", "\n", "", "", "\u{fffd} he", "o"]);
    assert_eq!(whole, "he\n\u{fffd} heo");
    assert_eq!(streamed(&tokenizer, &[vec![264], bytes("🦀!".as_bytes())].concat()).1, "he🦀!");
    // The end may be a beginning.
    assert_eq!(streamed(&tokenizer, &bytes(&[b' ', 0xE4, 0xBD])).1, "\u{fffd}");
    // Ids that are no token, and special tokens, are no text.
    assert_eq!(streamed(&tokenizer, &[1, 9999, 264, 2, 264, 0]).1, "he he");
}

#[test]
fn all_pieces_are_the_text_of_all_tokens() {
    let mut state = 1_u64;
    let mut next = |n: u32| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as u32 % n
    };
    let bytes = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
    let vocab: serde_json::Map<String, Value> =
        bytes.iter().zip(0..).map(|(c, id)| (c.to_string(), json!(id))).collect();
    let mut byte_level = pieces(None);
    for part in ["normalizer", "pre_tokenizer"] {
        byte_level[part] = Value::Null;
    }
    byte_level["decoder"] =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    byte_level["model"] = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
        "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [],
    });
    byte_level["added_tokens"] = json!([added(256, "<é>", false), added(257, "</s>", true)]);
    let mut metaspace = pieces(None);
    metaspace["decoder"] =
        json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true});
    // The tokenizer's own decoding replaces whole runs of bytes where one is bad: it is asked about good ones alone.
    let (byte_level, metaspace, pieces) =
        (read(&byte_level, None).0, read(&metaspace, None).0, read(&pieces(None), None).0);
    for round in 0..200 {
        let ids: Vec<u32> = (0..40).map(|_| next(258)).collect();
        assert_eq!(streamed(&byte_level, &ids).1, byte_level.decode(&ids, true).unwrap(), "{round}: {ids:?}");
        let ids: Vec<u32> =
            (0..40).map(|_| if next(3) == 0 { 3 + next(128) } else { 259 + next(8) }).collect();
        assert_eq!(streamed(&pieces, &ids).1, pieces.decode(&ids, true).unwrap(), "{round}: {ids:?}");
        let ids: Vec<u32> = (0..40).map(|_| 259 + next(8)).collect();
        assert_eq!(streamed(&metaspace, &ids).1, metaspace.decode(&ids, true).unwrap(), "{round}: {ids:?}");
    }
}

#[test]
fn a_long_text_costs_what_its_tokens_cost() {
    let tokenizer = read(&pieces(None), None).0;
    // Never a whole character.
    let ids = vec![3 + 0xF0; 200_000];
    let start = std::time::Instant::now();
    assert_eq!(streamed(&tokenizer, &ids).1.chars().count(), ids.len());
    assert!(start.elapsed() < std::time::Duration::from_secs(5), "{:?}", start.elapsed());
}
