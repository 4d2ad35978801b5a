//! One interface over our models and candle's: the same tokens through one function, and what each can go back to.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../llama/cases.rs"]
#[allow(dead_code, reason = "what the tests of Llama alone need")]
mod cases;
mod models;
mod positions;

use candle_core::{DType, Device, Tensor};
use candle_sparse_models::causal_lm::CausalLm;
use cases::{argmax, tokens, worst};
use models::Checkpoint;

const PROMPT: [u32; 7] = [3, 141, 59, 265, 358, 97, 93];

/// What a model says after a prompt, whichever it is.
fn greedy<M: CausalLm + ?Sized>(model: &mut M, prompt: &[u32], n: usize) -> Vec<u32> {
    let mut ids = prompt.to_vec();
    let mut logits = forward(model, prompt, 0);
    for _ in 0..n {
        ids.push(argmax(&logits));
        let index_pos = ids.len() - 1;
        logits = forward(model, &ids[index_pos..], index_pos);
    }
    ids
}

fn forward<M: CausalLm + ?Sized>(model: &mut M, ids: &[u32], index_pos: usize) -> Tensor {
    let ids = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    model.forward(&ids, index_pos).unwrap()
}

#[test]
fn all_say_the_same_tokens_through_one_function() {
    let checkpoint = Checkpoint::new(None);
    let mut llama = checkpoint.llama_session();
    let expected = greedy(&mut llama, &PROMPT, 60);
    let said: std::collections::HashSet<_> = expected[PROMPT.len()..].iter().collect();
    assert!(said.len() > 10, "a model that repeats itself shows nothing: {expected:?}");
    let (names, mut models): (Vec<_>, Vec<Box<dyn CausalLm>>) = checkpoint.all().into_iter().unzip();
    assert_eq!(models.len(), 7);
    for (name, model) in names.iter().zip(&mut models) {
        assert_eq!(greedy(model.as_mut(), &PROMPT, 60), expected, "{name}");
        assert_eq!(model.cached_len(), PROMPT.len() + 60, "{name}");
    }
}

#[test]
fn logits_have_one_shape_and_type_for_batches_and_prompts_in_parts() {
    let x = tokens(3, 21, 5);
    let checkpoint = Checkpoint::new(None);
    let mut expected = checkpoint.llama_session();
    let expected = expected.forward(&x, 0).unwrap();
    for (name, mut model) in checkpoint.all() {
        let whole = model.forward(&x, 0).unwrap();
        assert_eq!((whole.dims(), whole.dtype()), (&[3, cases::VOCAB][..], DType::F32), "{name}");
        assert!(worst(&whole, &expected) <= 1e-4, "{name}: {}", worst(&whole, &expected));
        model.clear().unwrap();
        model.forward(&x.narrow(1, 0, 13).unwrap(), 0).unwrap();
        let parts = model.forward(&x.narrow(1, 13, 8).unwrap(), 13).unwrap();
        assert_eq!(model.cached_len(), 21, "{name}: tokens, not of all sequences together");
        assert!(worst(&parts, &expected) <= 1e-4, "{name} in parts: {}", worst(&parts, &expected));
    }
}

#[test]
fn half_precision_gives_logits_in_full() {
    let exact = forward(&mut Checkpoint::new(None).llama_session(), &PROMPT, 0);
    let half = Checkpoint::in_dtype(None, DType::F16);
    for (name, mut model) in half.in_memory() {
        let logits = forward(model.as_mut(), &PROMPT, 0);
        assert_eq!(logits.dtype(), DType::F32, "{name}");
        let off = worst(&logits, &exact);
        // Weights and, in candle's, activations in 11 bits.
        assert!(off > 0.0 && off < 0.03, "{name}: {off}");
    }
}
