//! Perplexity of a setting on text files, and its distance from the dense model as stored.
//!
//! Sparse settings are measured as they decode: token by token, every token's FFN sparse. `--sweep` compares ways of
//! choosing neurons over all shares instead.
#![allow(clippy::doc_markdown, reason = "comments on flags are the program's help text")]

#[path = "../common/cli.rs"]
#[allow(dead_code, reason = "not every program uses all of it")]
mod cli;
#[path = "../common/memory.rs"]
mod memory;
#[path = "../common/model.rs"]
mod model;
mod sweep;
#[path = "../common/text.rs"]
mod text;

use anyhow::{Result, bail};
use candle_core::{DType, Device, Tensor};
use candle_sparse::{
    AttentionMode,
    sparse::{FfnMode, SparseConfig},
};
use candle_sparse_models::{
    llama::{Cache, Llama},
    pretrained::Pretrained,
    quality::Quality,
    tokenizer::prompt_tokens,
};
use clap::Parser;
use cli::{OutputArgs, input, output, process_bytes};
use indicatif::{ProgressBar, ProgressStyle};
use model::ModelArgs;
use std::{io::Write, path::PathBuf, process::ExitCode};

/// Measure the quality of a setting against the dense model.
#[derive(Parser, Debug)]
#[command(name = "perplexity", version)]
struct Cli {
    #[command(flatten)]
    model: ModelArgs,
    /// Text files, read one after the other
    #[arg(long, required = true, num_args = 1.., help_heading = "Text")]
    text: Vec<PathBuf>,
    /// Tokens per window; the model's context, at most 1024, where not given
    #[arg(long, help_heading = "Text")]
    context: Option<usize>,
    /// Tokens from one window to the next; only the last `stride` tokens of a window count; half of --context where not given
    #[arg(long, conflicts_with = "sweep", help_heading = "Text")]
    stride: Option<usize>,
    /// Stop after this many counted tokens
    #[arg(long, help_heading = "Text")]
    tokens: Option<usize>,
    /// Compare random, static, low-rank, gate, cascade and oracle choices at every share of the profile, and draw them
    /// into this SVG file; windows are then documents (separated by <|endoftext|>) cut at --context, 256 if not given
    #[arg(long, help_heading = "Output")]
    sweep: Option<PathBuf>,
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
    if let Some(path) = &cli.sweep {
        return run_sweep(cli, path);
    }
    // What a rule costs, whether or not it is faster here.
    let setting = ModelArgs { force_sparse: true, ..cli.model.clone() }.load()?;
    let dense = cli.model.as_stored()?;
    let ids = encode(cli, &setting)?;
    let limit = setting.config.max_position_embeddings;
    let context = cli.context.unwrap_or(limit.min(1024));
    let stride = cli.stride.unwrap_or(context / 2);
    if !(2..=limit).contains(&context) || stride == 0 || stride >= context {
        bail!(
            "--context {context} must be 2 to {limit} (the model's context) and --stride {stride} 1 to below it"
        );
    }
    if ids.len() < context {
        bail!(
            "the text has {} tokens, a window needs {context}: give more --text or a smaller --context",
            ids.len()
        );
    }
    let mut cache = cli.model.cache(&setting)?;
    let mut dense_cache = Cache::new(true, DType::F32, &dense.config, &Device::Cpu)?;
    let windows = 1 + (ids.len() - context) / stride;
    let bar = ProgressBar::new(windows as u64);
    bar.set_style(ProgressStyle::with_template("{bar:40} {pos}/{len} windows, {eta} left, ppl {msg}")?);
    let mut quality = Quality::default();
    let mut failed = None;
    for w in 0..windows {
        let window = &ids[w * stride..w * stride + context];
        // Tokens before the overlap were counted by the window before.
        let first = if w == 0 { 1 } else { context - stride };
        let measured = all_logits(&setting.model, window, &mut cache).and_then(|logits| {
            let dense = prefill(&dense.model, window, &mut dense_cache)?;
            Ok(quality.add(window, first, &logits, &dense)?)
        });
        if let Err(error) = measured {
            failed = Some(error);
            break;
        }
        bar.set_message(format!("{:.3}", quality.ppl()));
        bar.inc(1);
        if cli.tokens.is_some_and(|n| quality.tokens() >= n) {
            break;
        }
    }
    bar.finish_and_clear();
    cli.model.memory.note_unused(cache.kv().config(), context);
    match failed {
        // What was measured before is reported too.
        Some(error) if quality.tokens() > 0 => {
            report(cli, &quality, &setting.model, &cache)?;
            Err(error)
        }
        Some(error) => Err(error),
        None => report(cli, &quality, &setting.model, &cache),
    }
}

fn run_sweep(cli: &Cli, path: &std::path::Path) -> Result<()> {
    candle_sparse::save::check(path)?;
    if cli.model.ffn.is_some() || cli.model.sparsity.is_some() || cli.model.memory.is_given() {
        bail!(
            "--sweep measures every choice of neurons at every share, all keys and values exact: leave out --ffn, --sparsity, \
             --kv and --attention"
        );
    }
    let files = cli.model.files()?;
    let Some(profile) = cli.model.profile(&files)? else {
        bail!("--sweep needs a profile: make one with `calibrate` and give it with --profile");
    };
    // Choices are simulated on the dense model, which takes no profile.
    let dense = ModelArgs { ffn: Some(model::Ffn::Dense), profile: None, ..cli.model.clone() };
    let loaded = dense.load()?;
    let context = cli.context.unwrap_or(loaded.config.max_position_embeddings.min(256));
    if !(64..=loaded.config.max_position_embeddings).contains(&context) {
        let limit = loaded.config.max_position_embeddings;
        bail!("--context {context} must be 64 to {limit} (the model's context)");
    }
    let windows = sweep::windows(&loaded, &cli.text, context, cli.tokens.unwrap_or(24_000))?;
    if windows.is_empty() {
        bail!("the text is too short for a window: give more --text");
    }
    let points = sweep::sweep(&loaded, &profile, &windows)?;
    // The numbers are there, whether they can be drawn or not.
    sweep::print(&points, cli.output.json)?;
    sweep::plot(&points, &format!("{}: quality against active share", files.name), path)
}

fn encode(cli: &Cli, loaded: &Pretrained) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for path in &cli.text {
        let text = input::text(path)?;
        ids.extend(prompt_tokens(&loaded.tokenizer, &text)?);
    }
    Ok(ids)
}

/// Logits `[window, vocab_size]`, all positions at once: dense in the FFN.
fn prefill(model: &Llama, window: &[u32], cache: &mut Cache) -> Result<Tensor> {
    let x = Tensor::new(window, &Device::Cpu)?.unsqueeze(0)?;
    Ok(model.forward_all(&x, 0, cache)?.squeeze(0)?)
}

/// The same as the setting decodes.
fn all_logits(model: &Llama, window: &[u32], cache: &mut Cache) -> Result<Tensor> {
    let sparse = model.decoder().sparse_config().is_some_and(|c| c.mode != FfnMode::Dense);
    let attention = model.decoder().attention_config().mode != AttentionMode::Dense;
    // A prompt's tokens see the pages of their own run before these cool.
    if !(sparse || attention || cache.kv().config().is_tiered()) {
        return prefill(model, window, cache);
    }
    let vocab = model.decoder().config().vocab_size;
    let mut logits = vec![0.0; window.len() * vocab];
    for (i, (&token, logits)) in window.iter().zip(logits.chunks_exact_mut(vocab)).enumerate() {
        model.decode(token, i, cache, logits)?;
    }
    Ok(Tensor::from_vec(logits, (window.len(), vocab), &Device::Cpu)?)
}

fn report(cli: &Cli, q: &Quality, model: &Llama, cache: &Cache) -> Result<()> {
    let active = cache.sparse_stats().active_share();
    let mode = model.decoder().sparse_config().map_or(FfnMode::Dense, |SparseConfig { mode, .. }| mode);
    let mut out = output::stdout();
    if cli.output.json {
        let json = serde_json::json!({
            "tokens": q.tokens(),
            "nll": q.nll(),
            "ppl": q.ppl(),
            "dense_nll": q.dense_nll(),
            "dense_ppl": q.dense_nll().exp(),
            "kld": q.kld(),
            "top1_agreement": q.top1_agreement(),
            "ffn": format!("{mode:?}"),
            "active_fraction": active,
            "kv_bytes": cache.kv_bytes(),
            "rss_bytes": process_bytes("VmRSS").ok(),
        });
        writeln!(out, "{json}")?;
        return Ok(());
    }
    writeln!(
        out,
        "{} tokens, {mode:?}, {:.3} of the neurons active: ppl {:.4} (nll {:.5} nats/token), dense as stored {:.4}, \
         change {:+.3} %, kld {:.6}, top-1 agreement {:.4}",
        q.tokens(),
        active,
        q.ppl(),
        q.nll(),
        q.dense_nll().exp(),
        q.ppl_change() * 100.0,
        q.kld(),
        q.top1_agreement()
    )?;
    Ok(())
}
