//! What a line of a conversation wants: a message, or a command.

pub(crate) const HELP: &str = "\
/help         this list
/clear        forget the conversation, but not --system
/save FILE    write the conversation as JSON
/load FILE    go on with a conversation that was written
/exit         leave; so does Ctrl-D
A line that ends in a backslash goes on in the next; \"\"\" begins and ends a message of several lines.
Ctrl-C stops an answer. A message that begins like a command is said with a blank before it.";

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

/// `/name` with letters alone is a command; `/usr/bin` is not.
pub(crate) fn command(text: &str) -> Option<Said> {
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
            assert_eq!(command(message), None, "{message}");
        }
        for wrong in ["/quit", "/save", "/clear all", "/"] {
            assert!(matches!(command(wrong), Some(Said::Wrong(_))), "{wrong}");
        }
    }
}
