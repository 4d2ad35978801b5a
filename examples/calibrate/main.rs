//! Fits a sparse profile to a model: which neurons a token needs, and how to tell.
//!
//! The texts are cut in three: one part to fit, one to set thresholds, one to check and report. The profile is written at
//! the end, whole; until then what was found stands in `OUT.checkpoint`, where the same command goes on after an
//! interruption. Exit code 3: it was written, but no rule keeps the target.
#![allow(clippy::doc_markdown, reason = "comments on flags are the program's help text")]

#[path = "../common/cli.rs"]
#[allow(dead_code, reason = "not every program uses all of it")]
mod cli;
mod gates;
#[path = "../common/memory.rs"]
mod memory;
#[path = "../common/model.rs"]
mod model;
mod report;
#[path = "../common/text.rs"]
mod text;

use anyhow::{Result, bail};
use candle_sparse_models::{
    FfnMode,
    calibrate::{Calibrator, Progress, RecallSettings, Target, own_text},
    decoder::LoadOptions,
    pretrained::{self, Pretrained, var_builder},
    quality::Loss,
};
use clap::Parser;
use cli::output;
use gates::GateArgs;
use indicatif::{ProgressBar, ProgressStyle};
use model::SourceArgs;
use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

/// Fit a sparse profile to a model.
#[derive(Parser, Debug)]
#[command(name = "calibrate", version)]
struct Cli {
    #[command(flatten)]
    model: SourceArgs,
    /// Text files, of the kind that the model is used for; documents in them may be separated by <|endoftext|>
    #[arg(long, required_unless_present = "self_text", num_args = 1..)]
    text: Vec<PathBuf>,
    /// Let the model write so many tokens itself (the value may be left out), instead of or beside --text
    #[arg(long, num_args = 0..=1, default_missing_value = "30000", value_name = "TOKENS")]
    self_text: Option<usize>,
    /// Text files to check and report quality on, instead of the last fifth of --text
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
    #[arg(long, conflicts_with_all = ["max_ppl_loss", "max_kld"])]
    target_sparsity: Option<f32>,
    /// Skip as many neurons as cost at most so many percent of perplexity on held-out text, with a certainty of 95 %
    #[arg(long, default_value_t = 1.0)]
    max_ppl_loss: f64,
    /// And at most this divergence from the dense model, nats per token, beyond the noise of its rounded activations
    #[arg(long, default_value_t = 0.02)]
    max_kld: f64,
    /// Candidates of a cascade per neuron that it wants active; 1.4, with ReLU 2, where not given
    #[arg(long)]
    candidate_factor: Option<f32>,
    #[command(flatten)]
    gate: GateArgs,
    /// Calibrate attention alone, in windows of 2048 where --context is not given: how heads share the budget of recall (with a --context
    /// of 512 or more a whole calibration does that too), and gates. Without gates a minute for 135M; neurons are computed as without
    /// a profile. An interrupted run begins anew
    #[arg(long, conflicts_with_all = ["self_text", "target_sparsity", "rank", "max_ppl_loss", "max_kld", "candidate_factor"])]
    attention_only: bool,
    /// Where the profile is written; beside the model's files it is found by name. An interrupted run leaves OUT.checkpoint, with
    /// which the same command goes on (not with --attention-only)
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
    let checkpoint = checkpoint(&cli.out);
    candle_sparse::save::check(&cli.out)?;
    candle_sparse::save::check(&checkpoint)?;
    let start = Instant::now();
    let calibrator = cli.calibrator()?;
    let mut files = cli.model.files()?;
    // What was learned before is not to be learned again.
    files.sparse_profile = None;
    let mut options = LoadOptions::default().with_threads(cli.model.threads()?);
    if pretrained::config(&files)?.hidden_act.has_exact_zeros() {
        // Nor is anything left out that needs no profile.
        options.sparse.mode = FfnMode::Dense;
    }
    let loaded = Pretrained::load(&files, options)?;
    loaded.notices.iter().for_each(output::note);
    let [fit, tune, held_out] = cli.windows(&loaded)?;
    let bar = ProgressBar::new(0);
    bar.set_style(ProgressStyle::with_template("{msg:>22} {bar:40} {pos}/{len}, {elapsed} so far")?);
    let mut stage = "";
    let show = |p: Progress| {
        // Who reads a file or a pipe sees no bar.
        if bar.is_hidden() && std::mem::replace(&mut stage, p.stage) != p.stage {
            output::status(format_args!("{} ({:.0} s so far)", p.stage, start.elapsed().as_secs_f64()));
        }
        bar.set_length(p.steps as u64);
        bar.set_position(p.done as u64);
        bar.set_message(p.stage);
    };
    let vb = var_builder(&files, None)?;
    let rank = calibrator.settings.rank.min(loaded.config.hidden_size / 2);
    let mut calibrator = with_rank(calibrator, cli.rank.unwrap_or(rank));
    let model = loaded.model.decoder();
    if cli.attention_only {
        let fit = [fit, tune].concat();
        calibrator.gate = cli.gate.settings(&fit, &held_out)?;
        calibrator.recall = Some(RecallSettings::default());
        let fitted = calibrator.calibrate_attention(model, &vb, [&fit, &held_out], show)?;
        bar.finish_and_clear();
        fitted.profile.save(&cli.out)?;
        return report::print_attention(cli, &fitted, start.elapsed().as_secs_f64());
    }
    calibrator.gate = cli.gate.settings(&fit, &tune)?;
    let recall = RecallSettings::default();
    let enough = |text: &[Vec<u32>]| text.iter().any(|window| recall.is_enough(window.len()));
    calibrator.recall = (enough(&fit) && enough(&tune)).then_some(recall);
    let texts = [&*fit, &*tune, &*held_out];
    let mut fitted = calibrator.calibrate_resumable(model, &vb, texts, &checkpoint, show)?;
    bar.finish_and_clear();
    let seconds = start.elapsed().as_secs_f64();
    fitted.profile.about["calibration"] = serde_json::json!({
        "fit_tokens": tokens(&fit), "tune_tokens": tokens(&tune),
        "target_sparsity": cli.target_sparsity, "max_ppl_loss_percent": cli.max_ppl_loss, "max_kld": cli.max_kld,
        "noise_floor": fitted.noise_floor, "own_ppl": fitted.ppl[1],
    });
    fitted.profile.about["held_out"] = fitted.held_out.iter().map(report::json).collect();
    fitted.profile.save(&cli.out)?;
    if checkpoint.exists() {
        std::fs::remove_file(&checkpoint)?;
    }
    report::print(cli, &fitted, seconds)
}

/// Where an interrupted run leaves what it has found: beside the profile.
fn checkpoint(out: &Path) -> PathBuf {
    let mut name = out.as_os_str().to_owned();
    name.push(".checkpoint");
    name.into()
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
            None => {
                let limits = [("--max-ppl-loss", self.max_ppl_loss), ("--max-kld", self.max_kld)];
                if let Some((name, limit)) = limits.into_iter().find(|(_, l)| l.is_nan() || *l <= 0.0) {
                    bail!("{name} {limit} must be above 0");
                }
                Target::Loss(Loss { ppl: self.max_ppl_loss / 100.0, kld: self.max_kld })
            }
        };
        if let Target::ActiveShare(share) = c.target {
            c.settings.reference_share = share;
        }
        Ok(c)
    }

    /// Windows to fit, to tune, and to report on.
    fn windows(&self, loaded: &Pretrained) -> Result<[Vec<Vec<u32>>; 3]> {
        let limit = loaded.config.max_position_embeddings;
        let context = self.context.unwrap_or(limit.min(if self.attention_only { 2048 } else { 256 }));
        if !(64..=limit).contains(&context) {
            bail!("--context {context} must be 64 to {limit} (the model's context)");
        }
        let mut all = text::some(&text::windows(&loaded.tokenizer, &self.text, context)?, self.tokens);
        if let Some(tokens) = self.self_text {
            output::status(format_args!("the model writes {tokens} tokens ..."));
            all.extend(own_text(loaded.model.decoder(), tokens, &start(loaded)?, 1)?.windows);
        }
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

/// What a text of the model begins with: what its tokenizer puts before one, else its first special token.
fn start(loaded: &Pretrained) -> Result<Vec<u32>> {
    let start = loaded.tokenizer.encode("", true).map_err(anyhow::Error::msg)?.get_ids().to_vec();
    if !start.is_empty() {
        return Ok(start);
    }
    Ok(vec![loaded.config.bos_token_id.unwrap_or(0)])
}
