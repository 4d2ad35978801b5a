//! What a client is told when it gets no answer: OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`.

use crate::fields::Wrong;
use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use candle_sparse_models::pretrained::first_line;
use serde_json::{Value, json};

/// A request that is not answered, and why.
#[derive(Clone, Debug)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    /// OpenAI's `type`.
    kind: &'static str,
    wrong: Wrong,
}

impl ApiError {
    fn new(
        status: StatusCode,
        kind: &'static str,
        code: Option<&'static str>,
        message: impl AsRef<str>,
    ) -> Self {
        Self { status, kind, wrong: Wrong { code, ..Wrong::new(message) } }
    }

    /// The client can mend it.
    pub(crate) fn invalid(status: StatusCode, code: &'static str, message: impl AsRef<str>) -> Self {
        Self::new(status, "invalid_request_error", Some(code), message)
    }

    /// No key, or a wrong one.
    pub(crate) fn key(message: &str) -> Self {
        Self::invalid(StatusCode::UNAUTHORIZED, "invalid_api_key", message)
    }

    /// More is asked for than can wait.
    pub(crate) fn overloaded(message: impl AsRef<str>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("overloaded"), message)
    }

    /// The client has as much as it may have.
    pub(crate) fn share(message: impl AsRef<str>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "requests", Some("rate_limit_exceeded"), message)
    }

    /// The server is about to end.
    pub(crate) fn ending() -> Self {
        let message = "the server is shutting down";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("shutting_down"), message)
    }

    /// Something that the client has no part in.
    pub(crate) fn internal(message: impl AsRef<str>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", None, message)
    }

    /// Why the engine does not take a request.
    pub(crate) fn from_engine(error: &candle_core::Error) -> Self {
        match candle_sparse::Error::of(error) {
            Some(candle_sparse::Error::Full { problem }) => Self::overloaded(problem),
            Some(candle_sparse::Error::Setting { name, problem }) => Wrong::value(*name, problem).into(),
            _ => Self::internal(first_line(error)),
        }
    }

    /// As JSON, also for the middle of a stream.
    pub(crate) fn json(&self) -> Value {
        let Wrong { message, param, code } = &self.wrong;
        json!({ "error": { "message": message, "type": self.kind, "param": param, "code": code } })
    }
}

impl From<Wrong> for ApiError {
    fn from(wrong: Wrong) -> Self {
        Self { status: StatusCode::BAD_REQUEST, kind: "invalid_request_error", wrong }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, json_response(&self.json())).into_response();
        let headers = response.headers_mut();
        match self.status {
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            _ => {}
        }
        response
    }
}

/// JSON as it is sent.
pub(crate) fn json_response(value: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}
