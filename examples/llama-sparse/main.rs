//! Generates text with a Llama on the CPU; without flags with a tiny model built into the program.
#![allow(clippy::doc_markdown, reason = "comments on flags are the program's help text")]

mod cache_file;
mod chat;
#[path = "../common/cli.rs"]
#[allow(dead_code, reason = "not every program uses all of it")]
mod cli;
mod commands;
mod compare;
#[path = "../common/generate.rs"]
mod generate;
#[path = "../common/interrupt.rs"]
mod interrupt;
#[path = "../common/memory.rs"]
mod memory;
#[path = "../common/model.rs"]
mod model;
#[path = "../common/prompt.rs"]
mod prompt;
#[path = "../common/sampling.rs"]
mod sampling;
#[path = "../common/speculate.rs"]
mod speculate;
mod talk;

use anyhow::{Result, bail};
use candle_sparse::input::Expected;
use candle_sparse_models::{
    causal_lm::LlamaSession,
    decoder::{Decoder, SparseStats},
    files::ModelFiles,
    pretrained::Pretrained,
    speculation::Speculative,
};
use clap::Parser;
use cli::{OutputArgs, output, process_bytes};
use generate::{Past, Writer, Written};
use interrupt::Interrupt;
use model::ModelArgs;
use prompt::PromptArgs;
use sampling::SamplingArgs;
use speculate::SpeculateArgs;
use std::{process::ExitCode, time::Instant};

const EXAMPLES: &str = "\
Examples:
  llama-sparse                                              a tale by the built-in model, and all modes compared
  llama-sparse --model org/name --prompt \"The sea\"          a model of the Hub continues a text
  llama-sparse --model model.gguf --chat --system \"Be brief.\"
  llama-sparse --model model.gguf --file question.txt --temperature 0 --json
  some-program | llama-sparse --model model.gguf --prompt -
  llama-sparse --kv tiered --attention gated --window 64 --budget 256 -n 800";

/// Generate text with a Llama on the CPU.
#[derive(Parser, Debug)]
#[command(name = "llama-sparse", version, after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    prompt: PromptArgs,
    /// Token ids to continue, instead of a text
    #[arg(long, value_delimiter = ',', conflicts_with_all = ["prompt", "file"], help_heading = "Prompt")]
    prompt_ids: Option<Vec<u32>>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    cache: cache_file::CacheArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    speculate: SpeculateArgs,
    #[command(flatten)]
    chat: chat::ChatArgs,
    #[command(flatten)]
    output: OutputArgs,
    /// Also compare the modes of the FFN: speed, bytes and quality; without any flag this is done too
    #[arg(long, help_heading = "Output")]
    compare: bool,
    /// With --json: also this many logits of the prompt's last position, to compare with other programs
    #[arg(long, requires = "json", help_heading = "Output")]
    logits: Option<usize>,
}

fn main() -> ExitCode {
    let cli: Cli = cli::parse();
    if cli.output.quiet {
        output::be_quiet();
    }
    cli::exit(run(&cli))
}

impl Cli {
    /// What can be said before anything is loaded.
    fn check(&self) -> Result<()> {
        self.sampling.check()?;
        let given = [
            ("--prompt", self.prompt.prompt.is_some()),
            ("--file", self.prompt.file.is_some()),
            ("--prompt-ids", self.prompt_ids.is_some()),
            ("--compare", self.compare),
            ("--logits", self.logits.is_some()),
        ];
        if let Some((name, _)) = given.iter().find(|(_, given)| *given && self.chat.chat) {
            bail!("{name} does not go with --chat, where each line of standard input is a turn");
        }
        self.cache.check()?;
        self.chat.check()
    }

    fn files(&self) -> Result<ModelFiles> {
        let mut files = self.model.files()?;
        if let Some(path) = &self.chat.chat_template {
            files.chat_template = Some(candle_sparse::input::read(path, Expected::Text)?);
        }
        Ok(files)
    }

    fn prompt_ids(&self, loaded: &Pretrained) -> Result<Vec<u32>> {
        match &self.prompt_ids {
            Some(ids) => Ok(ids.clone()),
            None => self.prompt.ids(&loaded.tokenizer),
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    cli.check()?;
    let start = Instant::now();
    let files = cli.files()?;
    let compares = cli.compare || std::env::args_os().len() == 1;
    // A comparison shows what leaving neurons out is worth, whether or not it is faster here.
    let force_sparse = cli.model.force_sparse || compares;
    let loaded = ModelArgs { force_sparse, ..cli.model.clone() }.load_files(&files)?;
    let sampler = cli.sampling.sampler(loaded.generation)?;
    let load_s = start.elapsed().as_secs_f64();
    if compares && loaded.model.decoder().sparse_config().is_none() {
        bail!("--compare needs a profile: make one with `calibrate` and give it with --profile");
    }
    let cache = cli.model.cache(&loaded)?;
    let speculation = cli.speculate.speculation(&loaded.model)?;
    let session = LlamaSession { model: loaded.model.clone(), cache };
    let mut past = Past::new(Speculative::new(session, speculation));
    cli.cache.load(&mut past)?;
    let is_end = |token| loaded.is_eos(token);
    let mut writer = Writer {
        args: &cli.sampling,
        sampler,
        tokenizer: &loaded.tokenizer,
        is_end: &is_end,
        context: loaded.config.max_position_embeddings,
        aside: cli.output.json,
        interrupt: Interrupt::new()?,
    };
    if cli.chat.chat {
        return chat::chat(cli, &loaded, &mut past, writer);
    }
    continue_prompt(cli, &loaded, &mut past, &mut writer, load_s)?;
    if compares {
        compare::compare(&loaded, cli.model.cache(&loaded)?, cli.output.json)?;
    }
    Ok(())
}

fn continue_prompt(
    cli: &Cli,
    loaded: &Pretrained,
    past: &mut Past<Speculative<LlamaSession>>,
    writer: &mut Writer<'_>,
    load_s: f64,
) -> Result<()> {
    let ids = cli.prompt_ids(loaded)?;
    writer.check_room(ids.len())?;
    let prompt_tokens = ids.len();
    let held = past.replace(ids)?;
    cli.cache.note_held(held, prompt_tokens);
    let mut written = writer.write(past, cli.sampling.sample_len.unwrap_or(200), true);
    writer.end_line(&mut written)?;
    report(cli, loaded, past, &written, [prompt_tokens, held], load_s)?;
    cli.cache.save(past)?;
    written.result()
}

fn report(
    cli: &Cli,
    loaded: &Pretrained,
    past: &Past<Speculative<LlamaSession>>,
    out: &Written,
    [prompt_tokens, held]: [usize; 2],
    load_s: f64,
) -> Result<()> {
    let (decode, prefill) = (out.tokens_per_s(), (prompt_tokens - held) as f64 / out.prefill_s);
    let (decoder, cache) = (loaded.model.decoder(), &past.model.model().cache);
    cli.model.memory.note_unused(cache.kv().config(), past.ids.len());
    if cli.output.json {
        let logits = cli.logits.unwrap_or(0).min(out.first_logits.len());
        let mut json = serde_json::json!({
            "text": out.text,
            "token_ids": past.ids,
            "prompt_logits": out.first_logits[..logits],
            "prompt_tokens": prompt_tokens,
            "cached_tokens": held,
            "generated_tokens": out.tokens,
            "decode_steps": past.model.stats().steps,
            "drafted_tokens": past.model.stats().drafted,
            "accepted_tokens": past.model.stats().accepted,
            "end": out.end.name(),
            "load_s": load_s,
            "prefill_tokens_per_s": prefill,
            "decode_tokens_per_s": decode,
            "ffn": ffn(decoder),
            "active_fraction": cache.sparse_stats().active_share(),
            "guard": guard(cli, &cache.sparse_stats()),
            "weight_bytes": decoder.weight_bytes(),
            "weight_bytes_per_token": decoder.weight_bytes_per_token(),
            "kv_bytes": cache.kv_bytes(),
            "rss_bytes": process_bytes("VmRSS").ok(),
            "peak_rss_bytes": process_bytes("VmHWM").ok(),
            "level": decoder.level().name(),
            "threads": decoder.threads().count(),
        });
        if let Some(error) = &out.error {
            json["error"] = output::one_line(error).into();
        }
        return output::line(json);
    }
    output::status(format_args!(
        "\n{} tokens at {decode:.1} tokens/s after a prompt of {prompt_tokens} at {prefill:.1} tokens/s{}; weights {:.1} MB, \
         kv {:.2} MB, {} on {} threads, {}, {:.3} of the neurons active{}",
        out.tokens,
        out.end.remark(decoder.config().max_position_embeddings),
        decoder.weight_bytes() as f64 / 1e6,
        cache.kv_bytes() as f64 / 1e6,
        decoder.level(),
        decoder.threads().count(),
        ffn(decoder),
        cache.sparse_stats().active_share(),
        speculate::remark(past.model.stats()),
    ));
    Ok(())
}

/// What the guard found: comparisons, their mean error, and by what the thresholds of the worst block are multiplied.
fn guard(cli: &Cli, stats: &SparseStats) -> Option<serde_json::Value> {
    cli.model.guard?;
    let looks: u64 = stats.layers.iter().map(|l| l.looks).sum();
    let errors: f64 = stats.layers.iter().map(|l| l.error * l.looks as f64).sum();
    let scale = stats.layers.iter().map(|l| l.scale).fold(1.0, f32::min);
    Some(
        serde_json::json!({ "comparisons": looks, "error": errors / looks.max(1) as f64, "least_scale": scale }),
    )
}

/// How the FFN of decoded tokens runs.
fn ffn(decoder: &Decoder) -> String {
    decoder.sparse_config().map_or_else(|| "dense".to_string(), |c| format!("{:?}", c.mode).to_lowercase())
}
