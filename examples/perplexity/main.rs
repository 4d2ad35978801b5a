//! Perplexity of a setting on text files, and its distance from the dense model as stored.
//!
//! ppl = e^(mean nll); kld = mean Σ p·(ln p − ln q) of the dense distribution p and the setting's q, in nats per token;
//! top-1 agreement = share of positions at which both find the same token most likely.
#![allow(clippy::doc_markdown, reason = "comments on flags are the program's help text")]

#[path = "../common/cli.rs"]
mod cli;
#[path = "../common/model.rs"]
mod model;

use anyhow::{Context, Result, bail};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::ops::log_softmax;
use candle_sparse_models::{llama::Cache, pretrained::Pretrained};
use clap::Parser;
use cli::process_bytes;
use indicatif::{ProgressBar, ProgressStyle};
use model::ModelArgs;
use std::{io::Write, path::PathBuf, process::ExitCode};

/// Measure the quality of a setting against the dense model.
#[derive(Parser, Debug)]
#[command(version)]
struct Cli {
    #[command(flatten)]
    model: ModelArgs,
    /// Text files, read one after the other
    #[arg(long, required = true, num_args = 1..)]
    text: Vec<PathBuf>,
    /// Tokens per window; the model's context, at most 1024, where not given
    #[arg(long)]
    context: Option<usize>,
    /// Tokens from one window to the next; only the last `stride` tokens of a window count
    #[arg(long)]
    stride: Option<usize>,
    /// Stop after this many counted tokens
    #[arg(long)]
    tokens: Option<usize>,
    /// Print one JSON object as the last line of standard output
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    cli::exit(run(&Cli::parse()))
}

/// Sums over the counted tokens.
#[derive(Default)]
struct Totals {
    tokens: usize,
    nll: f64,
    dense_nll: f64,
    kld: f64,
    agreed: f64,
}

fn run(cli: &Cli) -> Result<()> {
    let setting = cli.model.load()?;
    let dense = ModelArgs { dtype: None, ..cli.model.clone() }.load()?;
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
    let kv = cli.model.kv_dtype(&setting);
    let mut caches = [
        Cache::new(true, kv, &setting.config, &Device::Cpu)?,
        Cache::new(true, DType::F32, &dense.config, &Device::Cpu)?,
    ];
    let windows = 1 + (ids.len() - context) / stride;
    let bar = ProgressBar::new(windows as u64);
    bar.set_style(ProgressStyle::with_template("{bar:40} {pos}/{len} windows, {eta} left, ppl {msg}")?);
    let mut totals = Totals::default();
    for w in 0..windows {
        let window = &ids[w * stride..w * stride + context];
        // Tokens before the overlap were counted by the window before.
        let first = if w == 0 { 1 } else { context - stride };
        score(&setting, &dense, &mut caches, window, first, &mut totals)?;
        bar.set_message(format!("{:.3}", (totals.nll / totals.tokens as f64).exp()));
        bar.inc(1);
        if cli.tokens.is_some_and(|n| totals.tokens >= n) {
            break;
        }
    }
    bar.finish_and_clear();
    report(cli, &totals, &caches[0])
}

fn encode(cli: &Cli, loaded: &Pretrained) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for path in &cli.text {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let encoding = loaded.tokenizer.encode(text, true).map_err(anyhow::Error::msg)?;
        ids.extend_from_slice(encoding.get_ids());
    }
    Ok(ids)
}

/// Adds the tokens `window[first..]`, each predicted from those before it.
fn score(
    setting: &Pretrained,
    dense: &Pretrained,
    caches: &mut [Cache; 2],
    window: &[u32],
    first: usize,
    totals: &mut Totals,
) -> Result<()> {
    let x = Tensor::new(window, &Device::Cpu)?.unsqueeze(0)?;
    let n = window.len() - first;
    let targets = Tensor::new(&window[first..], &Device::Cpu)?.unsqueeze(1)?;
    let [cache, dense_cache] = caches;
    let log_probabilities = |m: &Pretrained, cache: &mut Cache| -> Result<Tensor> {
        let logits = m.model.forward_all(&x, 0, cache)?.squeeze(0)?;
        Ok(log_softmax(&logits.narrow(0, first - 1, n)?, D::Minus1)?)
    };
    let q = log_probabilities(setting, cache)?;
    let p = log_probabilities(dense, dense_cache)?;
    let sum = |t: &Tensor| -> Result<f64> { Ok(t.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?) };
    let nll = -sum(&q.gather(&targets, 1)?)?;
    if !nll.is_finite() {
        bail!("the logits are not numbers: the checkpoint holds NaN or infinity");
    }
    totals.nll += nll;
    totals.dense_nll -= sum(&p.gather(&targets, 1)?)?;
    totals.kld += sum(&(p.exp()? * (&p - &q)?)?)?;
    totals.agreed += sum(&p.argmax(1)?.eq(&q.argmax(1)?)?)?;
    totals.tokens += n;
    Ok(())
}

fn report(cli: &Cli, t: &Totals, cache: &Cache) -> Result<()> {
    let n = t.tokens as f64;
    let (nll, dense_nll) = (t.nll / n, t.dense_nll / n);
    let mut out = std::io::stdout();
    if cli.json {
        let json = serde_json::json!({
            "tokens": t.tokens,
            "nll": nll,
            "ppl": nll.exp(),
            "dense_nll": dense_nll,
            "dense_ppl": dense_nll.exp(),
            "kld": t.kld / n,
            "top1_agreement": t.agreed / n,
            "active_fraction": 1.0,
            "kv_bytes": cache.kv_bytes(),
            "rss_bytes": process_bytes("VmRSS").ok(),
        });
        writeln!(out, "{json}")?;
        return Ok(());
    }
    writeln!(
        out,
        "{} tokens: ppl {:.4} (nll {nll:.5} nats/token), dense as stored {:.4}, change {:+.3} %, kld {:.6}, top-1 agreement {:.4}",
        t.tokens,
        nll.exp(),
        dense_nll.exp(),
        ((nll - dense_nll).exp() - 1.0) * 100.0,
        t.kld / n,
        t.agreed / n
    )?;
    Ok(())
}
