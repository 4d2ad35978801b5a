//! A conversation: one cache, into which each turn's new tokens go.

use crate::{
    Cli,
    cli::{
        self,
        output::{self, Ended, ended},
    },
    commands::{HELP, Said},
    generate::{End, Past, Writer, Written},
    talk::Source,
};
use anyhow::{Context, Error, Result, bail};
use candle_sparse::input::Expected;
use candle_sparse_models::{
    causal_lm::LlamaSession,
    chat::{Chat, ChatTemplate, Message, stop_tokens},
    pretrained::Pretrained,
    speculation::Speculative,
};
use clap::Args;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// A conversation instead of one text.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Chat")]
pub(crate) struct ChatArgs {
    /// Talk: each line of standard input is a turn; /help lists commands
    #[arg(long)]
    pub(crate) chat: bool,
    /// With --chat: instructions that come before the conversation
    #[arg(long, value_parser = cli::text())]
    system: Option<String>,
    /// With --chat: a file with the template of the conversation, instead of the model's own
    #[arg(long)]
    pub(crate) chat_template: Option<PathBuf>,
}

impl ChatArgs {
    /// What can be said before anything is loaded.
    pub(crate) fn check(&self) -> Result<()> {
        let given = [("--system", self.system.is_some()), ("--chat-template", self.chat_template.is_some())];
        if let Some((name, _)) = given.iter().find(|(_, given)| *given && !self.chat) {
            bail!("{name} belongs to a conversation: add --chat");
        }
        Ok(())
    }
}

struct Session<'a> {
    cli: &'a Cli,
    loaded: &'a Pretrained,
    past: &'a mut Past<Speculative<LlamaSession>>,
    writer: Writer<'a>,
    template: ChatTemplate,
    chat: Chat,
    /// What was said, for `--json`.
    turns: Vec<Value>,
    failed: usize,
}

/// Answers what is said on standard input until it ends. A turn that fails is as if it had not been said.
pub(crate) fn chat(
    cli: &Cli,
    loaded: &Pretrained,
    past: &mut Past<Speculative<LlamaSession>>,
    writer: Writer<'_>,
) -> Result<()> {
    let Some(template) = loaded.chat_template()? else {
        bail!("'{}' has no chat template: give one with --chat-template FILE", cli.model.name());
    };
    let stops = stop_tokens(&loaded.tokenizer, template);
    let is_end = |token| loaded.is_eos(token) || stops.contains(&token);
    let chat = Chat::new(template.clone(), cli.chat.system.as_deref());
    let writer = Writer { is_end: &is_end, ..writer };
    let (turns, template) = (Vec::new(), template.clone());
    let mut session = Session { cli, loaded, past, writer, template, chat, turns, failed: 0 };
    let mut source = Source::new(session.writer.interrupt.clone());
    if source.is_terminal() {
        let name = cli.model.name();
        output::status(format_args!(
            "Talking with {name}: /help lists commands, Ctrl-C stops an answer, Ctrl-D leaves."
        ));
    }
    let result = session.talk(&mut source);
    let reported = session.report();
    let saved = cli.cache.save(session.past);
    result.and(reported).and(saved)?;
    if session.failed > 0 && !source.is_terminal() {
        return Err(Ended(output::FAILED).into());
    }
    Ok(())
}

impl Session<'_> {
    fn talk(&mut self, source: &mut Source) -> Result<()> {
        // The second Ctrl-C in a row leaves.
        let mut interrupts = 0;
        loop {
            let said = source.next()?;
            interrupts = if said == Said::Interrupt { interrupts + 1 } else { 0 };
            let result = match said {
                Said::Exit => return Ok(()),
                // Who waits for a pipe is told by the exit code.
                Said::Interrupt if !source.is_terminal() => {
                    return Err(Ended(output::INTERRUPTED).into());
                }
                Said::Interrupt if interrupts > 1 => return Ok(()),
                Said::Interrupt => {
                    output::status("(Ctrl-C again, Ctrl-D or /exit leaves)");
                    Ok(())
                }
                Said::Help => {
                    output::status(HELP);
                    Ok(())
                }
                Said::Clear => self.start(Chat::new(self.template.clone(), self.cli.chat.system.as_deref())),
                Said::Save(file) => save(&self.chat, Path::new(&file)),
                Said::Load(file) => self.load(Path::new(&file)),
                Said::Wrong(problem) => Err(Error::msg(problem)),
                Said::Message(text) => self.turn(&text).map(|end| {
                    interrupts = usize::from(end == End::Interrupted);
                }),
            };
            if let Err(error) = result {
                if ended(&error).is_some() {
                    return Err(error);
                }
                self.failed += 1;
                output::error(output::one_line(&error));
            }
        }
    }

    /// Another conversation.
    fn start(&mut self, chat: Chat) -> Result<()> {
        self.past.cut(0)?;
        self.chat = chat;
        Ok(())
    }

    fn load(&mut self, file: &Path) -> Result<()> {
        let messages = messages(&candle_sparse::input::read(file, Expected::Json)?)
            .with_context(|| format!("{} is no conversation written by /save", file.display()))?;
        let count = messages.len();
        self.start(Chat::with_messages(self.template.clone(), messages))?;
        output::status(format_args!("{count} messages, which are read with the next turn"));
        Ok(())
    }

    /// Why the answer ended; after an error the conversation is what it was before.
    fn turn(&mut self, user: &str) -> Result<End> {
        let (chat, ids, turns) = (self.chat.clone(), self.past.ids.clone(), self.turns.len());
        let result = self.ask(user);
        if let Err(error) = &result {
            self.chat = chat;
            // What was read or written since may be in the cache.
            let same = ids.iter().zip(&self.past.ids).take_while(|(a, b)| a == b).count();
            self.past.cut(same)?;
            self.past.ids = ids;
            let error = output::one_line(error);
            match self.turns.get_mut(turns) {
                Some(turn) => turn["error"] = error.into(),
                None => self.turns.push(json!({ "user": user, "error": error })),
            }
        }
        result
    }

    fn ask(&mut self, user: &str) -> Result<End> {
        let turn = self.chat.say(user)?;
        let new = turn.encode(&self.loaded.tokenizer)?;
        if new.is_empty() {
            bail!("the chat template makes no text of this conversation");
        }
        let (context, held) = (self.writer.context, if turn.continues { self.past.ids.len() } else { 0 });
        if held + new.len() > context {
            let new = new.len();
            bail!(
                "the context of {context} tokens is full: it holds {held}, this turn has {new} more; it is left out \
                 (/clear begins anew)"
            );
        }
        let mut ids = if turn.continues { self.past.ids.clone() } else { Vec::new() };
        ids.extend(&new);
        let (all, there) = (ids.len(), self.past.replace(ids)?);
        if self.turns.is_empty() {
            self.cli.cache.note_held(there, all);
        }
        let limit = self.cli.sampling.sample_len.unwrap_or(usize::MAX);
        let written = self.writer.write(self.past, limit, false);
        self.answered(user, all - there.max(held), written)
    }

    /// Takes note of an answer.
    fn answered(&mut self, user: &str, read: usize, written: Written) -> Result<End> {
        let (speed, tokens) = (written.tokens_per_s(), written.tokens);
        self.turns.push(json!({
            "user": user, "text": written.text, "read": read, "written": tokens, "end": written.end.name(),
            "decode_tokens_per_s": speed,
        }));
        if let Some(error) = written.error {
            if ended(&error).is_none() {
                self.writer.show("\n")?;
            }
            return Err(error);
        }
        self.writer.show("\n")?;
        self.chat.answered(&written.text, None);
        output::status(format_args!(
            "[read {read} tokens at {:.1}/s, wrote {tokens} at {speed:.1} tokens/s{}]",
            read as f64 / written.prefill_s,
            written.end.remark(self.writer.context)
        ));
        Ok(written.end)
    }

    fn report(&self) -> Result<()> {
        let cache = &self.past.model.model().cache;
        self.cli.model.memory.note_unused(cache.kv().config(), self.past.ids.len());
        if !self.cli.output.json {
            return Ok(());
        }
        output::line(json!({ "turns": self.turns, "token_ids": self.past.ids }))
    }
}

/// Writes a conversation, whole or not at all.
fn save(chat: &Chat, file: &Path) -> Result<()> {
    let messages: Vec<_> =
        chat.messages().iter().map(|m| json!({ "role": m.role, "content": m.content })).collect();
    let count = messages.len();
    let text = format!("{:#}\n", json!({ "messages": messages }));
    candle_sparse::save::save(file, |out| Ok(std::io::Write::write_all(out, text.as_bytes())?))?;
    output::status(format_args!("{count} messages written to {}", file.display()));
    Ok(())
}

/// The messages of a conversation that [`save`] wrote.
fn messages(json: &[u8]) -> Result<Vec<Message>> {
    let json: Value = serde_json::from_slice(json)?;
    let text = |message: &Value, key: &str| {
        message[key].as_str().map(str::to_string).with_context(|| format!("a message has no {key}"))
    };
    let list = json["messages"].as_array().context("there are no messages")?;
    list.iter()
        .map(|message| Ok(Message { role: text(message, "role")?, content: text(message, "content")? }))
        .collect()
}
