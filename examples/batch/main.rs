//! Writes an answer for each line of a file, through the engine: JSON lines in, JSON lines out, and after a kill the same command goes on.
#![allow(clippy::doc_markdown, reason = "comments on flags are the program's help text")]

#[path = "../common/ask.rs"]
mod ask;
#[path = "../common/cli.rs"]
#[allow(dead_code, reason = "not every program uses all of it")]
mod cli;
#[path = "../common/engine_args.rs"]
mod engine_args;
#[path = "../common/fields.rs"]
mod fields;
#[path = "../common/interrupt.rs"]
mod interrupt;
mod lines;
#[path = "../common/memory.rs"]
mod memory;
#[path = "../common/model.rs"]
mod model;
mod results;
mod run;
#[path = "../common/sampling.rs"]
mod sampling;
mod shard;
#[path = "../common/speculate.rs"]
#[allow(dead_code, reason = "not every program uses all of it")]
mod speculate;

use anyhow::{Result, bail};
use ask::{Asker, Seeds};
use candle_sparse::input::Expected;
use clap::Parser;
use cli::{OutputArgs, output};
use engine_args::EngineArgs;
use interrupt::Interrupt;
use model::ModelArgs;
use run::Run;
use sampling::SamplingArgs;
use shard::Shard;
use std::{path::PathBuf, process::ExitCode, time::Instant};

const EXAMPLES: &str = "\
A line of the input is an object with an id, a prompt or messages, and what of OpenAI's sampling fields it wants:
  {\"id\": 1, \"prompt\": \"The sea\", \"max_tokens\": 50}
  {\"id\": \"b\", \"messages\": [{\"role\": \"user\", \"content\": \"Who are you?\"}], \"temperature\": 0}
A line of the output:
  {\"id\": 1, \"text\": \"…\", \"finish_reason\": \"length\", \"usage\": {\"prompt_tokens\": 2, …}}
  {\"id\": \"b\", \"error\": {\"message\": \"…\", \"param\": \"messages\", \"code\": null}}

Examples:
  batch --input questions.jsonl --out answers.jsonl --model model.gguf
  batch --input questions.jsonl --out answers.3.jsonl --shard 3/8 --model model.gguf";

/// Write an answer for each line of a file. Ids that the output has already are passed over, so the same command goes on after a kill.
#[derive(Parser, Debug)]
#[command(name = "batch", version, after_help = EXAMPLES)]
struct Cli {
    /// File with a JSON object in each line; - is standard input
    #[arg(long, short)]
    input: PathBuf,
    /// File to add results to, in the order in which they are done
    #[arg(long, short)]
    out: PathBuf,
    /// Do the lines i, i + n, i + 2n, … alone, the first line being 0: n runs with files of their own do all
    #[arg(long, value_name = "I/N", default_value = "0/1")]
    shard: Shard,
    /// Do those again whose result is an error
    #[arg(long)]
    retry_errors: bool,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// A file with the template of conversations, instead of the model's own
    #[arg(long, help_heading = "Model")]
    chat_template: Option<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
}

fn main() -> ExitCode {
    let cli: Cli = cli::parse();
    if cli.output.quiet {
        output::be_quiet();
    }
    cli::exit(run(&cli))
}

fn run(cli: &Cli) -> Result<()> {
    cli.sampling.check()?;
    let input = lines::Lines::open(&cli.input, cli.shard)?;
    let (results, done) = results::Results::open(&cli.out, cli.retry_errors)?;
    let mut files = cli.model.files()?;
    if let Some(path) = &cli.chat_template {
        files.chat_template = Some(candle_sparse::input::read(path, Expected::Text)?);
    }
    let loaded = cli.model.load_files(&files)?;
    let asker = Asker::new(&loaded, &cli.sampling, Seeds::Fixed)?;
    // As many again wait with the engine, so that it never waits for a line to be read.
    let room = cli.engine.max_sequences.saturating_mul(2);
    let engine = cli.engine.engine(&cli.model, &loaded, asker.tokenizer.clone(), room)?;
    let start = Instant::now();
    let mut run = Run::new(engine, &asker, results, done, input.len(), room);
    let interrupt = Interrupt::new()?;
    interrupt.listen();
    let ended = run.all(input, &interrupt);
    interrupt.let_end();
    let report = run.report(start.elapsed().as_secs_f64());
    if cli.output.json {
        output::line(report.json())?;
    }
    output::status(report.line(&cli.out));
    ended?;
    if report.interrupted {
        return Err(output::Ended(output::INTERRUPTED).into());
    }
    match report.failed {
        0 => Ok(()),
        failed => bail!("{failed} lines failed: their results say why"),
    }
}
