//! Jinja's filters on texts and numbers, where the engine has others or none.

use super::arguments::{Arguments, Given, values};
use super::{format, made, refused, sequences, spend, strings, text};
use crate::chat::source::is_space;
use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, State, Value};

pub(super) fn install(env: &mut Environment<'_>) {
    // The engine's own: in Jinja they are unknown, or write something else.
    for name in ["bool", "chain", "lines", "pprint", "split", "zip"] {
        env.remove_filter(name);
    }
    env.add_filter("string", |state: &mut State<'_, '_>, value: Value| made(state, text(&value)));
    for name in ["escape", "e", "forceescape"] {
        env.add_filter(name, |state: &mut State<'_, '_>, value: Value| made(state, escaped(&text(&value))));
    }
    for name in ["center", "trim", "replace", "indent", "truncate", "join", "format"] {
        env.add_filter(name, move |state: &mut State<'_, '_>, value: Value, args: Given| {
            filter(state, name, value, &values(args))
        });
    }
    for name in ["title", "capitalize"] {
        env.add_filter(name, move |state: &mut State<'_, '_>, value: Value| {
            titled(state, &value, name == "title")
        });
    }
    env.add_filter("wordcount", |value: Value| {
        let text = text(&value);
        text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty()).count()
    });
    env.add_filter("striptags", |state: &mut State<'_, '_>, value: Value| {
        made(state, without_tags(&text(&value)))
    });
    env.add_filter("urlencode", url_encoded);
    env.add_filter("filesizeformat", |value: Value, args: Given| file_size(&value, &values(args)));
    env.add_filter("int", |value: Value, args: Given| int(&value, &values(args)));
    env.add_filter("float", |value: Value, args: Given| float(&value, &values(args)));
}

fn filter(state: &mut State<'_, '_>, name: &str, value: Value, args: &[Value]) -> Result<Value, Error> {
    match name {
        "center" => center(state, &value, args),
        "trim" => trim(state, &value, args),
        "replace" => replace(state, &value, args),
        "indent" => indent(state, &value, args),
        "truncate" => truncate(state, &value, args),
        "join" => join(state, value, args),
        _ => format::filter(state, &text(&value), args).map(Value::from),
    }
}

fn escaped(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    text.replace('\'', "&#39;").replace('"', "&#34;")
}

fn center(state: &mut State<'_, '_>, value: &Value, args: &[Value]) -> Result<Value, Error> {
    let width = Arguments::new("center", &["width"], args)?.integer(0)?.unwrap_or(80);
    strings::call(state, &text(value), "center", &[Value::from(width)])
}

fn trim(state: &mut State<'_, '_>, value: &Value, args: &[Value]) -> Result<Value, Error> {
    let args = Arguments::new("trim", &["chars"], args)?;
    let chars = if args.some(0).is_some() { Some(args.text(0)?) } else { None };
    made(state, strings::stripped(&text(value), "strip", chars).to_string())
}

fn replace(state: &mut State<'_, '_>, value: &Value, args: &[Value]) -> Result<Value, Error> {
    let args = Arguments::new("replace", &["old", "new", "count"], args)?;
    let (old, new) = (text(args.needed(0)?), text(args.needed(1)?));
    strings::replace(state, &text(value), &old, &new, args.integer(2)?)
}

fn indent(state: &mut State<'_, '_>, value: &Value, args: &[Value]) -> Result<Value, Error> {
    let args = Arguments::new("indent", &["width", "first", "blank"], args)?;
    let blanks = match args.some(0).and_then(Value::as_str) {
        Some(text) => text.to_string(),
        None => {
            let width = args.length(0, 4)?;
            spend(state, width)?;
            " ".repeat(width)
        }
    };
    let (first, blank) = (args.flag(1, false), args.flag(2, false));
    let text = text(value) + "\n";
    let lines = strings::split_lines(&text, false);
    spend(state, text.len().saturating_add(lines.len().saturating_mul(blanks.len())))?;
    let mut out = String::new();
    for (i, line) in lines.into_iter().enumerate() {
        out.push_str(if i > 0 { "\n" } else { "" });
        if if i > 0 { blank || !line.is_empty() } else { first } {
            out.push_str(&blanks);
        }
        out.push_str(line);
    }
    Ok(Value::from(out))
}

fn truncate(state: &mut State<'_, '_>, value: &Value, args: &[Value]) -> Result<Value, Error> {
    let args = Arguments::new("truncate", &["length", "killwords", "end", "leeway"], args)?;
    let (length, leeway, end) = (args.length(0, 255)?, args.length(3, 5)?, args.text_or(2, "...")?);
    let text = text(value);
    let kept = length
        .checked_sub(end.chars().count())
        .ok_or_else(|| refused("truncate: the end is longer than the length"))?;
    if text.chars().count() <= length.saturating_add(leeway) {
        return made(state, text);
    }
    let cut: String = text.chars().take(kept).collect();
    let cut = if args.flag(1, false) {
        cut.as_str()
    } else {
        cut.rsplit_once(' ').map_or(cut.as_str(), |(head, _)| head)
    };
    made(state, format!("{cut}{end}"))
}

fn join(state: &mut State<'_, '_>, value: Value, args: &[Value]) -> Result<Value, Error> {
    let args = Arguments::new("join", &["d", "attribute"], args)?;
    let between = args.some(0).map_or_else(String::new, text);
    let items = match args.some(1) {
        Some(attribute) => {
            let attribute = minijinja::value::Kwargs::from_iter([("attribute", attribute.clone())]);
            state.apply_filter("map", &[value, attribute.into()])?
        }
        None => value,
    };
    let mut out = String::new();
    for (i, item) in sequences::checked(&items)?.try_iter()?.enumerate() {
        let part = text(&item);
        spend(state, part.len() + between.len())?;
        out.push_str(if i > 0 { &between } else { "" });
        out.push_str(&part);
    }
    Ok(Value::from(out))
}

/// Words begin behind blanks, hyphens and opening brackets, as Jinja has it and `str.title` has not.
fn titled(state: &mut State<'_, '_>, value: &Value, words: bool) -> Result<Value, Error> {
    let begins = |c: char| words && (is_space(c) || "-([{<".contains(c));
    let mut at_start = true;
    let mut out = String::new();
    for c in text(value).chars() {
        if at_start {
            out.extend(c.to_uppercase());
        } else {
            out.extend(c.to_lowercase());
        }
        at_start = begins(c);
    }
    made(state, out)
}

fn without_tags(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, tag)) = rest.split_once('<') {
        out.push_str(before);
        let Some((_, after)) = tag.split_once('>') else {
            out.push('<');
            rest = tag;
            continue;
        };
        rest = after;
    }
    out.push_str(rest);
    out.split(is_space).filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

fn quoted(text: &str, kept: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            byte if byte.is_ascii_alphanumeric() || kept.as_bytes().contains(&byte) => {
                out.push(char::from(byte));
            }
            byte => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

fn url_encoded(state: &mut State<'_, '_>, value: Value) -> Result<Value, Error> {
    let pairs = match value.kind() {
        ValueKind::Map => super::containers::pairs(&value)?,
        ValueKind::Seq => {
            let pair = |item: Value| Ok((item.get_item_by_index(0)?, item.get_item_by_index(1)?));
            value.try_iter()?.map(pair).collect::<Result<_, Error>>()?
        }
        _ => return made(state, quoted(&text(&value), "_.-~/")),
    };
    let part = |value: &Value| quoted(&text(value), "_.-~ ").replace(' ', "+");
    let parts: Vec<_> = pairs.iter().map(|(key, item)| format!("{}={}", part(key), part(item))).collect();
    made(state, parts.join("&"))
}

fn file_size(value: &Value, args: &[Value]) -> Result<String, Error> {
    let binary = Arguments::new("filesizeformat", &["binary"], args)?.flag(0, false);
    let bytes = number(value).ok_or_else(|| refused("filesizeformat: that is no number"))?;
    let (base, between) = if binary { (1024.0, "i") } else { (1000.0, "") };
    if bytes < base {
        return Ok(if bytes == 1.0 { "1 Byte".to_string() } else { format!("{} Bytes", bytes.trunc()) });
    }
    let (mut size, mut unit) = (bytes / base, 0);
    while size >= base && unit < 7 {
        (size, unit) = (size / base, unit + 1);
    }
    let first = if binary { 'K' } else { 'k' };
    Ok(format!("{size:.1} {}{between}B", [first, 'M', 'G', 'T', 'P', 'E', 'Z', 'Y'][unit]))
}

/// What `float(value)` gives, if anything.
fn number(value: &Value) -> Option<f64> {
    match (value.as_str(), value.kind()) {
        (Some(text), _) => {
            let text = text.trim_matches(is_space);
            let odd = text.starts_with('_') || text.ends_with('_') || text.contains("__");
            if odd { None } else { text.replace('_', "").parse().ok() }
        }
        (_, ValueKind::Bool) => Some(f64::from(u8::from(value.is_true()))),
        (_, ValueKind::Number) => f64::try_from(value.clone()).ok(),
        _ => None,
    }
}

fn check_defined(name: &str, value: &Value) -> Result<(), Error> {
    if value.is_undefined() {
        return Err(Error::new(ErrorKind::UndefinedError, format!("{name} of an undefined value")));
    }
    Ok(())
}

fn float(value: &Value, args: &[Value]) -> Result<Value, Error> {
    check_defined("float", value)?;
    let args = Arguments::new("float", &["default"], args)?;
    Ok(number(value).map_or_else(|| args.get(0).cloned().unwrap_or_else(|| Value::from(0.0)), Value::from))
}

fn int(value: &Value, args: &[Value]) -> Result<Value, Error> {
    check_defined("int", value)?;
    let args = Arguments::new("int", &["default", "base"], args)?;
    if value.is_integer() {
        return Ok(value.clone());
    }
    let base = args.integer(1)?.unwrap_or(10);
    let whole = value.as_str().and_then(|text| integer(text, base));
    // As Python does where a float is given.
    let whole = whole
        .or_else(|| number(value).filter(|number| number.abs() < 1e38).map(|number| number.trunc() as i128));
    Ok(match whole {
        Some(whole) => i64::try_from(whole).map_or_else(|_| Value::from(whole), Value::from),
        None => args.get(0).cloned().unwrap_or_else(|| Value::from(0)),
    })
}

/// Python's `int(text, base)`.
fn integer(text: &str, base: i64) -> Option<i128> {
    let text = text.trim_matches(is_space);
    let (sign, digits) =
        text.strip_prefix('-').map_or((1, text.strip_prefix('+').unwrap_or(text)), |rest| (-1, rest));
    let lower = digits.to_ascii_lowercase();
    let radix = u32::try_from(base).ok().filter(|radix| (2..=36).contains(radix))?;
    let prefix = [(2, "0b"), (8, "0o"), (16, "0x")].into_iter().find(|(of, _)| *of == radix);
    let digits = prefix.and_then(|(_, prefix)| lower.strip_prefix(prefix)).unwrap_or(&lower);
    if digits.starts_with(['_', '+', '-']) || digits.ends_with('_') || digits.contains("__") {
        return None;
    }
    i128::from_str_radix(&digits.replace('_', ""), radix).ok().map(|number| sign * number)
}
