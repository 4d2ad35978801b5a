//! Python's `json.dumps`; Jinja's own filter would escape HTML.

use super::arguments::{Arguments, Given, values};
use super::{MOST_DEPTH, float, float_of, refused, repr, spend, type_name};
use minijinja::value::ValueKind;
use minijinja::{Error, State, Value};

pub(super) fn filter(state: &mut State<'_, '_>, value: Value, args: Given) -> Result<Value, Error> {
    let args =
        Arguments::new("tojson", &["ensure_ascii", "indent", "separators", "sort_keys"], &values(args))?;
    let indent = match args.some(1) {
        Some(blanks) if blanks.as_str().is_some() => blanks.as_str().map(ToString::to_string),
        Some(_) => {
            let width = args.length(1, 0)?;
            if width > 100 {
                return Err(refused("tojson: an indent of more than 100 blanks"));
            }
            Some(" ".repeat(width))
        }
        None => None,
    };
    let (between, after_key) = match args.some(2) {
        Some(given) => {
            let parts: Vec<_> = given.try_iter()?.collect();
            let texts: Vec<_> = parts.iter().filter_map(Value::as_str).collect();
            let [between, after_key] = texts[..] else {
                return Err(refused("tojson: separators are two strings"));
            };
            (between.to_string(), after_key.to_string())
        }
        None => (if indent.is_some() { "," } else { ", " }.to_string(), ": ".to_string()),
    };
    let (ascii, sorted) = (args.flag(0, false), args.flag(3, false));
    let mut writer = Writer { out: String::new(), counted: 0, ascii, sorted, indent, between, after_key };
    writer.value(state, &value, 0)?;
    spend(state, writer.out.len() - writer.counted)?;
    Ok(Value::from(writer.out))
}

struct Writer {
    out: String,
    /// How much of it was counted.
    counted: usize,
    ascii: bool,
    sorted: bool,
    indent: Option<String>,
    between: String,
    after_key: String,
}

impl Writer {
    fn value(&mut self, state: &mut State<'_, '_>, value: &Value, depth: usize) -> Result<(), Error> {
        spend(state, self.out.len() - self.counted)?;
        self.counted = self.out.len();
        if depth > MOST_DEPTH {
            return Err(refused("tojson: a value nests too deep"));
        }
        match value.kind() {
            ValueKind::String => self.text(value.as_str().unwrap_or_default()),
            ValueKind::None | ValueKind::Bool | ValueKind::Number => self.out.push_str(&plain(value)),
            ValueKind::Seq => {
                let items: Vec<_> = value.try_iter()?.collect();
                self.container(state, '[', ']', items, depth, |writer, state, item| {
                    writer.value(state, &item, depth + 1)
                })?;
            }
            ValueKind::Map => {
                let mut pairs = super::containers::pairs(value)?;
                if self.sorted {
                    pairs.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                self.container(state, '{', '}', pairs, depth, |writer, state, (key, item)| {
                    match key.kind() {
                        ValueKind::String => writer.text(key.as_str().unwrap_or_default()),
                        ValueKind::None | ValueKind::Bool | ValueKind::Number => writer.text(&plain(&key)),
                        _ => return Err(refused(format!("tojson: {} is no key of JSON", repr(&key)))),
                    }
                    writer.out.push_str(&writer.after_key.clone());
                    writer.value(state, &item, depth + 1)
                })?;
            }
            _ => return Err(refused(format!("tojson: {} cannot be written as JSON", type_name(value)))),
        }
        Ok(())
    }

    fn container<'s, T>(
        &mut self,
        state: &mut State<'s, '_>,
        open: char,
        close: char,
        items: Vec<T>,
        depth: usize,
        mut item: impl FnMut(&mut Self, &mut State<'s, '_>, T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        let any = !items.is_empty();
        for (i, part) in items.into_iter().enumerate() {
            if i > 0 {
                self.out.push_str(&self.between.clone());
            }
            self.line(depth + 1);
            item(self, state, part)?;
        }
        if any {
            self.line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    fn text(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' | '\\' => self.out.extend(['\\', c]),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\x08' => self.out.push_str("\\b"),
                '\x0c' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

fn plain(value: &Value) -> String {
    match (value.kind(), float_of(value)) {
        (ValueKind::None, _) => "null".to_string(),
        (ValueKind::Bool, _) => value.is_true().to_string(),
        (_, Some(number)) if number.is_nan() => "NaN".to_string(),
        (_, Some(number)) if number.is_infinite() => {
            if number > 0.0 { "Infinity" } else { "-Infinity" }.to_string()
        }
        (_, Some(number)) => float(number),
        _ => value.to_string(),
    }
}
