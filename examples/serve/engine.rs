//! The thread that owns the engine: asked by a channel, answering each request by one of its own.

use crate::{
    cli::output,
    crowd::{Client, Refusal, Share},
    error::ApiError,
};
use candle_sparse_models::engine::{Engine, EngineStats, Event, EventKind, Request, SequenceId};
use std::{
    collections::HashMap,
    sync::{
        Arc, Weak,
        mpsc::{Receiver, Sender, channel},
    },
    thread::JoinHandle,
};
use tokio::sync::{mpsc, oneshot};

/// What happened to the text with this number among those that a request wants.
pub(crate) type Happened = (usize, EventKind);

enum Command {
    /// All of them or none.
    Add {
        client: Client,
        requests: Vec<Request>,
        events: mpsc::UnboundedSender<Happened>,
        answer: oneshot::Sender<Result<(), ApiError>>,
    },
    Stats(oneshot::Sender<EngineStats>),
    /// All texts are given up, and none begins any more.
    End,
}

/// Asks the engine; where all are gone its thread ends.
#[derive(Clone, Debug)]
pub(crate) struct Handle {
    commands: Sender<Command>,
    /// Held by the thread.
    life: Weak<()>,
}

impl Handle {
    /// Starts the thread.
    pub(crate) fn start(engine: Engine, line: Line) -> std::io::Result<(Self, JoinHandle<()>)> {
        let (send, commands) = channel();
        let life = Arc::new(());
        let handle = Self { commands: send, life: Arc::downgrade(&life) };
        let worker = Worker { engine, line, routes: HashMap::new(), commands, ending: false, _life: life };
        let thread = std::thread::Builder::new().name("engine".to_string());
        Ok((handle, thread.spawn(move || worker.run())?))
    }

    /// Whether the thread runs: nothing that it does makes this wait.
    pub(crate) fn is_alive(&self) -> bool {
        self.life.strong_count() > 0
    }

    /// Gives all texts up.
    pub(crate) fn end(&self) {
        // Where the thread has ended already there is nothing to give up.
        let _ = self.commands.send(Command::End);
    }

    /// Adds the texts of one request. Who drops the receiver gives them up. What waits there is bounded by the tokens asked for.
    pub(crate) async fn add(
        &self,
        client: Client,
        requests: Vec<Request>,
    ) -> Result<mpsc::UnboundedReceiver<Happened>, ApiError> {
        let (events, receiver) = mpsc::unbounded_channel();
        self.ask(|answer| Command::Add { client, requests, events, answer }).await??;
        Ok(receiver)
    }

    /// What the engine does and holds, between two of its steps.
    pub(crate) async fn stats(&self) -> Result<EngineStats, ApiError> {
        self.ask(Command::Stats).await
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, ApiError> {
        let (send, answer) = oneshot::channel();
        let gone = || ApiError::internal("the engine has ended");
        self.commands.send(command(send)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }
}

/// Texts that wait at most, and what of that one client may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Line {
    pub(crate) most: usize,
    pub(crate) share: Share,
}

/// Where a sequence's events go.
struct Route {
    choice: usize,
    events: mpsc::UnboundedSender<Happened>,
}

struct Worker {
    engine: Engine,
    line: Line,
    routes: HashMap<SequenceId, Route>,
    commands: Receiver<Command>,
    ending: bool,
    _life: Arc<()>,
}

impl Worker {
    fn run(mut self) {
        while self.listen() {
            self.give_up_abandoned();
            for event in self.engine.step() {
                self.route(event);
            }
            self.engine.take_notices().iter().for_each(output::note);
        }
    }

    /// Takes what was asked meanwhile, and waits for it where there is nothing else to do; `false`: nobody can ask any more.
    fn listen(&mut self) -> bool {
        if self.engine.is_idle() {
            match self.commands.recv() {
                Ok(command) => self.obey(command),
                Err(_) => return false,
            }
        }
        // Where nobody can ask any more, nobody reads either: what runs is given up, and the next turn ends here.
        while let Ok(command) = self.commands.try_recv() {
            self.obey(command);
        }
        true
    }

    fn obey(&mut self, command: Command) {
        match command {
            // Nobody waits for an answer whose connection is closed.
            Command::Stats(answer) => drop(answer.send(self.engine.stats())),
            Command::Add { client, requests, events, answer } => {
                let added = self.add(client, requests, &events);
                drop(answer.send(added));
            }
            Command::End => {
                self.ending = true;
                for id in self.routes.keys() {
                    self.engine.cancel(*id);
                }
            }
        }
    }

    fn add(
        &mut self,
        client: Client,
        requests: Vec<Request>,
        events: &mpsc::UnboundedSender<Happened>,
    ) -> Result<(), ApiError> {
        if self.ending {
            return Err(ApiError::ending());
        }
        let mut added = Vec::with_capacity(requests.len());
        for (choice, request) in requests.into_iter().enumerate() {
            match self.add_one(client, request) {
                Ok(id) => added.push((id, Route { choice, events: events.clone() })),
                Err(error) => {
                    for (id, _) in &added {
                        self.engine.cancel(*id);
                    }
                    return Err(error);
                }
            }
        }
        self.routes.extend(added);
        Ok(())
    }

    fn add_one(&mut self, client: Client, request: Request) -> Result<SequenceId, ApiError> {
        let Line { most, share } = self.line;
        let (own, free) = (self.engine.waiting(Some(client.number())), most - self.engine.waiting(None));
        if free > 0 && !share.allows(own, free) {
            return Err(Refusal::Share.of("texts that may wait"));
        }
        let added = self.engine.add(request.with_client(client.number()));
        added.map_err(|error| ApiError::from_engine(&error))
    }

    fn give_up_abandoned(&mut self) {
        let engine = &mut self.engine;
        self.routes.retain(|id, route| {
            let wanted = !route.events.is_closed();
            if !wanted {
                engine.cancel(*id);
            }
            wanted
        });
    }

    fn route(&mut self, Event { id, kind }: Event) {
        // One that was cancelled may have had its last word still to come.
        let Some(route) = self.routes.get(&id) else { return };
        let ends = matches!(kind, EventKind::Finished(_));
        // A closed channel is noticed before the next step.
        let _ = route.events.send((route.choice, kind));
        if ends {
            self.routes.remove(&id);
        }
    }
}
