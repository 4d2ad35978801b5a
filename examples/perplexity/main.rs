//! Perplexity of a setting on text files, and its distance from the dense model as stored.
//!
//! Sparse settings, tiers and choices of pages are measured as they decode: every token has the bits of one that is decoded
//! alone. `--sweep` compares ways of choosing neurons over all shares instead.
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
mod windows;

use anyhow::{Result, bail};
use candle_sparse::{
    Format, Profile,
    kv_cache::{KvConfig, KvDType},
    sparse::{FfnMode, SparseConfig},
};
use candle_sparse_models::{
    llama::Llama, pretrained::Pretrained, quality::Quality, tokenizer::prompt_tokens,
};
use clap::Parser;
use cli::{OutputArgs, format, input, output, process_bytes};
use indicatif::{ProgressBar, ProgressStyle};
use model::ModelArgs;
use std::{io::Write, path::PathBuf, process::ExitCode, sync::Arc};
use windows::{Reader, measure};

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
    /// Tokens from one window to the next; half of --context where not given
    #[arg(long, conflicts_with = "sweep", help_heading = "Text")]
    stride: Option<usize>,
    /// So many last tokens of each window count; those that no window before has read where not given. `--context 512 --stride
    /// 512 --count 255` counts what llama.cpp's `llama-perplexity` does
    #[arg(long, conflicts_with = "sweep", help_heading = "Text")]
    count: Option<usize>,
    /// Stop after this many counted tokens
    #[arg(long, help_heading = "Text")]
    tokens: Option<usize>,
    /// Format of the dense model that the setting is compared with, such as f32; as stored where not given
    #[arg(long, value_parser = format, conflicts_with = "sweep", help_heading = "Text")]
    reference: Option<Format>,
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
    let dense = cli.model.dense(cli.reference)?;
    let ids = encode(cli, &setting)?;
    let layout = Layout::new(cli, setting.config.max_position_embeddings, ids.len())?;
    let mut reader = Reader::new(setting.model.decoder(), cli.model.memory.kv(setting.default_kv_dtype())?);
    let mut dense = Reader::new(dense.model.decoder(), KvConfig::exact(KvDType::F32));
    let bar = ProgressBar::new(layout.windows as u64);
    bar.set_style(ProgressStyle::with_template("{bar:40} {pos}/{len} windows, {eta} left, ppl {msg}")?);
    let mut quality = Quality::default();
    let mut failed = None;
    for w in 0..layout.windows {
        let window = &ids[w * layout.stride..w * layout.stride + layout.context];
        if let Err(error) = measure(window, layout.first(w), [&mut reader, &mut dense], &mut quality) {
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
    cli.model.memory.note_unused(reader.cache.config(), layout.context);
    match failed {
        // What was measured before is reported too.
        Some(error) if quality.tokens() > 0 => {
            report(cli, &quality, &setting.model, &reader)?;
            Err(error)
        }
        Some(error) => Err(error),
        None => report(cli, &quality, &setting.model, &reader),
    }
}

/// Where windows lie in the text, and what of them counts.
struct Layout {
    context: usize,
    stride: usize,
    count: Option<usize>,
    windows: usize,
}

impl Layout {
    fn new(cli: &Cli, limit: usize, tokens: usize) -> Result<Self> {
        let context = cli.context.unwrap_or(limit.min(1024));
        let stride = cli.stride.unwrap_or(context / 2);
        if !(2..=limit).contains(&context) || !(1..=context).contains(&stride) {
            bail!(
                "--context {context} must be 2 to {limit} (the model's context) and --stride {stride} 1 to that"
            );
        }
        if let Some(count) = cli.count.filter(|c| !(1..context).contains(c)) {
            bail!("--count {count} must be 1 to {}: the first token of a window follows none", context - 1);
        }
        if tokens < context {
            bail!(
                "the text has {tokens} tokens, a window needs {context}: give more --text or a smaller --context"
            );
        }
        Ok(Self { context, stride, count: cli.count, windows: 1 + (tokens - context) / stride })
    }

    /// The first token of a window that counts.
    fn first(&self, window: usize) -> usize {
        match self.count {
            Some(count) => self.context - count,
            None if window == 0 => 1,
            // Tokens before were counted by the window before.
            None => (self.context - self.stride).max(1),
        }
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
    let of_ffn = |p: &Arc<Profile>| !p.is_of_attention_alone();
    let Some(profile) = cli.model.profile(&files)?.filter(of_ffn) else {
        bail!("--sweep needs a profile of the FFN: make one with `calibrate` and give it with --profile");
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

fn report(cli: &Cli, q: &Quality, model: &Llama, reader: &Reader<'_>) -> Result<()> {
    let active = reader.sparse_stats().active_share();
    let mode = model.decoder().sparse_config().map_or(FfnMode::Dense, |SparseConfig { mode, .. }| mode);
    let mut out = output::stdout();
    if cli.output.json {
        let json = serde_json::json!({
            "tokens": q.tokens(),
            "nll": q.nll(),
            "ppl": q.ppl(),
            "dense_nll": q.dense_nll(),
            "dense_ppl": q.dense_nll().exp(),
            "ppl_change": q.ppl_change(),
            "ppl_change_error": q.ppl_change_error(),
            "kld": q.kld(),
            "kld_error": q.kld_error(),
            "top1_agreement": q.top1_agreement(),
            "ffn": format!("{mode:?}"),
            "active_fraction": active,
            "kv_bytes": reader.cache.bytes(),
            "rss_bytes": process_bytes("VmRSS").ok(),
        });
        writeln!(out, "{json}")?;
        return Ok(());
    }
    let reference = cli.reference.map_or_else(|| "as stored".to_string(), |f| format!("in {}", f.name()));
    writeln!(
        out,
        "{} tokens, {mode:?}, {active:.3} of the neurons active: ppl {:.4} (nll {:.5} nats/token), dense {reference} {:.4}, \
         change {:+.3} ± {:.3} %, kld {:.6} ± {:.6}, top-1 agreement {:.4}",
        q.tokens(),
        q.ppl(),
        q.nll(),
        q.dense_nll().exp(),
        q.ppl_change() * 100.0,
        q.ppl_change_error() * 100.0,
        q.kld(),
        q.kld_error(),
        q.top1_agreement()
    )?;
    Ok(())
}
