//! One program, compiled against candle's llama and against ours, says the same.
#![allow(clippy::unwrap_used, reason = "tests")]

use candle_core::DType;
use candle_transformers::generation::Sampling;
use std::path::PathBuf;

mod with_candle {
    use candle_transformers::models::llama as model;
    include!("swap/llama_app.rs");
}

mod with_candle_sparse {
    use candle_sparse_models::llama as model;
    include!("swap/llama_app.rs");
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/testdata/tales-silu")
}

/// Both programs with the same arguments; the fields are those of two types.
macro_rules! both {
    ($($field:ident: $value:expr),*) => {{
        let candle = with_candle::main(&folder(), &with_candle::Args { $($field: $value),* }).unwrap();
        let ours = with_candle_sparse::main(&folder(), &with_candle_sparse::Args { $($field: $value),* }).unwrap();
        assert!(ours.len() > 20);
        (ours, candle)
    }};
}

#[test]
fn only_the_import_differs() {
    for prompt in ["Once upon a time", "KING RICHARD:\nWhat, "] {
        let (ours, candle) = both!(prompt: prompt, dtype: DType::F32, sample_len: 150, no_kv_cache: false,
            sampling: Sampling::ArgMax, repeat_penalty: 1.1);
        assert_eq!(ours, candle, "{prompt}");
    }
}

#[test]
fn every_way_to_sample_draws_the_same() {
    let temperature = 0.8;
    for sampling in [
        Sampling::All { temperature },
        Sampling::TopK { k: 40, temperature },
        Sampling::TopP { p: 0.9, temperature },
        Sampling::TopKThenTopP { k: 40, p: 0.9, temperature },
    ] {
        let (ours, candle) = both!(prompt: "Once upon a time", dtype: DType::F32, sample_len: 80, no_kv_cache: false,
            sampling: sampling.clone(), repeat_penalty: 1.0);
        assert_eq!(ours, candle, "{sampling:?}");
    }
}

#[test]
fn without_a_cache_the_whole_text_is_read_again() {
    let (ours, candle) = both!(prompt: "Once upon a time", dtype: DType::F32, sample_len: 30, no_kv_cache: true,
        sampling: Sampling::ArgMax, repeat_penalty: 1.1);
    assert_eq!(ours, candle);
    let (cached, _) = both!(prompt: "Once upon a time", dtype: DType::F32, sample_len: 30, no_kv_cache: false,
        sampling: Sampling::ArgMax, repeat_penalty: 1.1);
    assert_eq!(ours, cached);
}

/// candle rounds activations to 11 bits there, we do not: texts agree until two words are nearly as likely.
#[test]
fn in_f16_the_same_program_runs() {
    let (ours, candle) = both!(prompt: "Once upon a time", dtype: DType::F16, sample_len: 60, no_kv_cache: false,
        sampling: Sampling::ArgMax, repeat_penalty: 1.1);
    let same = ours.iter().zip(&candle).take_while(|(a, b)| a == b).count();
    assert!(same > 20, "{ours:?} {candle:?}");
}

#[test]
fn configurations_and_embeddings_are_candles() {
    assert_eq!(with_candle_sparse::configs(&folder()), with_candle::configs(&folder()));
    let ids = [0, 300, 41, 1999, 7, 7, 512];
    let candle = with_candle::by_embeddings(&folder(), &ids).unwrap();
    let ours = with_candle_sparse::by_embeddings(&folder(), &ids).unwrap();
    let size = candle.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    let worst = ours.iter().zip(&candle).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= 1e-4 * size, "{worst} of {size}");
}
