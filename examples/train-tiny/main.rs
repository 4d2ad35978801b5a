//! Trains a byte-level BPE tokenizer and a tiny Llama from plain text, in candle, on the CPU.
//!
//! With glibc, set `MALLOC_MMAP_THRESHOLD_=2000000000` and `MALLOC_TRIM_THRESHOLD_=4000000000`: each
//! step frees and allocates hundreds of megabytes, and giving them back to the system in between
//! takes half of the time.

mod card;
#[path = "../common/cli.rs"]
#[allow(dead_code, reason = "not every program uses all of it")]
mod cli;
mod config;
mod data;
mod eval;
mod loss;
mod model;
mod ops;
mod optim;
mod rng;
mod save;
mod train;

use anyhow::{Context, Result, anyhow};
use candle_core::Device;
use clap::Parser;
use core::time::Duration;
use std::path::PathBuf;
use std::process::ExitCode;
use tokenizers::Tokenizer;

use self::cli::output;
use self::config::{Config, HiddenAct, WrongInput, wrong};
use self::data::{BOS, Corpus, EOS, encode, token_id, train_tokenizer};
use self::model::Llama;
use self::rng::Rng;
use self::train::{Recipe, Source};

/// Train a tiny Llama and its tokenizer from plain text files.
#[derive(Parser, Debug)]
#[command(name = "train-tiny", version)]
struct Args {
    /// UTF-8 text files
    #[arg(long, required = true, num_args = 1..)]
    text: Vec<PathBuf>,
    /// Folder for the checkpoint
    #[arg(long)]
    out: PathBuf,
    /// Feed-forward activation: silu, relu or relu2
    #[arg(long, default_value = "silu")]
    hidden_act: String,
    /// Feed-forward without a gate, down(act(up(x))), with this activation: relu or relu2 (an Arcee)
    #[arg(long, value_name = "HIDDEN_ACT", conflicts_with = "hidden_act")]
    ungated: Option<String>,
    /// Optimizer steps
    #[arg(long, default_value_t = 2400)]
    steps: usize,
    /// Windows per step
    #[arg(long, default_value_t = 8)]
    batch_size: usize,
    /// Tokens per window
    #[arg(long, default_value_t = 256)]
    seq_len: usize,
    /// Tokens per long window [default: 1024]
    #[arg(long)]
    long_seq_len: Option<usize>,
    /// Every n-th step uses long windows (0: never)
    #[arg(long, default_value_t = 5)]
    long_every: usize,
    /// Peak learning rate
    #[arg(long, default_value_t = 2e-3)]
    lr: f64,
    /// Weight decay on matrices
    #[arg(long, default_value_t = 0.1)]
    weight_decay: f64,
    /// Largest global gradient norm
    #[arg(long, default_value_t = 1.0)]
    clip: f64,
    /// Dropout probability while training
    #[arg(long, default_value_t = 0.1)]
    dropout: f64,
    /// Seed of the weights, windows and dropout
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[arg(long, default_value_t = 2048)]
    vocab_size: usize,
    #[arg(long, default_value_t = 256)]
    hidden_size: usize,
    #[arg(long, default_value_t = 512)]
    intermediate_size: usize,
    #[arg(long, default_value_t = 4)]
    num_hidden_layers: usize,
    #[arg(long, default_value_t = 8)]
    num_attention_heads: usize,
    #[arg(long, default_value_t = 2)]
    num_key_value_heads: usize,
    #[arg(long, default_value_t = 1024)]
    max_position_embeddings: usize,
    /// Share of each file, at its end, that is never trained on
    #[arg(long, default_value_t = 6.0)]
    heldout_percent: f64,
    /// Steps between two looks at the held-out loss
    #[arg(long, default_value_t = 100)]
    eval_every: usize,
    /// Finish the learning rate schedule within this time (the result then depends on the machine)
    #[arg(long)]
    max_minutes: Option<f64>,
    /// Where the data comes from and its licence, for the model card
    #[arg(long, default_value = "not stated", value_parser = cli::text())]
    data_note: String,
    /// Start of the sample in the model card
    #[arg(long, default_value = "Once upon a time there was a", value_parser = cli::text())]
    prompt: String,
    /// Also write the cleaned held-out text to this file
    #[arg(long)]
    write_heldout: Option<PathBuf>,
    /// Print one JSON object as the last line of stdout
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let result = run(&cli::parse());
    match &result {
        // What is not the user's to mend.
        Err(err) if output::ended(err).is_none() && err.downcast_ref::<WrongInput>().is_none() => {
            output::error(output::one_line(err));
            ExitCode::FAILURE
        }
        _ => cli::exit(result),
    }
}

fn run(args: &Args) -> Result<()> {
    cli::threads(None).or_else(|err| wrong(output::one_line(&err)))?;
    let act = HiddenAct::parse(args.ungated.as_ref().unwrap_or(&args.hidden_act))?;
    let mut config = config(args, act);
    config.check()?;
    let recipe = recipe(args)?;
    if let Some(path) = &args.write_heldout {
        candle_sparse::save::check(path).or_else(|err| wrong(format!("{err:#}")))?;
    }
    let corpus = Corpus::read(&args.text, args.heldout_percent)?;
    std::fs::create_dir_all(&args.out)
        .or_else(|err| wrong(format!("cannot make {}: {err}", args.out.display())))?;
    if let Some(path) = &args.write_heldout {
        save::write_file(path, corpus.heldout_text().as_bytes()).or_else(|err| wrong(format!("{err:#}")))?;
    }
    let tokenizer = train_tokenizer(&corpus.train, args.vocab_size)?;
    config.bos_token_id = token_id(&tokenizer, BOS)?;
    config.eos_token_id = token_id(&tokenizer, EOS)?;
    let mut source = source(args, &corpus, &tokenizer, config.eos_token_id)?;
    describe_split(args, &corpus, &source);
    // A stale model must not stand beside the new tokenizer.
    for stale in ["model.safetensors", "README.md"] {
        let _ = std::fs::remove_file(args.out.join(stale));
    }
    let json = tokenizer.to_string(true).map_err(|err| anyhow!("tokenizer: {err}"))?;
    save::write_file(&args.out.join("tokenizer.json"), json.as_bytes())?;
    let model = Llama::new(&config, &mut Rng::new(!args.seed))?;
    output::status(format_args!("{} parameters, {} training tokens", model.parameters(), source.train.len()));
    let outcome = train::train(&model, &recipe, &mut source, || save::save_weights(&model, &args.out))?;
    finish(args, &corpus, &tokenizer, &source, &config, outcome)
}

/// Measures the saved checkpoint, writes its card and prints the result.
fn finish(
    args: &Args,
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    source: &Source,
    config: &Config,
    outcome: train::Outcome,
) -> Result<()> {
    // What is measured is the file, after its rounding to f16.
    let path = args.out.join("model.safetensors");
    let tensors = candle_core::safetensors::load(&path, &Device::Cpu)
        .with_context(|| format!("cannot read back {}", path.display()))?;
    let model = Llama::from_tensors(config, &tensors)?;
    let score = eval::score(&model, &source.heldout, args.long_seq_len())?;
    let prompt = encode(tokenizer, &args.prompt)?;
    let ids = eval::sample(&model, &prompt, 60, 0.7, &mut Rng::new(args.seed))?;
    let heldout_bytes: usize = corpus.heldout.iter().map(String::len).sum();
    let card = card::Card {
        command: card::command(std::env::args_os().skip(1).map(|arg| arg.to_string_lossy().into_owned())),
        data_note: args.data_note.clone(),
        files: card::file_names(&args.text),
        heldout_percent: args.heldout_percent,
        train_tokens: source.train.len(),
        parameters: model.parameters(),
        bits_per_byte: score.loss * score.tokens as f64 / heldout_bytes as f64 / core::f64::consts::LN_2,
        positions: eval::by_position(&model, &source.heldout, args.long_seq_len())?,
        sample: data::decode(tokenizer, &ids)?,
        config: config.clone(),
        sparse: model.is_sparse(),
        planned_steps: args.steps,
        score,
        outcome,
    };
    save::write_file(&args.out.join("README.md"), card.markdown().as_bytes())?;
    output::status(card.markdown());
    if args.json {
        output::line(card.json())?;
    }
    Ok(())
}

impl Args {
    fn long_seq_len(&self) -> usize {
        self.long_seq_len.unwrap_or(1024)
    }
}

fn config(args: &Args, hidden_act: HiddenAct) -> Config {
    let gated_mlp = args.ungated.is_none();
    let (model_type, class) =
        if gated_mlp { ("llama", "LlamaForCausalLM") } else { ("arcee", "ArceeForCausalLM") };
    Config {
        architectures: vec![class.into()],
        model_type: model_type.into(),
        vocab_size: args.vocab_size,
        hidden_size: args.hidden_size,
        intermediate_size: args.intermediate_size,
        num_hidden_layers: args.num_hidden_layers,
        num_attention_heads: args.num_attention_heads,
        num_key_value_heads: args.num_key_value_heads,
        head_dim: args.hidden_size / args.num_attention_heads.max(1),
        max_position_embeddings: args.max_position_embeddings,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        hidden_act,
        gated_mlp,
        bos_token_id: 0,
        eos_token_id: 1,
        tie_word_embeddings: true,
        attention_bias: false,
        mlp_bias: false,
        torch_dtype: "float16".into(),
    }
}

fn recipe(args: &Args) -> Result<Recipe> {
    let counts = [
        ("--steps", args.steps),
        ("--batch-size", args.batch_size),
        ("--seq-len", args.seq_len),
        ("--long-seq-len", args.long_seq_len()),
        ("--eval-every", args.eval_every),
    ];
    if let Some((name, _)) = counts.iter().find(|(_, count)| *count == 0) {
        return wrong(format!("{name} must be at least 1"));
    }
    if args.long_every == 0 && args.long_seq_len.is_some() {
        return wrong("--long-seq-len changes nothing with --long-every 0, which never takes long windows");
    }
    let longest = args.seq_len.max(args.long_seq_len());
    if longest > args.max_position_embeddings {
        return wrong(format!("windows of {longest} tokens exceed --max-position-embeddings"));
    }
    if !(0.0..1.0).contains(&args.dropout) {
        return wrong(format!("--dropout {} must lie in 0..1", args.dropout));
    }
    if !(args.lr > 0.0 && args.lr.is_finite() && args.clip > 0.0) {
        return wrong("--lr and --clip must be above 0");
    }
    if !(0.0..1.0).contains(&args.weight_decay) {
        return wrong(format!("--weight-decay {} must lie in 0..1", args.weight_decay));
    }
    if args.max_minutes.is_some_and(|minutes| !(minutes > 0.0 && minutes < 1e6)) {
        return wrong("--max-minutes must be above 0");
    }
    Ok(Recipe {
        steps: args.steps,
        batch_size: args.batch_size,
        seq_len: args.seq_len,
        long_seq_len: args.long_seq_len(),
        long_every: args.long_every,
        lr: args.lr,
        weight_decay: args.weight_decay,
        clip: args.clip,
        dropout: args.dropout,
        eval_every: args.eval_every,
        limit: args.max_minutes.map(|minutes| Duration::from_secs_f64(60.0 * minutes)),
    })
}

fn source(args: &Args, corpus: &Corpus, tokenizer: &Tokenizer, eos: u32) -> Result<Source> {
    let mut train = vec![];
    for text in &corpus.train {
        train.extend(encode(tokenizer, text)?);
        train.push(eos);
    }
    let heldout: Result<Vec<_>> = corpus.heldout.iter().map(|text| encode(tokenizer, text)).collect();
    let need = args.seq_len.max(args.long_seq_len());
    if train.len() < need {
        let have = train.len();
        return wrong(format!("the text is too short: {have} tokens, a window has {need}"));
    }
    Ok(Source { train, heldout: heldout?, rng: Rng::new(args.seed) })
}

fn describe_split(args: &Args, corpus: &Corpus, source: &Source) {
    let percent = args.heldout_percent;
    output::status(format_args!(
        "held out: the last {percent} % of each cleaned file, from the next paragraph on"
    ));
    for (i, file) in args.text.iter().enumerate() {
        output::status(format_args!(
            "  {}: {} bytes to train, {} bytes ({} tokens) held out",
            file.display(),
            corpus.train[i].len(),
            corpus.heldout[i].len(),
            source.heldout[i].len()
        ));
    }
}
