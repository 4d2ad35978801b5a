//! Several sequences on one set of weights.

mod event;
mod options;
mod request;
mod stats;

use crate::{
    decoder::{Input, Logits, Scratch, Step},
    kv_cache::KvCache,
    llama::Llama,
    sampling::Sampler,
    tokenizer::{StopTexts, TextStream},
};
use candle_core::Result;
use candle_sparse::Error;
pub use event::{Event, EventKind, FinishReason, Finished, TokenLogprobs};
pub use options::EngineOptions;
pub use request::{Request, SequenceId};
pub use stats::EngineStats;
use std::{collections::VecDeque, sync::Arc};
use tokenizers::Tokenizer;

/// Several sequences on one set of weights.
#[derive(Debug)]
pub struct Engine {
    model: Llama,
    tokenizer: Option<Arc<Tokenizer>>,
    options: EngineOptions,
    next_id: u64,
    queue: VecDeque<(SequenceId, Request)>,
    running: Vec<Sequence>,
    stats: EngineStats,
}

#[derive(Debug)]
struct Sequence {
    id: SequenceId,
    request: Request,
    cache: KvCache,
    scratch: Scratch,
    sampler: Sampler,
    ids: Vec<u32>,
    fed: usize,
    stream: Option<TextStream<'static>>,
    text: StopTexts,
}

impl Engine {
    /// An engine for a model; stop texts, and the texts of events, need the tokenizer.
    ///
    /// # Errors
    /// [`Error::Setting`]: an option makes no sense.
    pub fn new(model: &Llama, tokenizer: Option<Arc<Tokenizer>>, options: EngineOptions) -> Result<Self> {
        options.check()?;
        Ok(Self {
            model: model.clone(),
            tokenizer,
            options,
            next_id: 0,
            queue: VecDeque::new(),
            running: Vec::new(),
            stats: EngineStats::default(),
        })
    }

    /// Adds a request, which waits for its turn.
    ///
    /// # Errors
    /// [`Error::Full`]: too many wait. [`Error::Setting`]: the request can never be served.
    pub fn add(&mut self, request: Request) -> Result<SequenceId> {
        let wrong = |name, problem: &str| Err(Error::Setting { name, problem: problem.into() }.into());
        if request.prompt.is_empty() {
            return wrong("prompt", "it is empty: give at least one token");
        }
        if !request.stop.is_empty() && self.tokenizer.is_none() {
            return wrong("stop", "stop texts need a tokenizer: give Engine::new one");
        }
        if self.queue.len() >= self.options.max_queued {
            let problem = format!("{} requests wait already: try again later", self.queue.len());
            return Err(Error::Full { problem }.into());
        }
        request.sampling.check()?;
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        self.queue.push_back((id, request));
        Ok(id)
    }

    /// Does some work for all sequences that have any: at most one chunk of a prompt, and one token for each that is written.
    pub fn step(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        while self.running.len() < self.options.max_sequences
            && let Some((id, request)) = self.queue.pop_front()
        {
            let cache = KvCache::new(self.model.decoder().config(), self.options.kv);
            let stream = self.tokenizer.clone().map(TextStream::shared);
            let text = StopTexts::new(request.stop.iter().cloned());
            let sampler = Sampler::new(&request.sampling).expect("checked when it was added");
            let ids = request.prompt.clone();
            let scratch = Scratch::default();
            self.running.push(Sequence { id, request, cache, scratch, sampler, ids, fed: 0, stream, text });
        }
        let mut running = std::mem::take(&mut self.running);
        running.retain_mut(|s| self.advance(s, &mut events));
        self.running = running;
        events
    }

    fn advance(&mut self, s: &mut Sequence, events: &mut Vec<Event>) -> bool {
        let written = s.ids.len() - s.request.prompt.len();
        let end = match self.token(s) {
            Ok((id, _)) if s.request.end_tokens.contains(&id) => Some((FinishReason::EndToken, None)),
            Ok((id, text)) => {
                s.ids.push(id);
                self.stats.tokens_written += 1;
                events.push(Event { id: s.id, kind: EventKind::Token { id, text, logprobs: None } });
                let ends = [
                    (s.text.stopped(), FinishReason::StopText),
                    (written + 1 == s.request.max_tokens, FinishReason::Length),
                    (s.ids.len() >= s.cache.max_positions(), FinishReason::Context),
                ];
                ends.into_iter().find(|(ends, _)| *ends).map(|(_, reason)| (reason, None))
            }
            Err(error) => Some((FinishReason::Failed, Some(error.to_string()))),
        };
        let Some((reason, error)) = end else { return true };
        let finished = Finished {
            reason,
            text: std::mem::take(&mut s.text).rest(),
            prompt_tokens: s.request.prompt.len(),
            cached_tokens: 0,
            completion_tokens: s.ids.len() - s.request.prompt.len(),
            error,
        };
        events.push(Event { id: s.id, kind: EventKind::Finished(finished) });
        false
    }

    fn token(&self, s: &mut Sequence) -> Result<(u32, String)> {
        let decoder = self.model.decoder();
        let mut logits = vec![0.0; decoder.config().vocab_size];
        let step = Step { batch: 1, seq_len: s.ids.len() - s.fed, index_pos: s.fed };
        let ids = Input::Ids(&s.ids[s.fed..]);
        decoder.forward(ids, step, &mut s.cache, &mut s.scratch, Logits::Last, &mut logits)?;
        s.fed = s.ids.len();
        let id = s.sampler.sample(&logits, &s.ids[s.request.prompt.len()..])?;
        let piece = s.stream.as_mut().map(|stream| stream.push(id)).unwrap_or_default();
        Ok((id, s.text.push(&piece)))
    }

    /// Ends a sequence, or a request that waits; the next step tells of it. `false`: there is none.
    pub fn cancel(&mut self, id: SequenceId) -> bool {
        let before = self.queue.len() + self.running.len();
        self.queue.retain(|(of, _)| *of != id);
        self.running.retain(|s| s.id != id);
        self.queue.len() + self.running.len() < before
    }

    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.running.is_empty()
    }

    /// What it holds and has done.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        EngineStats { running: self.running.len(), queued: self.queue.len(), ..self.stats.clone() }
    }

    /// What was done otherwise than asked since the last call, one line each: a file of the prefix store that was skipped, for example.
    pub fn take_notices(&mut self) -> Vec<String> {
        Vec::new()
    }
}
