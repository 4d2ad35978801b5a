//! The drafts of one sequence, and the logits of those that were verified.

use super::{
    Speculation, SpeculationStats,
    costs::Costs,
    lookup::Lookup,
    measured::{Seen, usual},
};
use crate::sampling::{Sampler, Sampling};
use candle_core::{DType, Result};
use candle_sparse::{
    KvCache,
    decoder::{BatchScratch, Decoder, Input, Logits, Scratch, Step, Turn},
};
use std::time::{Duration, Instant};

/// How often a copy's guess is right, before any was seen, and for how many guesses that counts.
const GUESS: f64 = 0.8;
const GUESS_COUNTS: f64 = 8.0;
const MEMORY: f64 = 128.0;
/// Tokens before a copy that does not pay is tried again.
const REST: usize = 256;

/// What a model runs on.
#[derive(Debug)]
pub struct Decoding<'a> {
    /// The model.
    pub decoder: &'a Decoder,
    /// What it has seen.
    pub cache: &'a mut KvCache,
    /// The memory of its steps.
    pub scratch: &'a mut Scratch,
    /// What its logits are rounded to.
    pub logits_dtype: DType,
}

/// Drafts of a sequence.
#[derive(Clone, Debug, Default)]
pub(crate) struct Drafter {
    settings: Speculation,
    lookup: Lookup,
    /// Position of the first token that is known.
    first: usize,
    ahead: Ahead,
    copy: Copy,
    pub(crate) stats: SpeculationStats,
}

/// Logits of tokens that were drafted and verified, until they are asked for.
#[derive(Clone, Debug, Default)]
struct Ahead {
    ids: Vec<u32>,
    /// After each of them.
    logits: Vec<f32>,
    /// How many were asked for.
    used: usize,
    by_copy: bool,
}

/// What is known of the copy.
#[derive(Clone, Debug, Default)]
struct Copy {
    scratch: Scratch,
    seen: Seen,
    /// Seconds of a token.
    seconds: Option<f64>,
    /// It is not tried before this position, for so many tokens.
    rests_until: usize,
    rest: usize,
}

/// What the next tokens are drawn with, as far as it is known.
#[derive(Clone, Debug, Default)]
pub(crate) struct Expected {
    pub(crate) sampler: Option<Sampler>,
    pub(crate) written: Vec<u32>,
    /// Tokens that will be asked for at most.
    pub(crate) left: usize,
}

impl Drafter {
    pub(crate) fn new(settings: Speculation) -> Self {
        Self { settings, ..Self::default() }
    }

    pub(crate) fn is_off(&self) -> bool {
        self.settings.is_off()
    }

    /// Positions of the sequence: the cache may hold more, which were guessed.
    pub(crate) fn len(&self) -> usize {
        self.first + self.lookup.ids().len()
    }

    /// Notes that the tokens from `position` on are these: what is known of later ones is forgotten.
    pub(crate) fn read(&mut self, position: usize, ids: &[u32]) {
        self.drop_ahead();
        if position < self.first || position > self.len() {
            // Tokens before it are not known.
            self.lookup.cut(0);
            self.first = position;
        }
        self.lookup.cut(position - self.first);
        ids.iter().for_each(|id| self.lookup.push(*id));
    }

    /// Forgets the tokens from `len` on, those that were guessed among them.
    pub(crate) fn cut(&mut self, len: usize) {
        self.drop_ahead();
        if len < self.len() {
            self.lookup.cut(len.saturating_sub(self.first));
            self.first = self.first.min(len);
        }
    }

    /// The logits after a token that comes next, if it was guessed and is verified; it is noted either way.
    pub(crate) fn take(&mut self, id: u32) -> Option<&[f32]> {
        self.lookup.push(id);
        let right = self.ahead.ids.get(self.ahead.used) == Some(&id);
        if self.ahead.by_copy && self.ahead.used < self.ahead.ids.len() {
            self.copy.seen.note(right, MEMORY);
        }
        if !right {
            self.drop_ahead();
            return None;
        }
        let vocab = self.ahead.logits.len() / self.ahead.ids.len();
        self.ahead.used += 1;
        self.stats.accepted += 1;
        Some(&self.ahead.logits[(self.ahead.used - 1) * vocab..self.ahead.used * vocab])
    }

    /// Positions of the cache that are guesses.
    pub(crate) fn guesses(&self) -> usize {
        self.ahead.ids.len() - self.ahead.used
    }

    fn drop_ahead(&mut self) {
        self.ahead.ids.clear();
        self.ahead.logits.clear();
        self.ahead.used = 0;
    }

    /// What the look-up guesses to come after the last token, as many tokens as pay beside `others` rows, `most` at most.
    pub(crate) fn looked_up(&self, costs: &Costs, most: usize, others: usize) -> (Vec<u32>, f64) {
        let Some(found) = self.lookup.find().filter(|_| self.settings.lookup) else {
            return (Vec::new(), 1.0);
        };
        let (n, gain) = match self.settings.tokens {
            Some(n) => (n.min(most), 1.0),
            None => costs.best(self.lookup.right(found), 0.0, most, others),
        };
        (self.lookup.draft(found, n), gain)
    }

    /// Notes what became of a draft whose logits nobody has to keep: so many of its tokens were `right`, and the one behind them was
    /// wrong unless nothing was drawn for it.
    pub(crate) fn judged(&mut self, drafted: usize, right: usize, wrong: bool) {
        self.stats.drafted += drafted;
        self.stats.accepted += right;
        if std::mem::take(&mut self.ahead.by_copy) {
            (0..right).for_each(|_| self.copy.seen.note(true, MEMORY));
            (0..usize::from(wrong)).for_each(|_| self.copy.seen.note(false, MEMORY));
        }
    }

    /// Keeps the logits `[draft, vocab_size]` after each token of a draft until they are asked for.
    pub(crate) fn verified(&mut self, draft: &[u32], logits: &[f32]) {
        self.stats.drafted += draft.len();
        self.ahead.ids.extend_from_slice(draft);
        self.ahead.logits.extend_from_slice(logits);
    }

    /// The logits after `id`, which comes next.
    pub(crate) fn next(
        &mut self,
        id: u32,
        on: Decoding<'_>,
        costs: &mut Costs,
        batch: &mut BatchScratch,
        expected: &Expected,
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        let Decoding { decoder, cache, scratch, .. } = on;
        if let Some(ahead) = self.take(id) {
            logits.clear();
            logits.extend_from_slice(ahead);
            return Ok(());
        }
        let position = self.len() - 1;
        cache.truncate(position);
        let vocab = decoder.config().vocab_size;
        let most = (decoder.most_tokens(position) - 1).min(expected.left);
        let draft = self.draft(id, decoder, cache, costs, expected, most);
        let ids: Vec<u32> = std::iter::once(id).chain(draft).collect();
        let ids = if decoder.check_turn(&ids, cache).is_ok() { &ids[..] } else { &ids[..1] };
        logits.resize(ids.len() * vocab, 0.0);
        let start = Instant::now();
        if let [id] = ids {
            let step = Step { batch: 1, seq_len: 1, index_pos: position };
            decoder.forward(Input::Ids(&[*id]), step, cache, scratch, Logits::Last, logits)?;
        } else {
            decoder.decode_turns(&mut [Turn { ids, cache, scratch }], batch, logits)?;
            self.verified(&ids[1..], &logits[vocab..]);
            logits.truncate(vocab);
        }
        costs.note(ids.len(), start.elapsed());
        self.stats.steps += 1;
        Ok(())
    }

    /// Guesses of what comes after `id`, the last token of the text: as many as pay, `most` at most, of a sequence that is alone.
    pub(crate) fn draft(
        &mut self,
        id: u32,
        decoder: &Decoder,
        cache: &KvCache,
        costs: &Costs,
        expected: &Expected,
        most: usize,
    ) -> Vec<u32> {
        let (looked_up, gain) = self.looked_up(costs, most, 0);
        self.ahead.by_copy = false;
        let Some(copy) = &self.settings.copy else { return looked_up };
        let copy = copy.decoder();
        let share = copy.weight_bytes_per_token() as f64 / decoder.weight_bytes_per_token() as f64;
        let each = self.copy.seconds.zip(costs.one()).map_or(share, |(copy, one)| copy / one);
        let right = self.copy.seen.share(GUESS, GUESS_COUNTS);
        let (n, by_copy) = match self.settings.tokens {
            Some(n) => (n.min(most), if looked_up.is_empty() { f64::INFINITY } else { 0.0 }),
            None => costs.best(std::iter::repeat(right), each, most, 0),
        };
        if n == 0 || by_copy <= gain || self.copy.rests(self.lookup.ids().len(), by_copy <= 1.0) {
            return looked_up;
        }
        self.ahead.by_copy = true;
        let start = Instant::now();
        // A guess that fails is none.
        let draft = self.copy.draft(copy, id, cache.clone(), expected, n).unwrap_or_default();
        self.copy.note_time(start.elapsed(), draft.len());
        draft
    }
}

impl Copy {
    fn note_time(&mut self, took: Duration, tokens: usize) {
        self.seconds = Some(usual(self.seconds, took.as_secs_f64() / tokens.max(1) as f64));
    }

    /// Whether it is left alone for a while.
    fn rests(&mut self, tokens: usize, pays_not: bool) -> bool {
        if pays_not && tokens >= self.rests_until {
            self.rest = (2 * self.rest).max(REST);
            self.rests_until = tokens + self.rest;
        }
        tokens < self.rests_until
    }

    /// `n` tokens after `id`, drawn as the real ones will be: the same random numbers choose the same tokens where logits are close.
    fn draft(
        &mut self,
        copy: &Decoder,
        mut id: u32,
        mut cache: KvCache,
        expected: &Expected,
        n: usize,
    ) -> Result<Vec<u32>> {
        let mut sampler = match &expected.sampler {
            Some(sampler) => sampler.clone(),
            None => Sampler::new(&Sampling::greedy())?,
        };
        let mut written = expected.written.clone();
        let mut logits = vec![0.0; copy.config().vocab_size];
        let mut draft = Vec::with_capacity(n);
        while draft.len() < n {
            let step = Step { batch: 1, seq_len: 1, index_pos: cache.len() };
            if copy.check(Input::Ids(&[id]), step, &cache).is_err() {
                break;
            }
            copy.forward(Input::Ids(&[id]), step, &mut cache, &mut self.scratch, Logits::Last, &mut logits)?;
            id = sampler.sample(&logits, &written)?;
            written.push(id);
            draft.push(id);
        }
        Ok(draft)
    }
}
