//! Requests that wait, and whose turn it is: by priority, then of the client that holds the fewest places, then in rounds.
//!
//! A round has one request of each client that waits: the next of a client's own goes into the round after its last one, and the
//! first of a newcomer into the round after the one that is being served. So who asks for much waits behind itself, and nobody is
//! overtaken without end. Where all requests are of one client that is the order in which they came.

use super::{Request, SequenceId};
use std::{cmp::Reverse, collections::BTreeMap, time::Instant};

/// Whose turn it is: the smallest of all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    pub(super) priority: Reverse<i32>,
    /// Places that its client holds.
    pub(super) places: usize,
    pub(super) round: u64,
    pub(super) id: SequenceId,
    pub(super) client: u64,
}

#[derive(Debug)]
struct Waiting {
    round: u64,
    request: Request,
}

/// What a client has asked for.
#[derive(Debug, Default)]
struct Own {
    /// In its order.
    waiting: BTreeMap<(Reverse<i32>, SequenceId), Waiting>,
    /// Round of the one that came last.
    last: u64,
}

#[derive(Debug, Default)]
pub(super) struct Queue {
    /// Those that wait for anything.
    clients: BTreeMap<u64, Own>,
    len: usize,
    /// That of the latest request that has begun.
    round: u64,
}

impl Queue {
    pub(super) fn push(&mut self, id: SequenceId, request: Request) {
        let own = self.clients.entry(request.client).or_default();
        let round = own.last.max(self.round) + 1;
        own.last = round;
        own.waiting.insert((Reverse(request.priority), id), Waiting { round, request });
        self.len += 1;
    }

    /// The one whose turn it is, where clients hold so many places.
    pub(super) fn first(&self, places: impl Fn(u64) -> usize) -> Option<Rank> {
        let first = |(client, own): (&u64, &Own)| {
            let ((priority, id), waiting) = own.waiting.first_key_value()?;
            let (places, round) = (places(*client), waiting.round);
            Some(Rank { priority: *priority, places, round, id: *id, client: *client })
        };
        self.clients.iter().filter_map(first).min()
    }

    pub(super) fn get(&self, of: &Rank) -> Option<&Request> {
        self.clients.get(&of.client)?.waiting.get(&(of.priority, of.id)).map(|waiting| &waiting.request)
    }

    /// Takes one to begin it.
    pub(super) fn begin(&mut self, of: &Rank) -> Option<Request> {
        let request = self.take(of.client, (of.priority, of.id))?;
        self.round = self.round.max(of.round);
        Some(request)
    }

    /// Takes one that is not wanted any more.
    pub(super) fn remove(&mut self, id: SequenceId) -> Option<Request> {
        let mut all =
            self.clients.iter().flat_map(|(client, own)| own.waiting.keys().map(|key| (*client, *key)));
        let (client, key) = all.find(|(_, key)| key.1 == id)?;
        self.take(client, key)
    }

    fn take(&mut self, client: u64, key: (Reverse<i32>, SequenceId)) -> Option<Request> {
        let own = self.clients.get_mut(&client)?;
        let waiting = own.waiting.remove(&key)?;
        if own.waiting.is_empty() {
            self.clients.remove(&client);
        }
        self.len -= 1;
        Some(waiting.request)
    }

    /// Those whose time is over.
    pub(super) fn expired(&self, now: Instant) -> Vec<SequenceId> {
        let over = |waiting: &Waiting| waiting.request.deadline.is_some_and(|deadline| deadline <= now);
        let all = self.clients.values().flat_map(|own| &own.waiting);
        all.filter(|(_, waiting)| over(waiting)).map(|((_, id), _)| *id).collect()
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// How many of a client's wait.
    pub(super) fn len_of(&self, client: u64) -> usize {
        self.clients.get(&client).map_or(0, |own| own.waiting.len())
    }
}
