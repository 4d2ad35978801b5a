//! Speed of decode and prefill on any shape, beside the memory bandwidth measured in the same run.
//!
//! Weights are random unless `--model` names a checkpoint: time does not depend on them, quality does, so none is
//! claimed. `--against candle` runs candle's own model in turn with ours, step by step, so that a ratio holds even where
//! the machine's speed drifts. `--write-gguf` writes the random model for engines that are programs of their own.
#![allow(clippy::doc_markdown, reason = "comments on flags are the program's help text")]

#[path = "../common/cli.rs"]
#[allow(dead_code, reason = "not every program uses all of it")]
mod cli;
mod engines;
mod gguf;
#[path = "../common/memory.rs"]
mod memory;
#[path = "../common/model.rs"]
mod model;
mod probe;
mod report;
mod shapes;
mod source;
mod sparse;
mod turns;

use anyhow::{Result, bail};
use candle_sparse::{Format, Threads};
use clap::{Parser, ValueEnum};
use cli::{OutputArgs, output, process_bytes};
use engines::{Candle, CandleQuantized, Engine, Ours};
use gguf::gguf;
use report::{Row, Run, Times, median};
use source::Source;
use std::{ffi::OsString, path::PathBuf, process::ExitCode, time::Instant};

/// Measure decode and prefill speed.
#[derive(Parser, Debug)]
#[command(name = "decode-speed", version)]
pub(crate) struct Cli {
    /// Shape to fill with random weights
    #[arg(long, default_value = "smollm2-135m", conflicts_with = "model")]
    shape: shapes::Shape,
    /// A real checkpoint instead: Hub id (org/name), folder, .safetensors or .gguf file, or name of an embedded model
    #[arg(long)]
    model: Option<OsString>,
    /// Format of the weights; that of a checkpoint, f16 for random ones, where not given
    #[arg(long, value_parser = cli::format)]
    dtype: Option<Format>,
    /// Positions in the cache before the decode steps that are timed; ours are filled with random keys and values
    #[arg(long, default_value_t = 0)]
    depth: usize,
    #[command(flatten)]
    memory: memory::MemoryArgs,
    /// Tokens of the prompt for the prefill speed; 0 leaves it out
    #[arg(long, default_value_t = 512)]
    prefill: usize,
    /// Decode steps to time
    #[arg(long, default_value_t = 12)]
    steps: usize,
    /// Instead of prompts and lone tokens: steps of so many sequences together, in turn with steps of one token
    #[arg(long, value_delimiter = ',', value_name = "SEQUENCES", conflicts_with = "against")]
    batch: Vec<usize>,
    /// The same for steps of so many tokens of one sequence, as drafts are verified in
    #[arg(long, value_delimiter = ',', value_name = "TOKENS", conflicts_with = "against")]
    turn: Vec<usize>,
    /// With --turn: tokens but the first are drafted by a copy of the weights in Q4_0, each accepted with this probability, which is
    /// simulated, if those before it were
    #[arg(long, value_name = "PROBABILITY", requires = "turn")]
    accept: Option<f64>,
    /// Threads, at most those of candle's pool (CANDLE_NUM_THREADS)
    #[arg(long)]
    threads: Option<usize>,
    /// Which engine to measure
    #[arg(long, default_value = "candle-sparse")]
    engine: EngineName,
    /// Measure this engine too, in turn with the first
    #[arg(long)]
    against: Option<EngineName>,
    /// Compute this share of the neurons, with a drawn profile: random weights teach nothing
    #[arg(long, conflicts_with = "model", help_heading = "Sparse")]
    active: Option<f32>,
    /// With --active: what chooses the neurons
    #[arg(long, default_value = "cascade", requires = "active", help_heading = "Sparse")]
    ffn: sparse::Ffn,
    /// With --active: how activity is spread over the neurons; of exact zeros uniform
    #[arg(long, default_value = "skewed", requires = "active", help_heading = "Sparse")]
    activity: sparse::Activity,
    /// With --active: rank of the prediction
    #[arg(long, default_value_t = 64, requires = "active", help_heading = "Sparse")]
    rank: usize,
    /// Write the random model as a GGUF file without a tokenizer, and measure nothing
    #[arg(long, value_name = "FILE", conflicts_with_all = MEASURING, help_heading = "Output")]
    write_gguf: Option<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
}

/// Flags that say what is measured, and nothing of a file that is written.
const MEASURING: [&str; 19] = [
    "accept",
    "batch",
    "turn",
    "model",
    "depth",
    "prefill",
    "steps",
    "threads",
    "engine",
    "against",
    "active",
    "kv",
    "hot",
    "warm",
    "attention",
    "sinks",
    "window",
    "budget",
    "recall",
];

/// An engine that can be measured.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum EngineName {
    /// Sparse with --active
    CandleSparse,
    /// candle-sparse, dense FFN and attention, keys and values in F16 or as the weights
    Dense,
    Candle,
}

fn main() -> ExitCode {
    let cli: Cli = cli::parse();
    if cli.output.quiet {
        output::be_quiet();
    }
    cli::exit(run(&cli))
}

fn run(cli: &Cli) -> Result<()> {
    if let Some(path) = &cli.write_gguf {
        candle_sparse::save::check(path)?;
        return write_gguf(cli, path);
    }
    if let Some(p) = cli.accept.filter(|p| !(0.0..=1.0).contains(p)) {
        bail!("--accept {p} must be a probability, 0 to 1");
    }
    if cli.steps == 0 {
        bail!("--steps 0: give at least one step to time");
    }
    let engines = [Some(cli.engine), cli.against];
    let given = if cli.active.is_some() { "--active" } else { "--kv and --attention" };
    if (cli.active.is_some() || cli.memory.is_given()) && !engines.contains(&Some(EngineName::CandleSparse)) {
        bail!("{given} are settings of the engine candle-sparse, which is not measured");
    }
    let threads = cli::threads(cli.threads)?.unwrap_or_default();
    // candle takes its threads for a matmul from the rayon pool it runs in.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.count()).build()?;
    pool.install(|| measure(cli, threads))
}

fn write_gguf(cli: &Cli, path: &std::path::Path) -> Result<()> {
    let (format, name) = (cli.format(), format!("{} with random weights", cli.shape.name()));
    gguf(&Source::new(cli)?, format.unwrap_or(Format::F16), &name)?.save(path)?;
    let bytes = std::fs::metadata(path)?.len();
    if cli.output.json {
        return output::line(serde_json::json!({ "out": path.display().to_string(), "bytes": bytes }));
    }
    output::status(format_args!("{}: {:.1} MB", path.display(), bytes as f64 / 1e6));
    Ok(())
}

impl Cli {
    /// The format of the weights; `None` is that of a checkpoint.
    pub(crate) fn format(&self) -> Option<Format> {
        self.dtype.or(self.model.is_none().then_some(Format::F16))
    }

    /// The most positions that a cache must hold.
    fn positions(&self) -> usize {
        self.prefill.max(self.depth + 1 + self.steps)
    }

    fn drawn(&self) -> Result<Option<sparse::Drawn>> {
        let Some(share) = self.active else { return Ok(None) };
        if !(share > 0.0 && share <= 1.0) {
            bail!("--active {share} must be above 0 and at most 1");
        }
        if self.ffn == sparse::Ffn::ExactZero && !self.shape.has_exact_zeros() {
            bail!(
                "--ffn exact-zero: the activation of {} gives none, take afm-4.5b or minicpm-s-1b",
                self.shape.name()
            );
        }
        if self.ffn == sparse::Ffn::ExactZero && self.activity == sparse::Activity::Skewed {
            bail!("--ffn exact-zero opens all gates equally often: give --activity uniform");
        }
        let Self { ffn, activity, rank, .. } = *self;
        Ok(Some(sparse::Drawn { ffn, activity, share, rank, hidden_size: self.shape.hidden_size() }))
    }
}

/// Our model, for what no other engine does.
fn ours(cli: &Cli, threads: Threads) -> Result<Ours> {
    let (source, positions) = (Source::new(cli)?, cli.depth + 32);
    match cli.engine {
        EngineName::CandleSparse => Ours::load(&source, threads, cli.drawn()?, positions)?.reading(cli),
        EngineName::Dense => Ours::load(&source, threads, None, positions),
        EngineName::Candle => {
            bail!("--batch and --turn measure our model: --engine candle has no such steps")
        }
    }
}

fn load(cli: &Cli, threads: Threads) -> Result<Vec<Box<dyn Engine>>> {
    let source = Source::new(cli)?;
    let positions = cli.positions();
    let load = |name| -> Result<Box<dyn Engine>> {
        if name == EngineName::Candle && cli.model.is_none() && cli.shape.has_exact_zeros() {
            bail!(
                "candle's llama has a gate and silu, {} has not: measure it against dense",
                cli.shape.name()
            );
        }
        Ok(match name {
            EngineName::CandleSparse => {
                Box::new(Ours::load(&source, threads, cli.drawn()?, positions)?.reading(cli)?)
            }
            EngineName::Dense => Box::new(Ours::load(&source, threads, None, positions)?),
            EngineName::Candle if source.is_quantized() => {
                Box::new(CandleQuantized::load(&source, threads, positions)?)
            }
            EngineName::Candle => Box::new(Candle::load(&source)?),
        })
    };
    [Some(cli.engine), cli.against].into_iter().flatten().map(load).collect()
}

fn measure(cli: &Cli, threads: Threads) -> Result<()> {
    if !(cli.batch.is_empty() && cli.turn.is_empty()) {
        return turns::measure(cli, &ours(cli, threads)?);
    }
    let mut engines = load(cli, threads)?;
    let memory = [process_bytes("VmHWM").unwrap_or(0), process_bytes("VmRSS").unwrap_or(0)];
    let mut probe = probe::Probe::new(threads)?;
    let before = probe.gb_per_s()?;
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
            bandwidth.push(probe.gb_per_s()?);
        }
    }
    let rows: Vec<_> =
        engines.iter().zip(&times).map(|(e, t)| Row::new(e.as_ref(), t, cli.prefill)).collect();
    let run =
        Run { cli, threads, stream_gb_per_s: median(&mut bandwidth), load_peak: memory[0], rss: memory[1] };
    if cli.output.json { report::json(&run, &rows, &times) } else { report::text(&run, &rows, &times) }
}
