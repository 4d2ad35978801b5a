//! What is answered at which address.

use crate::{
    answer::Shape,
    answering::Answering,
    ask::{Asker, random},
    asked::{Asked, Kind, no_model},
    body::Bodies,
    crowd::Proxies,
    engine::Handle,
    error::{ApiError, json_response},
    guard,
    listener::Peer,
    logprobs::Spelling,
    metrics::Metrics,
    page,
};
use axum::{
    Extension, Router,
    extract::{Path, Request, State},
    http::{HeaderName, HeaderValue, StatusCode, header},
    middleware,
    response::{
        IntoResponse, Response,
        sse::{KeepAlive, Sse},
    },
    routing::{get, post},
};
use serde_json::{Value, json};
use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// A stream says something at least so often, so that proxies do not take it for dead while a long prompt is read.
const SIGN_OF_LIFE: Duration = Duration::from_secs(10);

/// What all requests share.
pub(crate) struct App {
    pub(crate) asker: Asker,
    pub(crate) engine: Handle,
    /// What clients call the model.
    pub(crate) name: String,
    pub(crate) keys: Option<guard::Keys>,
    /// Texts that a request may ask for at most: more would never be taken.
    pub(crate) most_texts: usize,
    pub(crate) bodies: Bodies,
    pub(crate) proxies: Proxies,
    pub(crate) started: SystemTime,
    pub(crate) metrics: Arc<Metrics>,
    /// Of the model, for the page.
    pub(crate) facts: Value,
}

/// All of it.
pub(crate) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route(
            "/v1/chat/completions",
            post(|state, peer, request| complete(state, peer, request, Kind::Chat)),
        )
        .route("/v1/completions", post(|state, peer, request| complete(state, peer, request, Kind::Text)))
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

async fn complete(
    State(app): State<Arc<App>>,
    Extension(Peer(peer)): Extension<Peer>,
    request: Request,
    kind: Kind,
) -> Result<Response, ApiError> {
    let by_key = request.extensions().get().copied();
    let client = by_key.unwrap_or_else(|| app.proxies.client(peer, request.headers()));
    let body = app.bodies.receive(client, request).await?;
    let reader = app.clone();
    let read = move |body: &[u8]| Asked::new(&reader.asker, kind, &reader.name, reader.most_texts, body);
    let mut asked = app.bodies.read(body, read).await??;
    let requests = std::mem::take(&mut asked.requests);
    let texts = requests.len();
    let events = app.engine.add(client, requests).await?;
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
