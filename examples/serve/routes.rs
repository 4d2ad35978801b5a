//! What is answered at which address.

use crate::{
    answer::Shape,
    answering::Answering,
    ask::{Asker, random},
    asked::{Asked, Kind, no_model},
    engine::Handle,
    error::{ApiError, json_response},
    guard,
    logprobs::Spelling,
    metrics::Metrics,
    page,
};
use axum::{
    Router,
    body::{Body, HttpBody},
    extract::{Path, Request, State},
    http::{HeaderName, HeaderValue, StatusCode, header},
    middleware,
    response::{
        IntoResponse, Response,
        sse::{KeepAlive, Sse},
    },
    routing::{get, post},
};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde_json::{Value, json};
use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::sync::Semaphore;

/// A stream says something at least so often, so that proxies do not take it for dead while a long prompt is read.
const SIGN_OF_LIFE: Duration = Duration::from_secs(10);
/// Bytes of a body that is read whatever else is: some 40 times as much is taken meanwhile, by each of the connections at most.
const SHORT: usize = 32 << 10;

/// What all requests share.
pub(crate) struct App {
    pub(crate) asker: Asker,
    pub(crate) engine: Handle,
    /// What clients call the model.
    pub(crate) name: String,
    pub(crate) key: Option<guard::Key>,
    /// Texts that may wait at most: a request for more would never be taken.
    pub(crate) max_queued: usize,
    /// Bytes of a request's body at most.
    pub(crate) max_body: usize,
    /// Whose turn it is to have a long body read.
    pub(crate) turn: Arc<Semaphore>,
    /// How long a body may take to come.
    pub(crate) patience: Duration,
    pub(crate) started: SystemTime,
    pub(crate) metrics: Arc<Metrics>,
    /// Of the model, for the page.
    pub(crate) facts: Value,
}

/// All of it.
pub(crate) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(|state, request| complete(state, request, Kind::Chat)))
        .route("/v1/completions", post(|state, request| complete(state, request, Kind::Text)))
        .route("/v1/models", get(models))
        // Names may have slashes in them.
        .route("/v1/models/{*name}", get(model))
        .route("/metrics", get(metrics))
        .route("/stats", get(stats))
        .route_layer(middleware::from_fn_with_state(app.clone(), guard::check))
        .route("/health", get(health))
        .route("/", get(page::page))
        .fallback(nothing_here)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(app.clone(), guard::count))
        .with_state(app)
}

async fn nothing_here(request: Request) -> ApiError {
    let message = format!("there is nothing at {}", request.uri().path());
    ApiError::invalid(StatusCode::NOT_FOUND, "unknown_url", message)
}

async fn wrong_method(request: Request) -> ApiError {
    let message = format!("{} does not take {}", request.uri().path(), request.method());
    ApiError::invalid(StatusCode::METHOD_NOT_ALLOWED, "method_not_supported", message)
}

async fn complete(State(app): State<Arc<App>>, request: Request, kind: Kind) -> Result<Response, ApiError> {
    let body = body(&app, request).await?;
    let turn = match body.len() > SHORT {
        true => app.turn.clone().acquire_owned().await.ok(),
        false => None,
    };
    // A long text takes a while to become tokens: others are answered meanwhile.
    let reader = app.clone();
    let read = move || {
        // Over when the text is read, even where nobody waits for it any more.
        let _turn = turn;
        Asked::new(&reader.asker, kind, &reader.name, reader.max_queued, &body)
    };
    let asked = tokio::task::spawn_blocking(read).await;
    let mut asked = asked.map_err(|_| ApiError::internal("the request could not be read"))??;
    let requests = std::mem::take(&mut asked.requests);
    let texts = requests.len();
    let events = app.engine.add(requests).await?;
    let spelling = Spelling::new(app.asker.tokenizer.clone());
    let shape = Shape::new(&asked, random(), seconds(SystemTime::now()), &app.name, spelling);
    let answering = Answering::new(shape, texts, events, app.metrics.clone());
    if !asked.stream {
        return Ok(json_response(&answering.whole().await?));
    }
    let alive = KeepAlive::new().interval(SIGN_OF_LIFE);
    let mut response = Sse::new(answering.stream()).keep_alive(alive).into_response();
    // nginx would gather the pieces otherwise.
    let unbuffered = HeaderName::from_static("x-accel-buffering");
    response.headers_mut().insert(unbuffered, HeaderValue::from_static("no"));
    Ok(response)
}

/// The body of a request, if it is JSON, is not too long and comes in time.
async fn body(app: &App, request: Request) -> Result<Vec<u8>, ApiError> {
    let kind = request.headers().get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    // Pages of other sites can send anything but this without asking.
    if !kind.is_some_and(|kind| kind.to_ascii_lowercase().starts_with(b"application/json")) {
        return Err(ApiError::invalid(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_media_type",
            "the body must be JSON: send the header Content-Type: application/json",
        ));
    }
    let too_long = || {
        let message = format!("the body is longer than {} bytes", app.max_body);
        ApiError::invalid(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message)
    };
    let body: Body = request.into_body();
    // Of a length that was announced nothing need come.
    if body.size_hint().lower() > app.max_body as u64 {
        return Err(too_long());
    }
    let collected = tokio::time::timeout(app.patience, Limited::new(body, app.max_body).collect()).await;
    let too_slow = || {
        let message = format!("the body did not come within {} s", app.patience.as_secs_f64());
        ApiError::invalid(StatusCode::REQUEST_TIMEOUT, "request_timeout", message)
    };
    let body = collected.map_err(|_| too_slow())?.map_err(|error| match error.is::<LengthLimitError>() {
        true => too_long(),
        false => ApiError::invalid(StatusCode::BAD_REQUEST, "invalid_body", "the body did not come whole"),
    })?;
    Ok(body.to_bytes().into())
}

async fn models(State(app): State<Arc<App>>) -> Response {
    json_response(&json!({ "object": "list", "data": [model_json(&app)] }))
}

async fn model(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Response, ApiError> {
    if name == app.name { Ok(json_response(&model_json(&app))) } else { Err(no_model(&name, &app.name)) }
}

fn model_json(app: &App) -> Value {
    json!({
        "id": app.name, "object": "model", "created": seconds(app.started), "owned_by": "candle-sparse",
        "context_length": app.asker.context,
    })
}

async fn health(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    match app.engine.is_alive() {
        true => Ok(json_response(&json!({ "status": "ok" }))),
        false => Err(ApiError::internal("the engine has ended")),
    }
}

async fn metrics(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let stats = app.engine.stats().await?;
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    Ok((kind, app.metrics.prometheus(&stats)).into_response())
}

async fn stats(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let stats = app.engine.stats().await?;
    let mut all = crate::metrics::stats_json(&stats);
    all["model"] = app.facts.clone();
    Ok(json_response(&all))
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
