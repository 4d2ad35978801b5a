//! Several sequences on one set of weights.
#![allow(clippy::unwrap_used, reason = "tests")]

mod clients;
mod company;
mod drafts;
mod ends;
mod folder;
mod generate;
mod memory;
mod parts;
mod prefix;
mod schedule;
