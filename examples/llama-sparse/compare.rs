//! One model in every mode of its FFN: speed, bytes and quality of the same run.
//!
//! Texts are written by the dense model itself, so every token is one it finds likely; each mode then reads the same
//! tokens one by one, in turn with the others.

use crate::cli::output;
use anyhow::Result;
use candle_core::{Device, Tensor};
use candle_sparse::FfnMode;
use candle_sparse_models::{
    llama::{Cache, Llama},
    pretrained::Pretrained,
    quality::Quality,
    sampling::{Sampler, Sampling},
};
use std::{io::Write, time::Instant};

const MODES: [FfnMode; 4] = [FfnMode::Dense, FfnMode::Gate, FfnMode::LowRank, FfnMode::Cascade];
/// Those that need no profile.
const WITHOUT_PROFILE: [FfnMode; 2] = [FfnMode::Dense, FfnMode::ExactZero];
/// Texts; speeds are medians over them.
const TEXTS: usize = 5;
const TOKENS: usize = 256;
/// Weights that a cache of a CPU may hold.
const CACHE_BYTES: usize = 64 << 20;

/// What a mode did on all texts.
struct Row {
    mode: FfnMode,
    model: Llama,
    quality: Quality,
    tokens_per_s: Vec<f64>,
    active: f64,
    bytes: f64,
}

/// Compares the modes and prints a table.
pub(crate) fn compare(loaded: &Pretrained, mut cache: Cache, json: bool) -> Result<()> {
    let config = loaded.model.decoder().sparse_config().unwrap_or_default();
    let row = |mode| -> Result<Row> {
        let model = loaded.model.with_sparse(config.with_mode(mode))?;
        let (quality, tokens_per_s) = (Quality::default(), Vec::new());
        Ok(Row { mode, model, quality, tokens_per_s, active: 0.0, bytes: 0.0 })
    };
    let modes = if config.mode == FfnMode::ExactZero { &WITHOUT_PROFILE[..] } else { &MODES };
    let mut rows = modes.iter().copied().map(row).collect::<Result<Vec<_>>>()?;
    let length = TOKENS.min(loaded.config.max_position_embeddings);
    for text in 0..TEXTS {
        let tokens = write(loaded, &rows[0].model, &mut cache, text as u64, length)?;
        let mut dense = None;
        for row in &mut rows {
            cache.clear();
            let logits = read(row, &tokens, &mut cache)?;
            row.note(&cache);
            let dense = dense.get_or_insert_with(|| logits.clone());
            row.quality.add(&tokens, 1, &logits, dense)?;
        }
    }
    print(&mut rows, json)
}

/// A text of the dense model.
fn write(
    loaded: &Pretrained,
    model: &Llama,
    cache: &mut Cache,
    seed: u64,
    length: usize,
) -> Result<Vec<u32>> {
    let start = loaded.tokenizer.encode("Once upon a time", true).map_err(anyhow::Error::msg)?;
    let mut tokens = start.get_ids().to_vec();
    let all = Sampling::default().with_temperature(1.0).with_top_k(0).with_top_p(1.0).with_min_p(0.0);
    let mut sampler = Sampler::new(&all.with_seed(seed))?;
    cache.clear();
    let x = Tensor::new(tokens.as_slice(), &Device::Cpu)?.unsqueeze(0)?;
    let mut logits = model.forward(&x, 0, cache)?.squeeze(0)?;
    while tokens.len() < length {
        let next = sampler.sample(&logits.to_vec1()?, &[])?;
        let x = Tensor::new(&[[next]], &Device::Cpu)?;
        logits = model.forward(&x, tokens.len(), cache)?.squeeze(0)?;
        tokens.push(next);
    }
    Ok(tokens)
}

/// Logits `[tokens, vocab_size]` and, in the row, how fast.
fn read(row: &mut Row, tokens: &[u32], cache: &mut Cache) -> Result<Tensor> {
    let vocab = row.model.decoder().config().vocab_size;
    let mut logits = vec![0.0; tokens.len() * vocab];
    let start = Instant::now();
    for (i, (&token, logits)) in tokens.iter().zip(logits.chunks_exact_mut(vocab)).enumerate() {
        row.model.decode(token, i, cache, logits)?;
    }
    row.tokens_per_s.push(tokens.len() as f64 / start.elapsed().as_secs_f64());
    Ok(Tensor::from_vec(logits, (tokens.len(), vocab), &Device::Cpu)?)
}

impl Row {
    /// What the cache counted on one text.
    fn note(&mut self, cache: &Cache) {
        let stats = cache.sparse_stats();
        self.active += stats.active_share() / TEXTS as f64;
        self.bytes += self.model.decoder().read_bytes_per_token(&stats) as f64 / TEXTS as f64;
    }

    fn median_tokens_per_s(&mut self) -> f64 {
        self.tokens_per_s.sort_by(f64::total_cmp);
        self.tokens_per_s[self.tokens_per_s.len() / 2]
    }
}

fn print(rows: &mut [Row], json: bool) -> Result<()> {
    let mut out = output::stdout();
    if json {
        let rows: Vec<_> = rows
            .iter_mut()
            .map(|r| {
                serde_json::json!({
                    "ffn": format!("{:?}", r.mode), "decode_tokens_per_s": r.median_tokens_per_s(),
                    "active_fraction": r.active, "weight_bytes_per_token": r.bytes, "ppl": r.quality.ppl(),
                    "kld": r.quality.kld(), "top1_agreement": r.quality.top1_agreement(),
                })
            })
            .collect();
        writeln!(out, "{}", serde_json::json!({ "compare": rows }))?;
        return Ok(());
    }
    writeln!(
        out,
        "\n{TEXTS} texts by the dense model, {} tokens, read by each mode in turn:",
        rows[0].quality.tokens()
    )?;
    // What lives in the cache costs instructions: there, its speed says nothing about a model that comes from memory.
    let in_cache = rows[0].model.decoder().weight_bytes() < CACHE_BYTES;
    let speed = |text: String| if in_cache { String::new() } else { format!(" {text:>9}") };
    writeln!(
        out,
        "{:>9}{} {:>7} {:>9} {:>8} {:>8} {:>7} {:>7}",
        "ffn",
        speed("tokens/s".into()),
        "active",
        "MB/token",
        "ppl",
        "change",
        "kld",
        "top-1"
    )?;
    for r in rows {
        let (mode, tokens_per_s, q) = (format!("{:?}", r.mode), r.median_tokens_per_s(), &r.quality);
        writeln!(
            out,
            "{mode:>9}{} {:>7.3} {:>9.2} {:>8.3} {:>+7.2}% {:>7.4} {:>7.4}",
            speed(format!("{tokens_per_s:.1}")),
            r.active,
            r.bytes / 1e6,
            q.ppl(),
            q.ppl_change() * 100.0,
            q.kld(),
            q.top1_agreement()
        )?;
    }
    if in_cache {
        writeln!(
            out,
            "This model lives in the CPU's cache, so fewer bytes save it no time. What they save a model that comes from \
             memory (random weights):\n  cargo run --release -p candle-sparse-programs --example decode-speed -- --shape tinyllama-1.1b --dtype q4_0 \
             --active 0.25 --against dense"
        )?;
    }
    Ok(())
}
