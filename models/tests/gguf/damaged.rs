//! Files that are cut off, corrupt, absurd, or another model.

use crate::files::{Gguf, HIDDEN, LAYERS};
use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, gguf_file::Value},
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
