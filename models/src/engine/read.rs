//! Prompts, chunk by chunk.

use super::{
    Engine, FinishReason,
    failure::caught,
    prefix::{Cuts, Place},
    sequence::{Loading, Sequence, Stage},
};
use crate::{
    decoder::{Decoder, Input, LayerTap, Logits, Step},
    kv_cache::KvCache,
};
use candle_core::{Error, Result, bail};
use std::{cmp::Reverse, path::PathBuf};

/// Positions that are read at once where nobody waits: as many as go through the layers together.
const LONG_CHUNK: usize = 512;

/// Makes a forward pass read a lone token as a part of a prompt, with all neurons.
struct AsPrompt;

impl LayerTap for AsPrompt {
    fn ffn(&mut self, _: usize, _: &[f32], _: &[f32], _: &mut [f32], _: &mut [f32]) {}
}

impl Engine {
    /// Reads one chunk of one prompt.
    pub(super) fn read(&mut self) {
        self.finish_loading();
        let Some(i) = self.choose_reader() else { return };
        let (chunk, vocab_size) = (self.chunk(), self.model.decoder().config().vocab_size);
        self.logits.resize(vocab_size, 0.0);
        let sequence = &mut self.running[i];
        (sequence.last_turn, sequence.stage) = (self.clock, Stage::Reading);
        let (id, was) = (sequence.id, sequence.cache.len());
        let done = caught(|| read_chunk(self.model.decoder(), sequence, chunk, &mut self.logits));
        if let Err(failure) = done {
            self.end(id, FinishReason::Failed, Some(failure.text()));
            return;
        }
        self.stats.tokens_read += (sequence.cache.len() - was) as u64;
        self.keep_prefix(i);
        let sequence = &mut self.running[i];
        if sequence.cache.len() == sequence.prompt_len {
            sequence.begin_writing();
            let written = sequence.write_caught(&self.logits, vocab_size);
            self.tell(id, written);
        }
    }

    /// Positions that are read at once now.
    fn chunk(&self) -> usize {
        let alone = !self.running.iter().any(Sequence::is_writing);
        let long = alone && self.cuts == Cuts::Anywhere;
        self.options.prompt_chunk.max(if long { LONG_CHUNK } else { 0 })
    }

    /// The sequence whose prompt is read next: the first by priority, then the one whose last chunk is longest ago. One that could
    /// begin with what another one is about to read waits for it.
    fn choose_reader(&mut self) -> Option<usize> {
        let mut order: Vec<usize> =
            (0..self.running.len()).filter(|i| self.running[*i].is_reading()).collect();
        order.sort_by_key(|i| {
            let s = &self.running[*i];
            (Reverse(s.priority), s.last_turn, s.id)
        });
        order.into_iter().find(|&i| !matches!(self.running[i].stage, Stage::New) || self.start(i))
    }

    /// Begins with what others have read of a prompt; `false`: it waits for them, or for a file.
    fn start(&mut self, i: usize) -> bool {
        if self.prefixes.is_off() {
            self.running[i].stage = Stage::Reading;
            return true;
        }
        let prompt = self.running[i].prompt().to_vec();
        let running = |s: &Sequence| self.prefixes.shared_now(&prompt, s.prompt(), &s.cache);
        let best = (0..self.running.len()).filter(|j| *j != i).map(|j| (running(&self.running[j]), j)).max();
        let (shared, j) = best.unwrap_or_default();
        // A file is read whole: one that is longer than the sequence may come to be has no room.
        let (empty, reserved) = (self.running[i].cache.clone(), self.running[i].reserved);
        let fits = |positions: usize| empty.bytes_at(1, positions) <= reserved;
        let found = self.prefixes.find(&prompt, &fits).filter(|(len, _)| *len > shared);
        let held = found.as_ref().map_or(shared, |(len, _)| *len);
        if self.waits_for_another(i, &prompt, held) {
            return false;
        }
        match found {
            Some((len, Place::File(path))) => self.load(i, len, path),
            Some((len, Place::Memory(cache))) => self.begin_with(i, *cache, len),
            None if shared > 0 => {
                let mut cache = self.running[j].cache.clone();
                cache.truncate(shared);
                self.begin_with(i, cache, shared);
            }
            None => self.running[i].stage = Stage::Reading,
        }
        let parting = self.prefixes.parting(&prompt).filter(|len| *len > held);
        self.running[i].marks.extend(parting);
        !matches!(self.running[i].stage, Stage::Loading(_))
    }

    /// Whether another sequence that is not less urgent is about to read more of the prompt than is held; it then leaves that behind.
    fn waits_for_another(&mut self, i: usize, prompt: &[u32], held: usize) -> bool {
        let priority = self.running[i].priority;
        let promise = |s: &Sequence| {
            // One that stands still reads nothing that could be waited for.
            let begun = s.id != self.running[i].id && s.priority >= priority && !s.is_paused;
            let len = self.prefixes.shared(prompt, s.prompt(), s.prompt_len);
            match s.stage {
                Stage::Reading | Stage::Loading(_) if begun && s.cache.len() < len => len,
                _ => 0,
            }
        };
        let best = (0..self.running.len()).map(|j| (promise(&self.running[j]), j)).max();
        let Some((len, j)) = best.filter(|(len, _)| *len > held) else { return false };
        let marks = &mut self.running[j].marks;
        if !marks.contains(&len) {
            marks.push(len);
        }
        true
    }

    fn begin_with(&mut self, i: usize, mut cache: KvCache, len: usize) {
        let sequence = &mut self.running[i];
        cache.set_max_bytes(sequence.cache.config().max_bytes);
        (sequence.cache, sequence.cached_tokens, sequence.stage) = (cache, len, Stage::Reading);
        self.stats.prefix_hits += 1;
        self.stats.prefix_tokens += len as u64;
    }

    /// Reads a file on a thread of its own, so that nobody waits for a disk.
    fn load(&mut self, i: usize, len: usize, path: PathBuf) {
        let mut cache = self.running[i].cache.clone();
        let from = path.clone();
        let read = move || {
            let ids = cache.load_tokens(&from)?;
            Ok((cache, ids))
        };
        self.running[i].stage = match std::thread::Builder::new().name("prefix".into()).spawn(read) {
            Ok(done) => Stage::Loading(Loading { done, path, len }),
            Err(_) => Stage::Reading,
        };
    }

    /// Goes on with the prompts whose beginning has come from a file; where nothing else can be done it waits for one.
    fn finish_loading(&mut self) {
        let idle = !self.running.iter().any(|s| s.is_writing() || s.is_reading());
        for i in 0..self.running.len() {
            let sequence = &mut self.running[i];
            let loading = match std::mem::replace(&mut sequence.stage, Stage::Reading) {
                Stage::Loading(loading) if idle || loading.done.is_finished() => loading,
                stage => {
                    sequence.stage = stage;
                    continue;
                }
            };
            let read = loading.done.join().unwrap_or_else(|_| Err(Error::msg("the thread panicked")));
            match read.and_then(|read| self.check_loaded(i, loading.len, read)) {
                Ok((mut cache, ids)) => {
                    let most = self.room();
                    self.prefixes.loaded(&ids, &cache, most);
                    cache.truncate(loading.len);
                    self.begin_with(i, cache, loading.len);
                }
                Err(error) => self.prefixes.damaged(&loading.path, &error),
            }
        }
    }

    /// Whether a file held what its name said.
    fn check_loaded(
        &self,
        i: usize,
        len: usize,
        (cache, ids): (KvCache, Vec<u32>),
    ) -> Result<(KvCache, Vec<u32>)> {
        if cache.len() < len || !ids.starts_with(&self.running[i].prompt()[..len]) {
            bail!("it holds another text than it did");
        }
        // Its name says that it was made with these settings, and whoever writes to the folder could write any.
        let (kept, ours) = (cache.config(), self.options.kv);
        if cache.batch_size() != 1 || kept.with_max_bytes(None) != ours.with_max_bytes(None) {
            bail!("it is kept in another way than its name says");
        }
        Ok((cache, ids))
    }

    /// Keeps what a sequence has read where it or others may begin with it again.
    fn keep_prefix(&mut self, i: usize) {
        let sequence = &self.running[i];
        let (len, prompt_len) = (sequence.cache.len(), sequence.prompt_len);
        let wanted = match self.cuts {
            Cuts::Anywhere => len == prompt_len,
            Cuts::AtChunks(chunk) => {
                let last = prompt_len.saturating_sub(self.model.decoder().least_part()) / chunk * chunk;
                len % chunk == 0 && (len == last || sequence.marks.contains(&len))
            }
        };
        if wanted && !self.prefixes.is_off() {
            let (ids, cache, most) = (sequence.prompt().to_vec(), sequence.cache.clone(), self.room());
            self.prefixes.keep(&ids, cache, most);
        }
    }
}

/// Reads the next positions of a prompt up to a multiple of `chunk`; `logits` are those of the last one.
fn read_chunk(decoder: &Decoder, s: &mut Sequence, chunk: usize, logits: &mut [f32]) -> Result<()> {
    let start = s.cache.len();
    // From the beginning of the prompt, so that company changes no chunk of it.
    let (mut end, least) = ((start / chunk + 1).saturating_mul(chunk), decoder.least_part());
    if end - start < least {
        end = end.saturating_add(chunk);
    }
    if s.prompt_len.saturating_sub(end) < least {
        end = s.prompt_len;
    }
    let (ids, step) =
        (Input::Ids(&s.ids[start..end]), Step { batch: 1, seq_len: end - start, index_pos: start });
    if end - start == 1 && s.prompt_len > 1 {
        let (cache, scratch) = (&mut s.cache, &mut s.scratch);
        return decoder.forward_tapped(ids, step, cache, scratch, &mut AsPrompt, Logits::Last, logits);
    }
    decoder.forward(ids, step, &mut s.cache, &mut s.scratch, Logits::Last, logits)
}
