//! Images: written, opened, run, and damaged in every way.
#![allow(clippy::unwrap_used, reason = "tests")]

mod damage;
mod model;
mod vocabulary;
