//! A Llama whose weights are set by hand so that it remembers: what stood after a name, two steps far, and how often.
//!
//! The residual stream has a place for everything a token knows:
//!
//! | place | holds | written by |
//! |---|---|---|
//! | `NAME` | the token's own code | embedding |
//! | `REFERS` | the code it asks for: its own, or that of the name it points to | embedding |
//! | `PREVIOUS` | `NAME` of the token before | layer 0 |
//! | `FIRST` | `REFERS` of the token that stands after the one asked for | layer 1 |
//! | `SECOND` | the same once more, asking for what `FIRST` found | layer 2 |
//! | `BAG` | mean of all `NAME`s so far | every layer |
//! | `RECENT` | mean of the latest `NAME`s, fading with the distance | every layer |
//! | `ONE`, `START` | a constant; whether the token is the first | embedding |
//! | `IS_NAME` | a little, if the token is a name | embedding |
//! | `AFTER_NAME` | the same of the token before: what follows a name is worth keeping, and a linear gate can see it | layer 0 |
//!
//! The head reads values from `FIRST` and `SECOND`, and all tokens, faintly, from `BAG` and `RECENT`.
//!
//! Query heads 0 and 1 share key/value head 0, which finds; 2 and 3 share key/value head 1, which looks around. In layer 0 a
//! finding key is a constant in the pairs that RoPE turns fast, where Σ cos((distance − 1)·ω) has one peak. In the
//! others it is `PREVIOUS`, in pairs that turn by about 0.01 at most over the whole context: positions do not matter there. Two
//! of these pairs are larger than the rest (and the query so much smaller), as in the keys of trained Llamas.
//! A query that finds nothing attends to the first token, whose value is 0. The MLPs are 0.

use super::{
    codes::{LEN, codes},
    matrix::Matrix,
};
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_sparse_models::llama::{Config, Llama, LlamaConfig};
use std::{collections::HashMap, ops::Range};

/// The first token of every text.
pub const START: u32 = 0;
/// Asks which value was the most frequent.
pub const MOST: u32 = 1;
/// Answers.
pub const VALUES: Range<u32> = 32..96;
/// What a value, or a reference, can be written after, and asked for by.
pub const NAMES: Range<u32> = 96..160;
/// A reference `REFERENCES.start + i` means the name `NAMES.start + i`.
pub const REFERENCES: Range<u32> = 160..224;
/// Tokens that mean nothing.
pub const FILLERS: Range<u32> = 224..512;

pub const VOCAB: usize = 512;
pub const CONTEXT: usize = 32_768;
pub const LAYERS: usize = 3;

const HIDDEN: usize = 256;
const INNER: usize = 64;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 64;
const PAIRS: usize = HEAD_DIM / 2;
const THETA: f64 = 1e13;

const NAME: usize = 0;
const REFERS: usize = 32;
const PREVIOUS: usize = 64;
const FIRST: usize = 96;
const SECOND: usize = 128;
const BAG: usize = 160;
const RECENT: usize = 192;
const ONE: usize = 224;
const IS_START: usize = 225;
const IS_NAME: usize = 226;
/// The channel of what a gate should see.
pub const AFTER_NAME: usize = 227;

/// Value of `IS_NAME`; small, so that the norm stays.
const NAMED: f32 = 0.4;
/// The channel of layer 0's values that carries it.
const NAMED_CHANNEL: usize = LEN;
/// Value of `ONE`; the larger, the less the norm of a token depends on what it has found.
const CONSTANT: f32 = 2.0;
/// Norm² of an embedding: two codes and the constant.
const ENERGY: f32 = 2.0 + CONSTANT * CONSTANT;

/// Pairs whose turns tell a distance of 1 from all others.
const FAST: Range<usize> = 0..8;
/// Nats of the token before, per pair; its neighbours have 26 less over all pairs, other tokens still less.
const STEP_NATS: f32 = 48.0;
/// Pairs whose turns make a recency that fades like a power of the distance.
const FADING: Range<usize> = 4..11;
const FADING_NATS: f32 = 0.7;
/// The pair of the first token, the slowest that no code uses.
const SINK: usize = 15;
/// Pairs of the codes.
const SLOW: usize = 16;
/// Pairs of the codes, counted among themselves, that are large in keys.
const OUTLIERS: [usize; 2] = [3, 9];
/// Score of the first token, of a found code's; other codes have a quarter at most.
const SINK_SHARE: f32 = 0.6;

/// Logit of what was found.
const LOGIT: f32 = 20.0;
/// How much more a share of `BAG` counts.
const BAG_GAIN: f32 = 3.0;

/// How easily the finding heads of layers 1 and 2 are led astray.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Score of a found code in nats: it is ahead of the first token by 0.4 of them, of all others by 0.75. Below 28 the others
    /// can outweigh, together, the first token at 16k positions: what finds nothing then finds a little of everything.
    pub found_nats: f32,
    /// How many times larger than the others four channels of the keys are.
    pub outlier: f32,
}

impl Default for Settings {
    fn default() -> Self {
        Self { found_nats: 60.0, outlier: 8.0 }
    }
}

pub fn config_json() -> String {
    format!(
        r#"{{"hidden_size": {HIDDEN}, "intermediate_size": {INNER}, "vocab_size": {VOCAB}, "num_hidden_layers": {LAYERS},
        "num_attention_heads": {HEADS}, "num_key_value_heads": {KV_HEADS}, "rms_norm_eps": 1e-5, "rope_theta": {THETA:e},
        "max_position_embeddings": {CONTEXT}, "tie_word_embeddings": false}}"#
    )
}

pub fn config() -> Config {
    serde_json::from_str::<LlamaConfig>(&config_json()).expect("a valid config").into_config(false)
}

/// The model in F32, with the default settings.
///
/// # Errors
/// Those of [`Llama::load`].
pub fn load() -> Result<Llama> {
    load_with(Settings::default())
}

/// The model in F32.
///
/// # Errors
/// Those of [`Llama::load`].
pub fn load_with(settings: Settings) -> Result<Llama> {
    Llama::load(VarBuilder::from_tensors(weights(settings)?, DType::F32, &Device::Cpu), &config())
}

/// The checkpoint, with Hugging Face names.
///
/// # Errors
/// Those of candle.
pub fn weights(settings: Settings) -> Result<HashMap<String, Tensor>> {
    let codes = codes(VOCAB, 1);
    let mut all = HashMap::new();
    all.insert("model.embed_tokens.weight".to_string(), embedding(&codes).into_tensor()?);
    all.insert("lm_head.weight".to_string(), head(&codes).into_tensor()?);
    all.insert("model.norm.weight".to_string(), ones()?);
    for layer in 0..LAYERS {
        let mut put = |name: &str, t: Tensor| all.insert(format!("model.layers.{layer}.{name}.weight"), t);
        put("input_layernorm", ones()?);
        put("post_attention_layernorm", ones()?);
        put("self_attn.q_proj", queries(layer, settings).into_tensor()?);
        put("self_attn.k_proj", keys(layer, settings).into_tensor()?);
        put("self_attn.v_proj", values(layer).into_tensor()?);
        put("self_attn.o_proj", output(layer).into_tensor()?);
        put("mlp.gate_proj", Matrix::zeros(INNER, HIDDEN).into_tensor()?);
        put("mlp.up_proj", Matrix::zeros(INNER, HIDDEN).into_tensor()?);
        put("mlp.down_proj", Matrix::zeros(HIDDEN, INNER).into_tensor()?);
    }
    Ok(all)
}

fn ones() -> Result<Tensor> {
    Tensor::ones(HIDDEN, DType::F32, &Device::Cpu)
}

fn embedding(codes: &[[f32; LEN]]) -> Matrix {
    let mut w = Matrix::zeros(VOCAB, HIDDEN);
    for token in 0..VOCAB as u32 {
        let row = token as usize;
        w.set(row, ONE, CONSTANT);
        if token == START {
            w.set(row, IS_START, 2_f32.sqrt());
            continue;
        }
        if NAMES.contains(&token) {
            w.set(row, IS_NAME, NAMED);
        }
        let refers = if REFERENCES.contains(&token) { name_of(token) } else { token };
        w.set_row(row, NAME, &codes[row]);
        w.set_row(row, REFERS, &codes[refers as usize]);
    }
    w
}

/// The name that a reference means.
pub fn name_of(reference: u32) -> u32 {
    assert!(REFERENCES.contains(&reference), "{reference} is no reference");
    reference - REFERENCES.start + NAMES.start
}

/// The reference that means a name.
pub fn reference_to(name: u32) -> u32 {
    assert!(NAMES.contains(&name), "{name} is no name");
    name - NAMES.start + REFERENCES.start
}

fn head(codes: &[[f32; LEN]]) -> Matrix {
    let mut w = Matrix::zeros(VOCAB, HIDDEN);
    let one = LOGIT / norm_gain(LAYERS);
    for token in START + 1..VOCAB as u32 {
        let row = token as usize;
        let code = &codes[row];
        let times = |gain: f32| code.map(|c| c * gain * one);
        if VALUES.contains(&token) {
            w.set_row(row, FIRST, &times(1.0));
            w.set_row(row, SECOND, &times(1.0));
        }
        if FILLERS.contains(&token) {
            w.set_row(row, RECENT, &times(1.0));
        }
        w.set_row(row, BAG, &times(BAG_GAIN));
    }
    w
}

/// What RMSNorm multiplies a token by before `layer` (or before the head): it has then found one code per layer.
fn norm_gain(layer: usize) -> f32 {
    (HIDDEN as f32 / (ENERGY + layer as f32)).sqrt()
}

/// Nats that the heads of layer 0 give a key so far back, less those of the token before.
pub fn step_score(distance: usize) -> f32 {
    let turned = |pair: usize| (frequency(pair) * (distance as f32 - 1.0)).cos() - 1.0;
    STEP_NATS * FAST.map(turned).sum::<f32>()
}

/// The angle by which the fastest pair of a code turns over the whole context.
pub fn turn_of_codes() -> f32 {
    frequency(SLOW) * CONTEXT as f32
}

fn frequency(pair: usize) -> f32 {
    THETA.powf(-(pair as f64) / PAIRS as f64) as f32
}

/// √ of what a query and a key must multiply to for so many nats.
fn amplitude(nats: f32) -> f32 {
    (nats * (HEAD_DIM as f32).sqrt()).sqrt()
}

/// Channel of element `i` of a code, and its scale in a key: both halves of a pair have the same one.
fn content(i: usize, settings: Settings) -> (usize, f32) {
    let (half, pair) = (i / (LEN / 2), i % (LEN / 2));
    (half * PAIRS + SLOW + pair, if OUTLIERS.contains(&pair) { settings.outlier } else { 1.0 })
}

fn queries(layer: usize, settings: Settings) -> Matrix {
    let mut w = Matrix::zeros(HEADS * HEAD_DIM, HIDDEN);
    let gain = 1.0 / norm_gain(layer);
    let one = gain / CONSTANT;
    for head in 0..2 {
        let row = head * HEAD_DIM;
        if layer == 0 {
            for pair in FAST {
                // Turned back by one position.
                let (sin, cos) = frequency(pair).sin_cos();
                w.set(row + pair, ONE, amplitude(STEP_NATS) * cos * one);
                w.set(row + PAIRS + pair, ONE, -amplitude(STEP_NATS) * sin * one);
            }
        } else {
            let asked = if layer == 1 { REFERS } else { FIRST };
            for i in 0..LEN {
                let (channel, scale) = content(i, settings);
                w.set(row + channel, asked + i, amplitude(settings.found_nats) / scale * gain);
            }
            w.set(row + SINK, ONE, amplitude(SINK_SHARE * settings.found_nats) * one);
        }
    }
    // Head 2 asks for nothing and attends to all alike.
    for pair in FADING {
        w.set(3 * HEAD_DIM + pair, ONE, amplitude(FADING_NATS) * one);
    }
    w
}

fn keys(layer: usize, settings: Settings) -> Matrix {
    let mut w = Matrix::zeros(KV_HEADS * HEAD_DIM, HIDDEN);
    let gain = 1.0 / norm_gain(layer);
    let one = gain / CONSTANT;
    if layer == 0 {
        FAST.for_each(|pair| w.set(pair, ONE, amplitude(STEP_NATS) * one));
    } else {
        for i in 0..LEN {
            let (channel, scale) = content(i, settings);
            w.set(channel, PREVIOUS + i, amplitude(settings.found_nats) * scale * gain);
        }
        w.set(SINK, IS_START, amplitude(SINK_SHARE * settings.found_nats) / 2_f32.sqrt() * gain);
    }
    FADING.for_each(|pair| w.set(HEAD_DIM + pair, ONE, amplitude(FADING_NATS) * one));
    w
}

fn values(layer: usize) -> Matrix {
    let mut w = Matrix::zeros(KV_HEADS * HEAD_DIM, HIDDEN);
    let gain = 1.0 / norm_gain(layer);
    w.copy(0, if layer == 0 { NAME } else { REFERS }, LEN, gain);
    w.copy(HEAD_DIM, NAME, LEN, gain);
    if layer == 0 {
        w.set(NAMED_CHANNEL, IS_NAME, gain);
    }
    w
}

fn output(layer: usize) -> Matrix {
    let mut w = Matrix::zeros(HIDDEN, HEADS * HEAD_DIM);
    let found = [PREVIOUS, FIRST, SECOND][layer];
    // Two heads that find the same.
    w.copy(found, 0, LEN, 0.5);
    w.copy(found, HEAD_DIM, LEN, 0.5);
    if layer == 0 {
        (0..2).for_each(|head| w.set(AFTER_NAME, head * HEAD_DIM + NAMED_CHANNEL, 0.5));
    }
    w.copy(BAG, 2 * HEAD_DIM, LEN, 1.0 / LAYERS as f32);
    w.copy(RECENT, 3 * HEAD_DIM, LEN, 1.0 / LAYERS as f32);
    w
}
