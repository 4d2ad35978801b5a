//! The jinja environment that transformers gives to chat templates.

use super::python;
use core::fmt;
use minijinja::{Environment, Error, ErrorKind, Value, syntax::SyntaxConfig};

/// Instructions that one rendering may take: thousands of messages, yet less than a second.
const FUEL: u64 = 5_000_000;

/// An environment as in [`_cached_compile_jinja_template`], for what [`super::source::translated`] makes of templates.
///
/// [`_cached_compile_jinja_template`]: https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/utils/chat_template_utils.py#L567-L672
pub(super) fn environment() -> Result<Environment<'static>, Error> {
    let mut env = Environment::new();
    // Blanks are trimmed already.
    env.set_syntax(SyntaxConfig::builder().keep_trailing_newline(true).build()?);
    env.set_fuel(Some(FUEL));
    python::install(&mut env);
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
