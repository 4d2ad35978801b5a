//! Runs a task through a model.

use super::tasks::Task;
use candle_core::{Device, Result, Tensor};
use candle_sparse_models::llama::{Cache, Llama};

/// What a model answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reading {
    pub got: u32,
    pub expected: u32,
    /// Logit of the expected answer less the largest other one: positive where the answer is right.
    pub margin: f32,
}

/// Reads the context once into an empty `cache`, then decodes every question after it, cutting the cache back between them.
/// The cache holds the context and the last question afterwards.
///
/// # Errors
/// Those of [`Llama::forward`].
pub fn ask(llama: &Llama, cache: &mut Cache, task: &Task) -> Result<Vec<Reading>> {
    llama.forward(&ids(&task.context)?, 0, cache)?;
    let ask = |i: usize| {
        let question = &task.questions[i];
        let (mut at, mut reading) = (task.context.len(), None);
        cache.truncate(at);
        for token in &question.tokens {
            reading = Some(read(&llama.forward(&ids(&[*token])?, at, cache)?, question.answer)?);
            at += 1;
        }
        Ok(reading.expect("a question has a token"))
    };
    (0..task.questions.len()).map(ask).collect()
}

/// The same with context and question as one prompt, for every question anew.
///
/// # Errors
/// Those of [`Llama::forward`].
pub fn ask_at_once(llama: &Llama, cache: &mut Cache, task: &Task) -> Result<Vec<Reading>> {
    let ask = |i: usize| {
        cache.clear();
        read(&llama.forward(&ids(&task.prompt(i))?, 0, cache)?, task.questions[i].answer)
    };
    (0..task.questions.len()).map(ask).collect()
}

/// What logits `[1, vocab]` say.
///
/// # Errors
/// Another shape.
pub fn read(logits: &Tensor, expected: u32) -> Result<Reading> {
    let logits: Vec<f32> = logits.squeeze(0)?.to_vec1()?;
    let best = |without: Option<u32>| {
        let tokens = (0..logits.len()).filter(|t| Some(*t) != without.map(|w| w as usize));
        tokens.max_by(|a, b| logits[*a].total_cmp(&logits[*b])).expect("two tokens or more")
    };
    let margin = logits[expected as usize] - logits[best(Some(expected))];
    Ok(Reading { got: best(None) as u32, expected, margin })
}

/// Token ids `[1, length]`.
///
/// # Errors
/// Those of candle.
pub fn ids(tokens: &[u32]) -> Result<Tensor> {
    Tensor::from_slice(tokens, (1, tokens.len()), &Device::Cpu)
}
