//! Small llamas of random weights in GGUF, as candle writes it.

use candle_core::{
    DType, Device, Tensor,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{self, Value},
    },
};
use std::path::Path;

pub(crate) const HIDDEN: usize = 256;
pub(crate) const INNER: usize = 512;
pub(crate) const VOCAB: usize = 300;
pub(crate) const HEADS: usize = 4;
pub(crate) const KV_HEADS: usize = 2;
pub(crate) const LAYERS: usize = 2;
pub(crate) const CONTEXT: usize = 512;

/// Matrices of a layer: name, rows, columns.
pub(crate) const MATRICES: [(&str, usize, usize); 7] = [
    ("attn_q", HIDDEN, HIDDEN),
    ("attn_k", HIDDEN / HEADS * KV_HEADS, HIDDEN),
    ("attn_v", HIDDEN / HEADS * KV_HEADS, HIDDEN),
    ("attn_output", HIDDEN, HIDDEN),
    ("ffn_gate", INNER, HIDDEN),
    ("ffn_up", INNER, HIDDEN),
    ("ffn_down", HIDDEN, INNER),
];

/// Numbers between ±`size`, the same for the same seed.
pub(crate) fn noise(n: usize, size: f32, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next() * size).collect()
}

pub(crate) fn matrix(rows: usize, cols: usize, seed: u64) -> Tensor {
    Tensor::from_vec(noise(rows * cols, 1.7 / (cols as f32).sqrt(), seed), (rows, cols), &Device::Cpu)
        .unwrap()
}

/// A file to be written.
pub(crate) struct Gguf {
    pub(crate) metadata: Vec<(String, Value)>,
    pub(crate) tensors: Vec<(String, QTensor)>,
}

impl Gguf {
    /// A llama whose matrices have the types that `dtype` says by name.
    pub(crate) fn llama(dtype: impl Fn(&str) -> GgmlDType, tied: bool) -> Self {
        let number = |n: usize| Value::U32(n as u32);
        let metadata = [
            ("general.architecture", Value::String("llama".into())),
            ("llama.block_count", number(LAYERS)),
            ("llama.embedding_length", number(HIDDEN)),
            ("llama.feed_forward_length", number(INNER)),
            ("llama.attention.head_count", number(HEADS)),
            ("llama.attention.head_count_kv", number(KV_HEADS)),
            ("llama.rope.dimension_count", number(HIDDEN / HEADS)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
            ("llama.context_length", number(CONTEXT)),
        ];
        let metadata = metadata.map(|(k, v)| (k.to_string(), v)).to_vec();
        let mut file = Self { metadata, tensors: Vec::new() };
        file.add("token_embd.weight", &matrix(VOCAB, HIDDEN, 1), dtype("token_embd"));
        if !tied {
            file.add("output.weight", &matrix(VOCAB, HIDDEN, 2), dtype("output"));
        }
        file.norm("output_norm.weight", 3);
        for layer in 0..LAYERS {
            for (i, (name, rows, cols)) in MATRICES.into_iter().enumerate() {
                let seed = (10 * layer + i + 10) as u64;
                file.add(&format!("blk.{layer}.{name}.weight"), &matrix(rows, cols, seed), dtype(name));
            }
            file.norm(&format!("blk.{layer}.attn_norm.weight"), 100 + layer as u64);
            file.norm(&format!("blk.{layer}.ffn_norm.weight"), 200 + layer as u64);
        }
        file
    }

    pub(crate) fn add(&mut self, name: &str, t: &Tensor, dtype: GgmlDType) {
        self.tensors.push((name.to_string(), QTensor::quantize(t, dtype).unwrap()));
    }

    fn norm(&mut self, name: &str, seed: u64) {
        let values = noise(HIDDEN, 0.3, seed).into_iter().map(|v| 1.0 + v).collect();
        let t = Tensor::from_vec::<_, f32>(values, HIDDEN, &Device::Cpu).unwrap();
        self.add(name, &t, GgmlDType::F32);
    }

    pub(crate) fn set(&mut self, key: &str, value: Value) {
        self.metadata.retain(|(k, _)| k != key);
        self.metadata.push((key.to_string(), value));
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let metadata: Vec<_> = self.metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let tensors: Vec<_> = self.tensors.iter().map(|(k, t)| (k.as_str(), t)).collect();
        let mut out = std::io::Cursor::new(Vec::new());
        gguf_file::write(&mut out, &metadata, &tensors).unwrap();
        out.into_inner()
    }

    pub(crate) fn save(&self, path: &Path) {
        std::fs::write(path, self.bytes()).unwrap();
    }
}

pub(crate) fn ids(n: usize, seed: u64) -> Tensor {
    let ids: Vec<u32> = noise(n, 1.0, seed).iter().map(|v| ((v + 1.0) / 2.0 * VOCAB as f32) as u32).collect();
    let ids: Vec<u32> = ids.into_iter().map(|i| i.min(VOCAB as u32 - 1)).collect();
    Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap()
}

fn pair(a: &Tensor, b: &Tensor) -> [Vec<f32>; 2] {
    assert_eq!(a.dims(), b.dims());
    [a, b].map(|t| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap())
}

/// The largest difference, of the largest number.
pub(crate) fn worst(a: &Tensor, b: &Tensor) -> f32 {
    let [a, b] = pair(a, b);
    let size = b.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / size
}

/// The difference's root mean square, of that of `b`.
pub(crate) fn rms(a: &Tensor, b: &Tensor) -> f32 {
    let [a, b] = pair(a, b);
    let square = |v: &mut dyn Iterator<Item = f32>| v.map(|v| f64::from(v * v)).sum::<f64>();
    let difference = square(&mut a.iter().zip(&b).map(|(a, b)| a - b));
    (difference / square(&mut b.iter().copied())).sqrt() as f32
}
