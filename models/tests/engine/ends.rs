//! How texts end: tokens, texts, lengths, errors.

use crate::parts::{Draw, engine, loaded, model, run, tokenizer};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sparse_models::{
    engine::{Engine, EngineOptions, EventKind, FinishReason, Request},
    llama::{Llama, LoadOptions},
    sampling::Sampling,
    tokenizer::prompt_tokens,
};
use std::collections::HashMap;

fn story() -> Request {
    let prompt = prompt_tokens(&tokenizer(), "Once upon a time").unwrap();
    Request::new(prompt).with_sampling(Sampling::greedy()).with_max_tokens(40)
}

#[test]
fn a_stop_text_ends_a_text_wherever_it_lies_across_tokens() {
    let mut engine = engine(&model(), EngineOptions::default());
    let whole = run(&mut engine, [story()]).remove(0);
    assert!(whole.text.is_ascii() && whole.text.len() > 60, "{}", whole.text);
    for start in 20..40 {
        for len in [1, 5, 12] {
            let stop = whole.text[start..start + len].to_string();
            let wanted = &whole.text[..whole.text.find(&stop).unwrap()];
            let came = run(&mut engine, [story().with_stop(vec!["never".into(), stop.clone()])]).remove(0);
            assert_eq!((&*came.text, came.reason()), (wanted, FinishReason::StopText), "{stop:?}");
            assert!(whole.ids.starts_with(&came.ids));
        }
    }
    // What only looked like one comes with the end.
    let almost = format!("{}#", &whole.text[whole.text.len() - 3..]);
    let came = run(&mut engine, [story().with_stop(vec![almost])]).remove(0);
    assert_eq!((came.text, came.finished.unwrap().text.len()), (whole.text, 3));
}

#[test]
fn an_end_token_ends_a_text_and_is_not_of_it() {
    let mut engine = engine(&model(), EngineOptions::default());
    let whole = run(&mut engine, [story()]).remove(0);
    for at in 0..20 {
        let came = run(&mut engine, [story().with_end_tokens(vec![1, whole.ids[at]])]).remove(0);
        let first = whole.ids.iter().position(|id| *id == whole.ids[at]).unwrap();
        assert_eq!((&*came.ids, came.reason()), (&whole.ids[..first], FinishReason::EndToken));
    }
}

#[test]
fn a_full_context_ends_a_text() {
    let mut engine = engine(&model(), EngineOptions::default());
    let prompt = Draw(1).ids(1000);
    let came = run(&mut engine, [Request::new(prompt).with_max_tokens(1000)]).remove(0);
    assert_eq!((came.ids.len(), came.reason()), (24, FinishReason::Context));
}

#[test]
fn text_is_that_of_the_tokens_and_none_without_a_tokenizer() {
    let mut with = engine(&model(), EngineOptions::default());
    let whole = run(&mut with, [story()]).remove(0);
    assert_eq!(whole.text, tokenizer().decode(&whole.ids, true).unwrap());
    let mut without = Engine::new(&model(), None, EngineOptions::default()).unwrap();
    let came = run(&mut without, [story()]).remove(0);
    assert_eq!((came.ids, &*came.text), (whole.ids, ""));
}

#[test]
fn probabilities_come_with_tokens_that_are_asked_for_them() {
    let mut engine = engine(&model(), EngineOptions::default());
    engine.add(story().with_max_tokens(5).with_top_logprobs(Some(3))).unwrap();
    let mut tokens = 0;
    while !engine.is_idle() {
        for event in engine.step() {
            let EventKind::Token { id, logprobs, .. } = event.kind else { continue };
            let logprobs = logprobs.unwrap();
            // Greedy: the most likely one.
            assert_eq!((logprobs.top.len(), logprobs.top[0]), (3, (id, logprobs.logprob)));
            assert!(logprobs.logprob < 0.0 && logprobs.top.is_sorted_by(|a, b| a.1 >= b.1));
            tokens += 1;
        }
    }
    assert_eq!(tokens, 5);
}

/// A model that says NaN behind one token of its vocabulary.
fn broken() -> Llama {
    let loaded = loaded(LoadOptions::default());
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu/model.safetensors");
    let mut tensors: HashMap<String, Tensor> = candle_core::safetensors::load(folder, &Device::Cpu).unwrap();
    let name = "model.embed_tokens.weight";
    let table = tensors[name].to_dtype(DType::F32).unwrap();
    let mut rows = table.to_vec2::<f32>().unwrap();
    // Of the head: the embedding of every token but this one is as it was.
    let head = Tensor::new(rows.clone(), &Device::Cpu).unwrap();
    rows[7].fill(f32::NAN);
    tensors.insert(name.into(), Tensor::new(rows, &Device::Cpu).unwrap());
    tensors.insert("lm_head.weight".into(), head);
    let mut config = loaded.config;
    config.tie_word_embeddings = false;
    Llama::load(VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu), &config).unwrap()
}

#[test]
fn logits_that_are_no_numbers_end_their_sequence_alone() {
    let model = broken();
    let good = |seed| {
        let prompt: Vec<u32> = Draw(seed).ids(20).into_iter().map(|id| id.max(8)).collect();
        Request::new(prompt).with_sampling(Sampling::greedy()).with_max_tokens(10)
    };
    let wanted = run(&mut engine(&model, EngineOptions::default()), [good(1), good(2)]);
    assert!(wanted.iter().all(|o| o.reason() == FinishReason::Length));
    let mut bad = good(3);
    bad.prompt.push(7);
    let mut engine = engine(&model, EngineOptions::default());
    let came = run(&mut engine, [good(1), bad, good(2)]);
    assert_eq!((&came[0].ids, &came[2].ids), (&wanted[0].ids, &wanted[1].ids));
    let finished = came[1].finished.clone().unwrap();
    assert_eq!(finished.reason, FinishReason::Failed);
    assert!(finished.error.unwrap().contains("not numbers"));
    assert_eq!(engine.stats().failed, 1);
}
