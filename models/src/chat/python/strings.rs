//! The methods of `str`.

use super::arguments::Arguments;
use super::characters::{is_alphanumeric, is_cased, is_decimal, is_digit, is_printable};
use super::{ELEMENT_BYTES, format, made, refused, spend};
use crate::chat::source::is_space;
use minijinja::value::Tuple;
use minijinja::{Error, ErrorKind, State, Value};

/// Whether there are characters, and `test` holds of all.
fn all(text: &str, test: impl Fn(char) -> bool) -> bool {
    !text.is_empty() && text.chars().all(test)
}

pub(super) fn call(
    state: &mut State<'_, '_>,
    text: &str,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if let Some(found) = test(text, name) {
        Arguments::new(name, &[], args)?;
        return Ok(Value::from(found));
    }
    match name {
        "upper" | "lower" | "title" | "capitalize" | "swapcase" | "casefold" => {
            Arguments::new(name, &[], args)?;
            made(state, cased(text, name))
        }
        "strip" | "lstrip" | "rstrip" | "removeprefix" | "removesuffix" => shortened(state, text, name, args),
        "split" | "rsplit" => split_call(state, text, name, args),
        "splitlines" => {
            let keep = Arguments::new(name, &["keepends"], args)?.flag(0, false);
            list(state, split_lines(text, keep))
        }
        "partition" | "rpartition" => partition(text, name, args),
        "find" | "rfind" | "index" | "rindex" | "count" => find(text, name, args),
        "startswith" | "endswith" => starts_or_ends(text, name, args),
        "replace" => {
            let args = Arguments::new(name, &["old", "new", "count"], args)?;
            replace(state, text, args.text(0)?, args.text(1)?, args.integer(2)?)
        }
        "join" => {
            let args = Arguments::new(name, &["iterable"], args)?;
            join(state, text, args.needed(0)?)
        }
        "ljust" | "rjust" | "center" | "zfill" => justified(state, text, name, args),
        "expandtabs" => {
            let size = Arguments::new(name, &["tabsize"], args)?.length(0, 8)?;
            expand_tabs(state, text, size)
        }
        "format" => format::braces(state, text, args).and_then(|text| made(state, text)),
        "format_map" => {
            let mapping = Arguments::new(name, &["mapping"], args)?.needed(0)?.clone();
            format::braces_of(state, text, &mapping).and_then(|text| made(state, text))
        }
        _ => Err(Error::new(ErrorKind::UnknownMethod, format!("str has no method `{name}` here"))),
    }
}

fn test(text: &str, name: &str) -> Option<bool> {
    let cased = |other: fn(char) -> bool| text.chars().any(is_cased) && !text.chars().any(other);
    Some(match name {
        "isalnum" => all(text, is_alphanumeric),
        "isalpha" => all(text, char::is_alphabetic),
        "isascii" => text.is_ascii(),
        "isdecimal" => all(text, is_decimal),
        "isdigit" => all(text, is_digit),
        "isnumeric" => all(text, char::is_numeric),
        "isidentifier" => {
            let plain = |c: char| c == '_' || is_alphanumeric(c);
            all(text, plain) && !text.starts_with(char::is_numeric)
        }
        "islower" => cased(char::is_uppercase),
        "isupper" => cased(char::is_lowercase),
        "isprintable" => text.chars().all(is_printable),
        "isspace" => all(text, is_space),
        "istitle" => text.chars().any(is_cased) && titled(text) == text,
        _ => return None,
    })
}

fn titled(text: &str) -> String {
    let mut inside = false;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase());
        } else {
            push_title(&mut out, c);
        }
        inside = is_cased(c);
    }
    out
}

/// A letter that begins a word, as the one letter that has become two.
fn push_title(out: &mut String, c: char) {
    let mut upper = c.to_uppercase();
    out.extend(upper.next());
    out.extend(upper.flat_map(char::to_lowercase));
}

fn cased(text: &str, name: &str) -> String {
    match name {
        "upper" => text.to_uppercase(),
        "lower" => text.to_lowercase(),
        "casefold" => text.to_lowercase().replace('ß', "ss").replace('ς', "σ"),
        "title" => titled(text),
        "capitalize" => {
            let mut out = String::with_capacity(text.len());
            let mut chars = text.chars();
            chars.next().into_iter().for_each(|c| push_title(&mut out, c));
            out + &chars.as_str().to_lowercase()
        }
        _ => {
            let swapped = |c: char| -> String {
                if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
            };
            text.chars().map(swapped).collect()
        }
    }
}

fn shortened(state: &mut State<'_, '_>, text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    match name {
        "strip" | "lstrip" | "rstrip" => {
            let args = Arguments::new(name, &["chars"], args)?;
            let chars = if args.some(0).is_some() { Some(args.text(0)?) } else { None };
            made(state, stripped(text, name, chars).to_string())
        }
        "removeprefix" => {
            let args = Arguments::new(name, &["prefix"], args)?;
            made(state, text.strip_prefix(args.text(0)?).unwrap_or(text).to_string())
        }
        _ => {
            let args = Arguments::new(name, &["suffix"], args)?;
            made(state, text.strip_suffix(args.text(0)?).unwrap_or(text).to_string())
        }
    }
}

pub(super) fn stripped<'t>(text: &'t str, name: &str, chars: Option<&str>) -> &'t str {
    let strips = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    match name {
        "lstrip" => text.trim_start_matches(strips),
        "rstrip" => text.trim_end_matches(strips),
        _ => text.trim_matches(strips),
    }
}

fn list(state: &mut State<'_, '_>, parts: Vec<&str>) -> Result<Value, Error> {
    spend(state, parts.iter().map(|part| part.len() + ELEMENT_BYTES).sum())?;
    Ok(Value::from(parts.into_iter().map(Value::from).collect::<Vec<_>>()))
}

fn split_call(state: &mut State<'_, '_>, text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let args = Arguments::new(name, &["sep", "maxsplit"], args)?;
    let most = args.integer(1)?.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
    let separator = if args.some(0).is_some() { Some(args.text(0)?) } else { None };
    if separator == Some("") {
        return Err(refused(format!("{name}: the separator is empty")));
    }
    list(state, split(text, separator, most, name == "rsplit"))
}

fn split<'t>(text: &'t str, separator: Option<&str>, most: usize, from_end: bool) -> Vec<&'t str> {
    let limit = most.saturating_add(1);
    let mut parts: Vec<&str> = match (separator, from_end) {
        (Some(separator), false) => return text.splitn(limit, separator).collect(),
        (Some(separator), true) => text.rsplitn(limit, separator).collect(),
        (None, false) => return words(text, most),
        (None, true) => words_from_end(text, most),
    };
    parts.reverse();
    parts
}

fn words(text: &str, most: usize) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text.trim_start_matches(is_space);
    while !rest.is_empty() {
        if parts.len() == most {
            parts.push(rest);
            break;
        }
        let end = rest.find(is_space).unwrap_or(rest.len());
        parts.push(&rest[..end]);
        rest = rest[end..].trim_start_matches(is_space);
    }
    parts
}

fn words_from_end(text: &str, most: usize) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text.trim_end_matches(is_space);
    while !rest.is_empty() {
        if parts.len() == most {
            parts.push(rest);
            break;
        }
        let word = rest.trim_end_matches(|c| !is_space(c)).len();
        parts.push(&rest[word..]);
        rest = rest[..word].trim_end_matches(is_space);
    }
    parts
}

pub(super) fn split_lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let ends = |c: char| {
        matches!(c, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}')
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let line = rest.find(ends).unwrap_or(rest.len());
        let end = if rest[line..].starts_with("\r\n") {
            2
        } else {
            rest[line..].chars().next().map_or(0, char::len_utf8)
        };
        lines.push(&rest[..line + if keep_ends { end } else { 0 }]);
        rest = &rest[line + end..];
    }
    lines
}

fn partition(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let args = Arguments::new(name, &["sep"], args)?;
    let separator = args.text(0)?;
    if separator.is_empty() {
        return Err(refused(format!("{name}: the separator is empty")));
    }
    let parts = match (name, text.split_once(separator), text.rsplit_once(separator)) {
        ("partition", Some((head, tail)), _) | ("rpartition", _, Some((head, tail))) => {
            [head, separator, tail]
        }
        ("partition", ..) => [text, "", ""],
        _ => ["", "", text],
    };
    Ok(Value::from(Tuple::from(parts.map(Value::from))))
}

/// The characters from `start` to `end`, as in a slice, and how many stand before; `None` where `start` is beyond the end.
fn span(text: &str, start: Option<i64>, end: Option<i64>) -> Option<(usize, &str)> {
    if start.is_none() && end.is_none() {
        return Some((0, text));
    }
    let length = text.chars().count();
    let place = |at: i64| {
        usize::try_from(if at < 0 { at.saturating_add_unsigned(length as u64) } else { at }).unwrap_or(0)
    };
    let (start, end) = (start.map_or(0, place), end.map_or(length, place).min(length));
    let byte = |at: usize| text.char_indices().nth(at).map_or(text.len(), |(byte, _)| byte);
    (start <= end).then(|| (start, &text[byte(start)..byte(end)]))
}

fn find(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let args = Arguments::new(name, &["sub", "start", "end"], args)?;
    let sought = args.text(0)?;
    let span = span(text, args.integer(1)?, args.integer(2)?);
    if name == "count" {
        return Ok(Value::from(span.map_or(0, |(_, part)| part.matches(sought).count())));
    }
    let found = span.and_then(|(before, part)| {
        let byte = if name.starts_with('r') { part.rfind(sought) } else { part.find(sought) };
        Some(before + part[..byte?].chars().count())
    });
    match found {
        Some(place) => Ok(Value::from(place)),
        None if name.ends_with("find") => Ok(Value::from(-1)),
        None => Err(refused(format!("{name}: the text is not in the string"))),
    }
}

fn starts_or_ends(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let args = Arguments::new(name, &["prefix", "start", "end"], args)?;
    let span = span(text, args.integer(1)?, args.integer(2)?);
    let fits = |sought: &str| {
        span.is_some_and(
            |(_, part)| if name == "startswith" { part.starts_with(sought) } else { part.ends_with(sought) },
        )
    };
    let sought = args.needed(0)?;
    if !sought.is_tuple() {
        return Ok(Value::from(fits(args.text(0)?)));
    }
    let mut found = false;
    for part in sought.try_iter()? {
        found |= fits(part.as_str().ok_or_else(|| refused(format!("{name} takes a str or a tuple of str")))?);
    }
    Ok(Value::from(found))
}

/// `text.replace(old, new, count)`, counted before it is made.
pub(super) fn replace(
    state: &mut State<'_, '_>,
    text: &str,
    old: &str,
    new: &str,
    count: Option<i64>,
) -> Result<Value, Error> {
    let most = count.and_then(|count| usize::try_from(count).ok()).unwrap_or(usize::MAX);
    let found = if old.is_empty() { text.chars().count() + 1 } else { text.matches(old).count() };
    spend(state, text.len().saturating_add(found.min(most).saturating_mul(new.len())))?;
    Ok(Value::from(if most == usize::MAX { text.replace(old, new) } else { text.replacen(old, new, most) }))
}

fn join(state: &mut State<'_, '_>, separator: &str, items: &Value) -> Result<Value, Error> {
    let mut out = String::new();
    for (i, item) in items.try_iter()?.enumerate() {
        let part = item
            .as_str()
            .ok_or_else(|| refused(format!("join: item {i} is {}, not str", super::type_name(&item))))?;
        spend(state, separator.len() + part.len())?;
        out.push_str(if i > 0 { separator } else { "" });
        out.push_str(part);
    }
    Ok(Value::from(out))
}

fn justified(state: &mut State<'_, '_>, text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let names: &[&str] = if name == "zfill" { &["width"] } else { &["width", "fillchar"] };
    let args = Arguments::new(name, names, args)?;
    args.needed(0)?;
    let fill = if name == "zfill" { "0" } else { args.text_or(1, " ")? };
    if fill.chars().count() != 1 {
        return Err(refused(format!("{name}: what fills up is one character")));
    }
    let width = args.length(0, 0)?;
    let missing = width.saturating_sub(text.chars().count());
    spend(state, text.len().saturating_add(missing.saturating_mul(fill.len())))?;
    let (before, after) = match name {
        "ljust" => (0, missing),
        // As CPython cuts it.
        "center" => (missing / 2 + (missing & width & 1), missing - missing / 2 - (missing & width & 1)),
        _ => (missing, 0),
    };
    let signed = name == "zfill" && text.starts_with(['+', '-']);
    let (sign, rest) = text.split_at(usize::from(signed));
    Ok(Value::from(format!("{sign}{}{rest}{}", fill.repeat(before), fill.repeat(after))))
}

fn expand_tabs(state: &mut State<'_, '_>, text: &str, size: usize) -> Result<Value, Error> {
    spend(state, text.len().saturating_add(text.matches('\t').count().saturating_mul(size)))?;
    let mut column = 0;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\t' => {
                let blanks = if size == 0 { 0 } else { size - column % size };
                out.push_str(&" ".repeat(blanks));
                column += blanks;
            }
            c => {
                out.push(c);
                column = if c == '\n' || c == '\r' { 0 } else { column + 1 };
            }
        }
    }
    Ok(Value::from(out))
}
