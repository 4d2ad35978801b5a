//! Jinja's grammar of expressions, in the order of its parser.

use super::literal;
use super::parser::{Binds, MOST_DEPTH, Parsed, Parser, Piece};
use super::tokens::Token;
use crate::chat::python::METHODS;

/// Filters of the engine that make a list as long as what they are given, and do not count it.
const COPYING: [&str; 10] =
    ["dictsort", "groupby", "map", "reject", "rejectattr", "select", "selectattr", "sort", "sum", "unique"];

const COMPARISONS: [&str; 6] = ["==", "!=", "<=", ">=", "<", ">"];

impl Parser<'_> {
    /// An expression, or several with commas between them.
    pub(super) fn tuple(&mut self) -> Parsed {
        let first = self.expression()?;
        self.tuple_from(first, Self::expression)
    }

    pub(super) fn tuple_from(&mut self, first: Piece, part: fn(&mut Self) -> Parsed) -> Parsed {
        if !self.is_operator(",") {
            return Ok(first);
        }
        let mut parts = vec![first.operand()];
        while self.take(",") {
            if matches!(self.peek(), None | Some(Token::Operator(")"))) {
                break;
            }
            parts.push(part(self)?.operand());
        }
        Ok(Piece::new(format!("({},)", parts.join(", ")), Binds::Tightly))
    }

    pub(super) fn expression(&mut self) -> Parsed {
        self.depth += 1;
        if self.depth > MOST_DEPTH {
            return Err("an expression nests too deep".to_string());
        }
        let mut value = self.or()?;
        while self.take_name("if") {
            self.count()?;
            let condition = self.or()?.operand();
            let otherwise = self.take_name("else").then(|| self.expression()).transpose()?;
            let mut text = format!("{} if {condition}", value.operand());
            if let Some(otherwise) = otherwise {
                text = format!("{text} else {}", otherwise.operand());
            }
            value = Piece::new(text, Binds::Loosely);
        }
        self.depth -= 1;
        Ok(value)
    }

    pub(super) fn or(&mut self) -> Parsed {
        self.words("or", |parser| parser.words("and", Self::not))
    }

    fn words(&mut self, word: &str, part: fn(&mut Self) -> Parsed) -> Parsed {
        let first = part(self)?;
        if !self.is_name(word) {
            return Ok(first);
        }
        let mut text = first.operand();
        while self.take_name(word) {
            self.count()?;
            text = format!("{text} {word} {}", part(self)?.operand());
        }
        Ok(Piece::new(text, Binds::Loosely))
    }

    fn not(&mut self) -> Parsed {
        let mut negations = 0;
        while self.take_name("not") {
            negations += 1;
        }
        let value = self.comparison()?;
        Ok(match negations {
            0 => value,
            _ => Piece::new(
                format!("{}{}", ["not ", "not not "][(negations + 1) % 2], value.operand()),
                Binds::Loosely,
            ),
        })
    }

    fn comparison(&mut self) -> Parsed {
        let first = self.sum()?;
        let mut text = String::new();
        loop {
            let negated = self.is_not_in();
            let operator = if let Some(operator) = self.take_any(&COMPARISONS) {
                operator
            } else if negated {
                self.at += 2;
                "not in"
            } else if self.take_name("in") {
                "in"
            } else {
                break;
            };
            self.count()?;
            let right = self.sum()?;
            let alone = text.is_empty() && !self.compares();
            if alone && ["<", "<=", ">", ">="].contains(&operator) {
                return Ok(
                    first.filtered("__compare", &format!("{}, {}", right.operand(), literal(operator)))
                );
            }
            text = format!("{text} {operator} {}", right.operand());
        }
        Ok(if text.is_empty() { first } else { Piece::new(first.operand() + &text, Binds::Loosely) })
    }

    fn is_not_in(&self) -> bool {
        self.is_name("not") && matches!(self.tokens.get(self.at + 1), Some(Token::Name(name)) if name == "in")
    }

    /// Whether another comparison follows, as in `1 < x < 3`.
    fn compares(&self) -> bool {
        self.is_not_in()
            || self.is_name("in")
            || COMPARISONS.iter().any(|operator| self.is_operator(operator))
    }

    fn sum(&mut self) -> Parsed {
        let mut value = self.concatenation()?;
        while let Some(operator) = self.take_any(&["+", "-"]) {
            self.count()?;
            let right = self.concatenation()?;
            value = match operator {
                "+" => value.filtered("__add", &right.text),
                _ => Piece::new(format!("{} - {}", value.operand(), right.operand()), Binds::Loosely),
            };
        }
        Ok(value)
    }

    fn concatenation(&mut self) -> Parsed {
        let first = self.product()?;
        let mut rest = Vec::new();
        while self.take("~") {
            self.count()?;
            rest.push(self.product()?.text);
        }
        Ok(if rest.is_empty() { first } else { first.filtered("__concat", &rest.join(", ")) })
    }

    fn product(&mut self) -> Parsed {
        let mut value = self.power()?;
        while let Some(operator) = self.take_any(&["*", "//", "/", "%"]) {
            self.count()?;
            let right = self.power()?;
            value = match operator {
                "*" => value.filtered("__times", &right.text),
                "%" => value.filtered("__modulo", &right.text),
                _ => {
                    Piece::new(format!("{} {operator} {}", value.operand(), right.operand()), Binds::Loosely)
                }
            };
        }
        Ok(value)
    }

    fn power(&mut self) -> Parsed {
        let mut value = self.unary(true)?;
        while self.take("**") {
            self.count()?;
            value =
                Piece::new(format!("{} ** {}", value.operand(), self.unary(true)?.operand()), Binds::Loosely);
        }
        Ok(value)
    }

    fn unary(&mut self, with_filters: bool) -> Parsed {
        let value = match self.take_any(&["-", "+"]) {
            Some(sign) => {
                self.depth += 1;
                if self.depth > MOST_DEPTH {
                    return Err("an expression nests too deep".to_string());
                }
                let value = self.unary(false)?;
                self.depth -= 1;
                match sign {
                    "-" if value.text.starts_with(|c: char| c.is_ascii_digit()) => {
                        Piece::new(format!("-{}", value.operand()), Binds::Loosely)
                    }
                    "-" => value.filtered("__minus", ""),
                    _ => value.filtered("__plus", ""),
                }
            }
            None => self.primary()?,
        };
        let value = self.postfix(value)?;
        if with_filters { self.filters(value) } else { Ok(value) }
    }

    fn primary(&mut self) -> Parsed {
        let Some(token) = self.peek() else { return Err(self.unexpected()) };
        self.at += 1;
        let text = match token {
            Token::Name(name) => name.clone(),
            Token::Number(number) => number.clone(),
            Token::Text(text) => literal(text),
            Token::Operator("(") if self.take(")") => "()".to_string(),
            Token::Operator("(") => {
                let value = self.tuple()?;
                self.expect(")")?;
                return Ok(Piece::new(value.bound(Binds::Tightly), Binds::Tightly));
            }
            Token::Operator("[") => format!("[{}]", self.list("]", Self::item)?),
            Token::Operator("{") => format!("{{{}}}", self.list("}", Self::pair)?),
            Token::Operator(_) => {
                self.at -= 1;
                return Err(self.unexpected());
            }
        };
        Ok(Piece::new(text, Binds::Tightly))
    }

    fn list(&mut self, end: &str, part: fn(&mut Self) -> Parsed<String>) -> Parsed<String> {
        let mut parts = Vec::new();
        while !self.take(end) {
            parts.push(part(self)?);
            if !self.is_operator(end) {
                self.expect(",")?;
            }
        }
        // A blank, so that no brace meets another.
        Ok(format!("{} ", parts.join(", ")))
    }

    fn item(&mut self) -> Parsed<String> {
        Ok(self.expression()?.operand())
    }

    fn pair(&mut self) -> Parsed<String> {
        let key = self.expression()?.operand();
        self.expect(":")?;
        Ok(format!("{key}: {}", self.expression()?.operand()))
    }

    fn postfix(&mut self, mut value: Piece) -> Parsed {
        loop {
            value = if self.take(".") {
                self.attribute(value)?
            } else if self.take("[") {
                self.subscript(value)?
            } else if self.is_operator("(") {
                self.call(value)?
            } else {
                return Ok(value);
            };
            self.count()?;
        }
    }

    fn attribute(&mut self, value: Piece) -> Parsed {
        if let Some(Token::Number(index)) = self.peek() {
            self.at += 1;
            return Ok(Piece::new(format!("{}[{index}]", value.bound(Binds::Tightly)), Binds::Tightly));
        }
        let name = self.name()?;
        if name == "cycle" && self.is_operator("(") {
            // The engine's own panics without items.
            let items = self.arguments()?;
            return Ok(value.filtered("__cycle", &items));
        }
        if METHODS.contains(&name) && !self.is_operator("(") {
            return Ok(value.filtered("__attribute", &literal(name)));
        }
        Ok(Piece::new(format!("{}.{name}", value.bound(Binds::Tightly)), Binds::Tightly))
    }

    fn subscript(&mut self, value: Piece) -> Parsed {
        let mut parts = vec![String::new()];
        while !self.is_operator("]") {
            if self.take(":") {
                parts.push(String::new());
                continue;
            }
            let part = self.tuple()?.operand();
            match parts.last_mut() {
                Some(last) if last.is_empty() => *last = part,
                _ => return Err(self.unexpected()),
            }
        }
        if parts.len() > 3 || parts == [""] {
            return Err(self.unexpected());
        }
        self.expect("]")?;
        if let [index] = parts.as_slice() {
            return Ok(Piece::new(format!("{}[{index}]", value.bound(Binds::Tightly)), Binds::Tightly));
        }
        let parts: Vec<_> = parts.iter().map(|p| if p.is_empty() { "none" } else { p.as_str() }).collect();
        Ok(value.filtered("__slice", &parts.join(", ")))
    }

    fn call(&mut self, value: Piece) -> Parsed {
        let arguments = self.arguments()?;
        Ok(Piece::new(format!("{}({arguments})", value.bound(Binds::Tightly)), Binds::Tightly))
    }

    fn arguments(&mut self) -> Parsed<String> {
        self.expect("(")?;
        let text = self.list(")", |parser| {
            let mut name = parser.take_any(&["**", "*"]).unwrap_or_default().to_string();
            if let (Some(Token::Name(keyword)), Some(Token::Operator("="))) =
                (parser.peek(), parser.tokens.get(parser.at + 1))
            {
                parser.at += 2;
                name = format!("{keyword}=");
            }
            Ok(format!("{name}{}", parser.expression()?.operand()))
        })?;
        Ok(text.trim_end().to_string())
    }

    pub(super) fn filter(&mut self) -> Parsed<String> {
        let mut name = self.name()?.to_string();
        while self.take(".") {
            self.count()?;
            name = format!("{name}.{}", self.name()?);
        }
        if name.starts_with("__") {
            return Err(format!("no filter is named `{name}`"));
        }
        Ok(if self.is_operator("(") { format!("{name}({})", self.arguments()?) } else { name })
    }

    fn filters(&mut self, mut value: Piece) -> Parsed {
        loop {
            value = if self.take("|") {
                let filter = self.filter()?;
                let copies = COPYING.iter().any(|name| filter.split('(').next() == Some(name));
                let counted = if copies { value.filtered("__counted", "") } else { value };
                Piece::new(format!("{}|{filter}", counted.operand()), Binds::AsFiltered)
            } else if self.take_name("is") {
                self.test(value)?
            } else if self.is_operator("(") {
                self.call(value)?
            } else {
                return Ok(value);
            };
            self.count()?;
        }
    }

    fn test(&mut self, value: Piece) -> Parsed {
        let is = if self.take_name("not") { "is not" } else { "is" };
        let name = self.name()?;
        let argument = match self.peek() {
            Some(Token::Operator("(")) => self.arguments()?,
            Some(Token::Name(word))
                if ["else", "or", "and", "if", "is", "in", "not", "recursive"].contains(&word.as_str()) =>
            {
                String::new()
            }
            Some(Token::Name(_) | Token::Text(_) | Token::Number(_) | Token::Operator("[" | "{")) => {
                let argument = self.primary()?;
                self.postfix(argument)?.text
            }
            _ => String::new(),
        };
        let argument = if argument.is_empty() { argument } else { format!("({argument})") };
        Ok(Piece::new(format!("{} {is} {name}{argument}", value.operand()), Binds::Loosely))
    }
}
