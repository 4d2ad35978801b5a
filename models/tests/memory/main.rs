//! Long-memory tasks with known answers: the dense model solves them all, and cannot without what it should remember.
#![allow(clippy::unwrap_used, reason = "tests")]

mod controls;
mod dense;
mod parts;
mod sparse;
mod synthetic;
