//! Speed of decode and prefill on any shape, beside the memory bandwidth measured in the same run.
//!
//! Weights are random unless `--model` names a checkpoint: time does not depend on them, quality does, so none is
//! claimed. `--against candle` runs candle's own model in turn with ours, step by step, so that a ratio holds even where
//! the machine's speed drifts.
#![allow(clippy::doc_markdown, reason = "comments on flags are the program's help text")]

#[path = "../common/cli.rs"]
mod cli;
mod engines;
mod probe;
mod shapes;

use anyhow::{Result, bail};
use candle_sparse::{Threads, core::Format};
use clap::{Parser, ValueEnum};
use cli::process_bytes;
use engines::{Candle, Engine, Ours};
use std::{io::Write, process::ExitCode, time::Instant};

/// Measure decode and prefill speed.
#[derive(Parser, Debug)]
#[command(version)]
pub(crate) struct Cli {
    /// Shape to fill with random weights
    #[arg(long, default_value = "smollm2-135m", conflicts_with = "model")]
    shape: shapes::Shape,
    /// A real checkpoint instead: Hub id, folder, or name of an embedded model
    #[arg(long)]
    model: Option<String>,
    /// Format of the weights
    #[arg(long, default_value = "f16", value_parser = cli::format)]
    dtype: Format,
    /// Tokens in the cache before the decode steps that are timed
    #[arg(long, default_value_t = 0)]
    depth: usize,
    /// Tokens of the prompt for the prefill speed; 0 leaves it out
    #[arg(long, default_value_t = 512)]
    prefill: usize,
    /// Decode steps to time
    #[arg(long, default_value_t = 12)]
    steps: usize,
    /// Threads, at most those of candle's pool (CANDLE_NUM_THREADS)
    #[arg(long)]
    threads: Option<usize>,
    /// Which engine to measure
    #[arg(long, default_value = "candle-sparse")]
    engine: EngineName,
    /// Measure this engine too, in turn with the first
    #[arg(long)]
    against: Option<EngineName>,
    /// Print one JSON object as the last line of standard output
    #[arg(long)]
    json: bool,
}

/// An engine that can be measured.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum EngineName {
    CandleSparse,
    Candle,
}

fn main() -> ExitCode {
    cli::exit(run(&Cli::parse()))
}

fn run(cli: &Cli) -> Result<()> {
    if cli.steps == 0 {
        bail!("--steps 0: give at least one step to time");
    }
    let threads = cli.threads.map_or(Ok(Threads::default()), Threads::new)?;
    // candle takes its threads for a matmul from the rayon pool it runs in.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.count()).build()?;
    pool.install(|| measure(cli, threads))
}

fn measure(cli: &Cli, threads: Threads) -> Result<()> {
    let format = cli.dtype;
    let source = engines::Source::new(cli, format)?;
    let mut engines: Vec<Box<dyn Engine>> = Vec::new();
    for name in [Some(cli.engine), cli.against].into_iter().flatten() {
        engines.push(match name {
            EngineName::CandleSparse => Box::new(Ours::load(&source, format, threads)?),
            EngineName::Candle => Box::new(Candle::load(&source, format)?),
        });
    }
    let memory = [process_bytes("VmHWM").unwrap_or(0), process_bytes("VmRSS").unwrap_or(0)];
    let mut probe = probe::Probe::new(threads)?;
    let before = probe.gb_per_s();
    let mut times = vec![Times::default(); engines.len()];
    if cli.prefill > 0 {
        // Several rounds in turn: one long call each would not notice a machine that changes its speed.
        for _ in 0..3 {
            for (engine, times) in engines.iter_mut().zip(&mut times) {
                let start = Instant::now();
                engine.prefill(cli.prefill, 0)?;
                times.prefill.push(start.elapsed().as_secs_f64());
            }
        }
    }
    for engine in &mut engines {
        engine.fill(cli.depth)?;
        engine.decode(cli.depth)?;
    }
    let mut bandwidth = vec![before];
    for step in 0..cli.steps {
        for (engine, times) in engines.iter_mut().zip(&mut times) {
            let start = Instant::now();
            engine.decode(cli.depth + 1 + step)?;
            times.decode.push(start.elapsed().as_secs_f64());
        }
        if step % 4 == 3 {
            bandwidth.push(probe.gb_per_s());
        }
    }
    let report = Report {
        cli,
        engines: &engines,
        times: &times,
        bandwidth: median(&mut bandwidth),
        load_peak: memory[0],
        rss: memory[1],
    };
    report.print(threads)
}

#[derive(Clone, Default)]
struct Times {
    prefill: Vec<f64>,
    decode: Vec<f64>,
}

fn median(v: &mut [f64]) -> f64 {
    v.sort_by(f64::total_cmp);
    if v.is_empty() { f64::NAN } else { v[v.len() / 2] }
}

struct Report<'a> {
    cli: &'a Cli,
    engines: &'a [Box<dyn Engine>],
    times: &'a [Times],
    bandwidth: f64,
    load_peak: u64,
    rss: u64,
}

impl Report<'_> {
    fn print(&self, threads: Threads) -> Result<()> {
        let cli = self.cli;
        let rows: Vec<_> = self
            .engines
            .iter()
            .zip(self.times)
            .map(|(engine, times)| {
                let decode = 1.0 / median(&mut times.decode.clone());
                let prefill = cli.prefill as f64 / median(&mut times.prefill.clone());
                let gb = engine.weight_bytes_per_token() as f64 * decode / 1e9;
                (engine.name(), decode, prefill, engine.weight_bytes_per_token(), gb)
            })
            .collect();
        let ratios: Option<(f64, f64)> = (rows.len() == 2)
            .then(|| (ratio(&self.times[0].decode, &self.times[1].decode), rows[0].2 / rows[1].2));
        let weights = if cli.model.is_some() { "checkpoint" } else { "random" };
        let mut out = std::io::stdout();
        if cli.json {
            let engines: Vec<_> = rows
                .iter()
                .map(|(name, decode, prefill, bytes, gb)| {
                    serde_json::json!({
                        "engine": name,
                        "decode_tokens_per_s": decode,
                        "prefill_tokens_per_s": if cli.prefill > 0 { Some(prefill) } else { None },
                        "weight_bytes_per_token": bytes,
                        "weight_gb_per_s": gb,
                        "bandwidth_share": gb / self.bandwidth,
                    })
                })
                .collect();
            let (name, decode, prefill, bytes, gb) = &rows[0];
            let json = serde_json::json!({
                "engine": name,
                "weights": weights,
                "shape": cli.model.clone().unwrap_or(cli.shape.name().into()),
                "dtype": cli.dtype.name(),
                "depth": cli.depth,
                "threads": threads.count(),
                "decode_tokens_per_s": decode,
                "prefill_tokens_per_s": if cli.prefill > 0 { Some(prefill) } else { None },
                "weight_bytes_per_token": bytes,
                "stream_gb_per_s": self.bandwidth,
                "bandwidth_share": gb / self.bandwidth,
                "weight_bytes": self.engines[0].weight_bytes(),
                "rss_bytes": self.rss,
                "load_peak_bytes": self.load_peak,
                "decode_ratio": ratios.map(|r| r.0),
                "prefill_ratio": ratios.map(|r| r.1),
                "engines": engines,
            });
            writeln!(out, "{json}")?;
            return Ok(());
        }
        writeln!(
            out,
            "{} {}, {weights} weights, {} threads, depth {}; streaming read {:.1} GB/s; load peak {:.2} GB, resident {:.2} GB",
            cli.model.as_deref().unwrap_or(cli.shape.name()),
            cli.dtype.name(),
            threads.count(),
            cli.depth,
            self.bandwidth,
            self.load_peak as f64 / 1e9,
            self.rss as f64 / 1e9,
        )?;
        for (name, decode, prefill, bytes, gb) in &rows {
            writeln!(
                out,
                "{name:>14}: decode {decode:8.2} tokens/s, {:.3} GB/token, {gb:5.1} GB/s = {:.2} of streaming; prefill {prefill:8.1} tokens/s",
                *bytes as f64 / 1e9,
                gb / self.bandwidth
            )?;
        }
        if let Some((decode, prefill)) = ratios {
            writeln!(out, "{:>14}: decode {decode:.2} x, prefill {prefill:.2} x", "ratio")?;
        }
        Ok(())
    }
}

/// How many times faster the first is: the median over pairs of steps that ran one after the other.
fn ratio(ours: &[f64], theirs: &[f64]) -> f64 {
    median(&mut ours.iter().zip(theirs).map(|(a, b)| b / a).collect::<Vec<_>>())
}
