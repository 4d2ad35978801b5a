//! The same prompt through candle's model and ours: speed, memory, the first differing token, divergence.
#![allow(clippy::doc_markdown, reason = "comments on flags are the program's help text")]

#[path = "../common/cli.rs"]
#[allow(dead_code, reason = "not every program uses all of it")]
mod cli;
#[path = "../common/memory.rs"]
mod memory;
#[path = "../common/model.rs"]
mod model;
#[path = "../common/prompt.rs"]
mod prompt;
mod theirs;

use anyhow::{Result, bail};
use candle_core::{Device, Tensor};
use candle_sparse_models::{
    causal_lm::{CausalLm, LlamaSession},
    quality::Quality,
};
use clap::Parser;
use cli::{OutputArgs, output, process_bytes};
use model::ModelArgs;
use prompt::PromptArgs;
use std::{io::Write, process::ExitCode, time::Instant};
use tokenizers::Tokenizer;

/// Run the same prompt through candle's model and ours.
#[derive(Parser, Debug)]
#[command(name = "ab", version)]
struct Cli {
    #[command(flatten)]
    prompt: PromptArgs,
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens to decode in each round; both models are given those that candle finds most likely
    #[arg(long, short = 'n', default_value_t = 64)]
    sample_len: usize,
    /// How often all is measured; medians are shown
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// dtype of candle's weights: f32, f16 or bf16; as stored where not given
    #[arg(long, value_parser = cli::format)]
    candle_dtype: Option<candle_sparse::Format>,
    #[command(flatten)]
    output: OutputArgs,
}

/// A model and what it cost.
struct Side {
    name: String,
    model: Box<dyn CausalLm>,
    load_s: f64,
    /// Resident; before the prompt was read, what the process held without it. `None` where the system does not say.
    bytes: Option<u64>,
    prefill: Vec<f64>,
    decode: Vec<f64>,
}

impl Side {
    fn load(load: impl FnOnce() -> Result<(String, Box<dyn CausalLm>)>) -> Result<Self> {
        let (before, start) = (process_bytes("VmRSS").ok(), Instant::now());
        let (name, model) = load()?;
        let load_s = start.elapsed().as_secs_f64();
        Ok(Self { name, model, load_s, bytes: before, prefill: Vec::new(), decode: Vec::new() })
    }

    /// Reads the prompt once: what a mapped file needs of memory shows when it is used.
    fn settle(mut self, prompt: &[u32]) -> Result<Self> {
        self.forward(prompt, 0)?;
        let after = process_bytes("VmRSS").ok();
        self.bytes = after.zip(self.bytes).map(|(after, before)| after.saturating_sub(before));
        Ok(self)
    }

    /// Logits `[1, vocab_size]` after `ids`, and seconds.
    fn forward(&mut self, ids: &[u32], index_pos: usize) -> Result<(Tensor, f64)> {
        let x = Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?;
        let start = Instant::now();
        let logits = self.model.forward(&x, index_pos)?;
        let seconds = start.elapsed().as_secs_f64();
        Ok((logits, seconds))
    }
}

fn main() -> ExitCode {
    let cli: Cli = cli::parse();
    if cli.output.quiet {
        output::be_quiet();
    }
    cli::exit(run(&cli))
}

fn run(cli: &Cli) -> Result<()> {
    if cli.rounds == 0 || cli.sample_len == 0 {
        bail!("--rounds and --sample-len must be 1 or more");
    }
    let mut found = None;
    let ours = Side::load(|| {
        let loaded = cli.model.load()?;
        let cache = cli.model.cache(&loaded)?;
        let decoder = loaded.model.decoder();
        let ffn =
            decoder.sparse_config().map_or("dense".to_string(), |c| format!("{:?}", c.mode).to_lowercase());
        let name =
            format!("candle-sparse, {ffn}, {} on {} threads", decoder.level(), decoder.threads().count());
        found = Some((loaded.tokenizer, loaded.config.max_position_embeddings));
        Ok((name, Box::new(LlamaSession { model: loaded.model, cache })))
    })?;
    let Some((tokenizer, context)) = found else { bail!("the model has no tokenizer") };
    let prompt = cli.prompt.ids(&tokenizer)?;
    if prompt.len().saturating_add(cli.sample_len) > context {
        let (n, sample_len) = (prompt.len(), cli.sample_len);
        bail!(
            "the prompt has {n} tokens: with --sample-len {sample_len} that is past the context of {context}"
        );
    }
    let mut ours = ours.settle(&prompt)?;
    let files = cli.model.files()?;
    let mut candle = Side::load(|| theirs::load(&files, cli.candle_dtype))?.settle(&prompt)?;
    let (mut said, mut failed) = (Said::default(), None);
    for done in 0..cli.rounds {
        match round(cli, &mut candle, &mut ours, &prompt) {
            Ok(new) => said = new,
            // The rounds before are reported too.
            Err(error) if done > 0 => {
                failed = Some(error);
                break;
            }
            Err(error) => return Err(error),
        }
    }
    report(cli, &candle, &ours, &tokenizer, prompt.len(), &said)?;
    failed.map_or(Ok(()), Err)
}

/// What the models said in a round.
#[derive(Default)]
struct Said {
    candle: Vec<u32>,
    ours: Vec<u32>,
    quality: Quality,
}

/// One prompt and its continuation, token by token in turns.
fn round(cli: &Cli, candle: &mut Side, ours: &mut Side, prompt: &[u32]) -> Result<Said> {
    let mut said = Said::default();
    let mut seconds = [0.0; 2];
    let mut ids = prompt.to_vec();
    let mut start = 0;
    for step in 0..=cli.sample_len {
        let mut logits = Vec::new();
        for (side, sum) in [&mut *candle, &mut *ours].into_iter().zip(&mut seconds) {
            if step == 0 {
                side.model.clear()?;
            }
            let (l, s) = side.forward(&ids[start..], start)?;
            match step {
                0 => side.prefill.push(prompt.len() as f64 / s),
                _ => *sum += s,
            }
            logits.push(l);
        }
        start = ids.len();
        let best = [best(&logits[0])?, best(&logits[1])?];
        said.quality.add(&[0, best[0]], 1, &logits[1], &logits[0])?;
        said.candle.push(best[0]);
        said.ours.push(best[1]);
        ids.push(best[0]);
    }
    candle.decode.push(cli.sample_len as f64 / seconds[0]);
    ours.decode.push(cli.sample_len as f64 / seconds[1]);
    Ok(said)
}

fn best(logits: &Tensor) -> Result<u32> {
    Ok(logits.squeeze(0)?.argmax(0)?.to_scalar()?)
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn report(
    cli: &Cli,
    candle: &Side,
    ours: &Side,
    tokenizer: &Tokenizer,
    prompt_tokens: usize,
    said: &Said,
) -> Result<()> {
    let ratio = |of: fn(&Side) -> &Vec<f64>| {
        let all: Vec<f64> = of(ours).iter().zip(of(candle)).map(|(a, b)| a / b).collect();
        median(&all)
    };
    let (prefill, decode) = (ratio(|s| &s.prefill), ratio(|s| &s.decode));
    let first = said.candle.iter().zip(&said.ours).position(|(a, b)| a != b);
    let q = &said.quality;
    if cli.output.json {
        let side = |s: &Side| {
            serde_json::json!({
                "name": s.name, "load_s": s.load_s, "resident_bytes": s.bytes,
                "prefill_tokens_per_s": median(&s.prefill), "decode_tokens_per_s": median(&s.decode),
            })
        };
        let json = serde_json::json!({
            "candle": side(candle), "ours": side(ours), "prefill_ratio": prefill, "decode_ratio": decode,
            "prompt_tokens": prompt_tokens, "tokens": said.candle.len(), "first_difference": first,
            "kld": q.kld(), "top1_agreement": q.top1_agreement(), "rounds": ours.decode.len(),
        });
        return output::line(json);
    }
    let mut out = output::stdout();
    writeln!(
        out,
        "| model | load s | resident MB | prefill tokens/s | decode tokens/s |\n|---|---|---|---|---|"
    )?;
    for s in [candle, ours] {
        let (name, mb) = (&s.name, s.bytes.map(|b| format!("{:.1}", b as f64 / 1e6)).unwrap_or_default());
        let (p, d) = (median(&s.prefill), median(&s.decode));
        writeln!(out, "| {name} | {:.2} | {mb} | {p:.1} | {d:.1} |", s.load_s)?;
    }
    writeln!(
        out,
        "\nours over candle's, median of {} rounds in turns: prefill {prefill:.2}, decode {decode:.2}",
        ours.decode.len()
    )?;
    let (tokens, kld, top1) = (said.candle.len(), q.kld(), q.top1_agreement());
    writeln!(out, "{tokens} tokens: KL divergence {kld:.6}, the same first choice for {top1:.4} of them")?;
    match first {
        None => writeln!(out, "no token differs")?,
        Some(i) => {
            let text = |id: u32| tokenizer.decode(&[id], false).unwrap_or_default();
            let (a, b) = (text(said.candle[i]), text(said.ours[i]));
            writeln!(out, "first difference at token {i} after the prompt: candle {a:?}, ours {b:?}")?;
        }
    }
    Ok(())
}
