//! What was measured, as lines or as one JSON object.

use super::{Cli, cli::output, engines::Engine};
use anyhow::Result;
use candle_sparse::{Format, Threads};
use serde_json::{Value, json};
use std::{borrow::Cow, io::Write};

/// Seconds of each call.
#[derive(Clone, Default)]
pub(crate) struct Times {
    pub(crate) prefill: Vec<f64>,
    pub(crate) decode: Vec<f64>,
}

/// What holds for all engines.
pub(crate) struct Run<'a> {
    pub(crate) cli: &'a Cli,
    pub(crate) threads: Threads,
    pub(crate) stream_gb_per_s: f64,
    pub(crate) load_peak: u64,
    pub(crate) rss: u64,
}

/// What holds for one.
pub(crate) struct Row {
    name: &'static str,
    decode: f64,
    prefill: Option<f64>,
    weight_bytes: usize,
    weight_bytes_per_token: usize,
    gb_per_s: f64,
    active_fraction: f64,
}

impl Row {
    pub(crate) fn new(engine: &dyn Engine, times: &Times, prefill: usize) -> Self {
        let decode = 1.0 / median(&mut times.decode.clone());
        let weight_bytes_per_token = engine.weight_bytes_per_token();
        Self {
            name: engine.name(),
            decode,
            prefill: (prefill > 0).then(|| prefill as f64 / median(&mut times.prefill.clone())),
            weight_bytes: engine.weight_bytes(),
            weight_bytes_per_token,
            gb_per_s: weight_bytes_per_token as f64 * decode / 1e9,
            active_fraction: engine.active_fraction(),
        }
    }

    fn json(&self, stream_gb_per_s: f64) -> Value {
        json!({
            "engine": self.name,
            "decode_tokens_per_s": self.decode,
            "prefill_tokens_per_s": self.prefill,
            "weight_bytes": self.weight_bytes,
            "weight_bytes_per_token": self.weight_bytes_per_token,
            "weight_gb_per_s": self.gb_per_s,
            "active_fraction": self.active_fraction,
            "bandwidth_share": self.gb_per_s / stream_gb_per_s,
        })
    }
}

impl Run<'_> {
    fn weights(&self) -> &'static str {
        if self.cli.model.is_some() { "checkpoint" } else { "random" }
    }

    fn shape(&self) -> Cow<'_, str> {
        self.cli.model.as_ref().map_or(Cow::Borrowed(self.cli.shape.name()), |m| m.to_string_lossy())
    }

    fn dtype(&self) -> &'static str {
        self.cli.format().map_or("as stored", Format::name)
    }
}

/// The first engine's figures at the top level, all of them under `engines`.
pub(crate) fn json(run: &Run<'_>, rows: &[Row], times: &[Times]) -> Result<()> {
    let mut object = rows[0].json(run.stream_gb_per_s);
    let ratios = ratios(times);
    for (key, value) in [
        ("weights", json!(run.weights())),
        ("shape", json!(run.shape())),
        ("activity", json!(run.cli.active.map(|_| format!("{:?} {:?}", run.cli.ffn, run.cli.activity)))),
        ("dtype", json!(run.dtype())),
        ("depth", json!(run.cli.depth)),
        ("threads", json!(run.threads.count())),
        ("stream_gb_per_s", json!(run.stream_gb_per_s)),
        ("rss_bytes", json!(run.rss)),
        ("load_peak_bytes", json!(run.load_peak)),
        ("decode_ratio", json!(ratios.map(|r| r.0))),
        ("prefill_ratio", json!(ratios.and_then(|r| r.1))),
        ("engines", rows.iter().map(|r| r.json(run.stream_gb_per_s)).collect()),
    ] {
        object[key] = value;
    }
    output::line(object)
}

/// One line for the run, one for each engine, one for the ratio.
pub(crate) fn text(run: &Run<'_>, rows: &[Row], times: &[Times]) -> Result<()> {
    let mut out = output::stdout();
    writeln!(
        out,
        "{} {}, {} weights, {} threads, depth {}; streaming read {:.1} GB/s; load peak {:.2} GB, resident {:.2} GB",
        run.shape(),
        run.dtype(),
        run.weights(),
        run.threads.count(),
        run.cli.depth,
        run.stream_gb_per_s,
        run.load_peak as f64 / 1e9,
        run.rss as f64 / 1e9,
    )?;
    for row in rows {
        let prefill = row.prefill.map_or(String::new(), |p| format!("; prefill {p:.1} tokens/s"));
        writeln!(
            out,
            "{:>14}: decode {:8.2} tokens/s, {:.3} of the neurons, {:.3} GB/token, {:5.1} GB/s = {:.2} of streaming{prefill}",
            row.name,
            row.decode,
            row.active_fraction,
            row.weight_bytes_per_token as f64 / 1e9,
            row.gb_per_s,
            row.gb_per_s / run.stream_gb_per_s
        )?;
    }
    if let Some((decode, prefill)) = ratios(times) {
        let prefill = prefill.map_or(String::new(), |p| format!(", prefill {p:.2} x"));
        let bytes = rows[1].weight_bytes_per_token as f64 / rows[0].weight_bytes_per_token as f64;
        writeln!(out, "{:>14}: decode {decode:.2} x{prefill}, bytes {bytes:.2} x fewer", "ratio")?;
    }
    Ok(())
}

/// How many times faster the first of two engines is, in decode and prefill: medians over pairs of calls that ran one
/// after the other.
fn ratios(times: &[Times]) -> Option<(f64, Option<f64>)> {
    let [ours, theirs] = times else { return None };
    let ratio = |a: &[f64], b: &[f64]| median(&mut a.iter().zip(b).map(|(a, b)| b / a).collect::<Vec<_>>());
    let prefill = (!ours.prefill.is_empty()).then(|| ratio(&ours.prefill, &theirs.prefill));
    Some((ratio(&ours.decode, &theirs.decode), prefill))
}

pub(crate) fn median(v: &mut [f64]) -> f64 {
    v.sort_by(f64::total_cmp);
    if v.is_empty() { f64::NAN } else { v[v.len() / 2] }
}
