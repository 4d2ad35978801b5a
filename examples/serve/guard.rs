//! Who may ask, and what is counted of all who do.

use crate::{crowd::Client, error::ApiError, routes::App};
use anyhow::{Result, bail};
use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, Uri, header},
    middleware::Next,
    response::Response,
};
use std::{fmt, sync::Arc};
use subtle::ConstantTimeEq;

/// The environment variable with the key that clients must send, or with several of them, commas between.
pub(crate) const KEY: &str = "CANDLE_SPARSE_API_KEY";

/// The keys of which clients must send one. They are never shown.
pub(crate) struct Keys(Vec<Vec<u8>>);

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys")
    }
}

impl Keys {
    /// Those of the environment, if there are any.
    pub(crate) fn from_env() -> Result<Option<Self>> {
        let Some(keys) = std::env::var_os(KEY) else { return Ok(None) };
        let keys: Vec<&str> = keys.to_str().unwrap_or_default().split(',').collect();
        if keys.iter().any(|key| key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic())) {
            bail!(
                "{KEY} must be letters, digits and signs without blanks, of several keys with commas between; unset, anybody may ask"
            );
        }
        Ok(Some(Self(keys.into_iter().map(Into::into).collect())))
    }

    /// Which of them a header has. How long that takes says nothing of a key but its length: all are compared.
    fn find(&self, header: &HeaderValue) -> Option<usize> {
        let (scheme, given) = header.as_bytes().split_at_checked(7)?;
        if !scheme.eq_ignore_ascii_case(b"bearer ") {
            return None;
        }
        let mut found = None;
        for (i, key) in self.0.iter().enumerate() {
            if bool::from(key.ct_eq(given)) {
                found = Some(i);
            }
        }
        found
    }

    /// Who sent a key, where there are several to tell apart.
    fn client(&self, key: usize) -> Option<Client> {
        (self.0.len() > 1).then(|| Client::of_key(key))
    }
}

/// Lets through who may ask.
pub(crate) async fn check(
    State(app): State<Arc<App>>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    match (&app.keys, request.headers().get(header::AUTHORIZATION)) {
        (Some(_), None) => {
            return Err(ApiError::key("no API key: send the header Authorization: Bearer KEY"));
        }
        (Some(keys), Some(given)) => {
            let key = keys.find(given).ok_or_else(|| ApiError::key("the API key is wrong"))?;
            if let Some(client) = keys.client(key) {
                request.extensions_mut().insert(client);
            }
        }
        (None, _) => check_origin(request.headers())?,
    }
    Ok(next.run(request).await)
}

/// Without a key, who reaches the server may ask; but a page of another site that is open in a browser on this machine reaches
/// it too, also under a name of its own for this address. Browsers say where a page is from.
fn check_origin(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(origin) = headers.get(header::ORIGIN) else { return Ok(()) };
    let host = |origin: &HeaderValue| Some(origin.to_str().ok()?.parse::<Uri>().ok()?.host()?.to_string());
    let host = host(origin);
    if host.is_some_and(|host| matches!(host.as_str(), "localhost" | "127.0.0.1" | "[::1]")) {
        return Ok(());
    }
    let message = format!("pages of other sites may ask only with an API key: set {KEY}");
    Err(ApiError::invalid(StatusCode::FORBIDDEN, "forbidden_origin", message))
}

/// Counts what is asked and how it is answered.
pub(crate) async fn count(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let path = request.uri().path().to_string();
    let response = next.run(request).await;
    app.metrics.answered(&path, response.status().as_u16());
    response
}
