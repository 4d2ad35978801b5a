//! What the user says in a conversation: lines of a terminal or of a pipe, joined to messages and told from commands.

use crate::{
    cli::{input, output},
    commands::{Said, command},
    interrupt::{Interrupt, keep_terminal},
};
use anyhow::Result;
use rustyline::{Behavior, Config, Editor, error::ReadlineError, history::MemHistory};
use std::{
    io::IsTerminal,
    sync::mpsc::{Receiver, RecvTimeoutError, sync_channel},
    time::Duration,
};

/// How long Ctrl-C may wait while nobody says anything.
const PATIENCE: Duration = Duration::from_millis(50);

/// Where lines come from.
pub(crate) enum Source {
    /// A terminal: its lines can be edited, and those before come back.
    Terminal(Box<Editor<(), MemHistory>>),
    /// Read by a thread of its own, so that Ctrl-C is noticed meanwhile.
    Pipe(Receiver<Result<Option<Vec<u8>>>>, Interrupt),
}

enum Line {
    Text(String),
    Interrupt,
    End,
}

impl Source {
    pub(crate) fn new(interrupt: Interrupt) -> Self {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Self::Pipe(lines(), interrupt);
        }
        keep_terminal();
        // Standard output may be a file: the prompt goes to the terminal itself.
        let config = Config::builder().behavior(Behavior::PreferTerm).build();
        let history = MemHistory::with_config(&config);
        match Editor::with_history(config, history) {
            Ok(editor) => Self::Terminal(Box::new(editor)),
            Err(error) => {
                output::note(format_args!("lines cannot be edited here: {error}"));
                Self::Pipe(lines(), interrupt)
            }
        }
    }

    pub(crate) fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal(_))
    }

    /// The next message or command; empty lines are passed over.
    pub(crate) fn next(&mut self) -> Result<Said> {
        loop {
            let text = match self.line("> ")? {
                Line::Interrupt => return Ok(Said::Interrupt),
                Line::End => return Ok(Said::Exit),
                Line::Text(line) => self.whole(line)?,
            };
            let Some(text) = text else { return Ok(Said::Interrupt) };
            if text.trim().is_empty() {
                continue;
            }
            if let Self::Terminal(editor) = self {
                // A history that is full or switched off is no reason to stop.
                let _ = editor.add_history_entry(text.as_str());
            }
            return Ok(command(&text).unwrap_or(Said::Message(text)));
        }
    }

    /// A line with those that belong to it; `None` where Ctrl-C gave it up.
    fn whole(&mut self, line: String) -> Result<Option<String>> {
        let (mut text, quoted) = match line.trim_start().strip_prefix("\"\"\"") {
            Some(rest) => (rest.to_string(), true),
            None => (line, false),
        };
        loop {
            let ended = if quoted { text.strip_suffix("\"\"\"") } else { None };
            if let Some(ended) = ended {
                return Ok(Some(ended.trim_matches('\n').to_string()));
            }
            if !quoted {
                let Some(begun) = text.strip_suffix('\\') else { return Ok(Some(text)) };
                text.truncate(begun.len());
            }
            match self.line("… ")? {
                Line::Text(next) => text = format!("{text}\n{next}"),
                Line::Interrupt => return Ok(None),
                Line::End => return Ok(Some(text)),
            }
        }
    }

    fn line(&mut self, prompt: &str) -> Result<Line> {
        Ok(match self {
            Self::Pipe(lines, interrupt) => {
                interrupt.listen();
                let line = wait(lines, interrupt);
                interrupt.let_end();
                line?
            }
            Self::Terminal(editor) => match editor.readline(prompt) {
                Ok(line) => Line::Text(line),
                Err(ReadlineError::Interrupted) => Line::Interrupt,
                Err(ReadlineError::Eof) => Line::End,
                Err(error) => return Err(error.into()),
            },
        })
    }
}

/// The lines of standard input, one ahead at most.
fn lines() -> Receiver<Result<Option<Vec<u8>>>> {
    let (send, receive) = sync_channel(0);
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        loop {
            let line = input::line(&mut stdin);
            let is_last = !matches!(line, Ok(Some(_)));
            // Nobody listens any more when the conversation has ended.
            if send.send(line).is_err() || is_last {
                break;
            }
        }
    });
    receive
}

fn wait(lines: &Receiver<Result<Option<Vec<u8>>>>, interrupt: &Interrupt) -> Result<Line> {
    loop {
        match lines.recv_timeout(PATIENCE) {
            Ok(line) => {
                return Ok(line?.map_or(Line::End, |line| Line::Text(input::lossy(line, "this line"))));
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(Line::End),
            Err(RecvTimeoutError::Timeout) if interrupt.came() => return Ok(Line::Interrupt),
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}
