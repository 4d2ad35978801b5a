//! Connections: as many as are allowed, for all and for each client, with patience that ends, and an end that waits for what runs.

use crate::{
    crowd::{Client, Crowd, Place, Proxies, Refusal, Share},
    metrics::Metrics,
};
use axum::{Router, http::Request, response::IntoResponse};
use futures_util::future::{Either, select};
use http_body_util::{BodyExt, Limited};
use hyper::{
    body::Incoming,
    server::conn::http1,
    service::{Service, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use std::{convert::Infallible, future::Future, net::IpAddr, pin::pin, sync::Arc, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_io_timeout::TimeoutStream;

/// What is left to those whose texts were given up to say so.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Where no more files can be opened, waiting is all that helps.
const OUT_OF_FILES: Duration = Duration::from_millis(50);
/// Bytes of a request's head at most.
const MAX_HEAD: usize = 64 << 10;

/// How long a client that has its share of the connections may take to hear so, and how many may at a time.
const REFUSAL: Duration = Duration::from_secs(2);
const REFUSALS: usize = 32;

/// How connections are treated.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    /// Connections at a time at most; others wait in the system's queue.
    pub(crate) connections: usize,
    /// What of them one client may have; proxies may have them all.
    pub(crate) share: Share,
    pub(crate) proxies: Proxies,
    /// How long a client may take for a request's head, and for reading what it is sent.
    pub(crate) patience: Duration,
    /// How long what runs may go on at the end.
    pub(crate) grace: Duration,
}

/// The address that a request comes from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub(crate) IpAddr);

/// Serves until `stop`, then waits for what runs; `give_up` ends what takes longer than the grace. Whether all came to its end.
pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    metrics: Arc<Metrics>,
    stop: impl Future<Output = ()>,
    give_up: impl FnOnce(),
) -> bool {
    let graceful = GracefulShutdown::new();
    let door = Door {
        crowd: Crowd::new(limits.connections, limits.share),
        refusals: Arc::new(Semaphore::new(REFUSALS)),
        listener,
        metrics,
    };
    let mut stop = pin!(stop);
    loop {
        let next = pin!(door.next(&limits.proxies));
        let Either::Left(((stream, peer, place), _)) = select(next, stop.as_mut()).await else { break };
        connect(stream, peer, place, router.clone(), limits.patience, &graceful);
    }
    drop(door);
    let mut ended = pin!(graceful.shutdown());
    if timeout(limits.grace, ended.as_mut()).await.is_ok() {
        return true;
    }
    give_up();
    let _ = timeout(LAST_WORDS, ended).await;
    false
}

/// Where clients come in.
struct Door {
    listener: TcpListener,
    crowd: Arc<Crowd>,
    refusals: Arc<Semaphore>,
    metrics: Arc<Metrics>,
}

impl Door {
    /// The next one that is let in; where nobody can be, others wait in the system's queue.
    async fn next(&self, proxies: &Proxies) -> (TcpStream, IpAddr, Place) {
        loop {
            self.crowd.any().await;
            let Ok((stream, address)) = self.listener.accept().await else {
                sleep(OUT_OF_FILES).await;
                continue;
            };
            let peer = address.ip();
            match self.crowd.enter(Client::of(peer), proxies.has(peer)) {
                Ok(place) => return (stream, peer, place),
                Err(refusal) => self.refuse(stream, refusal),
            }
        }
    }

    /// Tells a client why it is not let in, if not too many are told so.
    fn refuse(&self, stream: TcpStream, refusal: Refusal) {
        self.metrics.refused();
        let Ok(permit) = self.refusals.clone().try_acquire_owned() else { return };
        let service = service_fn(move |request: Request<Incoming>| async move {
            // What is not read when a connection is closed makes the answer be lost.
            let _ = Limited::new(request.into_body(), MAX_HEAD).collect().await;
            let error = refusal.of("connections");
            Ok::<_, Infallible>(error.into_response())
        });
        let connection =
            http1::Builder::new().keep_alive(false).serve_connection(TokioIo::new(stream), service);
        tokio::spawn(async move {
            let _ = timeout(REFUSAL, connection).await;
            drop(permit);
        });
    }
}

fn connect(
    stream: TcpStream,
    peer: IpAddr,
    place: Place,
    router: Router,
    patience: Duration,
    graceful: &GracefulShutdown,
) {
    // Tokens are small, and each is to be there at once.
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(patience));
    let io = TokioIo::new(Box::pin(stream));
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: Request<_>| {
        request.extensions_mut().insert(Peer(peer));
        router.call(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(patience)
        .max_buf_size(MAX_HEAD)
        .serve_connection(io, service);
    let connection = graceful.watch(connection);
    tokio::spawn(async move {
        // What a client does wrong, or that it has gone, is its own matter.
        let _ = connection.await;
        drop(place);
    });
}
