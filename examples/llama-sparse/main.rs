//! Generates text with a Llama on the CPU; without flags with a tiny model built into the program.
#![allow(clippy::doc_markdown, reason = "comments on flags are the program's help text")]

mod chat;
#[path = "../common/cli.rs"]
mod cli;
mod compare;
#[path = "../common/memory.rs"]
mod memory;
#[path = "../common/model.rs"]
mod model;

use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor};
use candle_sparse_models::{
    decoder::Decoder,
    llama::Cache,
    pretrained::Pretrained,
    tokenizer::{TextStream, prompt_tokens},
};
use candle_transformers::{
    generation::{LogitsProcessor, Sampling},
    utils::apply_repeat_penalty,
};
use clap::Parser;
use cli::process_bytes;
use model::ModelArgs;
use std::{io::Write, path::PathBuf, process::ExitCode, time::Instant};

/// Generate text with a Llama on the CPU.
#[derive(Parser, Debug)]
#[command(version)]
struct Cli {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to continue
    #[arg(long, default_value = "Once upon a time there was a king who had ")]
    prompt: String,
    /// Token ids to continue, instead of a text
    #[arg(long, value_delimiter = ',', conflicts_with = "prompt")]
    prompt_ids: Option<Vec<u32>>,
    /// Talk: each line of standard input is a turn
    #[arg(long, conflicts_with_all = ["prompt", "prompt_ids", "compare", "logits"])]
    chat: bool,
    /// With --chat: instructions that come before the conversation
    #[arg(long, requires = "chat")]
    system: Option<String>,
    /// With --chat: a file with the template of the conversation, instead of the model's own
    #[arg(long, requires = "chat")]
    chat_template: Option<PathBuf>,
    /// Tokens to generate at most
    #[arg(long, short = 'n', default_value_t = 200)]
    sample_len: usize,
    /// 0 takes the most likely token always
    #[arg(long, default_value_t = 0.8, allow_negative_numbers = true)]
    temperature: f64,
    /// Sample from the smallest set of tokens with this total probability
    #[arg(long, allow_negative_numbers = true)]
    top_p: Option<f64>,
    /// Sample from the k most likely tokens
    #[arg(long)]
    top_k: Option<usize>,
    /// Divides the logits of recent tokens; 1 is no penalty
    #[arg(long, default_value_t = 1.1, allow_negative_numbers = true)]
    repeat_penalty: f32,
    /// How many tokens count as recent
    #[arg(long, default_value_t = 128)]
    repeat_last_n: usize,
    /// Seed of the sampling
    #[arg(long, default_value_t = 299_792_458)]
    seed: u64,
    /// Also compare the modes of the FFN: speed, bytes and quality; without any flag this is done too
    #[arg(long)]
    compare: bool,
    /// Print one JSON object as the last line of standard output, the text to standard error
    #[arg(long)]
    json: bool,
    /// With --json: also this many logits of the prompt's last position, to compare with other programs
    #[arg(long, default_value_t = 0)]
    logits: usize,
}

fn main() -> ExitCode {
    cli::exit(run(&Cli::parse()))
}

impl Cli {
    fn sampler(&self) -> Result<LogitsProcessor> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            bail!("--temperature {} must be 0 or more", self.temperature);
        }
        if let Some(p) = self.top_p.filter(|p| !(0.0..=1.0).contains(p)) {
            bail!("--top-p {p} must be between 0 and 1");
        }
        if self.top_k == Some(0) {
            bail!("--top-k 0 leaves no token: give 1 or more");
        }
        if !(self.repeat_penalty > 0.0 && self.repeat_penalty.is_finite()) {
            bail!("--repeat-penalty {} must be above 0", self.repeat_penalty);
        }
        let temperature = self.temperature;
        let sampling = match (self.top_k, self.top_p) {
            _ if temperature == 0.0 => Sampling::ArgMax,
            (None, None) => Sampling::All { temperature },
            (Some(k), None) => Sampling::TopK { k, temperature },
            (None, Some(p)) => Sampling::TopP { p, temperature },
            (Some(k), Some(p)) => Sampling::TopKThenTopP { k, p, temperature },
        };
        Ok(LogitsProcessor::from_sampling(self.seed, sampling))
    }

    fn load(&self) -> Result<Pretrained> {
        let mut files = self.model.files()?;
        if let Some(path) = &self.chat_template {
            let template = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            files.chat_template = Some(template);
        }
        self.model.load_files(&files)
    }

    fn prompt_ids(&self, loaded: &Pretrained) -> Result<Vec<u32>> {
        if let Some(ids) = &self.prompt_ids {
            return Ok(ids.clone());
        }
        let ids = prompt_tokens(&loaded.tokenizer, &self.prompt)?;
        if ids.is_empty() {
            bail!("the prompt is empty: give at least one character with --prompt");
        }
        Ok(ids)
    }

    /// Where the text goes: standard output, unless that belongs to the JSON object.
    fn print(&self, text: &str) -> Result<()> {
        if self.json {
            eprint!("{text}");
            return Ok(());
        }
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes())?;
        Ok(out.flush()?)
    }
}

/// What a run produced.
struct Generated {
    ids: Vec<u32>,
    prompt_tokens: usize,
    text: String,
    prompt_logits: Vec<f32>,
    prefill_s: f64,
    decode_s: f64,
}

fn run(cli: &Cli) -> Result<()> {
    let mut sampler = cli.sampler()?;
    let start = Instant::now();
    let loaded = cli.load()?;
    let load_s = start.elapsed().as_secs_f64();
    let mut cache = cli.model.cache(&loaded)?;
    if cli.chat {
        return chat::chat(cli, &loaded, &mut cache, &mut sampler);
    }
    let out = generate(cli, &loaded, &mut cache, &mut sampler)?;
    report(cli, &loaded, &cache, &out, load_s)?;
    if cli.compare || std::env::args_os().len() == 1 {
        drop(loaded);
        // What leaving neurons out is worth, whether or not it is faster here.
        let forced = ModelArgs { force_sparse: true, ..cli.model.clone() };
        let loaded = forced.load()?;
        if loaded.model.decoder().sparse_config().is_none() {
            bail!("--compare needs a profile: make one with `calibrate` and give it with --profile");
        }
        compare::compare(&loaded, cli.model.cache(&loaded)?, cli.json)?;
    }
    Ok(())
}

fn generate(
    cli: &Cli,
    loaded: &Pretrained,
    cache: &mut Cache,
    sampler: &mut LogitsProcessor,
) -> Result<Generated> {
    let mut ids = cli.prompt_ids(loaded)?;
    let prompt_tokens = ids.len();
    let mut stream = TextStream::new(&loaded.tokenizer);
    let mut text = String::new();
    let mut say = |piece: &str| {
        text.push_str(piece);
        cli.print(piece)
    };
    for &id in &ids {
        say(&stream.push(id))?;
    }
    let start = Instant::now();
    let x = Tensor::new(ids.as_slice(), &Device::Cpu)?.unsqueeze(0)?;
    let mut logits = loaded.model.forward(&x, 0, cache)?.squeeze(0)?;
    let prefill_s = start.elapsed().as_secs_f64();
    let prompt_logits = logits.narrow(0, 0, cli.logits.min(logits.elem_count()))?.to_vec1()?;
    let start = Instant::now();
    let room = loaded.config.max_position_embeddings.saturating_sub(prompt_tokens) + 1;
    for step in 0..cli.sample_len.min(room) {
        if step > 0 {
            let last = Tensor::new(&ids[ids.len() - 1..], &Device::Cpu)?.unsqueeze(0)?;
            logits = loaded.model.forward(&last, ids.len() - 1, cache)?.squeeze(0)?;
        }
        let next = sample(cli, sampler, &logits, &ids)?;
        if loaded.is_eos(next) {
            break;
        }
        ids.push(next);
        say(&stream.push(next))?;
    }
    say(&stream.finish())?;
    cli.print("\n")?;
    let decode_s = start.elapsed().as_secs_f64();
    Ok(Generated { ids, prompt_tokens, text, prompt_logits, prefill_s, decode_s })
}

fn sample(cli: &Cli, sampler: &mut LogitsProcessor, logits: &Tensor, ids: &[u32]) -> Result<u32> {
    let sum = logits.sum_all()?.to_scalar::<f32>()?;
    if sum.is_nan() {
        bail!("the logits after {} tokens are not numbers: the checkpoint holds NaN or infinity", ids.len());
    }
    if cli.repeat_penalty == 1.0 {
        return Ok(sampler.sample(logits)?);
    }
    let recent = &ids[ids.len().saturating_sub(cli.repeat_last_n)..];
    Ok(sampler.sample(&apply_repeat_penalty(logits, cli.repeat_penalty, recent)?)?)
}

fn report(cli: &Cli, loaded: &Pretrained, cache: &Cache, out: &Generated, load_s: f64) -> Result<()> {
    let generated = out.ids.len() - out.prompt_tokens;
    // The first token comes out of the prefill.
    let decode = generated.saturating_sub(1) as f64 / out.decode_s;
    let prefill = out.prompt_tokens as f64 / out.prefill_s;
    let decoder = loaded.model.decoder();
    if cli.json {
        let json = serde_json::json!({
            "text": out.text,
            "token_ids": out.ids,
            "prompt_logits": out.prompt_logits,
            "prompt_tokens": out.prompt_tokens,
            "generated_tokens": generated,
            "load_s": load_s,
            "prefill_tokens_per_s": prefill,
            "decode_tokens_per_s": decode,
            "ffn": ffn(decoder),
            "active_fraction": cache.sparse_stats().active_share(),
            "weight_bytes": decoder.weight_bytes(),
            "weight_bytes_per_token": decoder.weight_bytes_per_token(),
            "kv_bytes": cache.kv_bytes(),
            "rss_bytes": process_bytes("VmRSS").ok(),
            "peak_rss_bytes": process_bytes("VmHWM").ok(),
            "level": decoder.level().name(),
            "threads": decoder.threads().count(),
        });
        writeln!(std::io::stdout(), "{json}")?;
        return Ok(());
    }
    eprintln!(
        "\n{generated} tokens at {decode:.1} tokens/s after a prompt of {} at {prefill:.1} tokens/s; weights {:.1} MB, \
         kv {:.2} MB, {} on {} threads, {}, {:.3} of the neurons active",
        out.prompt_tokens,
        decoder.weight_bytes() as f64 / 1e6,
        cache.kv_bytes() as f64 / 1e6,
        decoder.level(),
        decoder.threads().count(),
        ffn(decoder),
        cache.sparse_stats().active_share(),
    );
    Ok(())
}

/// How the FFN of decoded tokens runs.
fn ffn(decoder: &Decoder) -> String {
    decoder.sparse_config().map_or_else(|| "dense".to_string(), |c| format!("{:?}", c.mode).to_lowercase())
}
