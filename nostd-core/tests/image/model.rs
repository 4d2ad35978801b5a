//! A small model of random weights as an image, and what it says.

use candle_sparse_core::{
    Activation, ActivationGroup, Config, Format, Matrix, Rope, RopeScaling, Scalar,
    forward::{LayerWeights, Scratch, forward},
    image::{self, Image, Role, Tensor, config_bytes, empty_layer},
    kv_cache::KvCache,
    sampler::Sampler,
    tokenizer::TextStream,
};

pub(crate) const CONFIG: Config = Config {
    hidden_size: 32,
    intermediate_size: 64,
    vocab_size: 270,
    num_hidden_layers: 2,
    num_attention_heads: 4,
    num_key_value_heads: 2,
    head_dim: 8,
    rms_norm_eps: 1e-5,
    rope: Rope { theta: 1e4, scaling: RopeScaling::None, interleaved: false },
    max_position_embeddings: 64,
    hidden_act: Activation::Silu,
    gate_shift: 0.0,
    norm_shift: None,
    sliding_window: None,
};

/// Numbers between −1 and 1.
pub(crate) fn noise(seed: &mut u32) -> f32 {
    (next(seed) >> 8) as f32 / (1 << 23) as f32 - 1.0
}

pub(crate) fn next(seed: &mut u32) -> u32 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 17;
    *seed ^= *seed << 5;
    *seed
}

/// Bytes in words of 16, which is how images lie in memory.
pub(crate) struct Words(Vec<u128>, usize);

impl Words {
    pub(crate) fn new(bytes: &[u8]) -> Self {
        let mut words = vec![0; bytes.len().div_ceil(16)];
        bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
        Self(words, bytes.len())
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.0)[..self.1]
    }
}

fn matrix(rows: usize, cols: usize, seed: &mut u32) -> Words {
    let values: Vec<f32> = (0..rows * cols).map(|_| noise(seed) / (cols as f32).sqrt()).collect();
    let mut bytes = vec![0; rows * Format::Q8_0.row_bytes(cols)];
    Format::Q8_0.quantize(&values, &mut bytes);
    Words::new(&bytes)
}

/// The image, byte by byte.
pub(crate) fn image_bytes(c: &Config, tokenizer: &[u8]) -> Vec<u8> {
    let (hidden, inner, q, kv) = (c.hidden_size, c.intermediate_size, c.q_dim(), c.kv_dim());
    let ones = vec![1.0; hidden];
    let mut seed = 7;
    let mut held =
        vec![(Role::EmbedTokens, 0, c.vocab_size, hidden, matrix(c.vocab_size, hidden, &mut seed))];
    for layer in 0..c.num_hidden_layers as u32 {
        for (role, rows, cols) in [
            (Role::QProj, q, hidden),
            (Role::KProj, kv, hidden),
            (Role::VProj, kv, hidden),
            (Role::OProj, hidden, q),
            (Role::GateProj, inner, hidden),
            (Role::UpProj, inner, hidden),
            (Role::DownProj, hidden, inner),
        ] {
            held.push((role, layer, rows, cols, matrix(rows, cols, &mut seed)));
        }
    }
    let config = config_bytes(c).unwrap();
    let mut tensors: Vec<Tensor<'_>> = held
        .iter()
        .map(|(role, layer, rows, cols, words)| {
            let m = Matrix::from_bytes(*rows, *cols, Format::Q8_0, words.bytes()).unwrap();
            Tensor::matrix(*role, *layer, m).unwrap()
        })
        .collect();
    tensors.push(Tensor::vector(Role::Norm, 0, &ones));
    for layer in 0..c.num_hidden_layers as u32 {
        tensors.push(Tensor::vector(Role::InputLayernorm, layer, &ones));
        tensors.push(Tensor::vector(Role::PostAttentionLayernorm, layer, &ones));
    }
    tensors.push(Tensor::bytes(Role::Config, &config));
    tensors.push(Tensor::bytes(Role::Tokenizer, tokenizer));
    let mut bytes = Vec::new();
    image::write(&mut tensors, |piece| bytes.extend_from_slice(piece)).unwrap();
    bytes
}

/// A few greedy tokens, or why there are none.
pub(crate) fn say(bytes: &[u8]) -> Result<String, String> {
    let words = Words::new(bytes);
    let image = Image::open(words.bytes()).map_err(|e| e.to_string())?;
    let c = *image.config();
    let positions = 8.min(c.max_position_embeddings);
    // What a damaged configuration asks for and this machine would have to hold: a program has its buffers beforehand.
    let (elements, cache) = (Scratch::elements(&c, positions), KvCache::elements(&c, positions));
    if elements.max(cache).max(c.vocab_size).max(c.num_hidden_layers) > 1 << 20 {
        return Err("too large for this machine".to_string());
    }
    let mut layers: Vec<LayerWeights<'_>> = vec![empty_layer(); c.num_hidden_layers];
    let weights = image.weights(&mut layers).map_err(|e| e.to_string())?;
    let (mut data, mut kv) = (vec![0.0; elements], vec![0.0; cache]);
    let mut groups = vec![ActivationGroup::ZERO; Scratch::groups(&c)];
    let mut cache = KvCache::new(&c, positions, &mut kv).map_err(|e| e.to_string())?;
    let mut scratch = Scratch::new(&c, positions, &mut data, &mut groups).map_err(|e| e.to_string())?;
    let mut logits = vec![0.0; c.vocab_size];
    let tokenizer = image.tokenizer().map_err(|e| e.to_string())?;
    let (mut ids, mut ranks) = ([0; 16], [0; 16]);
    let n = tokenizer.encode_prompt("an a\u{e9}", &mut ids, &mut ranks).map_err(|e| e.to_string())?;
    let (mut text, mut stream) = (String::new(), TextStream::default());
    let mut token = 0;
    for position in 0..positions {
        token = if position < n { ids[position] } else { token };
        stream.push(&tokenizer, token, &mut text).unwrap();
        forward(&Scalar, &c, &weights, token as usize, position, &mut cache, &mut scratch, &mut logits)
            .map_err(|e| e.to_string())?;
        token = Sampler::Greedy.sample(&mut logits, || 0).map_err(|e| e.to_string())? as u32;
    }
    stream.finish(&mut text).unwrap();
    Ok(text)
}
