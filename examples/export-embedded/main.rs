//! Writes a model as one image for microcontrollers: weights, vocabulary, sparse profile and settings, used where they lie.
#![allow(clippy::doc_markdown, reason = "comments on flags are the program's help text")]

mod choice;
#[path = "../common/cli.rs"]
#[allow(dead_code, reason = "not every program uses all of it")]
mod cli;
mod cost;
#[path = "../common/embedded.rs"]
mod embedded;
mod export;
mod settings;
mod vocabulary;
mod weights;

#[cfg(test)]
mod tests;

use anyhow::Result;
use candle_sparse_core::image::Image;
use clap::Parser;
use export::ExportArgs;
use std::{io::Write, path::PathBuf, process::ExitCode};

/// Write a model as an image for microcontrollers
#[derive(Parser, Debug)]
#[command(name = "export-embedded", version)]
struct Cli {
    /// Hub id (org/name), folder, .safetensors or .gguf file, or name of an embedded model (tales-silu, tales-relu)
    #[arg(long)]
    model: String,
    /// Branch, tag or commit of a Hub model
    #[arg(long)]
    revision: Option<String>,
    /// The file to write
    #[arg(long)]
    out: PathBuf,
    #[command(flatten)]
    export: ExportArgs,
}

fn main() -> ExitCode {
    cli::exit(run(&cli::parse()))
}

fn run(cli: &Cli) -> Result<()> {
    candle_sparse::save::check(&cli.out)?;
    let files = embedded::resolve(&cli.model, cli.revision.as_deref())?;
    let words = export::image(&files, &cli.export)?;
    let bytes: &[u8] = bytemuck::cast_slice(&words);
    candle_sparse::save::save(&cli.out, |file| Ok(file.write_all(bytes)?))?;
    let image = Image::open(bytes)?;
    cli::output::status(format_args!("{}: {:.1} KB", cli.out.display(), bytes.len() as f64 / 1e3));
    cli::output::line(cost::report(&image, cli.export.active)?)?;
    Ok(())
}
