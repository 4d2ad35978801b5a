//! Who holds the places: sequences begin, stand still where another client wants its share, and go on.

use super::{
    Engine, SequenceId,
    queue::Rank,
    sequence::{Sequence, Start},
};
use crate::kv_cache::KvCache;
use std::cmp::Reverse;

impl Engine {
    /// Begins requests, and goes on with what stands still, as long as there are places, and room for the one whose turn it is.
    pub(super) fn admit(&mut self) {
        loop {
            let (paused, waiting) = (self.first_paused(), self.queue.first(|client| self.places_of(client)));
            let Some(next) = paused.into_iter().chain(waiting).min() else { return };
            if self.give_place(&next) {
                continue;
            }
            // Who waits for room holds nobody up who has it already: that one may be all that can give it back.
            match paused.filter(|_| self.is_place_free()) {
                Some(paused) => self.set_paused(paused.id, false),
                None => return,
            }
        }
    }

    /// Places that are held.
    pub(super) fn places(&self) -> usize {
        self.running.iter().filter(|s| !s.is_paused).count()
    }

    fn places_of(&self, client: u64) -> usize {
        self.running.iter().filter(|s| !s.is_paused && s.client == client).count()
    }

    fn is_place_free(&self) -> bool {
        self.places() < self.options.max_sequences
    }

    /// Sequences that stand still.
    pub(super) fn paused(&self) -> usize {
        self.running.iter().filter(|s| s.is_paused).count()
    }

    /// The one of those that stand still whose turn it is.
    fn first_paused(&self) -> Option<Rank> {
        let rank = |s: &Sequence| Rank {
            priority: Reverse(s.priority),
            places: self.places_of(s.client),
            round: s.round,
            id: s.id,
            client: s.client,
        };
        self.running.iter().filter(|s| s.is_paused).map(rank).min()
    }

    fn set_paused(&mut self, id: SequenceId, is_paused: bool) {
        self.running.iter_mut().filter(|s| s.id == id).for_each(|s| s.is_paused = is_paused);
    }

    /// Gives the one whose turn it is a place that is free, or one of the client that holds most. Places are nearer to equal each time.
    fn give_place(&mut self, next: &Rank) -> bool {
        let out = if self.is_place_free() { None } else { self.takes_most(next) };
        if out.is_none() && !self.is_place_free() {
            return false;
        }
        if self.running.iter().any(|s| s.id == next.id) {
            self.set_paused(next.id, false);
        } else if out.is_some() && self.paused() >= self.options.max_sequences || !self.begin(next) {
            return false;
        }
        if let Some(out) = out {
            self.set_paused(out, true);
        }
        true
    }

    /// The youngest sequence of the client that holds most places, if that one then still holds as many as the client of `next` does.
    fn takes_most(&self, next: &Rank) -> Option<SequenceId> {
        let less_urgent =
            self.running.iter().filter(|s| !s.is_paused && Reverse(s.priority) >= next.priority);
        let most = less_urgent.max_by_key(|s| (self.places_of(s.client), s.id))?;
        (self.places_of(most.client) >= next.places + 2).then_some(most.id)
    }

    /// Begins a request that waits, if there is room for all that it may come to need; nobody overtakes one that waits for room.
    fn begin(&mut self, next: &Rank) -> bool {
        let Some(reserved) = self.queue.get(next).map(|request| self.bytes_needed(request)) else {
            return false;
        };
        let Some(room) = self.room().checked_sub(reserved) else { return false };
        self.prefixes.shrink(room);
        let Some(request) = self.queue.begin(next) else { return false };
        let (decoder, kv) = (self.model.decoder(), self.options.kv);
        let mut cache = KvCache::new(decoder.config(), kv.with_max_bytes(kv.max_bytes.map(|_| reserved)));
        cache.set_origin(decoder.origin());
        let start = Start { id: next.id, round: next.round, cache, reserved };
        match Sequence::new(start, request, self.tokenizer.as_ref(), &self.options.speculation) {
            Ok(sequence) => self.running.push(sequence),
            Err(_) => unreachable!("the request was checked when it was added"),
        }
        true
    }
}
