//! The next tokens of all sequences that are written, in one step.

use super::{
    Engine, SequenceId,
    failure::{Failure, caught},
    sequence::{Sequence, Written},
};
use crate::{
    decoder::{BatchScratch, Decoder, Input, Logits, Step, Turn},
    speculation::Costs,
};
use rayon::prelude::*;
use std::time::Instant;

/// Steps after which sequences that are read one by one, since that was faster, are read together again.
const RETRY: u64 = 64;

impl Engine {
    /// Reads the last token of every sequence that is written, and guesses of those that follow, and chooses the next ones.
    pub(super) fn write(&mut self) {
        let decoder = self.model.decoder();
        let vocab_size = decoder.config().vocab_size;
        let mut ready: Vec<&mut Sequence> = self.running.iter_mut().filter(|s| s.is_writing()).collect();
        if ready.is_empty() {
            return;
        }
        let mut rows = ready.len();
        for s in &mut ready {
            rows += s.choose_turn(decoder, &self.costs, rows - 1) - 1;
        }
        self.logits.resize(rows * vocab_size, 0.0);
        let dear = self.costs.steps(rows) > rows as f64 && !self.clock.is_multiple_of(RETRY);
        let apart = rows == 1 || rows == ready.len() && dear;
        let on = On { decoder, batch: &mut self.batch, costs: &mut self.costs };
        let read = on.read(&mut ready, apart, &mut self.logits);
        let one_thread = decoder.threads().count() == 1;
        for (id, written) in choose(ready, read, &self.logits, vocab_size, one_thread) {
            self.tell(id, written);
        }
    }
}

/// What turns are read on.
struct On<'a> {
    decoder: &'a Decoder,
    batch: &'a mut BatchScratch,
    costs: &'a mut Costs,
}

impl On<'_> {
    /// Reads the turn of each sequence: `logits` `[rows, vocab_size]` are those after each token, where it could be read.
    ///
    /// One by one or together, the bits are the same.
    fn read(
        mut self,
        ready: &mut [&mut Sequence],
        apart: bool,
        logits: &mut [f32],
    ) -> Vec<Result<(), Failure>> {
        if apart {
            return self.one_by_one(ready, logits);
        }
        match self.together(ready, logits) {
            Ok(()) => ready.iter().map(|_| Ok(())).collect(),
            // One of them is the reason: the others go on.
            Err(Failure::Error(_)) => self.one_by_one(ready, logits),
            Err(Failure::Panic(text)) => {
                *self.batch = BatchScratch::default();
                // Nobody knows what the step has left in whose cache.
                ready.iter().map(|_| Err(Failure::Panic(text.clone()))).collect()
            }
        }
    }

    fn one_by_one(&mut self, ready: &mut [&mut Sequence], logits: &mut [f32]) -> Vec<Result<(), Failure>> {
        let vocab_size = self.decoder.config().vocab_size;
        let mut rest = logits;
        let one = |s: &mut &mut Sequence| {
            let (logits, behind) = std::mem::take(&mut rest).split_at_mut(s.rows() * vocab_size);
            rest = behind;
            match s.rows() {
                1 => self.alone(s, logits),
                _ => self.together(std::slice::from_mut(s), logits),
            }
        };
        ready.iter_mut().map(one).collect()
    }

    fn together(&mut self, ready: &mut [&mut Sequence], logits: &mut [f32]) -> Result<(), Failure> {
        let (start, rows) = (Instant::now(), ready.iter().map(|s| s.rows()).sum());
        caught(|| {
            let mut turns: Vec<Turn<'_>> = ready.iter_mut().map(|s| s.turn()).collect();
            self.decoder.decode_turns(&mut turns, self.batch, logits)
        })?;
        self.costs.note(rows, start.elapsed());
        Ok(())
    }

    /// One token of one sequence: sooner than a step of several could.
    fn alone(&mut self, s: &mut Sequence, logits: &mut [f32]) -> Result<(), Failure> {
        let start = Instant::now();
        let Turn { ids, cache, scratch } = s.turn();
        let step = Step { batch: 1, seq_len: ids.len(), index_pos: cache.len() };
        caught(|| self.decoder.forward(Input::Ids(ids), step, cache, scratch, Logits::Last, logits))?;
        self.costs.note(1, start.elapsed());
        Ok(())
    }
}

/// Chooses the next tokens of each sequence that could be read.
fn choose(
    ready: Vec<&mut Sequence>,
    read: Vec<Result<(), Failure>>,
    logits: &[f32],
    vocab_size: usize,
    one_thread: bool,
) -> Vec<(SequenceId, Written)> {
    let mut rest = logits;
    let with_logits = |(s, read): (_, Result<(), Failure>)| {
        let s: &mut Sequence = s;
        let (logits, behind) = rest.split_at(s.rows() * vocab_size);
        rest = behind;
        (s, read, logits)
    };
    let each: Vec<_> = ready.into_iter().zip(read).map(with_logits).collect();
    let one = |(s, read, logits): (&mut Sequence, Result<(), Failure>, &[f32])| match read {
        Ok(()) => (s.id, s.write_caught(logits, vocab_size)),
        Err(failure) => (s.id, Written::failed(failure.text())),
    };
    if one_thread || each.len() == 1 {
        return each.into_iter().map(one).collect();
    }
    each.into_par_iter().map(one).collect()
}
