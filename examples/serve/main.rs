//! Serves a model over HTTP as OpenAI's clients ask for it; without flags a tiny model built into the program, with a page to try it.
#![allow(clippy::doc_markdown, reason = "comments on flags are the program's help text")]

mod answer;
mod answering;
#[path = "../common/ask.rs"]
mod ask;
mod asked;
mod body;
#[path = "../common/cli.rs"]
#[allow(dead_code, reason = "not every program uses all of it")]
mod cli;
mod crowd;
mod engine;
#[path = "../common/engine_args.rs"]
mod engine_args;
mod error;
#[path = "../common/fields.rs"]
mod fields;
mod guard;
mod listener;
mod logprobs;
#[path = "../common/memory.rs"]
mod memory;
mod metrics;
#[path = "../common/model.rs"]
mod model;
mod page;
mod routes;
#[path = "../common/sampling.rs"]
mod sampling;
mod signals;
#[path = "../common/speculate.rs"]
#[allow(dead_code, reason = "not every program uses all of it")]
mod speculate;

use anyhow::{Context, Result, bail};
use ask::{Asker, Seeds};
use body::Bodies;
use candle_sparse::input::Expected;
use candle_sparse_models::{files::ModelFiles, pretrained::Pretrained};
use clap::Parser;
use cli::output;
use crowd::{Proxies, Share};
use engine::{Handle, Line};
use engine_args::EngineArgs;
use guard::Keys;
use listener::Limits;
use metrics::Metrics;
use model::ModelArgs;
use routes::{App, router};
use sampling::SamplingArgs;
use serde_json::{Value, json};
use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{net::TcpListener, runtime::Runtime};

const EXAMPLES: &str = "\
Examples:
  serve                                                     the built-in model; its address is a page to try it
  serve --model model.gguf --port 8000
  serve --model model.gguf --kv tiered --kv-mb 2000 --max-sequences 16
  CANDLE_SPARSE_API_KEY=secret serve --model model.gguf --host 0.0.0.0
  curl http://127.0.0.1:8080/v1/completions -H 'Content-Type: application/json' -d '{\"prompt\": \"The sea\"}'";

/// Bodies of requests that are read at a time at most: the engine has the same cores.
const READERS: usize = 4;

/// Serve a model over HTTP, as OpenAI's clients ask for it.
#[derive(Parser, Debug)]
#[command(name = "serve", version, after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    http: HttpArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// A file with the template of conversations, instead of the model's own
    #[arg(long, help_heading = "Model")]
    chat_template: Option<PathBuf>,
    /// Say nothing on standard error but errors
    #[arg(long, short)]
    quiet: bool,
}

/// Where and whom the server answers.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Server")]
struct HttpArgs {
    /// Address to listen on; any but this machine's own lets others in: set CANDLE_SPARSE_API_KEY to ask them for a key,
    /// or for one of several with commas between
    #[arg(long, default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen on; 0 takes a free one, which is printed
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// What clients call the model [default: what --model calls it, without its folder]
    #[arg(long)]
    name: Option<String>,
    /// Megabytes of a request at most
    #[arg(long, default_value_t = 2.0, value_name = "MB")]
    max_body: f64,
    /// Texts that may wait for their turn at most; requests for more are refused
    #[arg(long, default_value_t = 64, value_name = "N")]
    max_queued: usize,
    /// Connections at a time at most
    #[arg(long, default_value_t = 256, value_name = "N")]
    max_connections: usize,
    /// Share of the free connections, waiting texts and long bodies that one client (an address, of IPv6 its first 64 bits; of
    /// several keys each is a client, but connections are counted by address) may take: alone it gets this much of all,
    /// several get less each. 1: as much as there is [default: 1 where only this machine can ask and no proxy is named, else 0.5]
    #[arg(long, value_name = "SHARE")]
    client_share: Option<f64>,
    /// Address of a proxy before this server: whom its header X-Forwarded-For names last is the client
    #[arg(long, value_name = "ADDRESS")]
    proxy: Vec<IpAddr>,
    /// How long a client may take to send a request, and to take what it is sent
    #[arg(long, default_value_t = 30.0, value_name = "SECONDS")]
    patience: f64,
    /// How long what runs may go on after Ctrl-C or SIGTERM
    #[arg(long, default_value_t = 20.0, value_name = "SECONDS")]
    grace: f64,
}

impl HttpArgs {
    fn limits(&self) -> Result<Limits> {
        let seconds = |name, seconds: f64, least: f64| match Duration::try_from_secs_f64(seconds) {
            Ok(time) if seconds >= least => Ok(time),
            _ => bail!("--{name} {seconds} must be at least {least} seconds"),
        };
        if self.max_connections == 0 {
            bail!("--max-connections 0 lets nobody in: give at least 1");
        }
        if self.max_queued == 0 {
            bail!("--max-queued 0 refuses everything, for what begins waits first: give at least 1");
        }
        // Whoever asks from this machine is one's own, and has one address.
        let alone = self.host.is_loopback() && self.proxy.is_empty();
        let share = self.client_share.unwrap_or(if alone { 1.0 } else { 0.5 });
        if !(0.01..=1.0).contains(&share) {
            bail!("--client-share {share} must be 0.01 to 1");
        }
        Ok(Limits {
            share: Share(share),
            proxies: Proxies(self.proxy.clone()),
            connections: self.max_connections,
            patience: seconds("patience", self.patience, 0.1)?,
            grace: seconds("grace", self.grace, 0.0)?,
        })
    }

    fn max_body(&self) -> Result<usize> {
        match self.max_body {
            mb if (0.001..=1024.0).contains(&mb) => Ok((mb * 1e6) as usize),
            mb => bail!("--max-body {mb} must be 0.001 to 1024 megabytes"),
        }
    }
}

fn main() -> ExitCode {
    let cli: Cli = cli::parse();
    if cli.quiet {
        output::be_quiet();
    }
    cli::exit(run(&cli))
}

fn run(cli: &Cli) -> Result<()> {
    // All that can be said before anything is loaded.
    let (limits, max_body, keys) = (cli.http.limits()?, cli.http.max_body()?, Keys::from_env()?);
    cli.sampling.check()?;
    let files = files(cli)?;
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().max_blocking_threads(READERS).build()?;
    let address = SocketAddr::new(cli.http.host, cli.http.port);
    let listener = runtime.block_on(TcpListener::bind(address));
    let listener = listener.with_context(|| format!("cannot listen on {address}"))?;
    if keys.is_none() && !cli.http.host.is_loopback() {
        output::note(format_args!(
            "anybody who reaches {} may ask: set {} to ask for a key",
            cli.http.host,
            guard::KEY
        ));
    }
    let loaded = cli.model.load_files(&files)?;
    let asker = Asker::new(&loaded, &cli.sampling, Seeds::Random)?;
    let tokenizer = asker.tokenizer.clone();
    let engine = cli.engine.engine(&cli.model, &loaded, tokenizer, cli.http.max_queued)?;
    let line = Line { most: cli.http.max_queued, share: limits.share };
    let (engine, thread) = Handle::start(engine, line)?;
    let name = cli.http.name.clone().unwrap_or_else(|| served_name(&cli.model));
    let app = App {
        facts: facts(&name, &asker, &loaded),
        asker,
        engine,
        name,
        keys,
        most_texts: line.share.of(line.most),
        bodies: Bodies::new(max_body, limits.share, limits.patience)?,
        proxies: limits.proxies.clone(),
        started: SystemTime::now(),
        metrics: Arc::new(Metrics::default()),
    };
    let result = listen(&runtime, listener, app, limits);
    // With its connections the last ones go that can ask the engine: it gives up what is left, and ends.
    runtime.shutdown_timeout(Duration::from_secs(1));
    let ended = thread.join();
    result?;
    ended.map_err(|_| anyhow::anyhow!("the engine has failed"))
}

fn files(cli: &Cli) -> Result<ModelFiles> {
    let mut files = cli.model.files()?;
    if let Some(path) = &cli.chat_template {
        files.chat_template = Some(candle_sparse::input::read(path, Expected::Text)?);
    }
    Ok(files)
}

fn listen(runtime: &Runtime, listener: TcpListener, app: App, limits: Limits) -> Result<()> {
    output::line(format_args!("listening on http://{}", listener.local_addr()?))?;
    let (engine, metrics, app) = (app.engine.clone(), app.metrics.clone(), Arc::new(app));
    let give_up = || {
        output::status("the grace is over: what runs is given up");
        engine.end();
    };
    let stopped = signals::stop(engine.clone());
    runtime.block_on(async move {
        let stop = async {
            stopped.await;
            output::status("no more requests are taken; what runs may end (Ctrl-C again ends at once)");
        };
        listener::serve(listener, router(app), limits, metrics, stop, give_up).await;
    });
    Ok(())
}

/// The last part of what the user calls the model, without a file's extension.
fn served_name(model: &ModelArgs) -> String {
    let name = model.name();
    let path = Path::new(&*name);
    let is_file = path.extension().is_some_and(|e| e == "gguf" || e == "safetensors");
    let last = if is_file { path.file_stem() } else { path.file_name() };
    // A name of the Hub is whole with its owner.
    match last.map(|last| last.to_string_lossy().into_owned()) {
        Some(last) if path.exists() || is_file => last,
        _ => name.to_string(),
    }
}

/// What the page shows of a model.
fn facts(name: &str, asker: &Asker, loaded: &Pretrained) -> Value {
    let decoder = loaded.model.decoder();
    json!({
        "name": name,
        "context": asker.context,
        "chats": asker.chats(),
        "weight_bytes": decoder.weight_bytes(),
        "weight_bytes_per_token": decoder.weight_bytes_per_token(),
        "level": decoder.level().name(),
        "threads": decoder.threads().count(),
        "ffn": decoder.sparse_config().map_or_else(|| "dense".to_string(), |c| format!("{:?}", c.mode).to_lowercase()),
    })
}
