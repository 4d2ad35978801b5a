//! Bodies of requests: short ones whenever they come, long ones within places that clients share.
//!
//! A body takes many times its bytes while it becomes tokens, and a client may take as long to send one as it is waited for: so what is
//! held of all bodies is bounded here, whatever number of connections there is. What a thread has taken stays with it for what it
//! takes later, so long ones have one thread.

use crate::{
    crowd::{Client, Crowd, Place, Share},
    error::ApiError,
};
use axum::{
    body::{Body, Bytes, HttpBody},
    extract::Request,
    http::{HeaderValue, StatusCode, header},
};
use http_body_util::BodyExt;
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        mpsc::{Sender, channel},
    },
    time::{Duration, Instant},
};
use tokio::{sync::oneshot, task::spawn_blocking, time::timeout};

/// Bytes of a body that is read whatever else is.
const SHORT: usize = 32 << 10;
/// Longer ones that are received at a time.
const LONG_ONES: usize = 8;

type Job = Box<dyn FnOnce() + Send>;

/// How bodies are received and read.
#[derive(Clone, Debug)]
pub(crate) struct Bodies {
    places: Arc<Crowd>,
    /// Reads long ones, one after the other.
    reader: Sender<Job>,
    /// Bytes at most.
    most: usize,
    /// How long one may take to come, and may wait for its place.
    patience: Duration,
}

/// One that has come.
#[derive(Debug)]
pub(crate) struct Received {
    bytes: Vec<u8>,
    /// That of a long one.
    place: Option<Place>,
}

impl Bodies {
    /// # Errors
    /// The system gives no thread.
    pub(crate) fn new(most: usize, share: Share, patience: Duration) -> std::io::Result<Self> {
        let (reader, jobs) = channel::<Job>();
        let thread = std::thread::Builder::new().name("long bodies".to_string());
        // One that panics is missed by who waits for it; the next one is read.
        thread.spawn(move || jobs.iter().for_each(|job| drop(catch_unwind(AssertUnwindSafe(job)))))?;
        Ok(Self { places: Crowd::new(LONG_ONES, share), reader, most, patience })
    }

    /// Reads what has come, while others are answered.
    pub(crate) async fn read<T: Send + 'static>(
        &self,
        body: Received,
        read: impl FnOnce(&[u8]) -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let (send, done) = oneshot::channel();
        let is_long = body.place.is_some();
        let job = move || {
            let result = read(&body.bytes);
            // The place is free when it is read, even where nobody waits for it any more.
            drop(body);
            drop(send.send(result));
        };
        match is_long {
            true => drop(self.reader.send(Box::new(job))),
            false => drop(spawn_blocking(job)),
        }
        done.await.map_err(|_| ApiError::internal("the request could not be read"))
    }

    /// The body of a request, if it is JSON, is not too long and comes in time.
    pub(crate) async fn receive(&self, client: Client, request: Request) -> Result<Received, ApiError> {
        check_kind(&request)?;
        let mut body = request.into_body();
        // Of a length that was announced nothing need come.
        if body.size_hint().lower() > self.most as u64 {
            return Err(self.too_long());
        }
        let (mut bytes, mut left) = (Vec::new(), self.patience);
        if body.size_hint().lower() <= SHORT as u64 {
            let start = Instant::now();
            if self.in_time(left, take(&mut body, &mut bytes, SHORT.min(self.most))).await? {
                return Ok(Received { bytes, place: None });
            }
            left = left.saturating_sub(start.elapsed());
        }
        let place = self.places.wait(client, self.patience).await;
        let place = place.map_err(|refusal| refusal.of("long bodies that are read"))?;
        if !self.in_time(left, take(&mut body, &mut bytes, self.most)).await? {
            return Err(self.too_long());
        }
        Ok(Received { bytes, place: Some(place) })
    }

    async fn in_time(
        &self,
        left: Duration,
        take: impl Future<Output = Result<bool, ApiError>>,
    ) -> Result<bool, ApiError> {
        let too_slow = |_| {
            let message = format!("the body did not come within {} s", self.patience.as_secs_f64());
            ApiError::invalid(StatusCode::REQUEST_TIMEOUT, "request_timeout", message)
        };
        timeout(left, take).await.map_err(too_slow)?
    }

    fn too_long(&self) -> ApiError {
        let message = format!("the body is longer than {} bytes", self.most);
        ApiError::invalid(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message)
    }
}

fn check_kind(request: &Request) -> Result<(), ApiError> {
    let kind = request.headers().get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    // Pages of other sites can send anything but this without asking.
    if kind.is_some_and(|kind| kind.to_ascii_lowercase().starts_with(b"application/json")) {
        return Ok(());
    }
    Err(ApiError::invalid(
        StatusCode::UNSUPPORTED_MEDIA_TYPE,
        "unsupported_media_type",
        "the body must be JSON: send the header Content-Type: application/json",
    ))
}

/// Takes what comes until there is no more, or more than `most` bytes; whether it was all.
async fn take(body: &mut Body, bytes: &mut Vec<u8>, most: usize) -> Result<bool, ApiError> {
    while bytes.len() <= most {
        let Some(frame) = body.frame().await else { return Ok(true) };
        let not_whole =
            |_| ApiError::invalid(StatusCode::BAD_REQUEST, "invalid_body", "the body did not come whole");
        let data: Option<Bytes> = frame.map_err(not_whole)?.into_data().ok();
        // Copied: a small piece may be a part of a large buffer.
        bytes.extend_from_slice(&data.unwrap_or_default());
    }
    Ok(false)
}
