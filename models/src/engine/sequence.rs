//! A sequence that is read or written.

use super::{EventKind, FinishReason, Finished, Request, SequenceId, TokenLogprobs};
use crate::{
    decoder::{Scratch, Turn},
    kv_cache::KvCache,
    sampling::Sampler,
    tokenizer::{StopTexts, TextStream},
};
use candle_core::Result;
use std::{path::PathBuf, sync::Arc, thread::JoinHandle, time::Instant};
use tokenizers::Tokenizer;

/// How far a sequence has come.
#[derive(Debug)]
pub(super) enum Stage {
    /// Nothing was read; what others have read of the same prefix was not looked up.
    New,
    /// The beginning of its prompt comes from a file.
    Loading(Loading),
    /// Its prompt is read chunk by chunk.
    Reading,
    /// Its last token is not read yet, all others are.
    Writing,
}

/// A file that is being read.
#[derive(Debug)]
pub(super) struct Loading {
    /// Gives its keys and values, and their tokens.
    pub(super) done: JoinHandle<Result<(KvCache, Vec<u32>)>>,
    pub(super) path: PathBuf,
    /// So many positions of it are wanted.
    pub(super) len: usize,
}

#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) id: SequenceId,
    pub(super) priority: i32,
    pub(super) deadline: Option<Instant>,
    /// Prompt and what was written.
    pub(super) ids: Vec<u32>,
    pub(super) prompt_len: usize,
    /// Positions that others had read.
    pub(super) cached_tokens: usize,
    pub(super) cache: KvCache,
    pub(super) scratch: Scratch,
    pub(super) stage: Stage,
    /// Bytes of the budget that it may come to take.
    pub(super) reserved: usize,
    /// When a chunk of its prompt was last read.
    pub(super) last_turn: u64,
    /// Where others want to begin with what it has read.
    pub(super) marks: Vec<usize>,
    max_tokens: usize,
    end_tokens: Vec<u32>,
    top_logprobs: Option<usize>,
    sampler: Sampler,
    stream: Option<TextStream<'static>>,
    text: StopTexts,
}

/// A token, or the end of a text, or both.
#[derive(Debug, Default)]
pub(super) struct Written {
    pub(super) token: Option<EventKind>,
    pub(super) end: Option<FinishReason>,
}

impl Sequence {
    /// # Errors
    /// The request's sampling makes no sense.
    pub(super) fn new(
        id: SequenceId,
        request: Request,
        tokenizer: Option<&Arc<Tokenizer>>,
        cache: KvCache,
        reserved: usize,
    ) -> Result<Self> {
        Ok(Self {
            id,
            priority: request.priority,
            deadline: request.deadline,
            prompt_len: request.prompt.len(),
            ids: request.prompt,
            cached_tokens: 0,
            cache,
            scratch: Scratch::default(),
            stage: Stage::New,
            reserved,
            last_turn: 0,
            marks: Vec::new(),
            max_tokens: request.max_tokens,
            end_tokens: request.end_tokens,
            top_logprobs: request.top_logprobs,
            sampler: Sampler::new(&request.sampling)?,
            stream: tokenizer.cloned().map(TextStream::shared),
            text: StopTexts::new(request.stop),
        })
    }

    pub(super) fn prompt(&self) -> &[u32] {
        &self.ids[..self.prompt_len]
    }

    pub(super) fn is_writing(&self) -> bool {
        matches!(self.stage, Stage::Writing)
    }

    /// Whether a chunk of its prompt can be read, once the beginning is there.
    pub(super) fn is_reading(&self) -> bool {
        matches!(self.stage, Stage::New | Stage::Reading)
    }

    /// What it reads next.
    pub(super) fn turn(&mut self) -> Turn<'_> {
        let Self { ids, cache, scratch, .. } = self;
        Turn { ids: &ids[cache.len()..], cache, scratch }
    }

    /// Chooses the next token by `logits` `[vocab_size]`.
    ///
    /// # Errors
    /// The logits are no numbers.
    pub(super) fn write(&mut self, logits: &[f32]) -> Result<Written> {
        let id = self.sampler.sample(logits, &self.ids[self.prompt_len..])?;
        if self.end_tokens.contains(&id) {
            return Ok(Written { token: None, end: Some(FinishReason::EndToken) });
        }
        let logprobs = self.top_logprobs.map(|top| logprobs(logits, id, top));
        self.ids.push(id);
        let piece = self.stream.as_mut().map(|stream| stream.push(id)).unwrap_or_default();
        let text = self.text.push(&piece);
        let ends = [
            (self.text.stopped(), FinishReason::StopText),
            (self.ids.len() - self.prompt_len >= self.max_tokens, FinishReason::Length),
            (self.ids.len() >= self.cache.max_positions(), FinishReason::Context),
        ];
        let end = ends.into_iter().find(|(ends, _)| *ends).map(|(_, reason)| reason);
        Ok(Written { token: Some(EventKind::Token { id, text, logprobs }), end })
    }

    /// What is told of its end.
    pub(super) fn finished(&mut self, reason: FinishReason, error: Option<String>) -> Finished {
        let mut text = std::mem::take(&mut self.text);
        let mut rest = text.push(&self.stream.take().map(TextStream::finish).unwrap_or_default());
        rest += &text.rest();
        Finished {
            reason,
            text: rest,
            prompt_tokens: self.prompt_len,
            cached_tokens: self.cached_tokens,
            completion_tokens: self.ids.len() - self.prompt_len,
            error,
        }
    }
}

/// Log-probabilities of a token and of the `n` most likely ones.
fn logprobs(logits: &[f32], id: u32, n: usize) -> TokenLogprobs {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - max).exp()).sum();
    let of = |l: f32| (f64::from(l - max) - sum.ln()) as f32;
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let larger = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if n < order.len() {
        order.select_nth_unstable_by(n, larger);
        order.truncate(n);
    }
    order.sort_unstable_by(larger);
    let top = order.into_iter().map(|id| (id, of(logits[id as usize]))).collect();
    TokenLogprobs { logprob: of(logits[id as usize]), top }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_those_of_a_softmax() {
        let logits = [1.0_f32, 3.0, 2.0, 3.0];
        let sum: f32 = logits.iter().map(|l| l.exp()).sum();
        let all = logprobs(&logits, 2, 3);
        assert!((all.logprob - (2.0 - sum.ln())).abs() < 1e-6);
        assert_eq!(all.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 3, 2], "of equals the first");
        assert!((all.top[0].1 - (3.0 - sum.ln())).abs() < 1e-6);
        assert_eq!(logprobs(&logits, 0, 0).top, []);
        assert_eq!(logprobs(&logits, 0, 99).top.len(), 4);
    }
}
