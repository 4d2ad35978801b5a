//! The page at `/`: one file, part of the program.

use crate::ask::random;
use axum::{
    http::{HeaderName, header},
    response::{Html, IntoResponse, Response},
};

/// `NONCE` stands where a number is put that nobody can foresee: what has it is ours, and nothing else in the page may run.
const PAGE: &str = include_str!("page.html");

pub(crate) async fn page() -> Response {
    let nonce = format!("{:016x}{:016x}", random(), random());
    // The page loads nothing, and asks nobody but this server.
    let policy = format!(
        "default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let headers = [
        (header::CONTENT_SECURITY_POLICY, policy.as_str()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    ];
    (headers, Html(PAGE.replace("NONCE", &nonce))).into_response()
}
