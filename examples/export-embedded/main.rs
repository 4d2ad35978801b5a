//! Writes a model as one image for microcontrollers: weights, vocabulary and settings, used where they lie.

#[path = "../common/cli.rs"]
#[allow(dead_code, reason = "not every program uses all of it")]
mod cli;
mod vocabulary;
mod weights;

#[cfg(test)]
mod tests;

use anyhow::{Context, Result};
use candle_sparse::core::{
    Format,
    image::{self, Image, Role},
};
use candle_sparse_models::{files::ModelFiles, hub::HubSettings, pretrained};
use clap::Parser;
use std::{io::Write, path::PathBuf, process::ExitCode};
use vocabulary::Vocabulary;
use weights::Held;

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
    /// Format of the matrices: f32, f16, bf16, q8_0, q6_k, q5_1, q5_0, q5_k, q4_1, q4_0, q4_k, q3_k, q2_k
    #[arg(long, value_parser = cli::format, default_value = "q8_0")]
    dtype: Format,
    /// The file to write
    #[arg(long)]
    out: PathBuf,
}

fn main() -> ExitCode {
    cli::exit(run(&cli::parse()))
}

fn run(cli: &Cli) -> Result<()> {
    candle_sparse::save::check(&cli.out)?;
    let files = ModelFiles::resolve(&cli.model, cli.revision.as_deref(), &HubSettings::from_env())?;
    let image = image_of(&files, cli.dtype)?;
    candle_sparse::save(&cli.out, |file| Ok(file.write_all(bytemuck::cast_slice(&image))?))?;
    let bytes = image.len() * size_of::<u128>();
    cli::output::status(format_args!("{}: {:.1} KB", cli.out.display(), bytes as f64 / 1e3));
    Ok(())
}

/// The image of a model, in words of 16 bytes, which is how images lie in memory.
fn image_of(files: &ModelFiles, format: Format) -> Result<Vec<u128>> {
    let config = pretrained::config(files)?;
    let (tokenizer, notices) = files.load_tokenizer_and_notices()?;
    notices.iter().for_each(cli::output::note);
    let ends = pretrained::end_tokens(files, &tokenizer)?;
    let vocabulary = Vocabulary::new(&tokenizer, &ends).with_context(|| files.name.clone())?;
    let core = config.to_core()?;
    let vb = pretrained::var_builder(files, None)?;
    let mut all = weights::weights(&vb, &core, config.tie_word_embeddings, format)?;
    all.push(Held::Bytes(Role::Config, image::config_bytes(&core)?.to_vec()));
    all.push(Held::Bytes(Role::Tokenizer, vocabulary.to_bytes()));
    let image = written(&all)?;
    Image::open(bytemuck::cast_slice(&image))?;
    Ok(image)
}

fn written(all: &[Held]) -> Result<Vec<u128>> {
    let mut tensors = all.iter().map(Held::tensor).collect::<Result<Vec<_>>>()?;
    let mut bytes = Vec::new();
    image::write(&mut tensors, |piece| bytes.extend_from_slice(piece))?;
    let mut words = vec![0_u128; bytes.len().div_ceil(size_of::<u128>())];
    bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(&bytes);
    Ok(words)
}
