//! Files of the format before GGUF.

use crate::files::{HEADS, HIDDEN, INNER, LAYERS, VOCAB, ids, matrix, noise, worst};
use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor, ggml_file},
};
use candle_sparse_models::quantized_llama as ours;
use candle_transformers::models::quantized_llama as theirs;

fn write(out: &mut Vec<u8>, numbers: &[u32]) {
    numbers.iter().for_each(|n| out.extend_from_slice(&n.to_le_bytes()));
}

fn add(out: &mut Vec<u8>, name: &str, t: &Tensor, (dtype, number): (GgmlDType, u32)) {
    let dims: Vec<u32> = t.dims().iter().rev().map(|d| *d as u32).collect();
    write(out, &[dims.len() as u32, name.len() as u32, number]);
    write(out, &dims);
    out.extend_from_slice(name.as_bytes());
    out.resize(out.len().next_multiple_of(32), 0);
    out.extend_from_slice(&QTensor::quantize(t, dtype).unwrap().data().unwrap());
}

/// A file with as many key/value heads as query heads.
pub(crate) fn file(dtype: (GgmlDType, u32)) -> Vec<u8> {
    let mut out = Vec::new();
    write(&mut out, &[0x6767_6a74, 3]);
    let sizes = [VOCAB, HIDDEN, 256, HEADS, LAYERS, HIDDEN / HEADS, 0].map(|n| n as u32);
    write(&mut out, &sizes);
    for i in 0..VOCAB as u32 {
        write(&mut out, &[1]);
        out.push(b'a' + (i % 26) as u8);
        out.extend_from_slice(&0_f32.to_le_bytes());
    }
    let norm = |seed| Tensor::from_vec(noise(HIDDEN, 1.0, seed), HIDDEN, &Device::Cpu).unwrap();
    let f32 = (GgmlDType::F32, 0);
    add(&mut out, "tok_embeddings.weight", &matrix(VOCAB, HIDDEN, 1), dtype);
    add(&mut out, "norm.weight", &norm(2), f32);
    add(&mut out, "output.weight", &matrix(VOCAB, HIDDEN, 3), dtype);
    for l in 0..LAYERS {
        let seed = 10 * (l as u64 + 1);
        for (i, name) in ["wq", "wk", "wv", "wo"].into_iter().enumerate() {
            let t = matrix(HIDDEN, HIDDEN, seed + i as u64);
            add(&mut out, &format!("layers.{l}.attention.{name}.weight"), &t, dtype);
        }
        for (i, (name, rows, cols)) in
            [("w1", INNER, HIDDEN), ("w2", HIDDEN, INNER), ("w3", INNER, HIDDEN)].into_iter().enumerate()
        {
            let t = matrix(rows, cols, seed + 4 + i as u64);
            add(&mut out, &format!("layers.{l}.feed_forward.{name}.weight"), &t, dtype);
        }
        add(&mut out, &format!("layers.{l}.attention_norm.weight"), &norm(seed + 7), f32);
        add(&mut out, &format!("layers.{l}.ffn_norm.weight"), &norm(seed + 8), f32);
    }
    out
}

macro_rules! logits {
    ($models:ident, $bytes:expr) => {{
        let mut reader = std::io::Cursor::new($bytes);
        let content = ggml_file::Content::read(&mut reader, &Device::Cpu).unwrap();
        let mut model = $models::ModelWeights::from_ggml(content, 1).unwrap();
        let prompt = model.forward(&ids(20, 1), 0).unwrap();
        let next = model.forward(&ids(1, 2), 20).unwrap();
        Tensor::cat(&[prompt, next], 0).unwrap()
    }};
}

#[test]
fn ggml_files_give_candles_logits() {
    for (dtype, tolerance) in [((GgmlDType::F32, 0), 1e-4), ((GgmlDType::Q4_0, 2), 0.03)] {
        let bytes = file(dtype);
        let difference = worst(&logits!(ours, &bytes), &logits!(theirs, &bytes));
        assert!(difference < tolerance, "{dtype:?}: {difference}");
    }
}

#[test]
fn a_missing_tensor_is_named() {
    let mut reader = std::io::Cursor::new(file((GgmlDType::F32, 0)));
    let mut content = ggml_file::Content::read(&mut reader, &Device::Cpu).unwrap();
    content.tensors.remove("layers.1.attention.wk.weight");
    let e = ours::ModelWeights::from_ggml(content, 1).unwrap_err().to_string();
    assert!(e.contains("layers.1.attention.wk.weight"), "{e}");
}
