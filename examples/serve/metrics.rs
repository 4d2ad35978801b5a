//! What is counted: for Prometheus, and for the page.

use candle_sparse_models::engine::EngineStats;
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fmt::Write,
    sync::{Mutex, PoisonError},
    time::Instant,
};

/// Seconds up to which waiting times are counted together.
const BOUNDS: [f64; 12] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
const TIERS: [&str; 3] = ["hot", "warm", "cold"];
/// Addresses that are counted by name: there are endless others.
const PATHS: [&str; 7] =
    ["/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/stats", "/"];

/// Waiting times.
#[derive(Clone, Copy, Debug, Default)]
struct Histogram {
    counts: [u64; BOUNDS.len()],
    count: u64,
    sum: f64,
}

impl Histogram {
    fn add(&mut self, seconds: f64) {
        self.counts.iter_mut().zip(BOUNDS).filter(|(_, bound)| seconds <= *bound).for_each(|(n, _)| *n += 1);
        self.count += 1;
        self.sum += seconds;
    }
}

#[derive(Debug, Default)]
struct Counts {
    answered: BTreeMap<(&'static str, u16), u64>,
    refused: u64,
    first: Histogram,
    gap: Histogram,
}

/// What the HTTP side counts.
#[derive(Debug, Default)]
pub(crate) struct Metrics(Mutex<Counts>);

/// When a text's last token came.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    last: Instant,
    begun: bool,
}

impl Pace {
    pub(crate) fn new() -> Self {
        Self { last: Instant::now(), begun: false }
    }

    /// A token came.
    pub(crate) fn step(&mut self, metrics: &Metrics) {
        let now = Instant::now();
        let seconds = (now - std::mem::replace(&mut self.last, now)).as_secs_f64();
        let begun = std::mem::replace(&mut self.begun, true);
        metrics.change(|counts| if begun { &mut counts.gap } else { &mut counts.first }.add(seconds));
    }
}

impl Metrics {
    fn change<T>(&self, change: impl FnOnce(&mut Counts) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A request was answered.
    pub(crate) fn answered(&self, path: &str, status: u16) {
        let path = PATHS.into_iter().find(|known| *known == path).unwrap_or("other");
        self.change(|counts| *counts.answered.entry((path, status)).or_default() += 1);
    }

    /// A connection was not let in.
    pub(crate) fn refused(&self) {
        self.change(|counts| counts.refused += 1);
    }

    /// All of it as Prometheus reads it.
    pub(crate) fn prometheus(&self, stats: &EngineStats) -> String {
        let mut out = Text::default();
        self.change(|counts| {
            out.begin("requests_total", "counter", "Requests that were answered.");
            for ((path, status), n) in &counts.answered {
                out.line(&format!("requests_total{{path=\"{path}\",status=\"{status}\"}}"), n);
            }
            out.begin(
                "connections_refused_total",
                "counter",
                "Connections of clients that had their share of them.",
            );
            out.line("connections_refused_total", counts.refused);
            out.histogram(
                "first_token_seconds",
                "From a request to the first token of a text.",
                &counts.first,
            );
            out.histogram("token_gap_seconds", "From one token of a text to the next.", &counts.gap);
        });
        for (name, kind, help, value) in numbers(stats) {
            out.begin(name, kind, help);
            out.line(name, value);
        }
        for (name, help) in [
            ("kv_tier_pages", "Pages of the running texts, by tier."),
            ("kv_tier_bytes", "Bytes of the pages of the running texts, by tier."),
        ] {
            out.begin(name, "gauge", help);
            for (tier, stats) in TIERS.into_iter().zip(stats.kv_tiers) {
                let value = if name == "kv_tier_pages" { stats.pages } else { stats.bytes };
                out.line(&format!("{name}{{tier=\"{tier}\"}}"), value);
            }
        }
        if !stats.active_share.is_empty() {
            let help = "Mean share of the neurons that written tokens read, by layer.";
            out.begin("active_neurons_ratio", "gauge", help);
            for (layer, share) in stats.active_share.iter().enumerate() {
                out.line(&format!("active_neurons_ratio{{layer=\"{layer}\"}}"), share);
            }
        }
        out.0
    }
}

type Number = (&'static str, &'static str, &'static str, u64);

fn numbers(stats: &EngineStats) -> Vec<Number> {
    let (gauge, counter) = ("gauge", "counter");
    let mut all = vec![
        ("running", gauge, "Texts that are read or written now.", stats.running as u64),
        ("paused", gauge, "Texts that stand still for other clients' sake.", stats.paused as u64),
        ("waiting", gauge, "Texts that wait for their turn.", stats.queued as u64),
        ("texts_total", counter, "Texts that ended, however.", stats.finished),
        ("texts_failed_total", counter, "Texts that ended with an error.", stats.failed),
        ("tokens_read_total", counter, "Tokens of prompts that were read.", stats.tokens_read),
        ("tokens_written_total", counter, "Tokens that were written.", stats.tokens_written),
        ("prefix_hits_total", counter, "Prompts whose beginning was held already.", stats.prefix_hits),
        ("prefix_tokens_total", counter, "Tokens that need not be read for it.", stats.prefix_tokens),
        ("prefix_bytes", gauge, "Bytes held for prompts to come.", stats.prefix_bytes as u64),
        ("drafts_made_total", counter, "Tokens that were guessed.", stats.drafts_made),
        ("drafts_accepted_total", counter, "Guessed tokens that came true.", stats.drafts_accepted),
        ("kv_bytes", gauge, "Bytes of all keys and values, shared pages once.", stats.kv_bytes as u64),
    ];
    if let Some(bytes) = resident_bytes() {
        all.push(("resident_memory_bytes", gauge, "Memory of the process.", bytes));
    }
    all
}

fn resident_bytes() -> Option<u64> {
    crate::cli::process_bytes("VmRSS").ok()
}

/// Prometheus' text format; all names have the same beginning.
#[derive(Default)]
struct Text(String);

impl Text {
    fn begin(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP candle_sparse_{name} {help}\n# TYPE candle_sparse_{name} {kind}");
    }

    fn line(&mut self, name: &str, value: impl std::fmt::Display) {
        let _ = writeln!(self.0, "candle_sparse_{name} {value}");
    }

    fn histogram(&mut self, name: &str, help: &str, of: &Histogram) {
        self.begin(name, "histogram", help);
        for (bound, count) in BOUNDS.into_iter().zip(of.counts) {
            self.line(&format!("{name}_bucket{{le=\"{bound}\"}}"), count);
        }
        self.line(&format!("{name}_bucket{{le=\"+Inf\"}}"), of.count);
        self.line(&format!("{name}_sum"), of.sum);
        self.line(&format!("{name}_count"), of.count);
    }
}

/// The same numbers for the page.
pub(crate) fn stats_json(stats: &EngineStats) -> Value {
    let tiers: serde_json::Map<_, _> = TIERS
        .into_iter()
        .zip(stats.kv_tiers)
        .map(|(tier, stats)| (tier.to_string(), json!({ "pages": stats.pages, "bytes": stats.bytes })))
        .collect();
    json!({
        "running": stats.running,
        "reading": stats.reading,
        "paused": stats.paused,
        "waiting": stats.queued,
        "tokens": { "read": stats.tokens_read, "written": stats.tokens_written },
        "prefixes": {
            "hits": stats.prefix_hits, "tokens": stats.prefix_tokens, "held": stats.prefixes, "bytes": stats.prefix_bytes,
        },
        "drafts": { "made": stats.drafts_made, "accepted": stats.drafts_accepted },
        "kv_bytes": stats.kv_bytes,
        "kv_tiers": tiers,
        "active_share": stats.active_share,
        "resident_bytes": resident_bytes(),
    })
}
