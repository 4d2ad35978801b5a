//! How much of a long text a model still finds when attention reads a part of it.
//!
//! Texts of filler sentences hide numbers; a greedy answer is right if it holds the one that was asked for. Every way of reading
//! gets the same texts, and a share of the positions.
#![allow(clippy::doc_markdown, reason = "comments on flags are the program's help text")]

#[path = "../common/cli.rs"]
#[allow(dead_code, reason = "not every program uses all of it")]
mod cli;
#[path = "../common/memory.rs"]
mod memory;
#[path = "../common/model.rs"]
mod model;
mod tasks;

use anyhow::{Result, bail};
use candle_sparse::{
    AttentionConfig, AttentionMode, KvCache, KvConfig, KvDType,
    decoder::{Decoder, Input, Logits, Scratch, Step},
};
use candle_sparse_models::{pretrained::Pretrained, tokenizer::prompt_tokens};
use clap::Parser;
use cli::{OutputArgs, output};
use memory::Attention;
use model::ModelArgs;
use std::{io::Write, process::ExitCode};
use tasks::Task;

/// The last positions that every way but `window` reads.
const WINDOW: usize = 64;
/// Tokens of an answer.
const ANSWER: usize = 8;

/// Count what a model finds again in long texts.
#[derive(Parser, Debug)]
#[command(name = "long-memory", version)]
struct Cli {
    #[command(flatten)]
    model: ModelArgs,
    /// About so many tokens per text
    #[arg(long, num_args = 1.., value_delimiter = ',', default_values_t = [1000, 2000], help_heading = "Texts")]
    sizes: Vec<usize>,
    /// Texts per task and size
    #[arg(long, default_value_t = 12, help_heading = "Texts")]
    texts: usize,
    /// Of the positions of a text one in so many is read
    #[arg(long, default_value_t = 4, help_heading = "Texts")]
    one_in: usize,
    /// Ways of reading
    #[arg(long, num_args = 1.., value_delimiter = ',', default_values = ["dense", "window", "recall", "sampled"], help_heading = "Texts")]
    ways: Vec<Attention>,
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
    if cli.model.memory.attention != Attention::Dense {
        bail!("--attention is what is compared here: give --ways");
    }
    if cli.texts == 0 || cli.one_in == 0 {
        bail!("--texts and --one-in must be 1 or more");
    }
    cli.model.memory.attention()?;
    // A profile that a way of reading uses is no flag without effect.
    let mut model = cli.model.clone();
    if let Some(way) = cli.ways.iter().find(|way| way.reads_profile()) {
        model.memory.attention = *way;
    }
    let loaded = model.load()?;
    let kv = match cli.model.memory.kv {
        Some(_) => cli.model.memory.kv(loaded.default_kv_dtype())?,
        None => KvConfig::exact(KvDType::F16),
    };
    let names: Vec<_> = cli.ways.iter().map(|way| way.name()).collect();
    let mut out = output::stdout();
    if !cli.output.json {
        writeln!(out, "| task, tokens | {} |\n|---|{}", names.join(" | "), "---|".repeat(names.len()))?;
    }
    let mut rows = Vec::new();
    for &size in &cli.sizes {
        for task in Task::ALL {
            let (tokens, right) = ask(cli, &loaded, kv, task, size)?;
            if !cli.output.json {
                let right: Vec<_> = right.iter().map(|n| format!("{n}/{}", cli.texts)).collect();
                writeln!(out, "| {}, {tokens} | {} |", task.name(), right.join(" | "))?;
                out.flush()?;
            }
            rows.push(serde_json::json!({ "task": task.name(), "tokens": tokens, "right": right }));
        }
    }
    if cli.output.json {
        writeln!(out, "{}", serde_json::json!({ "ways": names, "texts": cli.texts, "rows": rows }))?;
    }
    Ok(())
}

/// Tokens of the longest text of a task, and how many answers of each way are right.
fn ask(cli: &Cli, loaded: &Pretrained, kv: KvConfig, task: Task, size: usize) -> Result<(usize, Vec<usize>)> {
    let (mut longest, mut right) = (0, vec![0; cli.ways.len()]);
    for i in 0..cli.texts {
        let prompt = task.prompt(size, i, cli.texts);
        let ids = prompt_tokens(&loaded.tokenizer, &prompt.text)?;
        longest = longest.max(ids.len());
        for (&way, right) in cli.ways.iter().zip(&mut right) {
            let decoder = loaded.model.decoder().with_attention(config(way, ids.len() / cli.one_in))?;
            let answer = answer(&decoder, kv, &ids)?;
            let answer = loaded.tokenizer.decode(&answer, true).map_err(anyhow::Error::msg)?;
            *right += usize::from(answer.contains(&prompt.answer));
        }
    }
    Ok((longest, right))
}

/// A way of reading `positions` positions.
fn config(way: Attention, positions: usize) -> AttentionConfig {
    let config = AttentionConfig::new(AttentionMode::from(way));
    let rest = positions.saturating_sub(WINDOW + config.sinks);
    match way {
        Attention::Dense => config,
        Attention::Window => config.with_window(positions),
        Attention::Recall => config.with_window(WINDOW).with_budget(rest),
        // Half of it is what the query asks for.
        Attention::Gated | Attention::Sampled => {
            config.with_window(WINDOW).with_budget(rest / 2).with_recall(rest / 2)
        }
    }
}

/// The tokens that a model finds most likely behind a text.
fn answer(decoder: &Decoder, kv: KvConfig, ids: &[u32]) -> Result<Vec<u32>> {
    let (mut cache, mut scratch) = (KvCache::new(decoder.config(), kv), Scratch::default());
    let mut logits = vec![0.0; decoder.config().vocab_size];
    let mut read = |ids: &[u32]| -> Result<u32> {
        let step = Step { batch: 1, seq_len: ids.len(), index_pos: cache.len() };
        decoder.forward(Input::Ids(ids), step, &mut cache, &mut scratch, Logits::Last, &mut logits)?;
        let best = (0..).zip(&logits).max_by(|a, b| a.1.total_cmp(b.1));
        Ok(best.map_or(0, |(token, _)| token))
    };
    let mut answer = vec![read(ids)?];
    while answer.len() < ANSWER {
        answer.push(read(&answer[answer.len() - 1..])?);
    }
    Ok(answer)
}
