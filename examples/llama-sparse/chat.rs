//! A conversation on the terminal: one cache, into which each turn's new tokens go.

use crate::{Cli, sample};
use anyhow::{Result, bail};
use candle_core::{Device, Tensor};
use candle_sparse_models::{chat::Chat, llama::Cache, pretrained::Pretrained, tokenizer::TextStream};
use candle_transformers::generation::LogitsProcessor;
use std::{
    io::{BufRead, IsTerminal, Write},
    time::Instant,
};

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Token,
    Length,
    Context,
}

/// What a turn took.
struct Report {
    text: String,
    read: usize,
    written: usize,
    end: End,
    prefill_s: f64,
    decode_s: f64,
}

struct Session<'a> {
    cli: &'a Cli,
    loaded: &'a Pretrained,
    cache: &'a mut Cache,
    sampler: &'a mut LogitsProcessor,
    chat: Chat,
    /// What was read and written.
    ids: Vec<u32>,
    /// How many of them the cache holds: the last one of an answer that was cut off waits for the next turn.
    fed: usize,
}

/// Answers the lines of standard input until they end, or the context is full.
pub(crate) fn chat(
    cli: &Cli,
    loaded: &Pretrained,
    cache: &mut Cache,
    sampler: &mut LogitsProcessor,
) -> Result<()> {
    let Some(template) = loaded.chat_template()? else {
        bail!("'{}' has no chat template: give one with --chat-template FILE", cli.model.model);
    };
    let chat = Chat::new(template.clone(), cli.system.as_deref());
    let mut session = Session { cli, loaded, cache, sampler, chat, ids: Vec::new(), fed: 0 };
    let mut turns = Vec::new();
    let input = std::io::stdin().lock();
    let prompt = if input.is_terminal() { "> " } else { "" };
    eprint!("{prompt}");
    for line in input.lines() {
        let line = line?;
        if !line.trim().is_empty() {
            let Some(report) = session.turn(&line)? else { break };
            turns.push(report.json(&line));
        }
        eprint!("{prompt}");
    }
    if cli.json {
        let json = serde_json::json!({ "turns": turns, "token_ids": session.ids });
        writeln!(std::io::stdout(), "{json}")?;
    }
    Ok(())
}

impl Session<'_> {
    /// `None` where the message has no room in the context.
    fn turn(&mut self, user: &str) -> Result<Option<Report>> {
        let turn = self.chat.say(user)?;
        if !turn.continues {
            self.ids.clear();
            self.fed = 0;
        }
        let new = turn.encode(&self.loaded.tokenizer)?;
        if new.is_empty() {
            bail!("the chat template makes no text of this conversation");
        }
        let context = self.context();
        if self.ids.len() + new.len() > context {
            let (held, new) = (self.ids.len(), new.len());
            eprintln!("the context of {context} tokens is full: it holds {held}, this turn has {new} more");
            return Ok(None);
        }
        self.ids.extend(&new);
        let report = self.answer(new.len())?;
        self.chat.answered(&report.text, None);
        report.print(context);
        Ok(Some(report))
    }

    fn context(&self) -> usize {
        self.loaded.config.max_position_embeddings
    }

    /// Feeds what is not in the cache yet; the logits of the last position.
    fn feed(&mut self) -> Result<Tensor> {
        let x = Tensor::new(&self.ids[self.fed..], &Device::Cpu)?.unsqueeze(0)?;
        let logits = self.loaded.model.forward(&x, self.fed, self.cache)?.squeeze(0)?;
        self.fed = self.ids.len();
        Ok(logits)
    }

    fn answer(&mut self, read: usize) -> Result<Report> {
        let start = Instant::now();
        let mut logits = self.feed()?;
        let prefill_s = start.elapsed().as_secs_f64();
        let start = Instant::now();
        let mut stream = TextStream::new(&self.loaded.tokenizer);
        let (mut text, mut written) = (String::new(), 0);
        let end = loop {
            if written == self.cli.sample_len {
                break End::Length;
            }
            if self.ids.len() == self.context() {
                break End::Context;
            }
            if self.fed < self.ids.len() {
                logits = self.feed()?;
            }
            let next = sample(self.cli, self.sampler, &logits, &self.ids)?;
            if self.loaded.is_eos(next) {
                break End::Token;
            }
            self.ids.push(next);
            written += 1;
            let piece = stream.push(next);
            self.cli.print(&piece)?;
            text.push_str(&piece);
        };
        let rest = stream.finish();
        text.push_str(&rest);
        self.cli.print(&format!("{rest}\n"))?;
        Ok(Report { text, read, written, end, prefill_s, decode_s: start.elapsed().as_secs_f64() })
    }
}

impl Report {
    /// The first token comes out of the prefill.
    fn tokens_per_s(&self) -> f64 {
        self.written.saturating_sub(1) as f64 / self.decode_s
    }

    fn print(&self, context: usize) {
        let Self { read, written, prefill_s, .. } = self;
        let (prefill, decode) = (*read as f64 / prefill_s, self.tokens_per_s());
        let end = match self.end {
            End::Token => String::new(),
            End::Length => ", cut off by --sample-len".to_string(),
            End::Context => format!(", cut off: the context of {context} tokens is full"),
        };
        eprintln!("[read {read} tokens at {prefill:.1}/s, wrote {written} at {decode:.1} tokens/s{end}]");
    }

    fn json(&self, user: &str) -> serde_json::Value {
        serde_json::json!({
            "user": user,
            "text": self.text,
            "read": self.read,
            "written": self.written,
            "end": format!("{:?}", self.end).to_lowercase(),
            "decode_tokens_per_s": self.tokens_per_s(),
        })
    }
}
