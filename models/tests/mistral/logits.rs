//! What the model says: candle's logits up to the window, the reference's beyond it.

use crate::{
    CONTEXT, WINDOWS, candle_config,
    cases::{builder, tokens, worst},
    config, decode, model, part, reference, weights,
};
use candle_core::{DType, Tensor};
use candle_sparse_models::{
    llama::LoadOptions,
    mistral::{Config, Model},
};
use candle_transformers::models::mistral as candle_mistral;

fn candles(c: &Config) -> candle_mistral::Model {
    candle_mistral::Model::new(&candle_config(c), builder(&weights(c), DType::F32)).unwrap()
}

/// The reference under a window's mask, `[n, vocab]`.
fn masked(c: &Config, x: &Tensor, window: usize) -> Tensor {
    reference::logits(c, &weights(c), x, |i, j| j <= i && i - j < window).unwrap()
}

#[test]
fn up_to_the_window_logits_are_candles() {
    for window in WINDOWS.map(Some).into_iter().chain([None]) {
        let c = config(window);
        let end = window.unwrap_or(150).min(150);
        for (batch, n) in [(1, 1), (1, 2), (1, end / 2), (1, end), (3, end / 2)] {
            let x = tokens(batch, end, 7);
            let (mut ours, mut theirs) = (model(&c), candles(&c));
            let prompt = part(&x, 0, n);
            let (a, b) = (ours.forward(&prompt, 0).unwrap(), theirs.forward(&prompt, 0).unwrap());
            assert_eq!(a.dims(), [batch, 1, c.vocab_size]);
            assert!(worst(&a, &b) <= 1e-4, "{window:?}: {batch} prompts of {n}: {}", worst(&a, &b));
            for p in n..end {
                let next = part(&x, p, 1);
                let diff = worst(&ours.forward(&next, p).unwrap(), &theirs.forward(&next, p).unwrap());
                assert!(diff <= 1e-4, "{window:?}: batch {batch} at {p}: {diff}");
            }
        }
    }
}

#[test]
fn beyond_the_window_logits_are_those_of_its_mask() {
    for window in WINDOWS {
        let (c, n) = (config(Some(window)), 300);
        let x = tokens(1, n, 3);
        let want = masked(&c, &x, window);
        let check = |name: &str, from: usize, got: &Tensor| {
            let diff = worst(got, &want.narrow(0, from, got.dim(0).unwrap()).unwrap());
            assert!(diff <= 1e-4, "window {window}, {name}: {diff}");
        };
        check("decode", 0, &decode(&mut model(&c), &x, n));
        let whole = model(&c);
        let all = whole.llama().forward_all(&x, 0, &mut whole.cache().clone()).unwrap();
        check("a whole prompt", 0, &all.squeeze(0).unwrap());
        for parts in [vec![300], vec![7; 42], vec![33; 9], vec![100, 1, 150, 49], vec![260, 3]] {
            let mut model = model(&c);
            for n in parts.iter().copied() {
                let start = model.cache().len();
                let got = model.forward(&part(&x, start, n), start).unwrap().squeeze(0).unwrap();
                check(&format!("parts {parts:?}"), start + n - 1, &got);
            }
            let (start, left) = (model.cache().len(), n - model.cache().len());
            if left > 0 {
                check("decode after parts", start, &decode(&mut model, &x, left));
            }
        }
    }
}

#[test]
fn the_window_makes_the_difference_and_is_not_candles() {
    let (c, n) = (config(Some(48)), 200);
    let x = tokens(1, n, 3);
    let last = |t: Tensor| t.narrow(0, n - 1, 1).unwrap();
    let got = model(&c).forward(&x, 0).unwrap().squeeze(0).unwrap();
    for (window, least) in [(47, 1e-3), (49, 1e-3), (n, 1e-2)] {
        let off = worst(&got, &last(masked(&c, &x, window)));
        assert!(off >= least, "a window of {window} would be off by {off}");
    }
    // candle sees one position more in a prompt, and all in decode.
    let theirs = candles(&c).forward(&x, 0).unwrap().squeeze(0).unwrap();
    assert!(worst(&theirs, &last(masked(&c, &x, 49))) <= 1e-4);
}

#[test]
fn batches_and_long_prompts_slide_too() {
    // More than the 512 positions that go through the layers together.
    let c = config(Some(48));
    let x = tokens(3, 600, 11);
    let mut together = model(&c);
    let got = together.forward(&x, 0).unwrap();
    let next = together.forward(&tokens(3, 1, 5), 600).unwrap();
    for b in 0..3 {
        let mut alone = model(&c);
        let (x, one) = (x.narrow(0, b, 1).unwrap(), tokens(3, 1, 5).narrow(0, b, 1).unwrap());
        assert!(worst(&alone.forward(&x, 0).unwrap(), &got.narrow(0, b, 1).unwrap()) <= 1e-5);
        assert!(worst(&alone.forward(&one, 600).unwrap(), &next.narrow(0, b, 1).unwrap()) <= 1e-5);
        let want = masked(&c, &x, 48).narrow(0, 599, 1).unwrap();
        assert!(worst(&got.narrow(0, b, 1).unwrap().squeeze(0).unwrap(), &want) <= 1e-4);
    }
}

#[test]
fn logits_have_the_dtype_of_the_checkpoint() {
    let c = config(Some(20));
    let x = tokens(1, 60, 2);
    let want = model(&c).forward(&x, 0).unwrap();
    for (dtype, bound) in [(DType::F16, 0.03), (DType::BF16, 0.2)] {
        let mut half = Model::new(&c, builder(&weights(&c), dtype)).unwrap();
        let got = half.forward(&x, 0).unwrap();
        assert_eq!((got.dtype(), got.dims()), (dtype, want.dims()));
        let diff = worst(&got.to_dtype(DType::F32).unwrap(), &want);
        assert!(diff <= bound, "{dtype:?}: {diff}");
    }
}

#[test]
fn threads_change_no_bit_beyond_the_window() {
    let c = config(Some(48));
    let run = |threads| {
        let options =
            LoadOptions::default().with_threads(Some(candle_sparse::Threads::new(threads).unwrap()));
        let mut model = Model::load_with(&c, builder(&weights(&c), DType::F32), options).unwrap();
        let prompt = model.forward(&tokens(1, 150, 1), 0).unwrap().squeeze(0).unwrap();
        let x = tokens(1, CONTEXT, 1);
        Tensor::cat(&[prompt, decode(&mut model, &x, 50)], 0).unwrap()
    };
    let all = candle_sparse::Threads::default().count();
    assert!(all > 1, "this test needs threads: set CANDLE_NUM_THREADS=4");
    assert_eq!(worst(&run(1), &run(all)), 0.0);
}

#[test]
fn what_cannot_be_loaded_is_named() {
    let c = config(Some(48));
    let w = weights(&c);
    let mut headless = w.clone();
    headless.remove("lm_head.weight");
    let error = |c: &Config, w| Model::new(c, builder(w, DType::F32)).unwrap_err().to_string();
    assert!(error(&Config { sliding_window: Some(0), ..c.clone() }, &w).contains("sliding_window"));
    let mish = Config { hidden_act: candle_nn::Activation::Mish, ..c.clone() };
    assert!(error(&mish, &w).contains("Mish"));
    assert!(error(&c, &headless).contains("lm_head.weight"));
}
