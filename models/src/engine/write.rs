//! The next tokens of all sequences that are written, in one step.

use super::{
    Engine, SequenceId,
    failure::{Failure, caught},
    sequence::{Sequence, Written},
};
use crate::decoder::{BatchScratch, Decoder, Input, Logits, Step, Turn};
use crate::pretrained::first_line;
use rayon::prelude::*;

impl Engine {
    /// Reads the last token of every sequence that is written, and chooses its next one.
    pub(super) fn write(&mut self) {
        let decoder = self.model.decoder();
        let vocab_size = decoder.config().vocab_size;
        let mut ready: Vec<&mut Sequence> = self.running.iter_mut().filter(|s| s.is_writing()).collect();
        self.logits.resize(ready.len() * vocab_size, 0.0);
        let read = decode(decoder, &mut ready, &mut self.batch, &mut self.logits);
        let one_thread = decoder.threads().count() == 1;
        for (id, written) in choose(ready, read, &self.logits, one_thread) {
            self.tell(id, written);
        }
    }
}

/// Reads the last token of each sequence: `logits` `[ready, vocab_size]` are those after it, where it could be read.
fn decode(
    decoder: &Decoder,
    ready: &mut [&mut Sequence],
    batch: &mut BatchScratch,
    logits: &mut [f32],
) -> Vec<Result<(), Failure>> {
    if let [one] = ready {
        return vec![alone(decoder, one, logits)];
    }
    match together(decoder, ready, batch, logits) {
        Ok(()) => ready.iter().map(|_| Ok(())).collect(),
        // One of them is the reason: the others go on.
        Err(Failure::Error(_)) => {
            let each = logits.chunks_exact_mut(decoder.config().vocab_size);
            ready.iter_mut().zip(each).map(|(s, logits)| alone(decoder, s, logits)).collect()
        }
        Err(Failure::Panic(text)) => {
            *batch = BatchScratch::default();
            // Nobody knows what the step has left in whose cache.
            ready.iter().map(|_| Err(Failure::Panic(text.clone()))).collect()
        }
    }
}

fn together(
    decoder: &Decoder,
    ready: &mut [&mut Sequence],
    batch: &mut BatchScratch,
    logits: &mut [f32],
) -> Result<(), Failure> {
    caught(|| {
        let mut turns: Vec<Turn<'_>> = ready.iter_mut().map(|s| s.turn()).collect();
        decoder.decode_turns(&mut turns, batch, logits)
    })
}

/// With the same bits, and faster where there is no company.
fn alone(decoder: &Decoder, s: &mut Sequence, logits: &mut [f32]) -> Result<(), Failure> {
    let Turn { ids, cache, scratch } = s.turn();
    let step = Step { batch: 1, seq_len: ids.len(), index_pos: cache.len() };
    caught(|| decoder.forward(Input::Ids(ids), step, cache, scratch, Logits::Last, logits))
}

/// Chooses a token for each sequence that could be read.
fn choose(
    ready: Vec<&mut Sequence>,
    read: Vec<Result<(), Failure>>,
    logits: &[f32],
    one_thread: bool,
) -> Vec<(SequenceId, Result<Written, String>)> {
    let vocab_size = logits.len() / ready.len().max(1);
    let one = |((s, read), logits): ((&mut Sequence, Result<(), Failure>), &[f32])| {
        let written = read.map_err(Failure::text).and_then(|()| s.write(logits).map_err(|e| first_line(&e)));
        (s.id, written)
    };
    if one_thread || ready.len() == 1 {
        return ready.into_iter().zip(read).zip(logits.chunks_exact(vocab_size.max(1))).map(one).collect();
    }
    ready.into_par_iter().zip(read).zip(logits.par_chunks_exact(vocab_size.max(1))).map(one).collect()
}
