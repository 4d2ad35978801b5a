//! Writes a model as a GGUF file: quantised, with its sparse profile inside, neuron-major if asked for.
#![allow(clippy::doc_markdown, reason = "comments on flags are the program's help text")]

#[path = "../common/cli.rs"]
#[allow(dead_code, reason = "not every program uses all of it")]
mod cli;
#[path = "../common/embedded.rs"]
mod embedded;

use anyhow::{Result, bail};
use candle_sparse::{Format, Profile};
use candle_sparse_models::{
    convert::{GgufModel, Layout},
    files::{ModelFiles, Weights},
    gguf::GgufFile,
    pretrained,
};
use clap::Parser;
use std::{path::PathBuf, process::ExitCode};

/// Write a model as a GGUF file.
#[derive(Parser, Debug)]
#[command(name = "convert", version)]
struct Cli {
    /// Hub id (org/name), folder, .safetensors or .gguf file, or name of an embedded model (tales-silu, tales-relu)
    #[arg(long)]
    model: String,
    /// Branch, tag or commit of a Hub model
    #[arg(long)]
    revision: Option<String>,
    /// Format of the matrices: f32, f16, bf16, q8_0, q6_k, q5_1, q5_0, q5_k, q4_1, q4_0, q4_k, q3_k, q2_k; as they are where not given
    #[arg(long, value_parser = cli::format)]
    dtype: Option<Format>,
    /// Sparse profile to put into the file, instead of the model's own
    #[arg(long)]
    profile: Option<PathBuf>,
    /// Put no profile into the file
    #[arg(long, conflicts_with_all = ["profile", "neuron_major"])]
    no_profile: bool,
    /// Hold up and down rows of a neuron side by side, in the profile's order, or the model's own where its activation gives exact
    /// zeros: sparse decode uses the file in place, llama.cpp and candle cannot open it
    #[arg(long)]
    neuron_major: bool,
    /// The file to write
    #[arg(long)]
    out: PathBuf,
    /// Print one JSON object as the last line of standard output
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    cli::exit(run(&cli::parse()))
}

fn run(cli: &Cli) -> Result<()> {
    candle_sparse::save::check(&cli.out)?;
    let files = embedded::resolve(&cli.model, cli.revision.as_deref())?;
    let profile = profile(cli, &files)?;
    let by_zeros = || Ok::<_, candle_core::Error>(pretrained::config(&files)?.hidden_act.has_exact_zeros());
    if cli.neuron_major && profile.is_none() && !by_zeros()? {
        bail!(
            "--neuron-major needs the order of a profile, or an activation that gives exact zeros: make one with `calibrate` and \
             give it with --profile"
        );
    }
    let layout = Layout::default()
        .with_format(cli.dtype)
        .with_neuron_major(profile.as_ref().filter(|_| cli.neuron_major))
        .with_own_order(cli.neuron_major && profile.is_none());
    let mut model = GgufModel::from_files(&files, layout)?;
    if let Some(profile) = &profile {
        model = model.with_profile(profile)?;
    }
    model.notices().iter().for_each(cli::output::note);
    model.save_checked(&cli.out)?;
    let bytes = std::fs::metadata(&cli.out)?.len();
    if cli.json {
        let json = serde_json::json!({
            "out": cli.out.display().to_string(), "bytes": bytes, "profile": profile.is_some(), "neuron_major": cli.neuron_major,
            "opens_elsewhere": model.is_ordinary(),
        });
        cli::output::line(json)?;
    }
    let opens = match (model.is_llama(), model.is_ordinary()) {
        (true, _) => "opens in llama.cpp and candle too",
        (false, true) => "opens in llama.cpp too",
        (false, false) => "opens here alone",
    };
    let inside = if profile.is_some() { "with its profile, " } else { "" };
    cli::output::status(format_args!("{}: {:.1} MB, {inside}{opens}", cli.out.display(), bytes as f64 / 1e6));
    Ok(())
}

/// The profile of the flag, else the one in or beside the model.
fn profile(cli: &Cli, files: &ModelFiles) -> Result<Option<Profile>> {
    Ok(match (&cli.profile, &files.sparse_profile, &files.weights) {
        _ if cli.no_profile => None,
        (Some(path), ..) => Some(Profile::load(path)?),
        (None, Some(profile), _) => Some(profile.load()?),
        (None, None, Weights::Gguf(path)) => GgufFile::open(path)?.profile()?,
        (None, None, _) => None,
    })
}
