//! Jinja's statements.

use super::literal;
use super::parser::{Parsed, Parser};
use super::tokens::Token;

impl Parser<'_> {
    /// What stands between `{{` and `}}`.
    pub(super) fn variable(mut self) -> Parsed<String> {
        let text = self.tuple()?.text;
        self.end(text)
    }

    /// What stands between `{%` and `%}`.
    pub(super) fn statement(mut self) -> Parsed<String> {
        let tag = self.name()?;
        let text = match tag {
            "if" | "elif" => format!("{tag} {}", self.tuple()?.text),
            "for" => self.loop_head()?,
            "set" => self.assignment()?,
            "macro" => format!("macro {}({})", self.name()?, self.parameters()?),
            "call" => {
                let parameters = if self.is_operator("(") { self.parameters()? } else { String::new() };
                format!("call({parameters}) {}", self.expression()?.text)
            }
            "filter" => format!("filter {}", self.filter_chain()?),
            "with" => self.with_head()?,
            // Marks what the assistant says, for training; a scope of its own in transformers too.
            "generation" => "with".to_string(),
            "endgeneration" => "endwith".to_string(),
            "do" | "autoescape" | "trans" => {
                return Err(format!("the tag `{tag}` is not known to chat templates"));
            }
            _ => return Ok(self.verbatim(tag)),
        };
        self.end(text)
    }

    /// Tags that need no change, such as `else`; unknown ones are refused by the engine.
    fn verbatim(self, tag: &str) -> String {
        let written = |token: &Token| match token {
            Token::Name(text) | Token::Number(text) => text.clone(),
            Token::Operator(text) => (*text).to_string(),
            Token::Text(text) => literal(text),
        };
        let rest: Vec<_> = self.tokens[self.at..].iter().map(written).collect();
        format!("{tag} {}", rest.join(" "))
    }

    /// Names to assign to, as written: `a`, `ns.b`, `(a, b), c`.
    fn target(&mut self) -> Parsed<String> {
        let mut text = String::new();
        loop {
            match self.peek() {
                Some(Token::Name(name)) if name != "in" => text.push_str(name),
                Some(Token::Operator(part @ ("," | "." | "(" | ")"))) => text.push_str(part),
                _ if text.is_empty() => return Err(self.unexpected()),
                _ => return Ok(text),
            }
            self.count()?;
            self.at += 1;
        }
    }

    fn loop_head(&mut self) -> Parsed<String> {
        let target = self.target()?;
        if !self.take_name("in") {
            return Err(self.unexpected());
        }
        let first = self.or()?;
        let items = self.tuple_from(first, Self::or)?.filtered("__each", "");
        let mut text = format!("for {target} in {}", items.text);
        if self.take_name("if") {
            text = format!("{text} if {}", self.expression()?.operand());
        }
        if self.take_name("recursive") {
            text.push_str(" recursive");
        }
        Ok(text)
    }

    fn assignment(&mut self) -> Parsed<String> {
        let target = self.target()?;
        if self.take("=") {
            let check = if target.contains('.') { "true" } else { "false" };
            return Ok(format!("set {target} = {}", self.tuple()?.filtered("__stored", check).text));
        }
        if self.take("|") {
            return Ok(format!("set {target} | {}", self.filter_chain()?));
        }
        Ok(format!("set {target}"))
    }

    fn filter_chain(&mut self) -> Parsed<String> {
        let mut text = self.filter()?;
        while self.take("|") {
            self.count()?;
            text = format!("{text}|{}", self.filter()?);
        }
        Ok(text)
    }

    fn with_head(&mut self) -> Parsed<String> {
        let mut parts = Vec::new();
        while self.peek().is_some() {
            let target = self.target()?;
            self.expect("=")?;
            parts.push(format!("{target} = {}", self.expression()?.operand()));
            self.take(",");
        }
        Ok(format!("with {}", parts.join(", ")))
    }

    fn parameters(&mut self) -> Parsed<String> {
        self.expect("(")?;
        let mut parts = Vec::new();
        while !self.take(")") {
            let name = self.name()?;
            let default = self.take("=").then(|| self.expression()).transpose()?;
            parts.push(default.map_or_else(|| name.to_string(), |d| format!("{name}={}", d.operand())));
            if !self.is_operator(")") {
                self.expect(",")?;
            }
        }
        Ok(parts.join(", "))
    }
}
