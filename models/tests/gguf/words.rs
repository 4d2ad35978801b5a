//! What a folder says about tokens, in the words of a GGUF file: it comes back, or is refused by name.

use candle_core::{
    DType, Device, Tensor,
    quantized::{GgmlDType, gguf_file::Value as Gguf},
};
use candle_sparse::Format;
use candle_sparse_models::{
    chat::Message,
    convert::{GgufModel, Layout},
    decoder::LoadOptions,
    files::ModelFiles,
    gguf::GgufFile,
    llama::LlamaEosToks,
    pretrained::Pretrained,
};
use serde_json::{Map, Value, json};
use std::{collections::HashMap, path::Path};
use tempfile::TempDir;

/// Rows of the embedding: more than there are tokens.
const VOCAB: usize = 300;
const HIDDEN: usize = 64;
const INNER: usize = 96;

fn added(id: usize, content: &str, special: bool) -> Value {
    json!({
        "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": special,
    })
}

fn byte_level(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

fn split(regex: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false})
}

fn sequence(steps: &[Value]) -> Value {
    json!({"type": "Sequence", "pretokenizers": steps})
}

fn bpe(tokens: impl IntoIterator<Item = String>, merges: &[&str], byte_fallback: bool) -> Value {
    let vocab: Map<String, Value> = tokens.into_iter().enumerate().map(|(id, t)| (t, json!(id))).collect();
    json!({
        "type": "BPE", "dropout": null, "unk_token": byte_fallback.then_some("<unk>"), "fuse_unk": byte_fallback,
        "continuing_subword_prefix": null, "end_of_word_suffix": null, "byte_fallback": byte_fallback,
        "ignore_merges": false, "vocab": vocab, "merges": merges,
    })
}

/// `<|end|>`, `<|im_start|>`, `<|im_end|>`, all bytes, and from 259 on what merges make.
fn bytes() -> Value {
    let names = ["<|end|>", "<|im_start|>", "<|im_end|>"];
    let mut alphabet: Vec<char> =
        tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let made = ["\u{120}\u{120}", "12", "123", "th", "\u{120}th"];
    let tokens = names.map(String::from).into_iter().chain(alphabet.iter().map(ToString::to_string));
    let merges = ["\u{120} \u{120}", "1 2", "12 3", "t h", "\u{120} th"];
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": names.iter().enumerate().map(|(id, name)| added(id, name, true)).collect::<Vec<_>>(),
        "pre_tokenizer": byte_level(true), "decoder": byte_level(true),
        "model": bpe(tokens.chain(made.map(String::from)), &merges, false),
    })
}

/// `<unk>`, `<s>`, `</s>`, all bytes, and from 259 on pieces.
fn pieces() -> Value {
    let names = ["<unk>", "<s>", "</s>"];
    let bytes = (0..=255_u8).map(|byte| format!("<0x{byte:02X}>"));
    let made = ["\u{2581}", "h", "e", "l", "\u{2581}h", "el", "\u{2581}hel", "\u{2581}\u{2581}"];
    let merges = ["\u{2581} h", "e l", "\u{2581}h el", "\u{2581} \u{2581}"];
    let blank = json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "pre_tokenizer": null, "post_processor": null,
        "added_tokens": names.iter().enumerate().map(|(id, name)| added(id, name, true)).collect::<Vec<_>>(),
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u{2581}"}, blank]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": bpe(names.map(String::from).into_iter().chain(bytes).chain(made.map(String::from)), &merges, true),
    })
}

fn with(mut json: Value, changes: Value) -> Value {
    json.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    json
}

fn more_tokens(mut json: Value, tokens: &[Value]) -> Value {
    json["added_tokens"].as_array_mut().unwrap().extend_from_slice(tokens);
    json
}

/// A model of one layer in a folder; `more`: further files.
fn folder(dir: &TempDir, tokenizer: &Value, config: Value, more: &[(&str, String)]) -> ModelFiles {
    let shape = json!({
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": VOCAB, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
        "hidden_act": "silu", "rope_theta": 10000.0,
    });
    let mut tensors = HashMap::new();
    let mut add = |name: &str, shape: &[usize]| {
        let t = Tensor::randn(0.0_f32, 0.05, shape, &Device::Cpu).unwrap().to_dtype(DType::F16).unwrap();
        tensors.insert(format!("{name}.weight"), t);
    };
    for name in ["model.embed_tokens", "lm_head"] {
        add(name, &[VOCAB, HIDDEN]);
    }
    for name in ["q", "k", "v", "o"] {
        add(&format!("model.layers.0.self_attn.{name}_proj"), &[HIDDEN, HIDDEN]);
    }
    for name in ["gate", "up"] {
        add(&format!("model.layers.0.mlp.{name}_proj"), &[INNER, HIDDEN]);
    }
    add("model.layers.0.mlp.down_proj", &[HIDDEN, INNER]);
    for name in ["model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"] {
        add(name, &[HIDDEN]);
    }
    candle_core::safetensors::save(&tensors, dir.path().join("model.safetensors")).unwrap();
    let files = [("config.json", with(shape, config).to_string()), ("tokenizer.json", tokenizer.to_string())];
    for (name, content) in files.iter().chain(more) {
        std::fs::write(dir.path().join(name), content).unwrap();
    }
    ModelFiles::from_folder(dir.path()).unwrap()
}

fn load(files: &ModelFiles) -> Pretrained {
    Pretrained::load(files, LoadOptions::default()).unwrap()
}

/// The folder, its file, and what was said while it was written.
fn both(files: &ModelFiles, path: &Path) -> (Pretrained, Pretrained, Vec<String>) {
    let model = GgufModel::from_files(files, Layout::default()).unwrap();
    model.save(path).unwrap();
    model.check_file(path).unwrap();
    (load(files), load(&ModelFiles::from_gguf(path).unwrap()), model.notices().to_vec())
}

/// A value of the metadata, which is no more than shown by candle.
fn value(file: &GgufFile, key: &str) -> Option<String> {
    file.content().metadata.get(key).map(|value| format!("{value:?}"))
}

fn ids(model: &Pretrained, text: &str) -> Vec<u32> {
    model.tokenizer.encode(text, true).unwrap().get_ids().to_vec()
}

const TEXTS: [&str; 7] = [
    "the  12 123",
    " hel hel  h",
    "a<think>b</think> c <tool> d",
    "<think>  x </s>hel <|im_end|> the",
    "Cafe\u{301} don't THE",
    "\n\n 1\r\n",
    "",
];

#[test]
fn tokenizers_come_back_or_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let digits = json!({"type": "Digits", "individual_digits": true});
    let qwen = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let llama = qwen.replace(r"|\p{N}|", r"|\p{N}{1,3}|");
    let coder = [
        split("[\r\n]"),
        split(r"\s?\p{L}+"),
        split(r"\s?\p{P}+"),
        split("[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+"),
        digits.clone(),
        byte_level(false),
    ];
    let splits = |steps: &[Value]| with(bytes(), json!({"pre_tokenizer": sequence(steps)}));
    let blank = pieces()["normalizer"]["normalizers"][1].clone();
    let decoders = pieces()["decoder"]["decoders"].as_array().unwrap()[..3].to_vec();
    let bare =
        with(pieces(), json!({"normalizer": blank, "decoder": {"type": "Sequence", "decoders": decoders}}));
    let metaspace = |scheme: &str, split: bool| {
        let step =
            json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": scheme, "split": split});
        with(pieces(), json!({"normalizer": null, "pre_tokenizer": step}))
    };
    let flags = |id: usize, content: &str, special: bool, flag: &str| {
        with(added(id, content, special), json!({flag: true}))
    };
    let flagged = [
        flags(270, "<think>", false, "lstrip"),
        flags(271, "</think>", false, "rstrip"),
        flags(272, "<tool>", true, "single_word"),
    ];
    let plain = [added(270, "<think>", false), added(271, "</think>", false), added(272, "<tool>", true)];
    let normalized = [flags(270, "<think>", false, "normalized")];
    for (tokenizer, key, expected, said) in [
        (bytes(), "pre", Gguf::String("gpt-2".into()), ""),
        (splits(&[digits.clone(), byte_level(true)]), "pre", Gguf::String("smollm".into()), ""),
        (splits(&[split(&llama), byte_level(false)]), "pre", Gguf::String("smaug-bpe".into()), ""),
        (
            with(splits(&[split(qwen), byte_level(false)]), json!({"normalizer": {"type": "NFC"}})),
            "pre",
            Gguf::String("qwen2".into()),
            "NFC",
        ),
        (splits(&[split(qwen), byte_level(false)]), "pre", Gguf::String("deepseek-r1-qwen".into()), ""),
        (splits(&coder), "pre", Gguf::String("deepseek-coder".into()), ""),
        (more_tokens(bytes(), &plain), "pre", Gguf::String("gpt-2".into()), ""),
        (
            more_tokens(bytes(), &flagged),
            "pre",
            Gguf::String("gpt-2".into()),
            "'<think>', '</think>', '<tool>'",
        ),
        (pieces(), "add_space_prefix", Gguf::Bool(true), ""),
        (bare, "add_space_prefix", Gguf::Bool(false), ""),
        (metaspace("always", false), "add_space_prefix", Gguf::Bool(true), "begins with one,"),
        (metaspace("first", false), "add_space_prefix", Gguf::Bool(true), "behind a special token"),
        (more_tokens(pieces(), &plain), "add_space_prefix", Gguf::Bool(true), ""),
        (more_tokens(pieces(), &flagged), "add_space_prefix", Gguf::Bool(true), "lstrip"),
        (more_tokens(pieces(), &normalized), "add_space_prefix", Gguf::Bool(true), "normalized"),
    ] {
        let (folder, file, notices) = both(&folder(&dir, &tokenizer, json!({}), &[]), &path);
        assert_eq!(
            value(&GgufFile::open(&path).unwrap(), &format!("tokenizer.ggml.{key}")),
            Some(format!("{expected:?}"))
        );
        for text in TEXTS {
            let (a, b) = (ids(&folder, text), ids(&file, text));
            assert_eq!(a, b, "{expected:?} {text:?}");
            let [a, b] = [&folder, &file].map(|m| m.tokenizer.decode(&a, true).unwrap());
            assert_eq!(a, b, "{expected:?} {text:?}");
        }
        let about = notices.iter().filter(|n| !said.is_empty() && n.contains(said)).count();
        assert_eq!([about, notices.len()], [usize::from(!said.is_empty()); 2], "{said}: {notices:?}");
    }
    let lower =
        json!({"type": "Sequence", "normalizers": [{"type": "Lowercase"}, pieces()["normalizer"].clone()]});
    for (tokenizer, needle) in [
        (splits(&[split("[\r\n]"), split(r"\s?\p{L}+"), digits, byte_level(false)]), "normalizes and splits"),
        (with(bytes(), json!({"normalizer": {"type": "NFC"}})), "NFC"),
        (with(pieces(), json!({"normalizer": lower})), "Lowercase"),
        (metaspace("always", true), "Metaspace"),
        (with(bytes(), json!({"decoder": {"type": "Fuse"}})), "decoder"),
        (with(bytes(), json!({"model": with(bytes()["model"].clone(), json!({"dropout": 0.1}))})), "dropout"),
        (
            with(pieces(), json!({"model": with(pieces()["model"].clone(), json!({"merges": ["e l"]}))})),
            "put together",
        ),
    ] {
        let files = folder(&dir, &tokenizer, json!({}), &[]);
        let error = GgufModel::from_files(&files, Layout::default()).unwrap_err().to_string();
        assert!(error.contains(needle) && error.lines().count() == 1, "{needle}: {error}");
    }
}

#[test]
fn types_and_rows_without_a_token_are_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let all: Vec<_> = (264..=VOCAB).map(|id| added(id, &format!("<r{id}>"), true)).collect();
    let (_, _, notices) = both(&folder(&dir, &more_tokens(bytes(), &all), json!({}), &[]), &path);
    assert!(notices.len() == 1 && notices[0].contains("'<r300>'"), "{notices:?}");
    let more = [added(264, "<think>", false)];
    let (_, file, notices) = both(&folder(&dir, &more_tokens(bytes(), &more), json!({}), &[]), &path);
    assert!(notices.is_empty(), "{notices:?}");
    let opened = GgufFile::open(&path).unwrap();
    let types = opened.content().metadata["tokenizer.ggml.token_type"].to_vec().unwrap();
    let types: Vec<i32> = types.iter().map(|t| t.to_i32().unwrap()).collect();
    assert_eq!(types.len(), VOCAB);
    assert_eq!([types[0], types[3], types[264], types[265], types[299]], [3, 1, 4, 5, 5]);
    assert_eq!(file.tokenizer.decode(&[264, 299, 3], true).unwrap(), "<think>!");
}

#[test]
fn tokens_that_begin_and_end_texts_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}";
    let names = json!({
        "bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "add_bos_token": true,
        "chat_template": template,
    });
    let more = [added(264, "<turn>", true), added(265, "<stop>", true), added(266, "<halt>", false)];
    let tokenizer = more_tokens(bytes(), &more);
    let generation = json!({"eos_token_id": [265, 266, 0]}).to_string();
    let config = json!({"eos_token_id": 264});
    for (config, names, others) in [
        (json!({}), None, vec![]),
        (config.clone(), None, vec![("generation_config.json", generation.clone())]),
        (config.clone(), Some(names.clone()), vec![("generation_config.json", generation)]),
        (
            json!({"bos_token_id": 1, "eos_token_id": [264, 2]}),
            Some(json!({"chat_template": template})),
            vec![],
        ),
        (config, Some(with(names, json!({"add_eos_token": true}))), vec![]),
    ] {
        let dir_files = names.map(|names| ("tokenizer_config.json", names.to_string()));
        let all: Vec<_> = others.into_iter().chain(dir_files).collect();
        for name in ["generation_config.json", "tokenizer_config.json"] {
            // What the case before this one left.
            let _ = std::fs::remove_file(dir.path().join(name));
        }
        let (folder, file, _) = both(&folder(&dir, &tokenizer, config, &all), &path);
        let sorted = |model: &Pretrained| match &model.config.eos_token_id {
            Some(LlamaEosToks::Multiple(ids)) => ids.clone(),
            other => panic!("{other:?}"),
        };
        assert_eq!(sorted(&folder), sorted(&file), "{all:?}");
        for text in TEXTS {
            assert_eq!(ids(&folder, text), ids(&file, text), "{all:?} {text:?}");
        }
        let talk = [Message::user("Who?"), Message::assistant("I.")];
        let said = |m: &Pretrained| m.chat_template().unwrap().map(|t| t.render(&talk, true).unwrap());
        assert_eq!(said(&folder), said(&file), "{all:?}");
    }
}

#[test]
fn the_template_that_loading_takes_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let (one, other) = ("1{{ messages[0].content }}", "2{{ messages[0].content }}");
    let list = json!([{"name": "tool_use", "template": other}, {"name": "default", "template": one}]);
    for more in [
        vec![("chat_template.jinja", one.to_string())],
        vec![
            ("tokenizer_config.json", json!({"chat_template": other}).to_string()),
            ("chat_template.jinja", one.to_string()),
        ],
        vec![("tokenizer_config.json", json!({"chat_template": list}).to_string())],
    ] {
        for name in ["chat_template.jinja", "tokenizer_config.json"] {
            // What the case before this one left.
            let _ = std::fs::remove_file(dir.path().join(name));
        }
        let (folder, file, _) = both(&folder(&dir, &bytes(), json!({"eos_token_id": 2}), &more), &path);
        for model in [folder, file] {
            assert_eq!(model.chat_template().unwrap().unwrap().source(), one, "{more:?}");
        }
    }
    let opened = GgufFile::open(&path).unwrap();
    assert_eq!(
        value(&opened, "tokenizer.chat_template.tool_use"),
        Some(format!("{:?}", Gguf::String(other.into())))
    );
}

#[test]
fn a_file_that_reads_otherwise_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let model = GgufModel::from_files(&folder(&dir, &bytes(), json!({}), &[]), Layout::default()).unwrap();
    for (key, value, needle) in [
        ("tokenizer.ggml.pre", Gguf::String("smollm".into()), "would be read as"),
        ("tokenizer.ggml.eot_token_id", Gguf::U32(1), "end an answer"),
    ] {
        let changed = GgufModel::from_files(&ModelFiles::from_folder(dir.path()).unwrap(), Layout::default());
        changed.unwrap().with_value(key, value).save(&path).unwrap();
        let error = model.check_file(&path).unwrap_err().to_string();
        assert!(error.contains(needle), "{error}");
    }
}

#[test]
fn what_was_true_of_the_old_bytes_is_not_copied() {
    let dir = tempfile::tempdir().unwrap();
    let [from, to] = ["a.gguf", "b.gguf"].map(|name| dir.path().join(name));
    let mut file = crate::files::Gguf::llama(|_| GgmlDType::Q8_0, false);
    for (key, value) in [
        ("general.alignment", Gguf::U32(32)),
        ("general.file_type", Gguf::U32(15)),
        ("general.quantization_version", Gguf::U32(1)),
        ("general.license", Gguf::String("mit".into())),
        ("split.count", Gguf::U16(1)),
    ] {
        file.set(key, value);
    }
    file.save(&from);
    let layout = Layout::default().with_format(Some(Format::F16)).with_neuron_major(None);
    GgufModel::from_gguf(&GgufFile::open(&from).unwrap(), layout).unwrap().save(&to).unwrap();
    let copy = GgufFile::open(&to).unwrap();
    for (key, expected) in [
        ("general.alignment", None),
        ("general.quantization_version", None),
        ("split.count", None),
        ("general.file_type", Some(Gguf::U32(1))),
        ("general.license", Some(Gguf::String("mit".into()))),
    ] {
        assert_eq!(value(&copy, key), expected.map(|value| format!("{value:?}")), "{key}");
    }
}

#[test]
fn a_format_that_rows_cannot_take_is_no_larger_and_said_once() {
    let dir = tempfile::tempdir().unwrap();
    let files = folder(&dir, &bytes(), json!({}), &[]);
    let path = dir.path().join("m.gguf");
    let write = |files: &ModelFiles, format| {
        let layout = Layout::default().with_format(Some(format)).with_neuron_major(None);
        let model = GgufModel::from_files(files, layout).unwrap();
        model.save(&path).unwrap();
        let types: Vec<_> = model.matrices().map(|(_, t)| t.dtype()).collect();
        (types, model.notices().to_vec(), std::fs::read(&path).unwrap())
    };
    let (types, notices, q4) = write(&files, Format::Q4K);
    assert!(types.iter().all(|t| *t == GgmlDType::Q4_0), "{types:?}");
    assert_eq!(
        notices,
        [
            "columns are no multiple of 256, as q4_k needs: 8 matrices of 64 columns in q4_0, 1 matrix of 96 columns in q4_0"
        ]
    );
    let stored = dir.path().join("q4.gguf");
    std::fs::write(&stored, q4).unwrap();
    let stored = ModelFiles::from_gguf(&stored).unwrap();
    // Stored in less than asked for: left as it is, unless it fits.
    let (types, notices, _) = write(&stored, Format::Q6K);
    assert!(types.iter().all(|t| *t == GgmlDType::Q4_0), "{types:?}");
    assert_eq!(notices.len(), 1, "{notices:?}");
    let (types, notices, _) = write(&stored, Format::Q8_0);
    assert!(types.iter().all(|t| *t == GgmlDType::Q8_0), "{types:?}");
    assert!(notices.len() == 1 && notices[0].contains("larger"), "{notices:?}");
    let options = LoadOptions::default().with_format(Some(Format::Q8_0));
    let loaded = Pretrained::load(&stored, options).unwrap();
    assert_eq!(loaded.model.decoder().notices(), notices, "the same when it is loaded");
}
