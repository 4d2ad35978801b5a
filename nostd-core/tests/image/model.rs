//! A small model of random weights as an image, and what it says.

use candle_sparse_core::{
    Activation, ActivationGroup, Config, Format, KvCache, KvConfig, Matrix, Rope, RopeScaling, Scalar,
    Scratch,
    attention::{AttentionConfig, AttentionMode},
    forward::forward,
    image::{self, Image, Role, Settings, Tensor, config_bytes, empty_layer, settings_bytes},
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
    gated_mlp: true,
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

/// A matrix of noise.
struct Held {
    role: Role,
    layer: u32,
    shape: [usize; 2],
    format: Format,
    words: Words,
}

impl Held {
    fn new(role: Role, layer: u32, shape: [usize; 2], format: Format, seed: &mut u32) -> Self {
        let [rows, cols] = shape;
        let values: Vec<f32> = (0..rows * cols).map(|_| noise(seed) / (cols as f32).sqrt()).collect();
        let mut bytes = vec![0; rows * format.row_bytes(cols)];
        format.quantize(&values, &mut bytes);
        Self { role, layer, shape, format, words: Words::new(&bytes) }
    }

    fn tensor(&self) -> Tensor<'_> {
        let m = Matrix::from_bytes(self.shape[0], self.shape[1], self.format, self.words.bytes()).unwrap();
        Tensor::matrix(self.role, self.layer, m).unwrap()
    }
}

fn attention(layer: u32, c: &Config) -> Vec<(Role, u32, [usize; 2])> {
    let (hidden, q, kv) = (c.hidden_size, c.q_dim(), c.kv_dim());
    vec![
        (Role::QProj, layer, [q, hidden]),
        (Role::KProj, layer, [kv, hidden]),
        (Role::VProj, layer, [kv, hidden]),
        (Role::OProj, layer, [hidden, q]),
    ]
}

/// The image, byte by byte. The last block chooses its neurons by a cascade; every block has an attention gate.
pub(crate) fn image_bytes(c: &Config, tokenizer: &[u8]) -> Vec<u8> {
    let (hidden, inner, heads) = (c.hidden_size, c.intermediate_size, c.num_key_value_heads);
    let last = c.num_hidden_layers as u32 - 1;
    let rank = 8;
    let mut shapes = vec![(Role::EmbedTokens, 0, [c.vocab_size, hidden])];
    for layer in 0..=last {
        shapes.extend(attention(layer, c));
        shapes.push((Role::GateProj, layer, [inner, hidden]));
        if layer < last {
            shapes.extend([(Role::UpProj, layer, [inner, hidden]), (Role::DownProj, layer, [hidden, inner])]);
        }
    }
    shapes.push((Role::UpDown, last, [2 * inner, hidden]));
    shapes.push((Role::PredictorP, last, [rank, hidden]));
    shapes.extend([Role::PredictorGate, Role::PredictorUp].map(|role| (role, last, [rank, 128])));
    let mut seed = 7;
    let mut matrix = |(role, layer, shape), format| Held::new(role, layer, shape, format, &mut seed);
    let mut held: Vec<Held> = shapes.into_iter().map(|shape| matrix(shape, Format::Q8_0)).collect();
    held.extend((0..=last).map(|layer| matrix((Role::Ridge, layer, [heads, hidden]), Format::F32)));
    let (config, settings) = (config_bytes(c).unwrap(), settings_bytes(&SETTINGS).unwrap());
    let (ones, zeros) = (vec![1.0; hidden.max(inner)], vec![0.0; hidden]);
    let (small, plan) = (vec![1e-4; inner], bytemuck::cast::<_, [u8; 12]>([2_u32, 0, 3]));
    let mut tensors: Vec<Tensor<'_>> = held.iter().map(Held::tensor).collect();
    tensors.push(Tensor::vector(Role::Norm, 0, &ones[..hidden]));
    for layer in 0..=last {
        for role in [Role::InputLayernorm, Role::PostAttentionLayernorm] {
            tensors.push(Tensor::vector(role, layer, &ones[..hidden]));
        }
        tensors.extend([Role::RidgeBias, Role::Threshold].map(|r| Tensor::vector(r, layer, &zeros[..heads])));
        tensors.push(Tensor::vector(Role::RecallShares, layer, &ones[..heads]));
    }
    for role in [Role::GateDeviation, Role::UpVariance, Role::UpSquare, Role::Candidate, Role::Keep] {
        tensors.push(Tensor::vector(role, last, &small));
    }
    tensors.push(Tensor::vector(Role::Skipped, last, &zeros));
    tensors.push(Tensor::bytes(Role::Plan, last, &plan));
    tensors.push(Tensor::bytes(Role::Config, 0, &config));
    tensors.push(Tensor::bytes(Role::Settings, 0, &settings));
    tensors.push(Tensor::bytes(Role::Tokenizer, 0, tokenizer));
    let mut bytes = Vec::new();
    image::write(&mut tensors, |piece| bytes.extend_from_slice(piece)).unwrap();
    bytes
}

const SETTINGS: Settings = Settings {
    attention: AttentionConfig::new(AttentionMode::Gated)
        .with_sinks(4)
        .with_window(32)
        .with_budget(32)
        .with_recall(32),
    kv: KvConfig::tiered(32, 64),
    positions: 64,
};

/// Tokens that are read and written.
const TOKENS: usize = 10;
/// The most words of memory that a damaged image gets.
const MOST: usize = 1 << 18;

/// A few greedy tokens, or why there are none.
pub(crate) fn say(bytes: &[u8]) -> Result<String, String> {
    let words = Words::new(bytes);
    let image = Image::open(words.bytes()).map_err(|e| e.to_string())?;
    let c = *image.config();
    let mut layers = vec![empty_layer(); c.num_hidden_layers.min(64)];
    let model = image.model(&mut layers).map_err(|e| e.to_string())?;
    let positions = image.settings().positions;
    let (elements, words) = (Scratch::elements(&model, positions), KvCache::words(&model, positions));
    // What a damaged setting asks for need not be there: a cache takes what it gets, working memory is refused.
    let (mut data, mut kv) = (vec![0.0; elements.min(MOST)], vec![0; words.min(MOST)]);
    let mut groups = vec![ActivationGroup::ZERO; Scratch::groups(&c)];
    let mut cache = KvCache::new(&model, &mut kv).map_err(|e| e.to_string())?;
    let mut scratch = Scratch::new(&model, positions, &mut data, &mut groups).map_err(|e| e.to_string())?;
    let mut logits = vec![0.0; c.vocab_size];
    let tokenizer = image.tokenizer().map_err(|e| e.to_string())?;
    let (mut ids, mut ranks) = ([0; 16], [0; 16]);
    let n = tokenizer.encode_prompt("an a\u{e9}", &mut ids, &mut ranks).map_err(|e| e.to_string())?;
    let (mut text, mut stream) = (String::new(), TextStream::default());
    let mut token = 0;
    for position in 0..TOKENS {
        token = if position < n { ids[position] } else { token };
        stream.push(&tokenizer, token, &mut text).unwrap();
        let at = (token as usize, position);
        forward(&Scalar, &model, at, &mut cache, &mut scratch, Some(&mut logits), &mut || false)
            .map_err(|e| e.to_string())?;
        token = Sampler::Greedy.sample(&mut logits, || 0).map_err(|e| e.to_string())? as u32;
    }
    stream.finish(&mut text).unwrap();
    Ok(text)
}
