//! `quantized_mistral` against candle's on files with Hugging Face names.

use crate::{
    CONTEXT, candle_config,
    cases::{builder, tokens, worst},
    decode as decode_floats, part, reference, relative, weights,
};
use candle_core::{
    DType, Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file},
};
use candle_nn::Activation;
use candle_sparse_models::{
    mistral,
    quantized_mistral::{self as ours, Config, VarBuilder},
};
use candle_transformers::models::quantized_mistral as theirs;
use std::{collections::HashMap, io::Cursor};

const PROMPT: usize = 24;
const LEN: usize = 40;

/// As [`crate::config`], with whole blocks and the heads that candle reckons: `hidden_size / num_attention_heads`.
fn config(sliding_window: Option<usize>) -> Config {
    Config {
        hidden_size: 256,
        intermediate_size: 512,
        num_attention_heads: 4,
        head_dim: Some(64),
        num_key_value_heads: 2,
        ..crate::config(sliding_window)
    }
}

/// A file as candle writes it: matrices of one type, norms in F32.
fn file(c: &Config, dtype: GgmlDType) -> HashMap<String, QTensor> {
    let quantized = |(name, t): (String, Tensor)| {
        let dtype = if t.rank() == 2 { dtype } else { GgmlDType::F32 };
        (name, QTensor::quantize(&t, dtype).unwrap())
    };
    weights(c).into_iter().map(quantized).collect()
}

fn written(tensors: &HashMap<String, QTensor>) -> VarBuilder {
    let tensors: Vec<_> = tensors.iter().map(|(name, t)| (name.as_str(), t)).collect();
    let mut out = Cursor::new(Vec::new());
    gguf_file::write(&mut out, &[], &tensors).unwrap();
    VarBuilder::from_gguf_buffer(&out.into_inner(), &Device::Cpu).unwrap()
}

/// What the file holds, as floats.
fn floats(tensors: &HashMap<String, QTensor>) -> HashMap<String, Tensor> {
    tensors.iter().map(|(name, t)| (name.clone(), t.dequantize(&Device::Cpu).unwrap())).collect()
}

/// Logits `[n, vocab]` of a prompt and of the tokens after it, one by one, through calls that both models have.
macro_rules! logits {
    ($model:expr, $x:expr, $prompt:expr) => {{
        let (mut model, x) = ($model, $x);
        let mut all = vec![model.forward(&part(x, 0, $prompt), 0).unwrap()];
        for p in $prompt..x.dim(1).unwrap() {
            all.push(model.forward(&part(x, p, 1), p).unwrap());
        }
        assert!(all.iter().all(|l| l.dims() == [1, 1, crate::cases::VOCAB] && l.dtype() == DType::F32));
        Tensor::cat(&all, 0).unwrap().squeeze(1).unwrap()
    }};
}

#[test]
fn every_type_gives_candles_logits() {
    let (c, x) = (config(None), tokens(1, LEN, 7));
    for dtype in
        [GgmlDType::F32, GgmlDType::F16, GgmlDType::Q8_0, GgmlDType::Q4_0, GgmlDType::Q4K, GgmlDType::Q6K]
    {
        let tensors = file(&c, dtype);
        let ours = logits!(ours::Model::new(&c, written(&tensors)).unwrap(), &x, PROMPT);
        let theirs = theirs::Model::new(&candle_config(&c), written(&tensors)).unwrap();
        let theirs = logits!(theirs, &x, PROMPT);
        if dtype == GgmlDType::F32 {
            assert!(worst(&ours, &theirs) <= 1e-4, "{}", worst(&ours, &theirs));
        }
        // With blocks both crates round activations to 8 bits, each over groups of its own: we must come as near to the
        // exact products with what the file holds as candle does.
        let exact = reference::logits(&c, &floats(&tensors), &x, |i, j| j <= i).unwrap();
        let exact = exact.narrow(0, PROMPT - 1, LEN - PROMPT + 1).unwrap();
        let [ours, theirs] = [relative(&ours, &exact), relative(&theirs, &exact)];
        assert!(ours <= 1.1 * theirs + 1e-5, "{dtype:?}: {ours} from the exact logits, candle {theirs}");
        assert!(theirs < 0.04, "{dtype:?}: candle says something else: {theirs}");
    }
}

#[test]
fn batches_and_a_second_text_give_candles_logits() {
    let (c, x) = (config(None), tokens(3, 20, 2));
    let tensors = file(&c, GgmlDType::F32);
    let mut ours = ours::Model::new(&c, written(&tensors)).unwrap();
    let mut theirs = theirs::Model::new(&candle_config(&c), written(&tensors)).unwrap();
    for seed in [3, 4] {
        let (a, b) = (ours.forward(&x, 0).unwrap(), theirs.forward(&x, 0).unwrap());
        assert_eq!(a.dims(), [3, 1, c.vocab_size]);
        assert!(worst(&a, &b) <= 1e-4);
        let next = tokens(3, 1, seed);
        let diff = worst(&ours.forward(&next, 20).unwrap(), &theirs.forward(&next, 20).unwrap());
        assert!(diff <= 1e-4, "{diff}");
        ours.clear_kv_cache();
        theirs.clear_kv_cache();
        assert!(ours.cache().is_empty());
    }
}

#[test]
fn beyond_the_window_logits_are_those_of_its_mask() {
    let (window, n) = (48, 150);
    let (c, x) = (config(Some(window)), tokens(1, n, 3));
    // What 8 bits for activations may cost is as above.
    for (dtype, bound) in [(GgmlDType::F32, 1e-4), (GgmlDType::Q8_0, 0.04)] {
        let tensors = file(&c, dtype);
        let masked = |w| reference::logits(&c, &floats(&tensors), &x, |i, j| j <= i && i - j < w).unwrap();
        let (want, all) = (masked(window), masked(n));
        for prompt in [1, 60, n] {
            let got = logits!(ours::Model::new(&c, written(&tensors)).unwrap(), &x, prompt);
            let from = prompt - 1;
            let off = relative(&got, &want.narrow(0, from, n - from).unwrap());
            assert!(off <= bound, "{dtype:?}, a prompt of {prompt}: {off}");
        }
        let last = |t: &Tensor| t.narrow(0, n - 1, 1).unwrap();
        let off = relative(&last(&all), &last(&want));
        assert!(off > 2.0 * bound, "{dtype:?}: the window must make a difference: {off}");
    }
    // The cache holds the window, not the text.
    let mut model = ours::Model::new(&c, written(&file(&c, GgmlDType::F32))).unwrap();
    for p in 0..n {
        model.forward(&part(&x, p, 1), p).unwrap();
    }
    // Keys and values of two heads of 64 channels in F32.
    let of_the_text = n * c.num_hidden_layers * 2 * 2 * 64 * 4;
    let bytes = model.cache().kv_bytes();
    assert!(bytes < of_the_text && bytes <= of_the_text * (window + 96) / n, "{bytes} of {of_the_text}");
}

#[test]
fn the_same_weights_say_what_the_unquantised_model_says() {
    let (c, x) = (config(Some(48)), tokens(1, 120, 5));
    let mut quantized = ours::Model::new(&c, written(&file(&c, GgmlDType::F32))).unwrap();
    let mut plain = mistral::Model::new(&c, builder(&weights(&c), DType::F32)).unwrap();
    let expected = decode_floats(&mut plain, &x, 120);
    let mut snapshot = None;
    for p in 0..120 {
        if p == 70 {
            snapshot = Some(quantized.clone());
        }
        let got = quantized.forward(&part(&x, p, 1), p).unwrap().squeeze(0).unwrap();
        assert!(worst(&got, &expected.narrow(0, p, 1).unwrap()) <= 1e-5, "at {p}");
    }
    let got = snapshot.unwrap().forward(&part(&x, 70, 1), 70).unwrap().squeeze(0).unwrap();
    assert!(worst(&got, &expected.narrow(0, 70, 1).unwrap()) <= 1e-5, "a clone has seen what it had seen");
}

#[test]
fn what_is_missing_or_wrong_is_named() {
    let c = config(None);
    let error = |c: &Config, tensors: &HashMap<String, QTensor>| {
        ours::Model::new(c, written(tensors)).unwrap_err().to_string()
    };
    for name in [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.2.self_attn.k_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.post_attention_layernorm.weight",
    ] {
        let mut tensors = file(&c, GgmlDType::Q4_0);
        tensors.remove(name);
        let e = error(&c, &tensors);
        assert!(e.contains(name), "{name}: {e}");
        // Of another shape than the configuration says.
        let other = Tensor::zeros((3, 32), DType::F32, &Device::Cpu).unwrap();
        tensors.insert(name.to_string(), QTensor::quantize(&other, GgmlDType::F32).unwrap());
        let e = error(&c, &tensors);
        assert!(e.contains(name) && e.contains("[3, 32]"), "{name}: {e}");
    }
    let tensors = file(&c, GgmlDType::F32);
    assert!(error(&Config { num_hidden_layers: 4, ..config(None) }, &tensors).contains("model.layers.3"));
    assert!(error(&Config { sliding_window: Some(0), ..config(None) }, &tensors).contains("sliding_window"));
    assert!(error(&Config { hidden_act: Activation::Mish, ..config(None) }, &tensors).contains("Mish"));
    let mut model = ours::Model::new(&c, written(&tensors)).unwrap();
    let e = model.forward(&tokens(1, CONTEXT + 1, 1), 0).unwrap_err().to_string();
    assert!(e.contains(&CONTEXT.to_string()), "{e}");
    let e = model.forward(&tokens(1, 1, 1), 5).unwrap_err().to_string();
    assert!(e.contains("gap"), "{e}");
}
