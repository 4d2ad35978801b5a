//! Embeddings as input, with and without a mask.

use crate::{
    candle_config,
    cases::{builder, tokens, worst},
    config, model, weights,
};
use candle_core::{DType, Device, Module, Tensor};
use candle_sparse_models::mistral::Model;
use candle_transformers::models::mistral as candle_mistral;

/// The mask `[1, 1, n, offset + n]` that is added to the scores.
fn mask(n: usize, offset: usize, window: usize, masked: f32) -> Tensor {
    let len = offset + n;
    let element = |i: usize| {
        let (query, key) = (offset + i / len, i % len);
        if key <= query && query - key < window { 0.0 } else { masked }
    };
    Tensor::from_vec((0..n * len).map(element).collect::<Vec<_>>(), (1, 1, n, len), &Device::Cpu).unwrap()
}

#[test]
fn the_embedding_is_candles_and_made_once() {
    let c = config(Some(48));
    let x = tokens(2, 9, 1);
    for dtype in [DType::F32, DType::BF16] {
        let vb = || builder(&weights(&c), dtype);
        let (ours, theirs) =
            (Model::new(&c, vb()).unwrap(), candle_mistral::Model::new(&candle_config(&c), vb()).unwrap());
        let got = ours.embed_tokens().forward(&x).unwrap();
        let want = theirs.embed_tokens().forward(&x).unwrap();
        assert_eq!(got.dtype(), dtype);
        let [got, want] = [got, want].map(|t| t.to_dtype(DType::F32).unwrap());
        assert_eq!(worst(&got, &want), 0.0);
        let other = ours.clone();
        assert!(std::ptr::eq(other.embed_tokens(), ours.embed_tokens()), "clones share the table");
    }
}

#[test]
fn embeddings_enter_as_tokens_do() {
    let c = config(Some(48));
    let (mut a, mut b) = (model(&c), model(&c));
    let mut position = 0;
    for n in [70, 1, 33, 1] {
        let x = tokens(1, n, position as u32);
        let want = a.forward(&x, position).unwrap();
        let embeds = a.embed_tokens().forward(&x).unwrap();
        // With the mask that it applies anyway, and without.
        for masked in [f32::NEG_INFINITY, f32::MIN, -65_504.0] {
            let mask = mask(n, position, 48, masked);
            assert_eq!(worst(&b.forward_embeds(&embeds, Some(&mask), position).unwrap(), &want), 0.0);
        }
        assert_eq!(worst(&b.forward_embeds(&embeds, None, position).unwrap(), &want), 0.0);
        position += n;
    }
}

#[test]
fn a_causal_mask_gives_candles_logits() {
    let c = config(Some(48));
    let mut theirs =
        candle_mistral::Model::new(&candle_config(&c), builder(&weights(&c), DType::F32)).unwrap();
    let mut ours = model(&c);
    let embeds = ours.embed_tokens().forward(&tokens(1, 40, 3)).unwrap();
    let causal = mask(40, 0, 48, f32::NEG_INFINITY);
    let want = theirs.forward_embeds(&embeds, Some(&causal), 0).unwrap();
    assert!(worst(&ours.forward_embeds(&embeds, Some(&causal), 0).unwrap(), &want) <= 1e-4);
    let one = ours.embed_tokens().forward(&tokens(1, 1, 9)).unwrap();
    let want = theirs.forward_embeds(&one, None, 40).unwrap();
    assert!(worst(&ours.forward_embeds(&one, None, 40).unwrap(), &want) <= 1e-4);
}

#[test]
fn another_mask_is_refused() {
    let c = config(Some(48));
    let mut model = model(&c);
    let embeds = model.embed_tokens().forward(&tokens(1, 60, 3)).unwrap();
    let zeros = Tensor::zeros((1, 1, 60, 60), DType::F32, &Device::Cpu).unwrap();
    let ones = Tensor::ones((60, 60), DType::U8, &Device::Cpu).unwrap();
    for other in [
        mask(60, 0, 49, f32::NEG_INFINITY),
        mask(60, 0, 60, f32::NEG_INFINITY),
        mask(60, 0, 48, -1.0),
        mask(60, 0, 48, f32::NAN),
        mask(30, 30, 48, f32::NEG_INFINITY),
        zeros,
        ones,
    ] {
        let error = model.forward_embeds(&embeds, Some(&other), 0).unwrap_err().to_string();
        assert!(error.contains("attn_mask") && error.contains("give None"), "{error}");
    }
    assert!(model.cache().is_empty());
}
