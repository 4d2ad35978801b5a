//! Who may ask, and what is counted of all who do.

use crate::{error::ApiError, routes::App};
use anyhow::{Result, bail};
use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, Uri, header},
    middleware::Next,
    response::Response,
};
use std::{fmt, sync::Arc};
use subtle::ConstantTimeEq;

/// The environment variable with the key that clients must send.
pub(crate) const KEY: &str = "CANDLE_SPARSE_API_KEY";

/// The key that clients must send. It is never shown.
pub(crate) struct Key(Vec<u8>);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

impl Key {
    /// That of the environment, if there is one.
    pub(crate) fn from_env() -> Result<Option<Self>> {
        let Some(key) = std::env::var_os(KEY) else { return Ok(None) };
        let is_visible = |key: &&str| !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_graphic());
        match key.to_str().filter(is_visible) {
            Some(key) => Ok(Some(Self(key.into()))),
            None => bail!("{KEY} must be letters, digits and signs without blanks; unset, anybody may ask"),
        }
    }

    /// Whether a header has it. How long that takes says nothing of the key but its length.
    fn is_in(&self, header: &HeaderValue) -> bool {
        let Some((scheme, key)) = header.as_bytes().split_at_checked(7) else { return false };
        scheme.eq_ignore_ascii_case(b"bearer ") && bool::from(self.0.ct_eq(key))
    }
}

/// Lets through who may ask.
pub(crate) async fn check(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    match (&app.key, request.headers().get(header::AUTHORIZATION)) {
        (Some(_), None) => {
            return Err(ApiError::key("no API key: send the header Authorization: Bearer KEY"));
        }
        (Some(key), Some(given)) if !key.is_in(given) => return Err(ApiError::key("the API key is wrong")),
        (Some(_), Some(_)) => {}
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
