//! Several sequences on one set of weights, and prompts that begin alike read once.
//!
//! An [`Engine`] is given [`Request`]s and does its work in [`Engine::step`]s, on the thread that calls it: each reads at most one
//! chunk of one prompt, and the last token of every sequence that is being written, all of them together, so that the weights are
//! read once for all. What happens comes as [`Event`]s. There is no thread, no lock and no clock of its own in it but those of files.
//!
//! **A text depends on its request alone**: on no other request, no order, no number of threads, and not on what the prefix store
//! holds, to the last bit; [`EngineOptions::reuse_written`] gives that up. It is the text that
//! [`generate`](crate::generate::Generate::generate) writes, where keys and values are exact; with tiers the cut into chunks has a
//! part in it.
//!
//! **How long a token is waited for**: a step takes as long as [`EngineOptions::prompt_chunk`] positions of a prompt and one token of
//! every sequence take, and every sequence that is being written gets a token in every step.
//!
//! **Whose turn it is**: requests begin by priority, as soon as one of [`EngineOptions::max_sequences`] places is free and the
//! [budget](crate::KvConfig::max_bytes) has room for all that the request may come to need; nobody overtakes one that waits for room.
//! Within a priority [clients](Request::client) take turns, and those of one client come in the order in which they were added. Where
//! one client holds places that are more than another one's share, its youngest sequence stands still until a place is free again. Prompts
//! that are read at the same time take turns, chunk by chunk, within the largest priority.
//!
//! **What goes wrong stays where it belongs**: an error, also logits that are no numbers, ends the sequence that it came from. A
//! panic in a step, which is a mistake of ours, ends those that the step worked on: the one whose prompt it read, or all that
//! are being written. Requests that wait and other prompts go on.

mod event;
mod failure;
mod options;
mod places;
mod prefix;
mod queue;
mod read;
mod request;
mod sequence;
mod stats;
mod write;

use crate::{
    decoder::BatchScratch,
    kv_cache::{KvCache, unique_bytes},
    llama::Llama,
    speculation::Costs,
};
use candle_core::Result;
use candle_sparse::Error;
pub use event::{Event, EventKind, FinishReason, Finished, TokenLogprobs};
pub use options::EngineOptions;
use prefix::{Cuts, Prefixes};
use queue::Queue;
pub use request::{Request, SequenceId};
use sequence::{Sequence, Stage, Written};
pub use stats::EngineStats;
use stats::Shares;
use std::{sync::Arc, time::Instant};
use tokenizers::Tokenizer;

/// Several sequences on one set of weights.
///
/// ```
/// use candle_sparse_models::{
///     engine::{Engine, EngineOptions, EventKind, Request},
///     tokenizer::prompt_tokens,
/// };
/// use std::{collections::HashMap, sync::Arc};
/// # use candle_sparse_models::{files::ModelFiles, llama::LoadOptions, pretrained::Pretrained};
/// # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
///
/// let loaded = Pretrained::load(&ModelFiles::from_folder(folder)?, LoadOptions::default())?;
/// let tokenizer = Arc::new(loaded.tokenizer);
/// let mut engine = Engine::new(&loaded.model, Some(tokenizer.clone()), EngineOptions::default())?;
/// for prompt in ["Once upon a time", "The dog was", "Once upon a hill"] {
///     engine.add(Request::new(prompt_tokens(&tokenizer, prompt)?).with_max_tokens(20))?;
/// }
/// let mut texts = HashMap::new();
/// while !engine.is_idle() {
///     for event in engine.step() {
///         let more = match event.kind {
///             EventKind::Token { text, .. } => text,
///             EventKind::Finished(finished) => finished.text,
///         };
///         texts.entry(event.id).or_insert_with(String::new).push_str(&more);
///     }
/// }
/// assert!(texts.len() == 3 && texts.values().all(|text| text.len() > 20), "{texts:?}");
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Engine {
    model: Llama,
    tokenizer: Option<Arc<Tokenizer>>,
    options: EngineOptions,
    cuts: Cuts,
    /// What the next request is called.
    next_id: u64,
    queue: Queue,
    /// In the order in which they began.
    running: Vec<Sequence>,
    prefixes: Prefixes,
    /// What the next step tells.
    events: Vec<Event>,
    stats: EngineStats,
    shares: Shares,
    /// Steps so far.
    clock: u64,
    batch: BatchScratch,
    /// Of steps by their rows.
    costs: Costs,
    logits: Vec<f32>,
}

impl Engine {
    /// An engine for a model, whose weights are shared; stop texts, and the texts of events, need the tokenizer.
    ///
    /// # Errors
    /// [`Error::Setting`]: an option makes no sense. [`Error::File`]: the folder of prefixes cannot be used.
    pub fn new(model: &Llama, tokenizer: Option<Arc<Tokenizer>>, options: EngineOptions) -> Result<Self> {
        options.check(model.decoder())?;
        let prefixes = Prefixes::new(model.decoder(), &options)?;
        Ok(Self {
            model: model.clone(),
            tokenizer,
            cuts: Cuts::of(model.decoder(), &options),
            options,
            next_id: 0,
            queue: Queue::default(),
            running: Vec::new(),
            prefixes,
            events: Vec::new(),
            stats: EngineStats::default(),
            shares: Shares::default(),
            clock: 0,
            batch: BatchScratch::default(),
            costs: Costs::default(),
            logits: Vec::new(),
        })
    }

    /// Adds a request, which waits for its turn.
    ///
    /// # Errors
    /// [`Error::Full`]: too many wait; later there may be room. [`Error::Setting`]: the request can never be served, since something of
    /// it makes no sense or is more than context or budget.
    pub fn add(&mut self, request: Request) -> Result<SequenceId> {
        self.check(&request)?;
        if self.queue.len() >= self.options.max_queued {
            let problem = format!("{} requests wait already: try again later", self.queue.len());
            return Err(Error::Full { problem }.into());
        }
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        self.queue.push(id, request);
        Ok(id)
    }

    fn check(&self, request: &Request) -> Result<()> {
        let wrong = |name, problem: String| Err(Error::Setting { name, problem }.into());
        let config = self.model.decoder().config();
        let (tokens, context) = (request.prompt.len(), config.max_position_embeddings);
        if tokens == 0 {
            return wrong("prompt", "it is empty: give at least one token".into());
        }
        if tokens >= context {
            return wrong("prompt", format!("its {tokens} tokens leave no room in the context of {context}"));
        }
        if let Some(id) = request.prompt.iter().find(|id| **id as usize >= config.vocab_size) {
            let problem = format!("token id {id} is not below vocab_size {}", config.vocab_size);
            return wrong("prompt", problem);
        }
        if request.max_tokens == 0 {
            return wrong("max_tokens", "0 tokens: give at least 1".into());
        }
        if !request.stop.is_empty() && self.tokenizer.is_none() {
            return wrong("stop", "stop texts need a tokenizer: give Engine::new one".into());
        }
        if request.stop.iter().any(String::is_empty) {
            return wrong("stop", "a stop text is empty".into());
        }
        let (needed, budget) = (self.bytes_needed(request), self.options.kv.max_bytes);
        if let Some(budget) = budget.filter(|budget| needed > *budget) {
            let problem = format!(
                "{tokens} tokens of the prompt and {} more may take {needed} bytes of keys and values, the budget is {budget}: ask \
                 for fewer tokens",
                request.max_tokens
            );
            return wrong("max_tokens", problem);
        }
        request.sampling.check()
    }

    /// The most bytes of keys and values that a request may come to need.
    fn bytes_needed(&self, request: &Request) -> usize {
        let config = self.model.decoder().config();
        let positions = request.prompt.len().saturating_add(request.max_tokens);
        let positions = positions.min(config.max_position_embeddings);
        KvCache::new(config, self.options.kv).bytes_to_read(positions, self.options.prompt_chunk)
    }

    /// Does some work for every sequence that has any, and tells what came of it; nothing where the engine [is idle](Self::is_idle).
    pub fn step(&mut self) -> Vec<Event> {
        self.clock += 1;
        self.end_late_ones();
        self.admit();
        self.write();
        self.read();
        self.prefixes.save();
        std::mem::take(&mut self.events)
    }

    /// Ends a request, whether it was begun or not; the next step tells of it. `false`: it has ended before.
    pub fn cancel(&mut self, id: SequenceId) -> bool {
        self.end(id, FinishReason::Cancelled, None)
    }

    /// How many requests wait for their turn, of a [client](Request::client) or of all.
    #[must_use]
    pub fn waiting(&self, client: Option<u64>) -> usize {
        client.map_or(self.queue.len(), |client| self.queue.len_of(client))
    }

    /// Whether there is nothing to do or to tell.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.queue.len() == 0 && self.running.is_empty() && self.events.is_empty()
    }

    /// What it holds now and has done.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        let caches = || self.running.iter().map(|s| &s.cache);
        let mut shares = self.shares.clone();
        self.running.iter().for_each(|s| shares.add(&s.scratch.sparse_stats()));
        EngineStats {
            running: self.places(),
            paused: self.paused(),
            reading: self.running.iter().filter(|s| !s.is_paused && !s.is_writing()).count(),
            queued: self.queue.len(),
            prefixes: self.prefixes.len(),
            prefix_bytes: self.prefixes.bytes(),
            kv_bytes: unique_bytes(caches().chain(self.prefixes.caches())),
            kv_tiers: stats::tiers(caches()),
            active_share: shares.means(),
            ..self.stats.clone()
        }
    }

    /// What was done otherwise than asked since the last call, one line each: a file of the prefix store that was skipped, for example.
    pub fn take_notices(&mut self) -> Vec<String> {
        std::mem::take(&mut self.prefixes.notices)
    }

    fn end_late_ones(&mut self) {
        let now = Instant::now();
        let mut late = self.queue.expired(now);
        let running = self.running.iter().filter(|s| s.deadline.is_some_and(|deadline| deadline <= now));
        late.extend(running.map(|s| s.id));
        for id in late {
            self.end(id, FinishReason::Deadline, None);
        }
    }

    /// Bytes that the running sequences leave of the budget, whatever they come to need.
    fn room(&self) -> usize {
        let budget = self.options.kv.max_bytes.unwrap_or(usize::MAX);
        budget.saturating_sub(self.running.iter().map(|s| s.reserved).fold(0, usize::saturating_add))
    }

    /// Tells of tokens, and ends their sequence where nothing follows.
    fn tell(&mut self, id: SequenceId, written: Written) {
        self.stats.tokens_written += written.tokens.len() as u64;
        self.stats.drafts_made += written.drafted as u64;
        self.stats.drafts_accepted += written.accepted as u64;
        self.events.extend(written.tokens.into_iter().map(|kind| Event { id, kind }));
        if let Some(reason) = written.end {
            self.end(id, reason, written.error);
        }
    }

    /// Ends a sequence or a request that waits; `false`: there is none.
    fn end(&mut self, id: SequenceId, reason: FinishReason, error: Option<String>) -> bool {
        let finished = if let Some(request) = self.queue.remove(id) {
            let prompt_tokens = request.prompt.len();
            Finished {
                reason,
                text: String::new(),
                prompt_tokens,
                cached_tokens: 0,
                completion_tokens: 0,
                error,
            }
        } else if let Some(i) = self.running.iter().position(|s| s.id == id) {
            let mut sequence = self.running.remove(i);
            self.shares.add(&sequence.scratch.sparse_stats());
            let finished = sequence.finished(reason, error);
            self.keep_written(sequence, reason);
            finished
        } else {
            return false;
        };
        self.stats.finished += 1;
        self.stats.failed += u64::from(reason == FinishReason::Failed);
        self.events.push(Event { id, kind: EventKind::Finished(finished) });
        true
    }

    /// Keeps what a sequence has written, too, where that is wanted.
    fn keep_written(&mut self, sequence: Sequence, reason: FinishReason) {
        let whole = matches!(sequence.stage, Stage::Writing) && reason != FinishReason::Failed;
        if self.options.reuse_written && whole {
            let room = self.room();
            self.prefixes.keep(&sequence.ids, sequence.cache, room);
        }
    }
}
