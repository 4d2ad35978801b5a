//! What the user says in a conversation: lines of a terminal or of a pipe, joined to messages and told from commands.

use crate::cli::{input, output};
use anyhow::Result;
use rustyline::{Behavior, Config, Editor, error::ReadlineError, history::MemHistory};
use std::io::{IsTerminal, StdinLock};

pub(crate) const HELP: &str = "\
/help         this list
/clear        forget the conversation, but not --system
/save FILE    write the conversation as JSON
/load FILE    go on with a conversation that was written
/exit         leave; so does Ctrl-D
A line that ends in a backslash goes on in the next; \"\"\" begins and ends a message of several lines.
Ctrl-C stops an answer. A message that begins like a command is said with a blank before it.";

/// Where lines come from.
pub(crate) enum Source {
    /// A terminal: its lines can be edited, and those before come back.
    Terminal(Box<Editor<(), MemHistory>>),
    Pipe(StdinLock<'static>),
}

/// What the user wants.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Said {
    Message(String),
    Help,
    Clear,
    Save(String),
    Load(String),
    /// A command that is none, and why.
    Wrong(String),
    /// Ctrl-C at the prompt.
    Interrupt,
    Exit,
}

enum Line {
    Text(String),
    Interrupt,
    End,
}

impl Source {
    pub(crate) fn new() -> Self {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Self::Pipe(stdin.lock());
        }
        // Standard output may be a file: the prompt goes to the terminal itself.
        let config = Config::builder().behavior(Behavior::PreferTerm).build();
        let history = MemHistory::with_config(&config);
        match Editor::with_history(config, history) {
            Ok(editor) => Self::Terminal(Box::new(editor)),
            Err(error) => {
                output::note(format_args!("lines cannot be edited here: {error}"));
                Self::Pipe(stdin.lock())
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
            Self::Pipe(stdin) => input::line(stdin)?.map_or(Line::End, Line::Text),
            Self::Terminal(editor) => match editor.readline(prompt) {
                Ok(line) => Line::Text(line),
                Err(ReadlineError::Interrupted) => Line::Interrupt,
                Err(ReadlineError::Eof) => Line::End,
                Err(error) => return Err(error.into()),
            },
        })
    }
}

/// `/name` with letters alone is a command; `/usr/bin` is not.
fn command(text: &str) -> Option<Said> {
    let (name, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    let (name, rest) = (name.strip_prefix('/')?, rest.trim());
    if !name.chars().all(char::is_alphabetic) {
        return None;
    }
    let wrong = |problem: String| Some(Said::Wrong(format!("{problem}; /help lists the commands")));
    Some(match (name, rest) {
        ("help", "") => Said::Help,
        ("clear", "") => Said::Clear,
        ("exit", "") => Said::Exit,
        ("save" | "load", "") => return wrong(format!("/{name} needs the name of a file")),
        ("save", file) => Said::Save(file.to_string()),
        ("load", file) => Said::Load(file.to_string()),
        ("help" | "clear" | "exit", more) => return wrong(format!("/{name} takes nothing: '{more}'")),
        _ => return wrong(format!("there is no command /{name}")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_told_from_messages() {
        assert_eq!(command("/save my talk.json"), Some(Said::Save("my talk.json".into())));
        assert_eq!(command("/exit"), Some(Said::Exit));
        for message in ["hi", " /exit", "/usr/bin is full", "//", "1/2", "/2"] {
            let said = command(message);
            assert!(said.is_none() || message == "/", "{message}: {said:?}");
        }
        for wrong in ["/quit", "/save", "/clear all", "/"] {
            assert!(matches!(command(wrong), Some(Said::Wrong(_))), "{wrong}");
        }
    }
}
