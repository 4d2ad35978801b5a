//! Connections: as many as are allowed, each with patience that ends, and an end that waits for what runs.

use axum::Router;
use futures_util::future::{Either, select};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use std::{future::Future, pin::pin, sync::Arc, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};
use tokio_io_timeout::TimeoutStream;

/// What is left to those whose texts were given up to say so.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Where no more files can be opened, waiting is all that helps.
const OUT_OF_FILES: Duration = Duration::from_millis(50);
/// Bytes of a request's head at most.
const MAX_HEAD: usize = 64 << 10;

/// How connections are treated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Connections at a time at most; others wait in the system's queue.
    pub(crate) connections: usize,
    /// How long a client may take for a request's head, and for reading what it is sent.
    pub(crate) patience: Duration,
    /// How long what runs may go on at the end.
    pub(crate) grace: Duration,
}

/// Serves until `stop`, then waits for what runs; `give_up` ends what takes longer than the grace. Whether all came to its end.
pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    stop: impl Future<Output = ()>,
    give_up: impl FnOnce(),
) -> bool {
    let graceful = GracefulShutdown::new();
    let slots = Arc::new(Semaphore::new(limits.connections));
    let mut stop = pin!(stop);
    loop {
        let next = pin!(next(&listener, &slots));
        let Either::Left(((stream, slot), _)) = select(next, stop.as_mut()).await else { break };
        connect(stream, slot, router.clone(), limits, &graceful);
    }
    drop(listener);
    let mut ended = pin!(graceful.shutdown());
    if timeout(limits.grace, ended.as_mut()).await.is_ok() {
        return true;
    }
    give_up();
    let _ = timeout(LAST_WORDS, ended).await;
    false
}

async fn next(listener: &TcpListener, slots: &Arc<Semaphore>) -> (TcpStream, Option<OwnedSemaphorePermit>) {
    // The semaphore is never closed.
    let slot = slots.clone().acquire_owned().await.ok();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return (stream, slot),
            Err(_) => sleep(OUT_OF_FILES).await,
        }
    }
}

fn connect(
    stream: TcpStream,
    slot: Option<OwnedSemaphorePermit>,
    router: Router,
    limits: Limits,
    graceful: &GracefulShutdown,
) {
    // Tokens are small, and each is to be there at once.
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(limits.patience));
    let io = TokioIo::new(Box::pin(stream));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.patience)
        .max_buf_size(MAX_HEAD)
        .serve_connection(io, TowerToHyperService::new(router));
    let connection = graceful.watch(connection);
    tokio::spawn(async move {
        // What a client does wrong, or that it has gone, is its own matter.
        let _ = connection.await;
        drop(slot);
    });
}
