//! The fields of a JSON object that somebody else wrote: each is taken by name, and what nobody took is refused by name.
#![allow(dead_code, reason = "not every program uses all of it")]

use candle_sparse::error::plain;
use serde_json::{Map, Value};
use std::{fmt, ops::RangeInclusive};

/// What is wrong with a request, and with which of its fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wrong {
    pub(crate) message: String,
    /// The field, where it is one.
    pub(crate) param: Option<String>,
    /// A word for programs.
    pub(crate) code: Option<&'static str>,
}

impl Wrong {
    /// Something that is not one field's fault. What it quotes of the request neither fills nor steers a terminal.
    pub(crate) fn new(message: impl AsRef<str>) -> Self {
        Self { message: plain(message.as_ref()), param: None, code: None }
    }

    /// A value of a field that makes no sense.
    pub(crate) fn value(param: impl Into<String>, message: impl fmt::Display) -> Self {
        // A name that nobody knows is as long as who asks made it.
        let param = plain(&param.into());
        let wrong = Self::new(format!("{param}: {message}"));
        Self { param: Some(param), code: Some("invalid_value"), ..wrong }
    }

    /// A field that is not known here, or not with this value.
    pub(crate) fn unsupported(param: impl Into<String>, why: impl fmt::Display) -> Self {
        Self { code: Some("unsupported_parameter"), ..Self::value(param, why) }
    }
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// A JSON object whose fields are not taken yet. A field that is `null` is one that is not there.
#[derive(Debug)]
pub(crate) struct Fields {
    left: Map<String, Value>,
    /// Where the object itself is, as in `messages[2].`.
    place: String,
}

impl Fields {
    pub(crate) fn new(value: Value, place: &str) -> Result<Self, Wrong> {
        match value {
            Value::Object(left) => {
                Ok(Self { left, place: if place.is_empty() { String::new() } else { format!("{place}.") } })
            }
            other if place.is_empty() => {
                Err(Wrong::new(format!("a JSON object is needed, this is {}", kind(&other))))
            }
            other => Err(Wrong::value(place, format_args!("an object is needed, this is {}", kind(&other)))),
        }
    }

    /// The full name of a field.
    pub(crate) fn name(&self, field: &str) -> String {
        format!("{}{field}", self.place)
    }

    pub(crate) fn take(&mut self, field: &str) -> Option<Value> {
        self.left.remove(field).filter(|value| !value.is_null())
    }

    pub(crate) fn needed(&mut self, field: &str) -> Result<Value, Wrong> {
        self.take(field).ok_or_else(|| Wrong {
            code: Some("missing_required_parameter"),
            ..Wrong::value(self.name(field), "is missing")
        })
    }

    fn typed<T>(
        &mut self,
        field: &str,
        what: &str,
        get: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, Wrong> {
        let Some(value) = self.take(field) else { return Ok(None) };
        let wrong =
            || Wrong::value(self.name(field), format_args!("{what} is needed, this is {}", kind(&value)));
        get(&value).map(Some).ok_or_else(wrong)
    }

    pub(crate) fn flag(&mut self, field: &str) -> Result<Option<bool>, Wrong> {
        self.typed(field, "true or false", Value::as_bool)
    }

    pub(crate) fn text(&mut self, field: &str) -> Result<Option<String>, Wrong> {
        self.typed(field, "a string", |value| value.as_str().map(str::to_string))
    }

    /// A number within a range.
    pub(crate) fn number(&mut self, field: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, Wrong> {
        let Some(number) = self.typed(field, "a number", Value::as_f64)? else { return Ok(None) };
        match range.contains(&number) {
            true => Ok(Some(number)),
            false => Err(self.out_of_range(field, number, range.start(), range.end())),
        }
    }

    /// An integer within a range; 3.0 is one too.
    pub(crate) fn integer(&mut self, field: &str, range: RangeInclusive<u64>) -> Result<Option<u64>, Wrong> {
        let whole = |n: f64| (n.fract() == 0.0 && (0.0..9e15).contains(&n)).then_some(n as u64);
        let get = |value: &Value| value.as_u64().or_else(|| whole(value.as_f64()?));
        // A negative one is of the right kind, so it is told that it is too small.
        let negative = self.left.get(field).and_then(Value::as_i64).filter(|n| *n < 0);
        if let Some(number) = negative {
            return Err(self.out_of_range(field, number, range.start(), range.end()));
        }
        let Some(number) = self.typed(field, "an integer", get)? else { return Ok(None) };
        match range.contains(&number) {
            true => Ok(Some(number)),
            false => Err(self.out_of_range(field, number, range.start(), range.end())),
        }
    }

    fn out_of_range(
        &self,
        field: &str,
        value: impl fmt::Display,
        least: &(impl fmt::Display + PartialOrd),
        most: &(impl fmt::Display + PartialOrd),
    ) -> Wrong {
        Wrong::value(self.name(field), format_args!("{value} is not between {least} and {most}"))
    }

    /// A field that does nothing here while it has one of these values, and would change the answer with any other.
    pub(crate) fn neutral(&mut self, field: &str, values: &[Value]) -> Result<(), Wrong> {
        let Some(value) = self.take(field) else { return Ok(()) };
        let same = |neutral: &Value| match (neutral.as_f64(), value.as_f64()) {
            (Some(a), Some(b)) => a == b,
            _ => *neutral == value,
        };
        if values.iter().any(same) {
            return Ok(());
        }
        let shown = short(&value);
        Err(Wrong::unsupported(self.name(field), format_args!("{shown} is not supported here")))
    }

    /// Fields that never change an answer.
    pub(crate) fn ignore(&mut self, fields: &[&str]) {
        fields.iter().for_each(|field| drop(self.left.remove(*field)));
    }

    /// Refuses the first field that nobody took.
    pub(crate) fn finish(self) -> Result<(), Wrong> {
        match self.left.iter().find(|(_, value)| !value.is_null()) {
            Some((field, _)) => {
                Err(Wrong::unsupported(self.name(field), "is not supported here: leave it out"))
            }
            None => Ok(()),
        }
    }
}

/// What a value is, in words.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(n) if n.is_f64() => "a number with a fraction",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(value: Value) -> Fields {
        Fields::new(value, "").unwrap()
    }

    #[test]
    fn a_field_is_taken_once_and_null_is_none() {
        let mut f = fields(json!({"a": 1, "b": null, "c": "x", "d": true, "e": 0.5}));
        assert_eq!(f.integer("a", 0..=9), Ok(Some(1)));
        assert_eq!(f.integer("a", 0..=9), Ok(None));
        assert_eq!(f.text("b"), Ok(None));
        assert_eq!(f.text("c"), Ok(Some("x".to_string())));
        assert_eq!((f.flag("d"), f.number("e", 0.0..=1.0)), (Ok(Some(true)), Ok(Some(0.5))));
        assert_eq!(f.finish(), Ok(()));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let mut f = fields(json!({"a": -1, "b": "x", "c": 3.5, "d": 3.0, "e": 1e30}));
        let message = |wrong: Wrong| (wrong.param.unwrap(), wrong.message);
        assert_eq!(
            message(f.integer("a", 1..=9).unwrap_err()),
            ("a".into(), "a: -1 is not between 1 and 9".into())
        );
        assert_eq!(
            message(f.number("b", 0.0..=1.0).unwrap_err()).1,
            "b: a number is needed, this is a string"
        );
        assert!(message(f.integer("c", 0..=9).unwrap_err()).1.contains("a number with a fraction"));
        assert_eq!(f.integer("d", 0..=9), Ok(Some(3)));
        assert!(f.integer("e", 0..=9).is_err());
        let mut inner = Fields::new(json!({"x": [1]}), "messages[2]").unwrap();
        assert_eq!(inner.neutral("x", &[json!([])]).unwrap_err().param.unwrap(), "messages[2].x");
        assert!(Fields::new(json!([1]), "").unwrap_err().message.contains("this is a list"));
    }

    #[test]
    fn what_is_quoted_neither_fills_nor_steers_a_terminal() {
        let long = "x".repeat(100_000);
        for name in [long.as_str(), "\u{1b}[2J\n"] {
            let wrong = fields(json!({ name: 1 })).finish().unwrap_err();
            let param = wrong.param.unwrap();
            assert!(param.len() < 1000 && wrong.message.len() < 1000, "{}", wrong.message.len());
            assert!(!(param + &wrong.message).contains(char::is_control), "{}", wrong.message);
        }
        assert!(Wrong::new(&long).message.len() < 1000);
    }

    #[test]
    fn a_field_that_nobody_knows_is_refused_unless_it_says_nothing() {
        assert_eq!(fields(json!({"a": null})).finish(), Ok(()));
        let wrong = fields(json!({"tools": []})).finish().unwrap_err();
        assert_eq!((wrong.param.as_deref(), wrong.code), (Some("tools"), Some("unsupported_parameter")));
        let mut f = fields(json!({"tools": [], "presence_penalty": 0, "user": "me"}));
        f.neutral("tools", &[json!([])]).unwrap();
        f.neutral("presence_penalty", &[json!(0.0)]).unwrap();
        f.ignore(&["user"]);
        assert_eq!(f.finish(), Ok(()));
    }
}
