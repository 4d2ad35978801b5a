//! Files that are cut off, corrupt, absurd, or another model.

use crate::files::{Gguf, HIDDEN, LAYERS};
use candle_core::{
    Device, Tensor,
    quantized::{
        GgmlDType,
        gguf_file::{Content, Value},
    },
};
use candle_sparse_models::{gguf::GgufFile, quantized_llama::ModelWeights};
use std::path::PathBuf;

fn small() -> Gguf {
    Gguf::llama(|_| GgmlDType::Q4_0, true)
}

fn write(dir: &tempfile::TempDir, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, bytes).unwrap();
    path
}

fn error(bytes: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let e = ModelWeights::from_path(write(&dir, bytes)).unwrap_err();
    e.to_string().lines().next().unwrap().to_string()
}

/// The bytes with `from`, which occurs, replaced by `to` of the same length.
fn replaced(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let at = bytes.windows(from.len()).position(|w| w == from).unwrap();
    let mut bytes = bytes.to_vec();
    bytes[at..at + to.len()].copy_from_slice(to);
    bytes
}

#[test]
fn every_truncation_is_an_error_that_names_the_file() {
    let whole = small().bytes();
    let dir = tempfile::tempdir().unwrap();
    let header = whole.len() - 400_000;
    for len in (0..4096.min(header)).chain((4096..whole.len()).step_by(9973)).chain([whole.len() - 1]) {
        let e = GgufFile::open(write(&dir, &whole[..len])).unwrap_err().to_string();
        assert!(e.contains("m.gguf"), "{len}: {e}");
    }
    GgufFile::open(write(&dir, &whole)).unwrap();
}

#[test]
fn no_changed_byte_of_the_header_is_a_panic() {
    let whole = small().bytes();
    let dir = tempfile::tempdir().unwrap();
    let mut refused = 0;
    for at in (0..3000).step_by(3) {
        for byte in [0x00, 0xff, 0x09] {
            let mut bytes = whole.clone();
            bytes[at] = byte;
            refused += usize::from(ModelWeights::from_path(write(&dir, &bytes)).is_err());
        }
    }
    assert!(refused > 500, "{refused}");
}

/// A header with all kinds of values, alignment and split among them, and little behind it.
fn header() -> Gguf {
    let mut file = Gguf { metadata: Vec::new(), tensors: Vec::new() };
    let text = |s: &str| Value::String(s.into());
    for (key, value) in [
        ("general.architecture", text("llama")),
        ("general.alignment", Value::U32(64)),
        ("split.no", Value::U16(0)),
        ("split.count", Value::U16(1)),
        ("split.tensors.count", Value::I32(1)),
        ("flag", Value::Bool(true)),
        ("small", Value::I8(-3)),
        ("wide", Value::F64(0.5)),
        ("list", Value::Array(vec![text("a"), text("b\0"), text("")])),
        ("numbers", Value::Array((0..5).map(Value::I16).collect())),
        ("candle_sparse.profile.length", Value::U64(7)),
    ] {
        file.set(key, value);
    }
    let t = Tensor::zeros((2, 32), candle_core::DType::F32, &Device::Cpu).unwrap();
    file.add("blk.0.attn_q.weight", &t, GgmlDType::Q4_0);
    file
}

/// The file with 64 more bytes, so that weights are inside of it wherever the alignment puts them.
fn longer(file: &Gguf) -> Vec<u8> {
    [file.bytes(), vec![0; 64]].concat()
}

#[test]
fn our_reader_of_headers_says_what_candles_says() {
    let dir = tempfile::tempdir().unwrap();
    for alignment in [8, 32, 64, 4096] {
        let mut file = header();
        file.set("general.alignment", Value::U32(alignment));
        let bytes = [file.bytes(), vec![0; 4096]].concat();
        let ours = GgufFile::open(write(&dir, &bytes)).unwrap();
        let theirs = Content::read(&mut std::io::Cursor::new(&bytes)).unwrap();
        let sorted = |c: &Content| {
            let mut all: Vec<_> = c.metadata.iter().map(|v| format!("{v:?}")).collect();
            all.extend(c.tensor_infos.iter().map(|t| format!("{t:?}")));
            all.sort();
            (all, c.tensor_data_offset, c.magic)
        };
        assert_eq!(sorted(ours.content()), sorted(&theirs), "{alignment}");
    }
}

#[test]
fn an_alignment_that_readers_take_differently_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for value in [
        Value::U8(0),
        Value::U8(64),
        Value::I32(64),
        Value::U64(64),
        Value::String("64".into()),
        Value::U32(0),
        Value::U32(48),
    ] {
        let mut file = header();
        file.set("general.alignment", value.clone());
        let e = GgufFile::open(write(&dir, &longer(&file))).unwrap_err().to_string();
        assert!(e.contains("m.gguf") && e.contains("general.alignment"), "{value:?}: {e}");
    }
}

#[test]
fn no_changed_byte_of_any_kind_of_value_is_a_panic() {
    let whole = longer(&header());
    let dir = tempfile::tempdir().unwrap();
    let mut refused = 0;
    for at in 0..whole.len() - 100 {
        for byte in [0x00, 0x01, 0x40, 0x7f, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] = byte;
            let path = write(&dir, &bytes);
            let opened = GgufFile::open(&path).and_then(|file| file.profile().map(|_| ()));
            refused += usize::from(opened.is_err());
            refused += usize::from(ModelWeights::from_path(&path).is_err());
        }
    }
    assert!(refused > 1000, "{refused}");
}

#[test]
fn what_is_said_twice_is_refused() {
    let mut file = header();
    file.metadata.push(("small".into(), Value::U32(1)));
    assert!(error(&longer(&file)).contains("value small is there twice"));
    // The same tensor of ours under two names of theirs.
    let mut file = small();
    let t = Tensor::zeros((HIDDEN, HIDDEN), candle_core::DType::F32, &Device::Cpu).unwrap();
    file.add("blk.+0.attn_q.weight", &t, GgmlDType::F16);
    let e = error(&file.bytes());
    assert!(e.contains("attn_q") && e.contains("another name"), "{e}");
}

#[test]
fn many_arrays_may_not_take_more_together_than_one() {
    // One byte in the file is 32 in memory: nine arrays of a million bytes each.
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend([0_u64, 9].map(u64::to_le_bytes).concat());
    for i in 0..9 {
        bytes.extend(2_u64.to_le_bytes());
        bytes.extend(format!("a{i}").bytes());
        bytes.extend([9_u32, 0].map(u32::to_le_bytes).concat());
        bytes.extend((1_u64 << 20).to_le_bytes());
        bytes.extend(vec![1; 1 << 20]);
    }
    let e = error(&bytes);
    assert!(e.contains("value a2") && e.contains("absurd"), "{e}");
}

#[test]
fn other_versions_and_byte_orders_are_named() {
    let whole = small().bytes();
    let with_version = |version: [u8; 4]| error(&[b"GGUF".as_slice(), &version, &whole[8..]].concat());
    let e = with_version([0, 0, 0, 3]);
    assert!(e.contains("big-endian"), "{e}");
    let e = with_version([4, 0, 0, 0]);
    assert!(e.contains("version 4"), "{e}");
    // Version 1 has lengths of 32 bits, so this is none.
    let e = with_version([1, 0, 0, 0]);
    assert!(e.contains("m.gguf"), "{e}");
}

/// Programs that copy tensors and metadata leave out what stands behind them.
#[test]
fn a_profile_that_is_announced_and_missing_is_named() {
    let mut file = small();
    file.set("candle_sparse.profile.length", Value::U64(100));
    let e = error(&file.bytes());
    assert!(e.contains("m.gguf") && e.contains("profile is missing"), "{e}");
}

#[test]
fn absurd_counts_are_refused_before_anything_is_allocated() {
    let whole = small().bytes();
    for (at, what) in [(8, "tensor"), (16, "value")] {
        let mut bytes = whole.clone();
        bytes[at..at + 8].copy_from_slice(&(u64::MAX / 2).to_le_bytes());
        let e = error(&bytes);
        assert!(
            e.contains("m.gguf") && (e.contains(what) || e.contains("key") || e.contains("takes")),
            "{e}"
        );
    }
    let key = b"llama.block_count";
    let at = whole.windows(key.len()).position(|w| w == key).unwrap() + key.len();
    // An array of a billion bytes.
    let mut bytes = whole;
    bytes[at..at + 4].copy_from_slice(&9_u32.to_le_bytes());
    bytes[at + 4..at + 8].copy_from_slice(&0_u32.to_le_bytes());
    bytes[at + 8..at + 16].copy_from_slice(&(1_u64 << 30).to_le_bytes());
    let e = error(&bytes);
    assert!(e.contains("llama.block_count") && e.contains("absurd"), "{e}");
}

#[test]
fn unknown_types_overlaps_and_strange_places_name_the_tensor() {
    let file = small();
    let whole = file.bytes();
    let name = b"blk.1.ffn_up.weight";
    let at = whole.windows(name.len()).position(|w| w == name).unwrap() + name.len();
    // Dimensions, then the type, then the place.
    let (kind, offset) = (at + 4 + 16, at + 4 + 16 + 4);
    let with = |at: usize, new: &[u8]| {
        let mut bytes = whole.clone();
        bytes[at..at + new.len()].copy_from_slice(new);
        error(&bytes)
    };
    let e = with(kind, &20_u32.to_le_bytes());
    assert!(e.contains("blk.1.ffn_up.weight") && e.contains("IQ4_NL") && e.contains("Q8_0"), "{e}");
    let e = with(offset, &0_u64.to_le_bytes());
    assert!(e.contains("overlap") && e.contains("blk.1.ffn_up.weight"), "{e}");
    let e = with(offset, &7_u64.to_le_bytes());
    assert!(e.contains("alignment"), "{e}");
    let e = with(offset, &(!31_u64).to_le_bytes());
    assert!(e.contains("past the end"), "{e}");
    let e = with(at + 4, &[0_u64, 1 << 40].map(u64::to_le_bytes).concat());
    assert!(e.contains("blk.1.ffn_up.weight") && e.contains("no elements"), "{e}");
    let e = with(at + 4, &(1_u64 << 40).to_le_bytes());
    assert!(e.contains("blk.1.ffn_up.weight") && e.contains("past the end"), "{e}");
    let e = error(&replaced(&whole, b"blk.1.ffn_up.weight", b"blk.1.ffn_uq.weight"));
    assert!(e.contains("blk.1.ffn_uq.weight") && e.contains("not part of a llama"), "{e}");
    let e = error(&replaced(&whole, b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"));
    assert!(e.contains("twice"), "{e}");
}

#[test]
fn other_models_are_refused_by_name() {
    let with = |key: &str, value: Value| {
        let mut file = small();
        file.set(key, value);
        error(&file.bytes())
    };
    let e = with("general.architecture", Value::String("gemma3".into()));
    assert!(e.contains("gemma3") && e.contains("llama"), "{e}");
    for (key, value, needle) in [
        ("llama.expert_count", Value::U32(8), "mixture of 8 experts"),
        ("llama.rope.dimension_count", Value::U32(32), "32 of 64 channels"),
        ("llama.attention.key_length", Value::U32(32), "64 of 32 channels"),
        ("llama.rope.scaling.type", Value::String("yarn".into()), "yarn"),
        ("llama.attention.head_count_kv", Value::U32(3), "num_key_value_heads 3"),
        ("llama.attention.head_count", Value::U32(0), "64 of 0 channels"),
        ("llama.embedding_length", Value::String("wide".into()), "llama.embedding_length"),
        ("llama.embedding_length", Value::I32(-1), "llama.embedding_length"),
        ("llama.block_count", Value::U32(LAYERS as u32 + 1), "blk.2"),
        ("llama.block_count", Value::U32(1), "blk.1"),
        ("llama.feed_forward_length", Value::U32(511), "511"),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(f32::NAN), "rms_norm_eps"),
    ] {
        let e = with(key, value);
        let needle = needle.replace("blk.2", "layers.2");
        assert!(e.contains(&needle), "{key}: {e}");
    }
    let mut file = small();
    file.metadata.retain(|(k, _)| k != "llama.attention.head_count");
    let e = error(&file.bytes());
    assert!(e.contains("llama.attention.head_count is missing"), "{e}");
}

#[test]
fn a_missing_or_misshapen_tensor_is_named() {
    let mut file = small();
    file.tensors.retain(|(k, _)| k != "blk.1.ffn_norm.weight");
    let e = error(&file.bytes());
    assert!(e.contains("layers.1.post_attention_layernorm.weight"), "{e}");
    let mut file = small();
    file.tensors.retain(|(k, _)| k != "blk.0.attn_q.weight");
    let t = Tensor::zeros((HIDDEN / 2, HIDDEN), candle_core::DType::F32, &Device::Cpu).unwrap();
    file.add("blk.0.attn_q.weight", &t, GgmlDType::F16);
    let e = error(&file.bytes());
    assert!(e.contains("layers.0.self_attn.q_proj.weight") && e.contains("128"), "{e}");
}
