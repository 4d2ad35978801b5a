//! What is fuzzed: each function takes any bytes as a file that somebody made, and must come back. What it cannot read it must
//! refuse by a message that fits a terminal. `models/tests/fuzz_replay.rs` runs the same functions over the kept inputs.
//!
//! A target that needs two or three files takes them in one input, cut at bytes of `0xff`, which no text has.

use candle_core::{Error, Result};
use candle_sparse::{KvCache, KvConfig, KvDType, Profile, Threads};
use candle_sparse_core::{
    ActivationGroup, Config as CoreConfig, Model, Scalar, Scratch,
    forward::forward,
    image::{Image, empty_layer},
};
use candle_sparse_models::{
    chat::{Chat, ChatTemplate, Message},
    engine::{Engine, EngineOptions, EventKind, Request},
    files::ModelFiles,
    gguf::{self, GgufFile},
    llama::{Cache, Llama, LlamaConfig, LoadOptions},
    pretrained::Pretrained,
    tokenizer::{TextStream, from_json, prompt_tokens},
};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    sync::LazyLock,
};

/// A target: a name, and what is done with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All but `requests`, which is a program of its own; the names are those of the folders with inputs.
pub const TARGETS: [Target; 10] = [
    ("cache", cache),
    ("chat", chat),
    ("gguf", gguf),
    ("gguf_tokenizer", gguf_tokenizer),
    ("image", image),
    ("index", index),
    ("prefixes", prefixes),
    ("profile", profile),
    ("safetensors", safetensors),
    ("tokenizer", tokenizer),
];

/// The shape of the model that saved caches and checkpoints are of.
pub const CONFIG: &str = r#"{"model_type":"llama","hidden_size":8,"intermediate_size":12,"vocab_size":6,"num_hidden_layers":1,"num_attention_heads":2,"num_key_value_heads":1,"head_dim":4,"rms_norm_eps":1e-5,"max_position_embeddings":96,"tie_word_embeddings":true}"#;
/// A tokenizer of six tokens.
pub const TOKENIZER: &str = r#"{"version":"1.0","model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2,"c":3,"d":4,"e":5},"merges":["a b"]}}"#;
/// Longer messages are no messages.
const LONGEST_MESSAGE: usize = 1000;
/// Tokens of the prompt whose prefix is in a file: more than a page.
const PROMPT: u32 = 44;

/// A message must fit a terminal, whatever of the file is quoted in it.
fn told<T>(result: Result<T>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(e) => {
            check_message(&e);
            None
        }
    }
}

fn check_message(e: &Error) {
    let text = e.to_string();
    fits(text.lines().next().unwrap_or_default());
}

/// What is said is neither empty nor long, and one line.
pub fn fits(message: &str) {
    assert!(!message.is_empty() && message.len() <= LONGEST_MESSAGE, "a message of {} bytes", message.len());
    assert!(!message.contains(char::is_control), "{message:?}");
    if cfg!(test) {
        println!("    {message}");
    }
}

/// An input's parts, as many as are asked for; those that are not there are empty.
fn parts<const N: usize>(data: &[u8]) -> [&[u8]; N] {
    let mut all = data.splitn(N, |byte| *byte == 0xff);
    core::array::from_fn(|_| all.next().unwrap_or_default())
}

/// A folder of this process, in which each call writes its files anew.
fn folder(target: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("candle-sparse-fuzz-{}-{target}", std::process::id()));
    fs::create_dir_all(&folder).expect("a temporary folder");
    folder
}

fn write(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).expect("a temporary file");
}

/// A safetensors file of a header and its data, whose length is right.
#[must_use]
pub fn safetensors_file(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

/// As many fuzzers run as there are cores.
fn options() -> LoadOptions {
    LoadOptions::default().with_threads(Threads::new(1).ok())
}

/// Some tokens of a loaded model: whatever its numbers are, there is a result.
fn decode(model: &Llama) {
    let config = model.decoder().config();
    // Time and memory of a forward pass are what the configuration asks for.
    if config.vocab_size * config.hidden_size > 1 << 20 {
        return;
    }
    let mut cache = Cache::of(model, KvConfig::exact(KvDType::F16));
    let mut logits = vec![0.0; config.vocab_size];
    for position in 0..3 {
        if told(model.decode(0, position, &mut cache, &mut logits)).is_none() {
            return;
        }
    }
}

/// `config.json`, the header of the weights, their bytes.
pub fn safetensors(data: &[u8]) {
    let [config, header, tensors] = parts(data);
    let folder = folder("safetensors");
    write(&folder.join("config.json"), config);
    write(&folder.join("tokenizer.json"), TOKENIZER.as_bytes());
    write(&folder.join("model.safetensors"), &safetensors_file(header, tensors));
    let loaded = ModelFiles::from_folder(&folder).and_then(|f| Pretrained::load(&f, options()));
    if let Some(loaded) = told(loaded) {
        loaded.notices.iter().for_each(|notice| fits(notice));
        decode(&loaded.model);
    }
}

/// `model.safetensors.index.json`, and the first eight bytes of a shard.
pub fn index(data: &[u8]) {
    let [index, shard] = parts(data);
    let folder = folder("index");
    write(&folder.join("config.json"), CONFIG.as_bytes());
    write(&folder.join("tokenizer.json"), TOKENIZER.as_bytes());
    write(&folder.join("model.safetensors.index.json"), index);
    write(&folder.join("m.safetensors"), shard);
    let files = ModelFiles::from_folder(&folder);
    if let Some(files) = told(files) {
        told(Pretrained::load(&files, options()));
    }
}

/// A whole GGUF file.
pub fn gguf(data: &[u8]) {
    let path = folder("gguf").join("m.gguf");
    write(&path, data);
    let Some(file) = told(GgufFile::open(&path)) else { return };
    told(file.profile());
    told(gguf::config(file.content()));
    if let Some(model) = told(Llama::from_gguf(&file, options())) {
        decode(&model);
    }
}

/// A GGUF file of which the words alone are read.
pub fn gguf_tokenizer(data: &[u8]) {
    let path = folder("gguf_tokenizer").join("m.gguf");
    write(&path, data);
    let Some(file) = told(GgufFile::open(&path)) else { return };
    let _ = gguf::tokenizer::eos_tokens(file.content());
    if let Some((tokenizer, notices)) = told(gguf::tokenizer::tokenizer_and_notices(file.content())) {
        notices.iter().for_each(|notice| fits(notice));
        speak(&tokenizer, "ab  é\n<s>1234");
    }
    if let Some(Some(template)) = told(ChatTemplate::from_gguf(&file.content().metadata)) {
        told(template.render(&[Message::user("a")], true));
    }
}

/// There and back.
fn speak(tokenizer: &tokenizers::Tokenizer, text: &str) {
    let Some(ids) = told(prompt_tokens(tokenizer, text)) else { return };
    let mut stream = TextStream::new(tokenizer);
    for id in ids.iter().copied().chain([0, 1, 1 << 20, u32::MAX]) {
        let _ = stream.push(id);
    }
    let _ = stream.finish();
}

/// `tokenizer.json`, `tokenizer_config.json`, a text.
pub fn tokenizer(data: &[u8]) {
    let [json, config, text] = parts(data);
    let config = (!config.is_empty()).then_some(config);
    if let Some((tokenizer, notices)) = told(from_json(json, config)) {
        notices.iter().for_each(|notice| fits(notice));
        speak(&tokenizer, &String::from_utf8_lossy(text));
        speak(&tokenizer, "ab c");
    }
}

/// The header of a profile, its bytes.
pub fn profile(data: &[u8]) {
    let [header, tensors] = parts(data);
    let bytes = safetensors_file(header, tensors);
    let path = folder("profile").join("p.safetensors");
    write(&path, &bytes);
    let read = told(Profile::load(&path));
    let Some(profile) = read else { return };
    // What is read can be written and read again.
    let again = profile.to_bytes().and_then(|bytes| Profile::from_bytes(&bytes)).expect("what was read");
    assert_eq!(again.layers.len(), profile.layers.len());
    let config: LlamaConfig = serde_json::from_str(CONFIG).expect("a configuration");
    told(config.into_config(false).to_core().and_then(|config| profile.check_model(&config)));
}

/// The header of a saved cache, its bytes.
pub fn cache(data: &[u8]) {
    let [header, tensors] = parts(data);
    let folder = folder("cache");
    let path = folder.join("c.safetensors");
    write(&path, &sealed(header, tensors));
    let config: LlamaConfig = serde_json::from_str(CONFIG).expect("a configuration");
    let config: CoreConfig = config.into_config(false).to_core().expect("a configuration");
    let mut cache = KvCache::new(&config, KvConfig::exact(KvDType::F32));
    let Some(ids) = told(cache.load_tokens(&path)) else { return };
    let again = folder.join("again.safetensors");
    told(cache.save_tokens(&again, &ids));
    let (batch, len) = (cache.batch_size().max(1), cache.len());
    if batch > 16 || told(cache.begin(batch, len, 2)).is_none() {
        return;
    }
    for (sequence, position) in (0..batch).flat_map(|s| [(s, len), (s, len + 1)]) {
        cache.write(sequence, 0, position, &[0.5; 4], &[1.0; 4]);
    }
    cache.advance(2);
    cache.truncate(len / 2);
    told(cache.save(&again));
}

/// A saved cache; its checksum, where it has one, is made right: the checks behind it are what is looked at.
fn sealed(header: &[u8], tensors: &[u8]) -> Vec<u8> {
    let seal = || {
        let mut header: Value = serde_json::from_slice(header).ok()?;
        let about = header.get_mut("__metadata__")?.get_mut("candle_sparse_kv_cache")?;
        let mut fields: Value = serde_json::from_str(about.as_str()?).ok()?;
        *fields.get_mut("crc32").filter(|sum| sum.is_u64())? = crc32(tensors).into();
        *about = fields.to_string().into();
        serde_json::to_vec(&header).ok()
    };
    safetensors_file(&seal().unwrap_or_else(|| header.to_vec()), tensors)
}

/// A tiny model with random weights, and perhaps a template for conversations.
#[must_use]
pub fn model(chat_template: Option<&str>) -> Pretrained {
    let [config, header, tensors] = parts(include_bytes!("../seeds/safetensors/llama"));
    let folder = folder("model");
    write(&folder.join("config.json"), config);
    write(&folder.join("tokenizer.json"), TOKENIZER.as_bytes());
    write(&folder.join("model.safetensors"), &safetensors_file(header, tensors));
    let mut files = ModelFiles::from_folder(&folder).expect("a model's files");
    files.chat_template = chat_template.map(Into::into);
    Pretrained::load(&files, options()).expect("a model")
}

/// The header of a file in a folder of prefixes, its bytes; an engine begins a prompt with it, or reads the prompt anew.
pub fn prefixes(data: &[u8]) {
    begun_with(data);
}

/// How many positions of a prompt an engine takes from a file of prefixes.
pub fn begun_with(data: &[u8]) -> usize {
    static MODEL: LazyLock<Pretrained> = LazyLock::new(|| model(None));
    /// What the engine calls the file of this prompt.
    static NAME: LazyLock<PathBuf> = LazyLock::new(|| {
        run(&MODEL.model);
        let entries =
            fs::read_dir(folder("prefixes")).expect("a folder").map(|entry| entry.expect("a file").path());
        entries.last().expect("a prefix was written")
    });
    let [header, tensors] = parts(data);
    write(&NAME, &sealed(header, tensors));
    run(&MODEL.model)
}

/// Has an engine write a few tokens behind the prompt; how much of that came from the folder.
fn run(model: &Llama) -> usize {
    let options = EngineOptions::default().with_prefix_folder(Some(folder("prefixes")));
    let mut engine = Engine::new(model, None, options).expect("an engine");
    let prompt: Vec<u32> = (0..PROMPT).map(|i| i * i % 6).collect();
    engine.add(Request::new(prompt).with_max_tokens(3)).expect("a request");
    let mut cached = 0;
    while !engine.is_idle() {
        for event in engine.step() {
            if let EventKind::Finished(finished) = event.kind {
                cached = finished.cached_tokens;
                finished.error.iter().for_each(|error| fits(error));
            }
        }
    }
    engine.take_notices().iter().for_each(|notice| fits(notice));
    cached
}

/// A template, and what the user says.
pub fn chat(data: &[u8]) {
    let [template, text] = parts(data);
    let Some(template) = told(ChatTemplate::new(&String::from_utf8_lossy(template), "<s>", "</s>")) else {
        return;
    };
    let text = String::from_utf8_lossy(text);
    told(
        template.render(&[Message::user(text.as_ref()), Message::assistant("Hi"), Message::user("b")], true),
    );
    let mut chat = Chat::new(template, Some("Be brief."));
    if told(chat.say(&text)).is_some() {
        chat.answered("Hi", Some("</s>"));
        told(chat.say("b"));
    }
}

/// An image for flash memory, whose checksum is made right: the checks behind it are what is looked at.
pub fn image(data: &[u8]) {
    let mut bytes = vec![0; data.len() + 16];
    let start = bytes.as_ptr().align_offset(16);
    let bytes = &mut bytes[start..start + data.len()];
    bytes.copy_from_slice(data);
    if let Some((head, checked)) = bytes.split_at_mut_checked(16) {
        head[12..].copy_from_slice(&crc32(checked).to_le_bytes());
    }
    let Ok(image) = Image::open(bytes) else { return };
    let mut layers = vec![empty_layer(); image.config().num_hidden_layers];
    let (Ok(model), Ok(words)) = (image.model(&mut layers), image.tokenizer()) else { return };
    let mut room = ([0; 64], [0; 64]);
    let _ = words.encode_prompt("an aé", &mut room.0, &mut room.1);
    let positions = image.settings().positions.min(8);
    let sizes = [candle_sparse_core::KvCache::words(&model, positions), Scratch::elements(&model, positions)];
    if sizes.iter().all(|size| *size < 1 << 20) && model.config().vocab_size < 1 << 16 {
        say(&model, positions, sizes);
    }
}

fn say(model: &Model<'_>, positions: usize, [words, elements]: [usize; 2]) {
    let (mut memory, mut data) = (vec![0; words], vec![0.0; elements]);
    let mut groups = vec![ActivationGroup::ZERO; Scratch::groups(model.config())];
    let mut logits = vec![0.0; model.config().vocab_size];
    let Ok(mut cache) = candle_sparse_core::KvCache::new(model, &mut memory) else { return };
    let Ok(mut scratch) = Scratch::new(model, positions, &mut data, &mut groups) else { return };
    for position in 0..positions {
        let step =
            forward(&Scalar, model, (0, position), &mut cache, &mut scratch, Some(&mut logits), &mut || {
                false
            });
        if step.is_err() {
            return;
        }
    }
}

/// CRC-32, as in zip files, bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32| crc >> 1 ^ 0xedb8_8320 & (crc & 1).wrapping_neg();
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)))
}
