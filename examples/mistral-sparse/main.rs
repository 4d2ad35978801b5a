//! Generates text with a Mistral on the CPU; without flags with a tiny model built into the program.
#![allow(clippy::doc_markdown, reason = "comments on flags are the program's help text")]

#[path = "../common/cli.rs"]
#[allow(dead_code, reason = "not every program uses all of it")]
mod cli;
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

use anyhow::{Context, Result, bail};
use candle_core::Device;
use candle_nn::{Activation, VarBuilder};

use candle_sparse_models::{
    files::{ModelFiles, Weights},
    generation::GenerationConfig,
    llama::LlamaConfig,
    mistral::{Config, Model as Mistral},
    pretrained::{end_tokens, var_builder},
    speculation::Speculative,
};
use clap::Parser;
use cli::{OutputArgs, output};
use generate::{Past, Writer, Written};
use interrupt::Interrupt;
use model::ModelArgs;
use prompt::PromptArgs;
use sampling::SamplingArgs;
use speculate::SpeculateArgs;
use std::process::ExitCode;

/// The window of the built-in model, which was trained without one.
const SHOWN_WINDOW: usize = 256;

/// Generate text with a Mistral on the CPU.
#[derive(Parser, Debug)]
#[command(name = "mistral-sparse", version)]
struct Cli {
    #[command(flatten)]
    prompt: PromptArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    speculate: SpeculateArgs,
    #[command(flatten)]
    output: OutputArgs,
}

fn main() -> ExitCode {
    let cli: Cli = cli::parse();
    if cli.output.quiet {
        output::be_quiet();
    }
    cli::exit(run(&cli))
}

fn run(cli: &Cli) -> Result<()> {
    cli.sampling.check()?;
    let files = cli.model.files()?;
    let sampler = cli.sampling.sampler(GenerationConfig::of(&files)?)?;
    let (model, context) = load(cli, &files)?;
    let tokenizer = files.load_tokenizer()?;
    let ends = end_tokens(&files, &tokenizer)?;
    let speculation = cli.speculate.speculation(model.llama())?;
    let mut past = Past::new(Speculative::new(model, speculation));
    past.ids = cli.prompt.ids(&tokenizer)?;
    let prompt_tokens = past.ids.len();
    let mut writer = Writer {
        args: &cli.sampling,
        sampler,
        tokenizer: &tokenizer,
        is_end: &|token| ends.contains(&token),
        context,
        aside: cli.output.json,
        interrupt: Interrupt::new()?,
    };
    writer.check_room(prompt_tokens)?;
    let mut written = writer.write(&mut past, cli.sampling.sample_len.unwrap_or(200), true);
    writer.end_line(&mut written)?;
    report(cli, &past, &written, prompt_tokens, context)?;
    written.result()
}

/// The model and its context.
fn load(cli: &Cli, files: &ModelFiles) -> Result<(Mistral, usize)> {
    let Some(json) = files.config.as_deref() else {
        bail!("{}: GGUF files, of Mistral too, run with llama-sparse", files.name);
    };
    let (config, vb) = match &files.weights {
        Weights::Embedded(bytes) => as_mistral(files, json, bytes)?,
        _ => {
            let config: Config =
                serde_json::from_slice(json).with_context(|| format!("{}: config.json", files.name))?;
            (config, var_builder(files, None)?)
        }
    };
    let kv = cli.model.memory.kv(vb.dtype())?;
    let attention = cli.model.memory.attention()?;
    let options = cli.model.options(files, cli.model.dtype, cli.model.sparse()?, attention)?;
    let has_profile = options.profile.is_some();
    let model = Mistral::load_with(&config, vb, options)?.with_kv(kv)?;
    let decoder = model.llama().decoder();
    decoder.notices().iter().for_each(output::note);
    cli.model.note_dtype(files)?;
    cli.model.check_sparse(has_profile || decoder.sparse_config().is_some())?;
    Ok((model, config.max_position_embeddings))
}

fn report(
    cli: &Cli,
    past: &Past<Speculative<Mistral>>,
    out: &Written,
    prompt_tokens: usize,
    context: usize,
) -> Result<()> {
    let kv_bytes = past.model.model().cache().kv_bytes();
    cli.model.memory.note_unused(past.model.model().cache().kv().config(), past.ids.len());
    if cli.output.json {
        let mut json = serde_json::json!({
            "text": out.text, "token_ids": past.ids, "prompt_tokens": prompt_tokens, "generated_tokens": out.tokens,
            "end": out.end.name(), "prefill_tokens_per_s": prompt_tokens as f64 / out.prefill_s,
            "decode_tokens_per_s": out.tokens_per_s(), "kv_bytes": kv_bytes,
        });
        if let Some(error) = &out.error {
            json["error"] = output::one_line(error).into();
        }
        return output::line(json);
    }
    output::status(format_args!(
        "\n{} tokens at {:.1} tokens/s after a prompt of {prompt_tokens}{}; kv {:.3} MB{}",
        out.tokens,
        out.tokens_per_s(),
        out.end.remark(context),
        kv_bytes as f64 / 1e6,
        speculate::remark(past.model.stats())
    ));
    Ok(())
}

/// A built-in Llama as a Mistral: the same shape, a head that is a copy of the embedding, and a sliding window.
fn as_mistral(files: &ModelFiles, json: &[u8], weights: &[u8]) -> Result<(Config, VarBuilder<'static>)> {
    let llama: LlamaConfig = serde_json::from_slice(json)?;
    if (llama.hidden_act, llama.gate_shift, llama.norm_shift)
        != (candle_sparse_core::Activation::Silu, 0.0, None)
    {
        bail!("{} is no Mistral: give a folder or a Hub id with --model, or leave it out", files.name);
    }
    let name = &files.name;
    output::note(format_args!(
        "{name} is a Llama, run here as a Mistral with a sliding window of {SHOWN_WINDOW}; a real one: --model org/name"
    ));
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
