//! The jinja environment that transformers gives to chat templates.

use core::fmt;
use minijinja::{Environment, Error, ErrorKind, Value, syntax::SyntaxConfig, value::Kwargs};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use std::io::{self, Write};

/// Instructions that one rendering may take: thousands of messages, yet less than a second.
const FUEL: u64 = 5_000_000;

/// An environment as in [`_cached_compile_jinja_template`].
///
/// [`_cached_compile_jinja_template`]: https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/utils/chat_template_utils.py#L567-L672
pub(super) fn environment() -> Result<Environment<'static>, Error> {
    let mut env = Environment::new();
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.set_fuel(Some(FUEL));
    env.set_unknown_method_callback(unknown_method_callback);
    env.add_filter("tojson", to_json);
    // Templates ask this of `tools`, which are none: minijinja would call none an empty sequence.
    env.add_test("iterable", |value: &Value| !value.is_none() && minijinja::tests::is_iterable(value));
    env.add_function("raise_exception", |message: String| Err::<Value, _>(Refusal::error(message)));
    env.add_function("strftime_now", strftime_now);
    Ok(env)
}

/// What a template says of a conversation that it cannot render.
#[derive(Debug)]
pub(super) struct Refusal(String);

impl Refusal {
    fn error(message: String) -> Error {
        Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Self(message))
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl core::error::Error for Refusal {}

fn strftime_now(format: &str) -> Result<String, Error> {
    jiff::fmt::strtime::format(format, &jiff::Zoned::now())
        .map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {e}")))
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`; jinja's own filter would escape HTML.
fn to_json(value: &Value, indent: Option<usize>, options: Kwargs) -> Result<String, Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => options.get("indent")?,
    };
    if options.get::<Option<bool>>("ensure_ascii")? == Some(true) {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson: ensure_ascii=True is not supported"));
    }
    options.assert_all_used()?;
    let mut json = Vec::new();
    let written = match indent {
        Some(indent) => {
            let blanks = " ".repeat(indent);
            let pretty = PrettyFormatter::with_indent(blanks.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut json, pretty))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut json, Spaced)),
    };
    let invalid = |e: String| Error::new(ErrorKind::BadSerialization, e);
    written.map_err(|e| invalid(e.to_string()))?;
    String::from_utf8(json).map_err(|e| invalid(e.to_string()))
}

/// JSON on one line with Python's blanks after `,` and `:`.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

/// Templates mark what the assistant says by `{% generation %}…{% endgeneration %}` for training; here the tags
/// become ones that do nothing and treat the blanks around them alike.
pub(super) fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        out.push_str(before);
        let name = tag.trim_start_matches(['-', '+']).trim_start();
        let skipped = tag.len() - name.len();
        let end = name.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(name.len());
        out.push_str(&tag[..skipped]);
        out.push_str(match &name[..end] {
            "generation" => "if true",
            "endgeneration" => "endif",
            other => other,
        });
        rest = &name[end..];
    }
    out.push_str(rest);
    out
}
