//! Makes a Llama sparse: a student with `relu` where the model had `silu` learns the model's own distributions, while a penalty
//! on open gates shuts most of its neurons for most tokens.
//!
//! Model, optimizer and data are those of `train-tiny`, and so on the CPU; the note on malloc there holds here too.
#![allow(clippy::doc_markdown, reason = "comments on flags are the program's help text")]

mod checkpoint;
#[path = "../common/cli.rs"]
#[allow(dead_code, reason = "not every program uses all of it")]
mod cli;
#[path = "../train-tiny/config.rs"]
#[allow(dead_code, reason = "the part of train-tiny")]
mod config;
#[path = "../train-tiny/data.rs"]
#[allow(dead_code, reason = "the part of train-tiny")]
mod data;
mod distill;
#[path = "../common/embedded.rs"]
mod embedded;
#[path = "../train-tiny/eval.rs"]
#[allow(dead_code, reason = "the part of train-tiny")]
mod eval;
#[path = "../train-tiny/loss.rs"]
mod loss;
#[path = "../train-tiny/model.rs"]
#[allow(dead_code, reason = "the part of train-tiny")]
mod model;
#[path = "../train-tiny/ops.rs"]
mod ops;
#[path = "../train-tiny/optim.rs"]
mod optim;
mod quality;
#[path = "../train-tiny/rng.rs"]
#[allow(dead_code, reason = "the part of train-tiny")]
mod rng;
#[path = "../train-tiny/save.rs"]
#[allow(dead_code, reason = "the part of train-tiny")]
mod save;
#[path = "loss.rs"]
mod sparse_loss;
#[path = "../train-tiny/train.rs"]
#[allow(dead_code, reason = "the part of train-tiny")]
mod train;

use anyhow::{Context, Result, bail};
use clap::Parser;
use cli::{OutputArgs, output};
use core::time::Duration;
use serde_json::json;
use std::{path::PathBuf, process::ExitCode, time::Instant};

use self::data::{Corpus, encode};
use self::distill::Recipe;
use self::model::Llama;
use self::quality::Quality;

/// Make a model sparse: FFNs with relu learn to answer as the model does with few neurons firing.
#[derive(Parser, Debug)]
#[command(name = "sparsify", version)]
struct Args {
    /// Hub id (org/name), folder or .safetensors file of a Llama, or name of an embedded model (tales-silu, tales-relu)
    #[arg(long, default_value = "tales-silu")]
    model: String,
    /// Branch, tag or commit of a Hub model
    #[arg(long)]
    revision: Option<String>,
    /// UTF-8 text files, best of the kind that the model was trained on; the last 6 % of each are for measuring
    #[arg(long, required = true, num_args = 1..)]
    text: Vec<PathBuf>,
    /// Folder for the new model
    #[arg(long)]
    out: PathBuf,
    /// Optimizer steps, those before --resume included
    #[arg(long, default_value_t = 350)]
    steps: usize,
    /// Windows per step
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens per window
    #[arg(long, default_value_t = 256)]
    context: usize,
    /// What an open gate costs, in nats per token if all were open; it grows to this over the first half of the steps.
    /// More: fewer neurons, further from the model
    #[arg(long, default_value_t = 0.1)]
    penalty: f64,
    /// Peak learning rate
    #[arg(long, default_value_t = 1e-3)]
    learning_rate: f64,
    /// Seed of the windows
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Finish the schedule within this time (the result then depends on the machine)
    #[arg(long)]
    max_minutes: Option<f64>,
    /// Minutes from one checkpoint in --out to the next
    #[arg(long, default_value_t = 5.0)]
    save_minutes: f64,
    /// Go on from the checkpoint in --out; the optimizer's moments are not in it and start anew
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    output: OutputArgs,
}

fn main() -> ExitCode {
    cli::exit(run(&cli::parse()))
}

fn run(args: &Args) -> Result<()> {
    if args.output.quiet {
        output::be_quiet();
    }
    cli::threads(None)?;
    let recipe = recipe(args)?;
    let files = embedded::resolve(&args.model, args.revision.as_deref())?;
    let (teacher, json) = checkpoint::read_teacher(&files)?;
    let longest = teacher.config.max_position_embeddings;
    if args.context > longest {
        bail!("--context {} exceeds the {longest} positions of {}", args.context, files.name);
    }
    let (train, heldout) = tokens(args, &files.load_tokenizer()?, teacher.config.eos_token_id)?;
    let (student, step) = begin(args, &teacher)?;
    checkpoint::save_settings(&files, json, &student.config, &args.out)?;
    let before = Quality::measure(&teacher, &student, &heldout, args.context)?;
    output::status(format_args!("after {step} steps: {before}"));
    let start = Instant::now();
    let save = |steps: usize| checkpoint::save(&student, steps, &args.out);
    let steps = distill::distill(&teacher, &student, &train, &recipe, step, save)?;
    let seconds = start.elapsed().as_secs_f64();
    // What is measured is the file, after its rounding to F16.
    let (student, _) = checkpoint::resume(&student.config, &args.out)?;
    let after = Quality::measure(&teacher, &student, &heldout, args.context)?;
    output::status(format_args!("after {steps} steps: {after}"));
    if args.output.json {
        let (before, after) = (before.json(), after.json());
        output::line(json!({ "steps": steps, "seconds": seconds, "before": before, "after": after }))?;
    }
    Ok(())
}

fn recipe(args: &Args) -> Result<Recipe> {
    for (name, count) in [("--steps", args.steps), ("--batch", args.batch), ("--context", args.context)] {
        if count == 0 {
            bail!("{name} must be at least 1");
        }
    }
    if !(args.learning_rate > 0.0 && args.learning_rate.is_finite()) {
        bail!("--learning-rate {} must be above 0", args.learning_rate);
    }
    if !(args.penalty >= 0.0 && args.penalty.is_finite()) {
        bail!("--penalty {} must be 0 or more", args.penalty);
    }
    let time = |name: &str, minutes: f64| {
        if !(minutes > 0.0 && minutes < 1e6) {
            bail!("{name} {minutes} must be above 0");
        }
        Ok(Duration::from_secs_f64(60.0 * minutes))
    };
    Ok(Recipe {
        steps: args.steps,
        batch: args.batch,
        context: args.context,
        learning_rate: args.learning_rate,
        penalty: args.penalty,
        seed: args.seed,
        limit: args.max_minutes.map(|minutes| time("--max-minutes", minutes)).transpose()?,
        save_every: time("--save-minutes", args.save_minutes)?,
    })
}

/// Share of each text, at its end, that is measured on, in percent.
const HELDOUT_PERCENT: f64 = 6.0;

/// The tokens to train on, and those of each text to measure on.
fn tokens(args: &Args, tokenizer: &tokenizers::Tokenizer, eos: u32) -> Result<(Vec<u32>, Vec<Vec<u32>>)> {
    let corpus = Corpus::read(&args.text, HELDOUT_PERCENT)?;
    let mut train = vec![];
    for text in &corpus.train {
        train.extend(encode(tokenizer, text)?);
        train.push(eos);
    }
    if train.len() < args.context {
        bail!("the text is too short: {} tokens, a window has {}", train.len(), args.context);
    }
    let heldout: Result<Vec<_>> = corpus.heldout.iter().map(|text| encode(tokenizer, text)).collect();
    Ok((train, heldout?))
}

/// The student as it begins, or as the last run left it, and how many steps it has behind it.
fn begin(args: &Args, teacher: &Llama) -> Result<(Llama, usize)> {
    let student = checkpoint::student(teacher)?;
    if args.resume {
        return checkpoint::resume(&student.config, &args.out);
    }
    let out = args.out.display();
    if checkpoint::exists(&args.out) {
        bail!("{out} holds a model already: --resume goes on with it, or give another --out");
    }
    std::fs::create_dir_all(&args.out).with_context(|| format!("cannot make {out}"))?;
    Ok((student, 0))
}
