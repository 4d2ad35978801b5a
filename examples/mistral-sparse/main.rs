//! Generates text with a Mistral on the CPU, written as candle's own example is; without flags with a tiny model built into
//! the program.
#![allow(clippy::doc_markdown, reason = "comments on flags are the program's help text")]

#[path = "../common/cli.rs"]
#[allow(dead_code, reason = "not every program uses all of it")]
mod cli;
#[path = "../common/memory.rs"]
mod memory;
#[path = "../common/model.rs"]
mod model;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Activation, VarBuilder};
use candle_sparse::core;
use candle_sparse_models::{
    files::{ModelFiles, Weights},
    llama::LlamaConfig,
    mistral::{Config, Model as Mistral},
    pretrained::{end_tokens, var_builder},
    tokenizer::{TextStream, prompt_tokens},
};
use candle_transformers::{generation::LogitsProcessor, utils::apply_repeat_penalty};
use clap::Parser;
use model::ModelArgs;
use std::{io::Write, process::ExitCode, time::Instant};
use tokenizers::Tokenizer;

/// The window of the built-in model, which was trained without one.
const SHOWN_WINDOW: usize = 256;

/// Generate text with a Mistral on the CPU.
#[derive(Parser, Debug)]
#[command(version)]
struct Cli {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to continue
    #[arg(long, default_value = "Once upon a time there was a king who had ")]
    prompt: String,
    /// Tokens to generate at most
    #[arg(long, short = 'n', default_value_t = 400)]
    sample_len: usize,
    /// 0 takes the most likely token always
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Sample from the smallest set of tokens with this total probability
    #[arg(long)]
    top_p: Option<f64>,
    /// Seed of the sampling
    #[arg(long, default_value_t = 299_792_458)]
    seed: u64,
    /// Divides the logits of recent tokens; 1 is no penalty
    #[arg(long, default_value_t = 1.1)]
    repeat_penalty: f32,
    /// How many tokens count as recent
    #[arg(long, default_value_t = 64)]
    repeat_last_n: usize,
}

fn main() -> ExitCode {
    cli::exit(run(&Cli::parse()))
}

struct TextGeneration {
    model: Mistral,
    tokenizer: Tokenizer,
    logits_processor: LogitsProcessor,
    eos_tokens: Vec<u32>,
}

impl TextGeneration {
    fn run(&mut self, cli: &Cli, context: usize) -> Result<()> {
        let mut tokens = prompt_tokens(&self.tokenizer, &cli.prompt)?;
        if tokens.is_empty() {
            bail!("the prompt is empty: give at least one character with --prompt");
        }
        let mut stream = TextStream::new(&self.tokenizer);
        let say = |piece: String| -> Result<()> {
            let mut out = std::io::stdout().lock();
            write!(out, "{piece}")?;
            Ok(out.flush()?)
        };
        tokens.iter().try_for_each(|token| say(stream.push(*token)))?;
        let (prompt, start) = (tokens.len(), Instant::now());
        for index in 0..cli.sample_len.min((context + 1).saturating_sub(prompt).max(1)) {
            let context_size = if index > 0 { 1 } else { tokens.len() };
            let start_pos = tokens.len() - context_size;
            let input = Tensor::new(&tokens[start_pos..], &Device::Cpu)?.unsqueeze(0)?;
            let logits = self.model.forward(&input, start_pos)?;
            let logits = logits.squeeze(0)?.squeeze(0)?.to_dtype(DType::F32)?;
            let recent = &tokens[tokens.len().saturating_sub(cli.repeat_last_n)..];
            let logits = apply_repeat_penalty(&logits, cli.repeat_penalty, recent)?;
            let next_token = self.logits_processor.sample(&logits)?;
            tokens.push(next_token);
            if self.eos_tokens.contains(&next_token) {
                break;
            }
            say(stream.push(next_token))?;
        }
        say(stream.finish())?;
        let (generated, seconds) = (tokens.len() - prompt, start.elapsed().as_secs_f64());
        writeln!(std::io::stdout())?;
        eprintln!(
            "\n{generated} tokens at {:.1} tokens/s after a prompt of {prompt}; kv {:.3} MB",
            generated as f64 / seconds,
            self.model.cache().kv_bytes() as f64 / 1e6
        );
        Ok(())
    }
}

fn run(cli: &Cli) -> Result<()> {
    if !(cli.temperature >= 0.0 && cli.temperature.is_finite()) {
        bail!("--temperature {} must be 0 or more", cli.temperature);
    }
    if let Some(p) = cli.top_p.filter(|p| !(0.0..=1.0).contains(p)) {
        bail!("--top-p {p} must be between 0 and 1");
    }
    if !(cli.repeat_penalty > 0.0 && cli.repeat_penalty.is_finite()) {
        bail!("--repeat-penalty {} must be above 0", cli.repeat_penalty);
    }
    let files = cli.model.files()?;
    let Some(json) = files.config.as_deref() else {
        bail!("{}: GGUF files, of Mistral too, run with llama-sparse", files.name);
    };
    let (config, vb) = match &files.weights {
        Weights::Embedded(bytes) => as_mistral(&files, json, bytes)?,
        _ => {
            let config: Config =
                serde_json::from_slice(json).with_context(|| format!("{}: config.json", files.name))?;
            (config, var_builder(&files, None)?)
        }
    };
    let kv = cli.model.memory.kv(vb.dtype())?;
    let options =
        cli.model.options(&files, cli.model.dtype, cli.model.sparse()?, cli.model.memory.attention())?;
    let model = Mistral::load_with(&config, vb, options)?.with_kv(kv)?;
    let (tokenizer, notices) = files.load_tokenizer_and_notices()?;
    for notice in notices.iter().chain(model.llama().decoder().notices()) {
        eprintln!("note: {notice}");
    }
    let eos_tokens = end_tokens(&files, &tokenizer)?;
    let temperature = Some(cli.temperature).filter(|t| *t > 0.0);
    let logits_processor = LogitsProcessor::new(cli.seed, temperature, cli.top_p);
    let mut generation = TextGeneration { model, tokenizer, logits_processor, eos_tokens };
    generation.run(cli, config.max_position_embeddings)
}

/// A built-in Llama as a Mistral: the same shape, a head that is a copy of the embedding, and a sliding window.
fn as_mistral(files: &ModelFiles, json: &[u8], weights: &[u8]) -> Result<(Config, VarBuilder<'static>)> {
    let llama: LlamaConfig = serde_json::from_slice(json)?;
    if (llama.hidden_act, llama.gate_shift, llama.norm_shift) != (core::Activation::Silu, 0.0, None) {
        bail!("{} is no Mistral: give a folder or a Hub id with --model, or leave it out", files.name);
    }
    let name = &files.name;
    eprintln!(
        "note: {name} is a Llama, run here as a Mistral with a sliding window of {SHOWN_WINDOW}; a real one: --model org/name"
    );
    let mut tensors = candle_core::safetensors::load_buffer(weights, &Device::Cpu)?;
    let table =
        tensors.get("model.embed_tokens.weight").context("the built-in model has an embedding")?.clone();
    let dtype = table.dtype();
    tensors.insert("lm_head.weight".to_string(), table);
    let config = Config {
        vocab_size: llama.vocab_size,
        hidden_size: llama.hidden_size,
        intermediate_size: llama.intermediate_size,
        num_hidden_layers: llama.num_hidden_layers,
        num_attention_heads: llama.num_attention_heads,
        head_dim: llama.head_dim,
        num_key_value_heads: llama.num_key_value_heads(),
        hidden_act: Activation::Silu,
        max_position_embeddings: llama.max_position_embeddings,
        rms_norm_eps: llama.rms_norm_eps,
        rope_theta: f64::from(llama.rope_theta),
        sliding_window: Some(SHOWN_WINDOW),
        use_flash_attn: false,
    };
    Ok((config, VarBuilder::from_tensors(tensors, dtype, &Device::Cpu)))
}
