//! Tokenizers out of GGUF metadata.
#![allow(clippy::unwrap_used, reason = "tests")]

use candle_core::quantized::gguf_file::{Content, Value, VersionedMagic};
use candle_sparse_models::chat::{Chat, ChatTemplate};
use candle_sparse_models::gguf::tokenizer::{eos_tokens, tokenizer, tokenizer_and_notices};
use std::{
    collections::{HashMap, HashSet},
    path::Path,
    time::{Duration, Instant},
};
use tokenizers::Tokenizer;

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

const TEXTS: [&str; 14] = [
    "Once upon a time, there was a little girl named Lily.",
    " leading blank",
    "  two leading blanks and  two inside  ",
    "\n\nnew\nlines\r\n\ttabs",
    "",
    " ",
    "Grüße aus Köln: naïve façade",
    "你好，世界",
    "emoji 🦀👩\u{200d}👩\u{200d}👧 done",
    "</s> in the text<s>",
    "a</s> b </s>c",
    "1234567890 + 0.5e-3 = ?",
    "\u{0}\u{7f}\u{feff}",
    "\u{2581}lower block \u{2581}\u{2581}",
];

fn text(s: &str) -> Value {
    Value::String(s.to_string())
}

fn content(metadata: impl IntoIterator<Item = (&'static str, Value)>) -> Content {
    let metadata =
        metadata.into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).collect();
    Content { magic: VersionedMagic::GgufV3, metadata, tensor_infos: HashMap::new(), tensor_data_offset: 0 }
}

/// `<unk>`, `<s>`, `</s>`, all bytes, then `more`.
fn sentencepiece(more: &[(&str, f32, i32)]) -> Content {
    let bytes: Vec<_> = (0..=255_u8).map(|byte| format!("<0x{byte:02X}>")).collect();
    let bytes = bytes.iter().map(|byte| (byte.as_str(), 0.0, BYTE));
    let first = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)];
    let all: Vec<_> = first.into_iter().chain(bytes).chain(more.iter().copied()).collect();
    content([
        ("model", text("llama")),
        ("tokens", Value::Array(all.iter().map(|t| text(t.0)).collect())),
        ("scores", Value::Array(all.iter().map(|t| Value::F32(t.1)).collect())),
        ("token_type", Value::Array(all.iter().map(|t| Value::I32(t.2)).collect())),
        ("unknown_token_id", Value::U32(0)),
        ("bos_token_id", Value::U32(1)),
        ("eos_token_id", Value::U32(2)),
    ])
}

/// Ids from 259 on.
const PIECES: [(&str, f32, i32); 14] = [
    ("\u{2581}", -10.0, NORMAL),
    ("h", -11.0, NORMAL),
    ("e", -12.0, NORMAL),
    ("l", -13.0, NORMAL),
    ("o", -14.0, NORMAL),
    ("he", -1.0, NORMAL),
    ("lo", -2.0, NORMAL),
    ("ll", -3.0, NORMAL),
    ("\u{2581}he", -4.0, NORMAL),
    ("llo", -5.0, NORMAL),
    ("\u{2581}hello", -6.0, NORMAL),
    ("<turn>", -7.0, USER_DEFINED),
    ("\u{2581}\u{2581}", -8.0, NORMAL),
    ("<end>", -9.0, CONTROL),
];

fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(text, false).unwrap().get_ids().to_vec()
}

fn set(mut content: Content, key: &str, value: Value) -> Content {
    content.metadata.insert(format!("tokenizer.ggml.{key}"), value);
    content
}

#[test]
fn pieces_are_put_together_by_their_scores() {
    let tokenizer = tokenizer(&sentencepiece(&PIECES)).unwrap();
    // "lo" goes before "ll", so "llo" is l + lo.
    assert_eq!(ids(&tokenizer, "hello"), [269]);
    assert_eq!(ids(&tokenizer, "hell"), [267, 266]);
    assert_eq!(ids(&tokenizer, "  hello"), [271, 269]);
    assert_eq!(ids(&tokenizer, "olé"), [259, 263, 262, 3 + 0xc3, 3 + 0xa9]);
    assert_eq!(ids(&tokenizer, "\n"), [259, 3 + 0x0a]);
    assert_eq!(ids(&tokenizer, "o<turn>o<end></s>"), [259, 263, 270, 259, 263, 272, 2]);
    assert_eq!(tokenizer.encode("he", true).unwrap().get_ids(), [1, 267]);
    assert_eq!(
        tokenizer.decode(&[1, 267, 270, 263, 272, 3 + 0xc3, 3 + 0xa9, 2], true).unwrap(),
        "he<turn>oé"
    );
    assert_eq!(tokenizer.decode(&[1, 267, 272], false).unwrap(), "<s> he<end>");
}

#[test]
fn flags_of_the_file_count() {
    let with =
        |key: &str, flag: bool| tokenizer(&set(sentencepiece(&PIECES), key, Value::Bool(flag))).unwrap();
    assert_eq!(with("add_bos_token", false).encode("he", true).unwrap().get_ids(), [267]);
    assert_eq!(with("add_eos_token", true).encode("he", true).unwrap().get_ids(), [1, 267, 2]);
    let plain = with("add_space_prefix", false);
    assert_eq!(ids(&plain, "he he"), [264, 267]);
    assert_eq!(plain.decode(&[267, 267], true).unwrap(), " he he");
    let pair = with("add_eos_token", true).encode(("he", "he"), true).unwrap();
    assert_eq!(pair.get_ids(), [1, 267, 2, 1, 267, 2]);
}

#[test]
fn texts_come_back() {
    let tokenizer = tokenizer(&sentencepiece(&PIECES)).unwrap();
    for text in TEXTS.iter().filter(|text| !text.contains("s>") && !text.contains('\u{2581}')) {
        assert_eq!(tokenizer.decode(&ids(&tokenizer, text), true).unwrap(), *text);
    }
}

#[test]
fn a_turn_begins_without_the_blank_of_a_text() {
    let tokenizer = tokenizer(&sentencepiece(&PIECES)).unwrap();
    let source = "{% for m in messages %}{{ m.content }}lo{% endfor %}";
    let mut chat = Chat::new(ChatTemplate::new(source, "<s>", "</s>").unwrap(), None);
    let mut turn = |user: &str, answer: &str| {
        let ids = chat.say(user).unwrap().encode(&tokenizer).unwrap();
        chat.answered(answer, None);
        ids
    };
    assert_eq!(turn("o", "e"), [1, 259, 263, 265]);
    assert_eq!(turn("e", "l"), [265, 261, 265]);
    // As one text "l" and "lo" would be "llo".
    assert_eq!(turn("e", ""), [265, 261, 265]);
}

#[test]
fn tokens_that_end_a_text_are_those_of_the_file() {
    let content = sentencepiece(&PIECES);
    assert_eq!(eos_tokens(&content), [2]);
    let content = set(set(content, "eot_token_id", Value::U32(272)), "eom_token_id", Value::I64(2));
    assert_eq!(eos_tokens(&content), [2, 272]);
}

#[test]
fn what_is_wrong_with_a_file_is_said() {
    let one = |key: &'static str, value: Value| set(sentencepiece(&PIECES), key, value);
    let without = |key: &str| {
        let mut content = sentencepiece(&PIECES);
        content.metadata.remove(&format!("tokenizer.ggml.{key}"));
        content
    };
    let entry = |key: &'static str, value: Value| {
        let mut content = sentencepiece(&PIECES);
        let Some(Value::Array(values)) = content.metadata.get_mut(&format!("tokenizer.ggml.{key}")) else {
            panic!("{key}")
        };
        values[260] = value;
        content
    };
    let gpt2 = |pre: &str| {
        content([
            ("model", text("gpt2")),
            ("pre", text(pre)),
            ("tokens", Value::Array(vec![text("a")])),
            ("merges", Value::Array(vec![text("a b")])),
        ])
    };
    for (content, needle) in [
        (
            one("model", text("bert")),
            "'bert' are not supported: give the model's tokenizer.json (`--tokenizer FILE`)",
        ),
        (one("model", Value::U8(1)), "`tokenizer.ggml.model` is not a string"),
        (without("model"), "no `tokenizer.ggml.model`"),
        (without("tokens"), "`tokenizer.ggml.tokens` is missing"),
        (without("scores"), "`tokenizer.ggml.scores` is missing"),
        (one("scores", Value::Array(vec![])), "273 entries, `tokenizer.ggml.scores` 0"),
        (one("token_type", Value::Array(vec![Value::I32(1)])), "273 entries, `tokenizer.ggml.token_type` 1"),
        (one("token_type", Value::U8(1)), "`tokenizer.ggml.token_type` is not an array"),
        (entry("tokens", Value::U8(1)), "token 260 of `tokenizer.ggml.tokens` is not a string"),
        (entry("tokens", text("</s>")), "tokens 2 and 260 are both '</s>'"),
        (entry("scores", Value::F32(f32::NAN)), "entry 260 of `tokenizer.ggml.scores`"),
        (entry("token_type", Value::I32(7)), "entry 260 of `tokenizer.ggml.token_type`"),
        (one("bos_token_id", Value::U32(273)), "none with id 273 (`tokenizer.ggml.bos_token_id`)"),
        (one("eot_token_id", Value::I32(-1)), "`tokenizer.ggml.eot_token_id` is not the id of a token"),
        (one("unknown_token_id", Value::U32(999)), "`tokenizer.ggml.unknown_token_id` is 999"),
        (one("add_space_prefix", text("yes")), "`tokenizer.ggml.add_space_prefix` is neither true nor false"),
        (gpt2("viking"), "pre-tokenizer 'viking' are not supported"),
        (gpt2("gpt-2"), "`tokenizer.ggml.merges` puts together 'ab', which is no token"),
    ] {
        let error = tokenizer(&content).unwrap_err().to_string();
        assert!(error.contains(needle) && error.lines().count() == 1, "{needle}: {error}");
    }
    // An empty token, as some files have, is none.
    assert_eq!(ids(&tokenizer(&entry("tokens", text(""))).unwrap(), "o"), [259, 263]);
}

/// Byte-level metadata with the merges `l l`, `ll o` and, found by their text alone, `▁ello`.
fn byte_level(pre: &str) -> Content {
    let mut tokens: Vec<_> = (b'!'..=b'~').map(|byte| char::from(byte).to_string()).collect();
    tokens.extend(["\u{120}", "ll", "llo", "\u{120}ello", "12", "<|e|>"].map(str::to_string));
    let types = tokens.iter().map(|t| Value::I32(if t == "<|e|>" { CONTROL } else { NORMAL })).collect();
    content([
        ("model", text("gpt2")),
        ("pre", text(pre)),
        ("tokens", Value::Array(tokens.iter().map(|t| text(t)).collect())),
        ("token_type", Value::Array(types)),
        ("merges", Value::Array(["l l", "ll o", "1 2"].map(text).to_vec())),
        ("bos_token_id", Value::U32(99)),
    ])
}

#[test]
fn byte_level_files_are_cut_as_their_models_were_trained() {
    let tokens = |pre: &str, text: &str, special: bool| {
        let tokenizer = tokenizer(&byte_level(pre)).unwrap();
        tokenizer.encode(text, special).unwrap().get_tokens().join(" ")
    };
    assert_eq!(tokens("gpt-2", "llo ello12", true), "llo \u{120} e llo 12");
    assert_eq!(tokens("smollm", "llo12", true), "llo 1 2");
    // llama.cpp takes whole words from the vocabulary and begins a text with the bos token.
    assert_eq!(tokens("llama-bpe", "llo ello12", true), "<|e|> llo \u{120}ello 12");
    assert_eq!(tokens("llama-bpe", "llo<|e|>", false), "llo <|e|>");
}

#[test]
fn a_type_of_token_means_the_same_in_both_vocabularies() {
    let pieces = sentencepiece(&[PIECES.as_slice(), &[("<gone>", 0.0, UNUSED)]].concat());
    let mut bytes = byte_level("smollm");
    let more = [("<turn>", USER_DEFINED), ("<end>", CONTROL), ("<gone>", UNUSED)];
    for (key, values) in
        [("tokens", more.map(|(name, _)| text(name))), ("token_type", more.map(|(_, kind)| Value::I32(kind)))]
    {
        let Some(Value::Array(all)) = bytes.metadata.get_mut(&format!("tokenizer.ggml.{key}")) else {
            panic!("{key}")
        };
        all.extend(values);
    }
    for content in [pieces, bytes] {
        let tokenizer = tokenizer(&content).unwrap();
        let id = |name: &str| tokenizer.token_to_id(name);
        let [turn, end] = ["<turn>", "<end>"].map(|name| id(name).unwrap());
        let read = ids(&tokenizer, "o<turn>o<end>o");
        assert!(read.contains(&turn) && read.contains(&end), "{read:?}");
        // User defined tokens are text, control tokens are not.
        assert_eq!(tokenizer.decode(&read, true).unwrap().replace(' ', ""), "o<turn>oo");
        // An unused token is neither found nor printed.
        assert_eq!(id("<gone>"), None);
        assert!(ids(&tokenizer, "<gone>").len() > 4);
        let unused = content.metadata["tokenizer.ggml.tokens"].to_vec().unwrap().len() as u32 - 1;
        assert_eq!(tokenizer.decode(&[unused], false).unwrap(), "");
    }
}

/// A byte-level vocabulary that some splits make, large enough to show it: pairs of letters, digits as given.
fn large(numbers: &[&str], marks: &[&str]) -> Content {
    let mut content = byte_level("default");
    let letters: Vec<char> = ('a'..='z').collect();
    let pairs = letters.iter().flat_map(|a| letters.iter().map(move |b| format!("{a}{b}")));
    let words = pairs.flat_map(|pair| (0..10).map(move |i| format!("\u{120}{pair}{}", "x".repeat(i))));
    let all = words.chain(numbers.iter().chain(marks).map(ToString::to_string));
    for (key, one) in [("tokens", None), ("token_type", Some(Value::I32(NORMAL)))] {
        let Some(Value::Array(values)) = content.metadata.get_mut(&format!("tokenizer.ggml.{key}")) else {
            panic!("{key}")
        };
        values.extend(all.clone().map(|token| one.clone().unwrap_or_else(|| text(&token))));
    }
    content
}

#[test]
fn splits_that_a_file_does_not_name_are_recognised_or_told_of() {
    let many = |one: &str| (0..60).map(|i| format!("{one}{i:03}")).collect::<Vec<_>>();
    let [numbers, spaced] = ["9", "\u{120}4"].map(many);
    let [numbers, spaced] = [&numbers, &spaced].map(|all| all.iter().map(String::as_str).collect::<Vec<_>>());
    let threes: Vec<&str> = numbers.iter().map(|n| &n[1..]).collect();
    let marks: Vec<String> = ('a'..='z').flat_map(|a| ('a'..='z').map(move |b| format!("({a}{b}"))).collect();
    let marks: Vec<_> = marks.iter().map(String::as_str).collect();
    for (content, name) in [
        (large(&[], &[]), "'smollm'"),
        (large(&spaced, &[]), "'gpt-2'"),
        (large(&[], &marks), "'qwen2'"),
        (large(&threes, &marks), "'llama-bpe'"),
        (byte_level("default"), "may not be how the model was trained"),
    ] {
        let (_, notices) = tokenizer_and_notices(&content).unwrap();
        let about = notices.iter().filter(|n| n.contains("`tokenizer.ggml.pre`") && n.contains(name));
        assert_eq!(about.count(), 1, "{name}: {notices:?}");
        let mut missing = content;
        missing.metadata.remove("tokenizer.ggml.pre");
        assert_eq!(tokenizer_and_notices(&missing).unwrap().1, notices, "{name}");
    }
    let (_, notices) = tokenizer_and_notices(&byte_level("gpt-2")).unwrap();
    assert_eq!(notices, ["GGUF metadata: `tokenizer.ggml.eos_token_id` is missing: no token ends an answer"]);
}

#[test]
fn what_a_file_does_not_say_is_said() {
    let without = |content: &Content, key: &str| {
        let key = format!("tokenizer.ggml.{key}");
        let mut metadata = content.metadata.clone();
        metadata.remove(&key);
        let content = Content {
            magic: VersionedMagic::GgufV3,
            metadata,
            tensor_infos: HashMap::new(),
            tensor_data_offset: 0,
        };
        (key, tokenizer_and_notices(&content).unwrap().1)
    };
    let (pieces, bytes) =
        (sentencepiece(&PIECES), set(byte_level("llama-bpe"), "eos_token_id", Value::U32(99)));
    assert!(tokenizer_and_notices(&pieces).unwrap().1.is_empty());
    assert!(tokenizer_and_notices(&bytes).unwrap().1.is_empty());
    let (_, notices) = without(&pieces, "bos_token_id");
    assert!(notices.len() == 1 && notices[0].contains("'<s>' is taken"), "{notices:?}");
    for (key, notices) in
        [without(&pieces, "bos_token_id"), without(&bytes, "bos_token_id"), without(&bytes, "token_type")]
    {
        assert!(notices.iter().any(|n| n.contains(&key)), "{key}: {notices:?}");
    }
}

#[test]
fn a_token_of_a_megabyte_is_read_in_seconds() {
    let long = "ab".repeat(1 << 19);
    let other = long[..long.len() - 2].to_string();
    let pieces = [
        PIECES.as_slice(),
        &[("a", 0.0, NORMAL), ("b", 0.0, NORMAL), (&long, 0.0, NORMAL), (&other, 0.0, NORMAL)],
    ];
    let content = sentencepiece(&pieces.concat());
    let start = Instant::now();
    assert_eq!(ids(&tokenizer(&content).unwrap(), "hello"), [269]);
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}

/// The vocabulary of a `tokenizer.json` as a GGUF file would hold it; a piece scores by its first merge.
fn as_gguf(path: &Path) -> Content {
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let mut scores: HashMap<String, f32> = HashMap::new();
    for (rank, merge) in json["model"]["merges"].as_array().unwrap().iter().enumerate() {
        let piece = match merge {
            serde_json::Value::String(pair) => pair.replacen(' ', "", 1),
            pair => format!("{}{}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
        };
        scores.entry(piece).or_insert(-(rank as f32));
    }
    let vocab = json["model"]["vocab"].as_object().unwrap();
    let mut tokens: Vec<_> = vocab.iter().map(|(token, id)| (id.as_u64().unwrap(), token.as_str())).collect();
    tokens.sort_unstable();
    let special: HashSet<_> =
        json["added_tokens"].as_array().unwrap().iter().map(|t| t["content"].as_str().unwrap()).collect();
    let kind = |token: &str| match token {
        "<unk>" => UNKNOWN,
        token if special.contains(token) => CONTROL,
        token if token.starts_with("<0x") && token.len() == 6 => BYTE,
        _ => NORMAL,
    };
    let score = |token: &str| scores.get(token).copied().unwrap_or(-1e6);
    content([
        ("model", text("llama")),
        ("tokens", Value::Array(tokens.iter().map(|t| text(t.1)).collect())),
        ("scores", Value::Array(tokens.iter().map(|t| Value::F32(score(t.1))).collect())),
        ("token_type", Value::Array(tokens.iter().map(|t| Value::I32(kind(t.1))).collect())),
        ("bos_token_id", Value::U32(1)),
        ("eos_token_id", Value::U32(2)),
    ])
}

#[test]
fn third_party_vocabularies_give_the_ids_of_their_tokenizer_json() {
    let Some(folder) = std::env::var_os("CANDLE_SPARSE_TEST_MODELS") else {
        println!("skipped: CANDLE_SPARSE_TEST_MODELS is not set");
        return;
    };
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path().join("tokenizer.json");
        let Ok(original) = Tokenizer::from_file(&path) else { continue };
        if !std::fs::read_to_string(&path).unwrap().contains("\"byte_fallback\": true") {
            continue;
        }
        let ours = tokenizer(&as_gguf(&path)).unwrap();
        for text in TEXTS {
            let (a, b) = (original.encode(text, true).unwrap(), ours.encode(text, true).unwrap());
            assert_eq!(a.get_ids(), b.get_ids(), "{}: {text:?}", path.display());
            for skip in [false, true] {
                assert_eq!(
                    original.decode(a.get_ids(), skip).unwrap(),
                    ours.decode(a.get_ids(), skip).unwrap()
                );
            }
        }
        seen += 1;
    }
    assert!(seen > 0, "CANDLE_SPARSE_TEST_MODELS holds no tokenizer with byte_fallback");
}

#[test]
fn a_large_vocabulary_is_read_in_seconds() {
    let letters: Vec<_> = ('a'..='z').map(String::from).collect();
    let words: Vec<_> =
        (0..32_000_u32).map(|i| format!("{i:b}").replace('0', "x").replace('1', "y")).collect();
    let pieces = letters.iter().chain(&words).zip(0..).map(|(word, i)| (word.as_str(), -(i as f32), NORMAL));
    let mut seen = HashSet::new();
    let pieces: Vec<_> = pieces.filter(|piece| seen.insert(piece.0)).collect();
    let content = sentencepiece(&pieces);
    let start = Instant::now();
    tokenizer(&content).unwrap();
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}
