//! Fits a sparse profile to a model: which neurons a token needs, and how to tell.
//!
//! The texts are cut in three: one part to fit, one to set thresholds, one to report. The profile is written at the
//! end, whole; an interrupted run leaves nothing.
#![allow(clippy::doc_markdown, reason = "comments on flags are the program's help text")]

#[path = "../common/cli.rs"]
#[allow(dead_code, reason = "not every program uses all of it")]
mod cli;
mod gates;
#[path = "../common/memory.rs"]
mod memory;
#[path = "../common/model.rs"]
mod model;
#[path = "../common/text.rs"]
mod text;

use anyhow::{Result, bail};
use candle_core::{DType, Device, Tensor};
use candle_sparse::{
    core::Gate,
    profile::{Profile, Rule},
};
use candle_sparse_models::{
    calibrate::{Calibrator, Fitted, Progress, Target},
    decoder::LoadOptions,
    files::ModelFiles,
    llama::Cache,
    pretrained::{Pretrained, var_builder},
    quality::Quality,
    simulate::{Choice, Simulation},
};
use clap::Parser;
use gates::GateArgs;
use indicatif::{ProgressBar, ProgressStyle};
use model::ModelArgs;
use std::{io::Write, path::PathBuf, process::ExitCode, sync::Arc, time::Instant};

/// Fit a sparse profile to a model.
#[derive(Parser, Debug)]
#[command(name = "calibrate", version)]
struct Cli {
    #[command(flatten)]
    model: ModelArgs,
    /// Text files; documents in them may be separated by <|endoftext|>
    #[arg(long, required = true, num_args = 1..)]
    text: Vec<PathBuf>,
    /// Text files to report quality on, instead of the last fifth of --text
    #[arg(long, num_args = 1..)]
    report: Vec<PathBuf>,
    /// Tokens to use at most
    #[arg(long, default_value_t = 30_000)]
    tokens: usize,
    /// Tokens of a window
    #[arg(long)]
    context: Option<usize>,
    /// Rank of the prediction; 64, at most half of hidden_size, where not given
    #[arg(long)]
    rank: Option<usize>,
    /// Share of the neurons that are to be skipped, such as 0.6
    #[arg(long, conflicts_with = "max_ppl_loss")]
    target_sparsity: Option<f32>,
    /// Skip as many neurons as cost at most so many percent of perplexity
    #[arg(long, default_value_t = 1.0)]
    max_ppl_loss: f64,
    /// Candidates of a cascade per neuron that it wants active; 1.4, with ReLU 2, where not given
    #[arg(long)]
    candidate_factor: Option<f32>,
    #[command(flatten)]
    gate: GateArgs,
    /// Where the profile is written; beside the model's files it is found by name
    #[arg(long, default_value = "sparse.safetensors")]
    out: PathBuf,
    /// Print one JSON object as the last line of standard output
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    cli::exit(run(&cli::parse()))
}

fn run(cli: &Cli) -> Result<()> {
    let start = Instant::now();
    let calibrator = cli.calibrator()?;
    let mut files = cli.model.files()?;
    // What was learned before is not to be learned again.
    files.sparse_profile = None;
    let loaded = Pretrained::load(&files, LoadOptions::default())?;
    let [fit, tune, report] = cli.windows(&loaded)?;
    let bar = ProgressBar::new(0);
    bar.set_style(ProgressStyle::with_template("{msg:>22} {bar:40} {pos}/{len}, {elapsed} so far")?);
    let show = |p: Progress| {
        bar.set_length(p.steps as u64);
        bar.set_position(p.done as u64);
        bar.set_message(p.stage);
    };
    let vb = var_builder(&files, None)?;
    let rank = calibrator.settings.rank.min(loaded.config.hidden_size / 2);
    let mut calibrator = with_rank(calibrator, cli.rank.unwrap_or(rank));
    calibrator.gate = cli.gate.settings(&fit, &tune)?;
    let mut fitted = calibrator.calibrate(&loaded.model, &vb, &loaded.config, &fit, &tune, show)?;
    bar.finish_and_clear();
    let seconds = start.elapsed().as_secs_f64();
    drop(loaded);
    let rows = report_rows(&files, &fitted.profile, &report)?;
    fitted.profile.about["calibration"] = serde_json::json!({
        "fit_tokens": tokens(&fit), "tune_tokens": tokens(&tune), "seconds": seconds,
        "target_sparsity": cli.target_sparsity, "max_ppl_loss_percent": cli.max_ppl_loss,
    });
    fitted.profile.about["held_out"] = rows.iter().map(Row::json).collect();
    fitted.profile.save(&cli.out)?;
    print(cli, &fitted, &rows, seconds)
}

fn with_rank(mut c: Calibrator, rank: usize) -> Calibrator {
    c.settings.rank = rank;
    c
}

fn tokens(windows: &[Vec<u32>]) -> usize {
    windows.iter().map(Vec::len).sum()
}

impl Cli {
    fn calibrator(&self) -> Result<Calibrator> {
        let mut c = Calibrator::default();
        if self.rank == Some(0) {
            bail!("--rank 0 predicts nothing: give 1 or more");
        }
        if let Some(f) = self.candidate_factor.filter(|f| !(*f >= 1.0 && f.is_finite())) {
            bail!("--candidate-factor {f} must be 1 or more");
        }
        c.settings.candidate_factor = self.candidate_factor;
        c.target = match self.target_sparsity {
            Some(s) if !(0.0..=0.98).contains(&s) => {
                bail!("--target-sparsity {s} must be between 0 and 0.98")
            }
            Some(s) => Target::ActiveShare(1.0 - s),
            None if self.max_ppl_loss > 0.0 => Target::PplLoss(self.max_ppl_loss / 100.0),
            None => bail!("--max-ppl-loss {} must be above 0 (percent)", self.max_ppl_loss),
        };
        if let Target::ActiveShare(share) = c.target {
            c.settings.reference_share = share;
        }
        Ok(c)
    }

    /// Windows to fit, to tune, and to report on.
    fn windows(&self, loaded: &Pretrained) -> Result<[Vec<Vec<u32>>; 3]> {
        let limit = loaded.config.max_position_embeddings;
        let context = self.context.unwrap_or(limit.min(256));
        if !(64..=limit).contains(&context) {
            bail!("--context {context} must be 64 to {limit} (the model's context)");
        }
        let all = text::windows(&loaded.tokenizer, &self.text, context)?;
        let all = text::some(&all, self.tokens);
        let (tune_at, report_at) = if self.report.is_empty() { (0.6, 0.8) } else { (0.7, 1.0) };
        let at = |share: f64| (all.len() as f64 * share) as usize;
        let (fit, rest) = all.split_at(at(tune_at));
        let (tune, report) = rest.split_at(at(report_at) - at(tune_at));
        let report = match self.report.as_slice() {
            [] => report.to_vec(),
            paths => text::some(&text::windows(&loaded.tokenizer, paths, context)?, 24_000),
        };
        if tokens(tune) < 1000 || tokens(&report) < 500 {
            bail!("the text has too few tokens to fit, tune and report on: give more --text");
        }
        Ok([fit.to_vec(), tune.to_vec(), report])
    }
}

/// Quality of one rule at its fitted point.
struct Row {
    rule: Rule,
    quality: Quality,
    active: f64,
    recall: Vec<f64>,
}

impl Row {
    fn json(&self) -> serde_json::Value {
        let q = &self.quality;
        serde_json::json!({
            "rule": format!("{:?}", self.rule), "tokens": q.tokens(), "active_fraction": self.active,
            "ppl": q.ppl(), "dense_ppl": q.dense_nll().exp(), "ppl_change": q.ppl_change(), "kld": q.kld(),
            "top1_agreement": q.top1_agreement(), "recall": self.recall,
        })
    }
}

/// Every rule at its fitted point, on windows that nothing was learned from.
fn report_rows(files: &ModelFiles, profile: &Profile, windows: &[Vec<u32>]) -> Result<Vec<Row>> {
    let options = LoadOptions { profile: Some(Arc::new(profile.clone())), ..LoadOptions::default() };
    let loaded = Pretrained::load(files, options)?;
    let c = &loaded.config;
    let act = Gate { act: c.hidden_act, shift: c.gate_shift };
    let mut cache = Cache::new(true, DType::F32, c, &Device::Cpu)?;
    let mut rows = Vec::new();
    for rule in Rule::ALL {
        let choice = Choice::Rule(rule, profile.fitted[rule as usize]);
        let mut simulation = Simulation::new(&profile.layers, act, choice)?;
        let mut quality = Quality::default();
        for window in windows {
            let x = Tensor::new(window.as_slice(), &Device::Cpu)?.unsqueeze(0)?;
            let dense = loaded.model.forward_all(&x, 0, &mut cache)?.squeeze(0)?;
            let logits = loaded.model.forward_tapped(&x, 0, &mut cache, &mut simulation)?.squeeze(0)?;
            simulation.check()?;
            quality.add(window, 1, &logits, &dense)?;
        }
        let active = simulation.active_share();
        let active = active.iter().sum::<f64>() / active.len() as f64;
        rows.push(Row { rule, quality, active, recall: simulation.recall() });
    }
    Ok(rows)
}

fn print(cli: &Cli, fitted: &Fitted, rows: &[Row], seconds: f64) -> Result<()> {
    let mut out = cli::output::stdout();
    if cli.json {
        let json = serde_json::json!({
            "out": cli.out.display().to_string(), "seconds": seconds, "shares": fitted.profile.shares, "runs": fitted.runs,
            "held_out": rows.iter().map(Row::json).collect::<Vec<_>>(), "gates": gates::json(&fitted.gates),
        });
        writeln!(out, "{json}")?;
        return Ok(());
    }
    writeln!(out, "{} written after {seconds:.1} s", cli.out.display())?;
    writeln!(out, "{:>10} {:>8} {:>10} {:>10} {:>8} {:>8}", "", "active", "ppl", "change", "kld", "top-1")?;
    for r in rows {
        let (q, rule) = (&r.quality, format!("{:?}", r.rule));
        writeln!(
            out,
            "{rule:>10} {:>8.3} {:>10.4} {:>+9.2}% {:>8.4} {:>8.4}",
            r.active,
            q.ppl(),
            q.ppl_change() * 100.0,
            q.kld(),
            q.top1_agreement()
        )?;
    }
    for (l, runs) in fitted.runs.iter().enumerate() {
        let recall: Vec<String> = rows.iter().map(|r| format!("{:.3}", r.recall[l])).collect();
        let shares: Vec<String> = (0..3)
            .map(|r| format!("{:.2}", fitted.profile.layers[l].rules[r].share[fitted.profile.fitted[r]]))
            .collect();
        writeln!(
            out,
            "block {l}: shares {}, recall {}, runs of {:.2} neurons before, {:.2} after ordering",
            shares.join(" "),
            recall.join(" "),
            runs[0],
            runs[1]
        )?;
    }
    gates::print(&mut out, &fitted.gates)
}
