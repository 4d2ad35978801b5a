//! Every ggml type: the logits of candle's quantised llama, from a mapped file and from a reader.

use crate::files::{CONTEXT, Gguf, HEADS, HIDDEN, ids, rms, worst};
use candle_core::{
    DType, Device, Tensor,
    quantized::{GgmlDType, gguf_file},
};
use candle_sparse::Format;
use candle_sparse_models::{decoder::LoadOptions, gguf::GgufFile, quantized_llama as ours};
use candle_transformers::models::quantized_llama as theirs;
use std::{fs::File, path::Path, process::Command};

const PROMPT: usize = 24;
const TOKENS: usize = 12;

const TYPES: [GgmlDType; 13] = [
    GgmlDType::F32,
    GgmlDType::F16,
    GgmlDType::BF16,
    GgmlDType::Q8_0,
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];

/// Logits of a prompt and of tokens after it, one below the other, through calls that both crates' models have.
macro_rules! logits {
    ($model:expr) => {{
        let mut model = $model;
        let mut all = vec![model.forward(&ids(PROMPT, 5), 0).unwrap()];
        for i in 0..TOKENS {
            all.push(model.forward(&ids(1, 50 + i as u64), PROMPT + i).unwrap());
        }
        model.clear_kv_cache();
        all.push(model.forward(&ids(3, 7), 0).unwrap());
        Tensor::cat(&all, 0).unwrap()
    }};
}

macro_rules! from_gguf {
    ($models:ident, $path:expr) => {{
        let mut file = File::open($path).unwrap();
        let content = gguf_file::Content::read(&mut file).unwrap();
        $models::ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap()
    }};
}

/// With blocks both crates round activations to 8 bits, each over groups of its own. What they round away from are the exact
/// products with what the file holds; we must come as near to those as candle does.
fn agree(path: &Path, what: &str) {
    let theirs = logits!(from_gguf!(theirs, path));
    assert_eq!(theirs.dims(), [TOKENS + 2, crate::files::VOCAB], "{what}");
    let mapped = logits!(ours::ModelWeights::from_path(path).unwrap());
    let read = logits!(from_gguf!(ours, path));
    assert_eq!(mapped.dtype(), DType::F32);
    assert_eq!(worst(&mapped, &read), 0.0, "{what}: mapped and read are the same bytes");
    let options = LoadOptions::default().with_format(Some(Format::F32));
    let file = GgufFile::open(path).unwrap();
    let exact = logits!(ours::ModelWeights::from_gguf_file(&file, options).unwrap());
    let [ours, theirs] = [rms(&mapped, &exact), rms(&theirs, &exact)];
    println!("{what}: {ours:.5} from the exact logits, candle {theirs:.5}");
    assert!(ours <= 1.1 * theirs + 1e-5, "{what}: {ours} from the exact logits, candle {theirs}");
    assert!(theirs < 0.04, "{what}: candle says something else: {theirs}");
}

#[test]
fn every_type_gives_candles_logits() {
    let dir = tempfile::tempdir().unwrap();
    for dtype in TYPES {
        let path = dir.path().join("m.gguf");
        Gguf::llama(|_| dtype, false).save(&path);
        agree(&path, &format!("{dtype:?}"));
    }
}

#[test]
fn mixed_files_and_tied_heads_give_candles_logits() {
    let dir = tempfile::tempdir().unwrap();
    type Mix = (&'static str, fn(&str) -> GgmlDType);
    let mixes: [Mix; 3] = [
        ("as llama.cpp's Q4_K_M", |name| match name {
            "attn_v" | "ffn_down" | "output" => GgmlDType::Q6K,
            _ => GgmlDType::Q4K,
        }),
        ("gate and up differ", |name| match name {
            "ffn_up" | "attn_k" => GgmlDType::F16,
            "ffn_gate" => GgmlDType::Q5_1,
            _ => GgmlDType::Q8_0,
        }),
        ("floats and blocks in one projection", |name| match name {
            "attn_q" => GgmlDType::F32,
            "attn_v" => GgmlDType::BF16,
            _ => GgmlDType::Q4_0,
        }),
    ];
    for (what, dtype) in mixes {
        for tied in [false, true] {
            let path = dir.path().join("m.gguf");
            Gguf::llama(dtype, tied).save(&path);
            agree(&path, what);
        }
    }
}

#[test]
fn threads_of_one_file_share_its_memory_and_the_file_counts_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    Gguf::llama(|_| GgmlDType::Q4_0, true).save(&path);
    let model = ours::ModelWeights::from_path(&path).unwrap();
    let bytes = model.llama().decoder().weight_bytes();
    let file = std::fs::metadata(&path).unwrap().len() as usize;
    // The rest of the file is header and norms; a tied head is no second matrix.
    assert!(bytes < file && bytes > file - 32 * 1024, "{bytes} of {file}");
    let copy = model.clone();
    let [a, b] = [model, copy].map(|m| logits!(m));
    assert_eq!(worst(&a, &b), 0.0);
}

#[test]
fn the_context_is_the_files_and_not_4096() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let mut file = Gguf::llama(|_| GgmlDType::F32, true);
    file.set("llama.context_length", gguf_file::Value::U32(9000));
    file.save(&path);
    let model = ours::ModelWeights::from_path(&path).unwrap();
    assert_eq!(model.llama().decoder().config().max_position_embeddings, 9000);
    Gguf::llama(|_| GgmlDType::F32, true).save(&path);
    let mut model = ours::ModelWeights::from_path(&path).unwrap();
    let e = model.forward(&ids(CONTEXT + 1, 1), 0).unwrap_err().to_string();
    assert!(e.contains("512"), "{e}");
}

/// Factors of 1 change nothing, others what Llama 3.1's configuration changes.
#[test]
fn factors_of_rotary_frequencies_are_those_of_the_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let half = HIDDEN / HEADS / 2;
    let with = |factors: Option<Vec<f32>>| {
        let mut file = Gguf::llama(|_| GgmlDType::F32, true);
        if let Some(f) = factors {
            let n = f.len();
            file.add("rope_freqs.weight", &Tensor::from_vec(f, n, &Device::Cpu).unwrap(), GgmlDType::F32);
        }
        file.save(&path);
        ours::ModelWeights::from_path(&path)
    };
    let plain = logits!(with(None).unwrap());
    assert_eq!(worst(&logits!(with(Some(vec![1.0; half])).unwrap()), &plain), 0.0);
    let halved = logits!(with(Some(vec![2.0; half])).unwrap());
    assert!(worst(&halved, &plain) > 1e-3, "twice slower turns say something else");
    // Linear scaling by 2 is the same as dividing all frequencies by 2.
    let mut file = Gguf::llama(|_| GgmlDType::F32, true);
    file.set("llama.rope.scaling.type", gguf_file::Value::String("linear".into()));
    file.set("llama.rope.scaling.factor", gguf_file::Value::F32(2.0));
    file.save(&path);
    assert!(worst(&logits!(ours::ModelWeights::from_path(&path).unwrap()), &halved) < 1e-5);
    for bad in [vec![1.0; half - 1], vec![0.0; half]] {
        let e = with(Some(bad)).unwrap_err().to_string();
        assert!(e.contains("rope_freqs"), "{e}");
    }
}

#[test]
fn weights_may_be_asked_for_in_another_format() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    Gguf::llama(|_| GgmlDType::F16, false).save(&path);
    let options = LoadOptions::default().with_format(Some(Format::Q8_0));
    let file = GgufFile::open(&path).unwrap();
    let quantised = ours::ModelWeights::from_gguf_file(&file, options).unwrap();
    let plain = ours::ModelWeights::from_path(&path).unwrap();
    let [a, b] = [&quantised, &plain].map(|m| m.llama().decoder().weight_bytes());
    assert!(a * 100 / b <= 54, "{a} bytes in Q8_0, {b} in F16");
    let difference = worst(&logits!(quantised), &logits!(plain));
    assert!(difference > 0.0 && difference < 0.03, "{difference}");
}

/// Files of llama.cpp's own tool: every type that it makes, and its mixtures. `CANDLE_SPARSE_LLAMA_QUANTIZE` names the tool.
#[test]
fn files_of_llama_cpps_quantize_give_candles_logits() {
    let Some(tool) = std::env::var_os("CANDLE_SPARSE_LLAMA_QUANTIZE") else {
        println!("skipped: CANDLE_SPARSE_LLAMA_QUANTIZE does not name llama.cpp's llama-quantize");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let [from, to] = ["f16.gguf", "q.gguf"].map(|f| dir.path().join(f));
    let mut file = Gguf::llama(|_| GgmlDType::F16, false);
    // llama.cpp wants a tokenizer's name, and its list may be left out then.
    file.set("tokenizer.ggml.model", gguf_file::Value::String("no_vocab".into()));
    file.set("llama.vocab_size", gguf_file::Value::U32(crate::files::VOCAB as u32));
    file.save(&from);
    for kind in [
        "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S",
        "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K",
    ] {
        let run = Command::new(&tool).arg(&from).arg(&to).arg(kind).output().unwrap();
        assert!(run.status.success(), "{kind}: {}", String::from_utf8_lossy(&run.stderr));
        agree(&to, &format!("llama.cpp's {kind}"));
    }
    // A type that neither reads: named, with the tensor.
    let run = Command::new(&tool).arg(&from).arg(&to).arg("IQ4_NL").output().unwrap();
    assert!(run.status.success());
    let e = GgufFile::open(&to).unwrap_err().to_string();
    assert!(e.contains("IQ4_NL") && e.contains("tensor "), "{e}");
}
