//! The server as clients meet it.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "serve/answers.rs"]
mod answers;
#[path = "serve/clients.rs"]
mod clients;
mod common;
#[cfg(target_os = "linux")]
#[path = "serve/crowd.rs"]
mod crowd;
#[path = "../common/fields.rs"]
mod fields;
#[path = "serve/hostile.rs"]
mod hostile;
#[path = "serve/others.rs"]
mod others;
#[path = "serve/server.rs"]
mod server;
#[path = "serve/wrong.rs"]
mod wrong;
