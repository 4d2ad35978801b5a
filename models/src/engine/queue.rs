//! Requests that wait: by priority, then in the order in which they came.

use super::{Request, SequenceId};
use std::{cmp::Reverse, collections::BTreeMap, time::Instant};

#[derive(Debug, Default)]
pub(super) struct Queue(BTreeMap<(Reverse<i32>, SequenceId), Request>);

impl Queue {
    pub(super) fn push(&mut self, id: SequenceId, request: Request) {
        self.0.insert((Reverse(request.priority), id), request);
    }

    /// The one whose turn it is.
    pub(super) fn first(&self) -> Option<&Request> {
        self.0.first_key_value().map(|(_, request)| request)
    }

    pub(super) fn pop(&mut self) -> Option<(SequenceId, Request)> {
        self.0.pop_first().map(|((_, id), request)| (id, request))
    }

    pub(super) fn remove(&mut self, id: SequenceId) -> Option<Request> {
        let key = self.0.keys().find(|(_, of)| *of == id).copied()?;
        self.0.remove(&key)
    }

    /// Those whose time is over.
    pub(super) fn expired(&self, now: Instant) -> Vec<SequenceId> {
        let over = |request: &Request| request.deadline.is_some_and(|deadline| deadline <= now);
        self.0.iter().filter(|(_, request)| over(request)).map(|((_, id), _)| *id).collect()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}
