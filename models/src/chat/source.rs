//! A template's source, read as Jinja's lexer reads it and written down for the engine.
//!
//! The engine's own reading differs in blanks, line ends, escapes and operators, mostly in silence. So blanks are trimmed here, text
//! becomes expressions, and what Python's operators do differently becomes a filter of ours.

mod expression;
mod parser;
mod statement;
mod tokens;

use minijinja::{Error, ErrorKind};
use parser::Parser;
use tokens::{Tag, Token};

/// So many tags may stand in one another; templates of models have some ten.
const MOST_NESTED: usize = 100;

/// What Python calls white space; Rust does not count the four separators of ASCII.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// The template in the engine's words: trimmed, with one line for each of the source, so that errors name the right one.
pub(super) fn translated(source: &str) -> Result<String, Error> {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    // As with `keep_trailing_newline=False`.
    let source = source.strip_suffix('\n').unwrap_or(&source);
    let mut reader = Reader { source, at: 0, out: String::new(), lines: 0, open: Vec::new() };
    reader.run()?;
    Ok(reader.out)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Variable,
    Block,
    Comment,
}

struct Reader<'s> {
    source: &'s str,
    at: usize,
    out: String,
    /// Lines that `out` has less than what was read.
    lines: usize,
    /// The tags that are open, and for each how many `elif` it has: the engine goes down all of them on its stack.
    open: Vec<usize>,
}

impl<'s> Reader<'s> {
    fn run(&mut self) -> Result<(), Error> {
        while let Some((start, kind)) = self.next_tag() {
            let body = &self.source[start + 2..];
            let sign = body.chars().next().filter(|c| ['-', '+'].contains(c));
            self.text_before(start, kind, sign);
            self.at = start + 2 + sign.map_or(0, char::len_utf8);
            match kind {
                Kind::Comment => self.comment()?,
                Kind::Block if self.raw()? => {}
                Kind::Block => self.tag(Tag::Block)?,
                Kind::Variable => self.tag(Tag::Variable)?,
            }
        }
        let rest = &self.source[self.at..];
        self.text(rest);
        Ok(())
    }

    fn next_tag(&self) -> Option<(usize, Kind)> {
        let rest = &self.source[self.at..];
        rest.match_indices('{').find_map(|(i, _)| {
            let kind = match rest.as_bytes().get(i + 1)? {
                b'{' => Kind::Variable,
                b'%' => Kind::Block,
                b'#' => Kind::Comment,
                _ => return None,
            };
            Some((self.at + i, kind))
        })
    }

    /// The text before a tag, without what its sign and `lstrip_blocks` take away.
    fn stripped(&self, end: usize, kind: Kind, sign: Option<char>) -> &'s str {
        let text = &self.source[self.at..end];
        match sign {
            Some('-') => return text.trim_end_matches(is_space),
            Some(_) => return text,
            None if kind == Kind::Variable => return text,
            None => {}
        }
        let line = text.rfind('\n').map_or(0, |i| i + 1);
        let line_starts = line > 0 || self.source[..self.at].chars().last().is_none_or(|c| c == '\n');
        if line_starts && text[line..].chars().all(is_space) { &text[..line] } else { text }
    }

    fn text_before(&mut self, end: usize, kind: Kind, sign: Option<char>) {
        let text = self.stripped(end, kind, sign);
        self.lines += self.source[self.at + text.len()..end].matches('\n').count();
        self.text(text);
    }

    /// Goes on behind a tag's end, of which `sign` is the last character before its bracket.
    fn pass_end(&mut self, end: usize, sign: Option<char>, trims: bool) {
        let rest = &self.source[end..];
        let blanks = match sign {
            Some('-') => rest.len() - rest.trim_start_matches(is_space).len(),
            None if trims && rest.starts_with('\n') => 1,
            _ => 0,
        };
        self.lines += self.source[self.at..end + blanks].matches('\n').count();
        self.at = end + blanks;
    }

    fn comment(&mut self) -> Result<(), Error> {
        let Some(length) = self.source[self.at..].find("#}") else {
            if self.source.len() == self.at {
                return Ok(());
            }
            return Err(self.error("a comment has no end"));
        };
        let end = self.at + length;
        let sign = self.source[self.at..end].chars().last().filter(|c| ['-', '+'].contains(c));
        self.pass_end(end + 2, sign, true);
        Ok(())
    }

    /// Reads a raw block, if one begins here.
    fn raw(&mut self) -> Result<bool, Error> {
        let Some((begin, sign)) = basic_tag(&self.source[self.at..], "raw") else { return Ok(false) };
        self.pass_end(self.at + begin, sign, false);
        let rest = &self.source[self.at..];
        let ends = rest.match_indices("{%").find_map(|(i, _)| {
            let opening = rest[i + 2..].chars().next().filter(|c| ['-', '+'].contains(c));
            let inner = i + 2 + opening.map_or(0, char::len_utf8);
            basic_tag(&rest[inner..], "endraw").map(|(length, closing)| (i, opening, inner + length, closing))
        });
        let Some((start, opening, end, closing)) = ends else {
            return Err(self.error("a raw block has no end"));
        };
        let (start, end) = (self.at + start, self.at + end);
        self.text_before(start, Kind::Block, opening);
        self.at = start;
        self.pass_end(end, closing, true);
        Ok(true)
    }

    fn tag(&mut self, tag: Tag) -> Result<(), Error> {
        let read = tokens::read(&self.source[self.at..], tag).map_err(|problem| self.error(&problem))?;
        let inner = match tag {
            Tag::Variable => Parser::new(&read.tokens).variable(),
            Tag::Block => Parser::new(&read.tokens).statement(),
        };
        let inner = inner.map_err(|problem| self.error(&problem))?;
        if tag == Tag::Block {
            self.nest(&inner)?;
        }
        let (open, close) = match tag {
            Tag::Variable => ("{{ ", " }}"),
            Tag::Block => ("{% ", " %}"),
        };
        self.out.push_str(open);
        self.out.push_str(&inner);
        self.pass_end(self.at + read.length, read.sign, tag == Tag::Block);
        self.out.push_str(&"\n".repeat(core::mem::take(&mut self.lines)));
        self.out.push_str(close);
        Ok(())
    }

    /// Counts how deep tags nest, of which `statement` is the next.
    fn nest(&mut self, statement: &str) -> Result<(), Error> {
        let mut words = statement.split(|c: char| !c.is_alphanumeric() && c != '_');
        match words.next().unwrap_or_default() {
            "elif" => {
                if let Some(last) = self.open.last_mut() {
                    *last += 1;
                }
            }
            end if end.starts_with("end") => {
                self.open.pop();
            }
            "else" | "include" | "import" | "from" | "extends" | "break" | "continue" => {}
            "set" if statement.split(' ').nth(2) == Some("=") => {}
            _ => self.open.push(1),
        }
        if self.open.iter().sum::<usize>() > MOST_NESTED {
            return Err(self.error(&format!("more than {MOST_NESTED} tags stand in one another")));
        }
        Ok(())
    }

    /// Text is an expression like any other: so nothing in it is taken for a tag, and the limits see it.
    fn text(&mut self, text: &str) {
        self.lines += text.matches('\n').count();
        if !text.is_empty() {
            self.out.push_str("{{ ");
            self.out.push_str(&literal(text));
            self.out.push_str(&"\n".repeat(core::mem::take(&mut self.lines)));
            self.out.push_str(" }}");
        }
    }

    fn error(&self, problem: &str) -> Error {
        let line = self.source[..self.at].matches('\n').count() + 1;
        Error::new(ErrorKind::SyntaxError, format!("{problem} (in chat_template:{line})"))
    }
}

/// The length of `raw %}` or `endraw %}` at the start of `text`, and its sign.
fn basic_tag(text: &str, name: &str) -> Option<(usize, Option<char>)> {
    let rest = text.trim_start_matches(is_space).strip_prefix(name)?.trim_start_matches(is_space);
    let sign = rest.chars().next().filter(|c| ['-', '+'].contains(c));
    let rest = rest[sign.map_or(0, char::len_utf8)..].strip_prefix("%}")?;
    Some((text.len() - rest.len(), sign))
}

/// A string literal of the engine, on one line.
fn literal(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\n' => out.push_str("\\n"),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

fn shown(token: Option<&Token>) -> String {
    match token {
        Some(Token::Name(name) | Token::Number(name)) => format!("`{name}`"),
        Some(Token::Operator(operator)) => format!("`{operator}`"),
        Some(Token::Text(text)) => format!("the string {}", literal(text)),
        None => "the tag's end".to_string(),
    }
}
