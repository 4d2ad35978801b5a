//! Logits and tokens of candle's own model on the same weights.

use crate::cases::{CASES, argmax, builder, tokens, weights, worst};
use candle_core::{DType, Device, Tensor};
use candle_sparse_models::llama::{Cache, Llama};
use candle_transformers::models::llama as candle_llama;

#[test]
fn logits_equal_candles_for_every_prompt_length_and_chunking() {
    for case in CASES {
        let config = case.config();
        let w = weights(&config, DType::F32);
        let ours = Llama::load(builder(&w, DType::F32), &config).unwrap();
        let theirs = candle_llama::Llama::load(builder(&w, DType::F32), &case.candle_config()).unwrap();
        let new_cache =
            || candle_llama::Cache::new(true, DType::F32, &case.candle_config(), &Device::Cpu).unwrap();
        for (batch, n) in [(1, 1), (1, 2), (1, 31), (1, 257), (3, 1), (3, 31), (3, 257), (1, 530)] {
            let x = tokens(batch, n, 7);
            let mut cache = Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
            let got = ours.forward(&x, 0, &mut cache).unwrap();
            let mut candle_cache = new_cache();
            let want = theirs.forward(&x, 0, &mut candle_cache).unwrap();
            let diff = worst(&got, &want);
            assert!(diff <= 1e-4, "{}: batch {batch}, {n} tokens: {diff}", case.name);

            // Then decode, and the same in chunks.
            let next = tokens(batch, 1, 99);
            let (a, b) = (
                ours.forward(&next, n, &mut cache).unwrap(),
                theirs.forward(&next, n, &mut candle_cache).unwrap(),
            );
            assert!(worst(&a, &b) <= 1e-4, "{}: decode after {n}", case.name);
            if n > 2 {
                let mut cache = Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
                for (start, len) in [(0, n / 3), (n / 3, 1), (n / 3 + 1, n - n / 3 - 1)] {
                    let chunked = ours.forward(&x.narrow(1, start, len).unwrap(), start, &mut cache).unwrap();
                    if start + len == n {
                        assert!(worst(&chunked, &want) <= 1e-4, "{}: chunks of {n}", case.name);
                    }
                }
            }
        }
    }
}

#[test]
fn two_hundred_greedy_tokens_equal_candles() {
    for case in CASES {
        let config = case.config();
        let w = weights(&config, DType::F32);
        let ours = Llama::load(builder(&w, DType::F32), &config).unwrap();
        let theirs = candle_llama::Llama::load(builder(&w, DType::F32), &case.candle_config()).unwrap();
        let mut cache = Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
        let mut candle_cache =
            candle_llama::Cache::new(true, DType::F32, &case.candle_config(), &Device::Cpu).unwrap();
        let (mut x, mut pos) = (tokens(1, 5, 3), 0);
        for step in 0..200 {
            let (a, b) = (
                ours.forward(&x, pos, &mut cache).unwrap(),
                theirs.forward(&x, pos, &mut candle_cache).unwrap(),
            );
            assert_eq!(argmax(&a), argmax(&b), "{}: token {step}", case.name);
            pos += x.dim(1).unwrap();
            x = Tensor::new(&[[argmax(&a)]], &Device::Cpu).unwrap();
        }
    }
}

#[test]
fn half_precision_is_within_its_own_rounding() {
    for dtype in [DType::F16, DType::BF16] {
        for case in CASES {
            let config = case.config();
            let w = weights(&config, dtype);
            let ours = Llama::load(builder(&w, dtype), &config).unwrap();
            // The exact result on the same rounded weights, from candle in f32.
            let wide = w.iter().map(|(k, v)| (k.clone(), v.to_dtype(DType::F32).unwrap())).collect();
            let theirs =
                candle_llama::Llama::load(builder(&wide, DType::F32), &case.candle_config()).unwrap();
            let x = tokens(1, 40, 5);
            let mut candle_cache =
                candle_llama::Cache::new(true, DType::F32, &case.candle_config(), &Device::Cpu).unwrap();
            let want = theirs.forward(&x, 0, &mut candle_cache).unwrap();
            // With an f32 cache only sums are rounded; a half cache rounds keys and values.
            for (kv, bound) in [(DType::F32, 1e-4), (DType::F16, 2e-2), (DType::BF16, 8e-2)] {
                let mut cache = Cache::new(true, kv, &config, &Device::Cpu).unwrap();
                let diff = worst(&ours.forward(&x, 0, &mut cache).unwrap(), &want);
                assert!(diff <= bound, "{} {dtype:?} kv {kv:?}: {diff}", case.name);
            }
            assert_eq!(ours.decoder().weight_bytes() % 2, 0);
        }
    }
}
