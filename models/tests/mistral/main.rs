//! The drop-in Mistral against candle's up to the sliding window, against plain tensor ops beyond it, and by itself.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../llama/cases.rs"]
#[allow(dead_code, reason = "what the tests of Llama alone need")]
mod cases;
mod embeddings;
mod logits;
mod memory;
mod quantized;
mod reference;
mod sparse;
mod swap;
mod swap_quantized;

use candle_core::{DType, Tensor};
use candle_nn::Activation;
use candle_sparse_models::mistral::{Config, Model};
use candle_transformers::models::mistral as candle_mistral;
use std::collections::HashMap;

/// Positions of the tiny models.
const CONTEXT: usize = 640;
/// No whole pages, less than a page, and one that no position reaches.
const WINDOWS: [usize; 3] = [48, 20, 700];

/// A tiny Mistral, with groups of three query heads and a width that is no multiple of 32.
fn config(sliding_window: Option<usize>) -> Config {
    Config {
        vocab_size: cases::VOCAB,
        hidden_size: 72,
        intermediate_size: 100,
        num_hidden_layers: 3,
        num_attention_heads: 6,
        head_dim: Some(24),
        num_key_value_heads: 2,
        hidden_act: Activation::Silu,
        max_position_embeddings: CONTEXT,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        sliding_window,
        use_flash_attn: false,
    }
}

fn candle_config(c: &Config) -> candle_mistral::Config {
    candle_mistral::Config {
        vocab_size: c.vocab_size,
        hidden_size: c.hidden_size,
        intermediate_size: c.intermediate_size,
        num_hidden_layers: c.num_hidden_layers,
        num_attention_heads: c.num_attention_heads,
        head_dim: c.head_dim,
        num_key_value_heads: c.num_key_value_heads,
        hidden_act: c.hidden_act,
        max_position_embeddings: c.max_position_embeddings,
        rms_norm_eps: c.rms_norm_eps,
        rope_theta: c.rope_theta,
        sliding_window: c.sliding_window,
        use_flash_attn: c.use_flash_attn,
    }
}

fn weights(c: &Config) -> HashMap<String, Tensor> {
    cases::weights(&c.to_llama().unwrap(), DType::F32)
}

fn model(c: &Config) -> Model {
    Model::new(c, cases::builder(&weights(c), DType::F32)).unwrap()
}

/// Some tokens of a text of one sequence.
fn part(x: &Tensor, start: usize, n: usize) -> Tensor {
    x.narrow(1, start, n).unwrap()
}

/// The next `n` tokens of `x`, one by one; the logits of all, `[n, vocab]`.
fn decode(model: &mut Model, x: &Tensor, n: usize) -> Tensor {
    let start = model.cache().len();
    let one = |p| model.forward(&part(x, p, 1), p).unwrap().squeeze(0).unwrap();
    Tensor::cat(&(start..start + n).map(one).collect::<Vec<_>>(), 0).unwrap()
}

/// Root mean square of the difference, of that of `b`.
fn relative(a: &Tensor, b: &Tensor) -> f32 {
    let [a, b] = [a, b].map(|t| t.to_dtype(DType::F32).unwrap());
    let rms = |t: &Tensor| t.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    rms(&(a - &b).unwrap()) / rms(&b)
}
