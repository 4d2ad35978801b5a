//! A request being answered: events of its texts become one object, or a stream of them.

use crate::{
    answer::{Choice, Shape},
    engine::Happened,
    error::ApiError,
    metrics::{Metrics, Pace},
};
use axum::response::sse::Event;
use candle_sparse_models::engine::EventKind;
use futures_util::stream::{self, Stream};
use serde_json::Value;
use std::{collections::VecDeque, convert::Infallible, sync::Arc};
use tokio::sync::mpsc::UnboundedReceiver;

/// What ends a stream that went well.
const DONE: &str = "[DONE]";

/// A request that the engine works on. Dropped, its texts are given up.
#[derive(Debug)]
pub(crate) struct Answering {
    shape: Shape,
    choices: Vec<Choice>,
    events: UnboundedReceiver<Happened>,
    metrics: Arc<Metrics>,
    paces: Vec<Pace>,
}

/// A stream that is being sent.
struct Sending {
    /// `None` once all is in `ready`.
    answering: Option<Answering>,
    ready: VecDeque<String>,
}

impl Answering {
    pub(crate) fn new(
        shape: Shape,
        texts: usize,
        events: UnboundedReceiver<Happened>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let choices = (0..texts).map(|_| Choice::default()).collect();
        Self { shape, choices, events, metrics, paces: vec![Pace::new(); texts] }
    }

    /// The pieces of what happens next; `None` when all texts have ended.
    async fn next(&mut self) -> Result<Option<Vec<Value>>, ApiError> {
        if self.choices.iter().all(Choice::is_finished) {
            return Ok(None);
        }
        let first = self.events.recv().await;
        let Some(first) = first else {
            return Err(ApiError::internal("the engine has ended"));
        };
        let mut pieces = Vec::new();
        let mut happened = Some(first);
        // What came meanwhile goes out together.
        while let Some((index, kind)) = happened {
            if matches!(kind, EventKind::Token { .. }) {
                self.paces[index].step(&self.metrics);
            }
            pieces.extend(self.shape.take(index, &mut self.choices[index], kind)?);
            happened = self.events.try_recv().ok();
        }
        Ok(Some(pieces))
    }

    /// The whole answer, once it is there.
    pub(crate) async fn whole(mut self) -> Result<Value, ApiError> {
        while self.next().await?.is_some() {}
        Ok(self.shape.whole(&self.choices))
    }

    /// The answer as it comes. Since the client has its status then, an error is a piece too, and the last one.
    pub(crate) fn stream(self) -> impl Stream<Item = Result<Event, Infallible>> {
        let sending = Sending { answering: Some(self), ready: VecDeque::new() };
        stream::unfold(sending, |mut sending| async {
            let data = sending.next().await?;
            Some((Ok(Event::default().data(data)), sending))
        })
    }
}

impl Sending {
    async fn next(&mut self) -> Option<String> {
        while self.ready.is_empty() {
            let answering = self.answering.as_mut()?;
            match answering.next().await {
                Ok(Some(pieces)) => self.ready.extend(pieces.iter().map(ToString::to_string)),
                Ok(None) => {
                    let last = answering.shape.last_piece(&answering.choices);
                    self.ready.extend(last.map(|piece| piece.to_string()));
                    self.ready.push_back(DONE.to_string());
                    self.answering = None;
                }
                Err(error) => {
                    self.ready.push_back(error.json().to_string());
                    self.answering = None;
                }
            }
        }
        self.ready.pop_front()
    }
}
