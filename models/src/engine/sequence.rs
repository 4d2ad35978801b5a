//! A sequence that is read or written.

use super::{EventKind, FinishReason, Finished, Request, SequenceId, TokenLogprobs, failure::caught};
use crate::{
    decoder::{Decoder, Scratch, Turn},
    kv_cache::KvCache,
    pretrained::first_line,
    sampling::Sampler,
    speculation::{Costs, Drafter, Expected, Speculation},
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
    pub(super) client: u64,
    /// In which round of all clients its turn came.
    pub(super) round: u64,
    /// Whether it stands still for another client's sake.
    pub(super) is_paused: bool,
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
    drafter: Drafter,
    /// What it reads in this step: its last token, and guesses of those that follow.
    turn: Vec<u32>,
}

/// What a sequence begins with.
#[derive(Debug)]
pub(super) struct Start {
    pub(super) id: SequenceId,
    pub(super) round: u64,
    /// Empty.
    pub(super) cache: KvCache,
    pub(super) reserved: usize,
}

/// Tokens, or the end of a text, or both.
#[derive(Debug, Default)]
pub(super) struct Written {
    pub(super) tokens: Vec<EventKind>,
    pub(super) end: Option<FinishReason>,
    pub(super) error: Option<String>,
    /// Tokens that were guessed, and those of them that were right.
    pub(super) drafted: usize,
    pub(super) accepted: usize,
}

impl Written {
    /// Nothing: its step failed.
    pub(super) fn failed(error: String) -> Self {
        Self { end: Some(FinishReason::Failed), error: Some(error), ..Self::default() }
    }
}

impl Sequence {
    /// # Errors
    /// The request's sampling makes no sense.
    pub(super) fn new(
        start: Start,
        request: Request,
        tokenizer: Option<&Arc<Tokenizer>>,
        speculation: &Speculation,
    ) -> Result<Self> {
        let Start { id, round, cache, reserved } = start;
        Ok(Self {
            id,
            priority: request.priority,
            client: request.client,
            round,
            is_paused: false,
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
            drafter: Drafter::new(speculation.clone()),
            turn: Vec::new(),
        })
    }

    pub(super) fn prompt(&self) -> &[u32] {
        &self.ids[..self.prompt_len]
    }

    /// Whether a token of it is written in each step.
    pub(super) fn is_writing(&self) -> bool {
        !self.is_paused && matches!(self.stage, Stage::Writing)
    }

    /// Whether a chunk of its prompt can be read, once the beginning is there.
    pub(super) fn is_reading(&self) -> bool {
        !self.is_paused && matches!(self.stage, Stage::New | Stage::Reading)
    }

    /// Its prompt is read.
    pub(super) fn begin_writing(&mut self) {
        self.stage = Stage::Writing;
        if !self.drafter.is_off() {
            self.drafter.read(0, &self.ids);
        }
    }

    /// Decides what it reads in this step beside so many tokens of others; how many tokens that is.
    pub(super) fn choose_turn(&mut self, decoder: &Decoder, costs: &Costs, others: usize) -> usize {
        let last = self.ids[self.cache.len()];
        self.turn.clear();
        self.turn.push(last);
        if self.drafter.is_off() {
            return 1;
        }
        let left = self.max_tokens.saturating_sub(self.ids.len() - self.prompt_len + 1);
        let most = left.min(decoder.most_tokens(self.cache.len()) - 1);
        let draft = match others {
            0 => {
                let (sampler, written) = (Some(self.sampler.clone()), self.ids[self.prompt_len..].to_vec());
                let expected = Expected { sampler, written, left };
                self.drafter.draft(last, decoder, &self.cache, costs, &expected, most)
            }
            _ => self.drafter.looked_up(costs, most, others).0,
        };
        self.turn.extend(draft);
        if decoder.check_turn(&self.turn, &self.cache).is_err() {
            self.turn.truncate(1);
        }
        self.turn.len()
    }

    /// Tokens that it reads in this step.
    pub(super) fn rows(&self) -> usize {
        self.turn.len()
    }

    pub(super) fn turn(&mut self) -> Turn<'_> {
        let Self { turn, cache, scratch, .. } = self;
        Turn { ids: turn, cache, scratch }
    }

    /// [`Self::write`], whatever goes wrong.
    pub(super) fn write_caught(&mut self, logits: &[f32], vocab_size: usize) -> Written {
        let written = caught(|| Ok(self.write(logits, vocab_size)));
        written.unwrap_or_else(|failure| Written::failed(failure.text()))
    }

    /// Chooses the next tokens by `logits` `[rows, vocab_size]`: one, and another one as long as the token before was guessed.
    fn write(&mut self, logits: &[f32], vocab_size: usize) -> Written {
        let mut written = Written::default();
        let draft = std::mem::take(&mut self.turn);
        let (draft, end) = (draft.get(1..).unwrap_or_default(), self.cache.len());
        let mut rows = 0;
        for logits in logits.chunks_exact(vocab_size) {
            rows += 1;
            let Some(id) = self.write_one(logits, &mut written) else { break };
            if draft.get(rows - 1) != Some(&id) {
                break;
            }
            written.accepted += 1;
            if written.end.is_some() {
                break;
            }
        }
        // What was guessed wrong is as if it had never been read.
        self.cache.truncate(end - draft.len() + rows - 1);
        written.drafted = draft.len();
        if !draft.is_empty() {
            let wrong = written.accepted < rows && rows <= draft.len();
            self.drafter.judged(draft.len(), written.accepted, wrong);
        }
        written
    }

    /// Chooses a token; `None`: it is no part of the text, which has ended.
    fn write_one(&mut self, logits: &[f32], written: &mut Written) -> Option<u32> {
        let id = match self.sampler.sample(logits, &self.ids[self.prompt_len..]) {
            Ok(id) => id,
            Err(error) => {
                (written.end, written.error) = (Some(FinishReason::Failed), Some(first_line(&error)));
                return None;
            }
        };
        if self.end_tokens.contains(&id) {
            written.end = Some(FinishReason::EndToken);
            return None;
        }
        let logprobs = self.top_logprobs.map(|top| logprobs(logits, id, top));
        if !self.drafter.is_off() {
            self.drafter.read(self.ids.len(), &[id]);
        }
        self.ids.push(id);
        let piece = self.stream.as_mut().map(|stream| stream.push(id)).unwrap_or_default();
        let text = self.text.push(&piece);
        let ends = [
            (self.text.stopped(), FinishReason::StopText),
            (self.ids.len() - self.prompt_len >= self.max_tokens, FinishReason::Length),
            (self.ids.len() >= self.cache.max_positions(), FinishReason::Context),
        ];
        written.end = ends.into_iter().find(|(ends, _)| *ends).map(|(_, reason)| reason);
        written.tokens.push(EventKind::Token { id, text, logprobs });
        Some(id)
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
