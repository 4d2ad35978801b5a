//! What the parsers of expressions and statements stand on.

use super::shown;
use super::tokens::Token;

/// How deep expressions may nest and how many operators one may have: both the engine and this parser recurse.
pub(super) const MOST_DEPTH: usize = 60;
const MOST_OPERATORS: usize = 1000;

/// An expression in the engine's words, and what may follow it without brackets.
pub(super) struct Piece {
    pub(super) text: String,
    pub(super) binds: Binds,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Binds {
    /// An operator is outermost.
    Loosely,
    /// A filter may follow.
    AsFiltered,
    /// `.`, `[` and `(` may follow.
    Tightly,
}

impl Piece {
    pub(super) fn new(text: impl Into<String>, binds: Binds) -> Self {
        Self { text: text.into(), binds }
    }

    pub(super) fn bound(self, binds: Binds) -> String {
        if self.binds >= binds { self.text } else { format!("({})", self.text) }
    }

    pub(super) fn operand(self) -> String {
        self.bound(Binds::AsFiltered)
    }

    pub(super) fn filtered(self, filter: &str, arguments: &str) -> Self {
        Self::new(format!("{}|{filter}({arguments})", self.operand()), Binds::AsFiltered)
    }
}

pub(super) struct Parser<'t> {
    pub(super) tokens: &'t [Token],
    pub(super) at: usize,
    pub(super) depth: usize,
    pub(super) operators: usize,
}

pub(super) type Parsed<T = Piece> = Result<T, String>;

impl<'t> Parser<'t> {
    pub(super) fn new(tokens: &'t [Token]) -> Self {
        Self { tokens, at: 0, depth: 0, operators: 0 }
    }

    pub(super) fn peek(&self) -> Option<&'t Token> {
        self.tokens.get(self.at)
    }

    pub(super) fn is_operator(&self, operator: &str) -> bool {
        matches!(self.peek(), Some(Token::Operator(found)) if *found == operator)
    }

    pub(super) fn is_name(&self, name: &str) -> bool {
        matches!(self.peek(), Some(Token::Name(found)) if found == name)
    }

    pub(super) fn take(&mut self, operator: &str) -> bool {
        let found = self.is_operator(operator);
        self.at += usize::from(found);
        found
    }

    pub(super) fn take_name(&mut self, name: &str) -> bool {
        let found = self.is_name(name);
        self.at += usize::from(found);
        found
    }

    pub(super) fn take_any(&mut self, operators: &[&'static str]) -> Option<&'static str> {
        operators.iter().copied().find(|operator| self.take(operator))
    }

    pub(super) fn expect(&mut self, operator: &str) -> Parsed<()> {
        if self.take(operator) { Ok(()) } else { Err(self.unexpected()) }
    }

    pub(super) fn name(&mut self) -> Parsed<&'t str> {
        let Some(Token::Name(name)) = self.peek() else { return Err(self.unexpected()) };
        self.at += 1;
        Ok(name)
    }

    pub(super) fn unexpected(&self) -> String {
        format!("unexpected {}", shown(self.peek()))
    }

    /// Counts one more operator, or level.
    pub(super) fn count(&mut self) -> Parsed<()> {
        self.operators += 1;
        if self.operators > MOST_OPERATORS { Err("an expression is too long".to_string()) } else { Ok(()) }
    }

    pub(super) fn end(&self, text: String) -> Parsed<String> {
        if self.peek().is_none() { Ok(text) } else { Err(self.unexpected()) }
    }
}
