//! `'…' % x`, the filter `format`, and `str.format`.

use super::{refused, repr, text};
use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, State, Value};

/// The widest field.
const MOST_WIDTH: usize = 10_000;

fn check_width(width: &str) -> Result<(), Error> {
    let wide = width
        .split(|c: char| !c.is_ascii_digit())
        .any(|n| !n.is_empty() && n.parse().map_or(true, |n: usize| n > MOST_WIDTH));
    if wide { Err(refused(format!("a field of more than {MOST_WIDTH} characters"))) } else { Ok(()) }
}

fn counted(state: &mut State<'_, '_>, out: &mut String, part: &str) -> Result<(), Error> {
    super::spend(state, part.len())?;
    out.push_str(part);
    Ok(())
}

/// What a `%` pattern takes its values from.
struct Values<'v> {
    all: Vec<Value>,
    next: usize,
    mapping: Option<&'v Value>,
    /// Whether some may be left over: of whatever could be looked up by key, Python takes what it needs.
    may_remain: bool,
}

impl Values<'_> {
    fn take(&mut self) -> Result<Value, Error> {
        let value = self.all.get(self.next).cloned();
        self.next += 1;
        value.ok_or_else(|| refused("not enough values for the fields of a `%` pattern"))
    }
}

/// `pattern % values`.
pub(super) fn percent(state: &mut State<'_, '_>, pattern: &str, values: &Value) -> Result<String, Error> {
    let all = if values.is_tuple() { values.try_iter()?.collect() } else { vec![values.clone()] };
    let mapping = (values.kind() == ValueKind::Map).then_some(values);
    let may_remain =
        matches!(values.kind(), ValueKind::Map | ValueKind::Seq | ValueKind::Undefined) && !values.is_tuple();
    fill(state, pattern, Values { all, next: 0, mapping, may_remain })
}

/// The filter: `pattern|format(a, b)` or `pattern|format(name=a)`.
pub(super) fn filter(state: &mut State<'_, '_>, pattern: &str, args: &[Value]) -> Result<String, Error> {
    match args {
        [named] if named.is_kwargs() => percent(state, pattern, named),
        [.., named] if named.is_kwargs() => Err(refused("format takes values by place or by name, not both")),
        _ => fill(state, pattern, Values { all: args.to_vec(), next: 0, mapping: None, may_remain: false }),
    }
}

fn fill(state: &mut State<'_, '_>, pattern: &str, mut values: Values<'_>) -> Result<String, Error> {
    let mut out = String::new();
    let mut rest = pattern;
    while let Some((before, field)) = rest.split_once('%') {
        counted(state, &mut out, before)?;
        rest = percent_field(state, &mut out, field, &mut values)?;
    }
    counted(state, &mut out, rest)?;
    if !values.may_remain && values.next < values.all.len() {
        return Err(refused("a `%` pattern has fewer fields than it is given values"));
    }
    Ok(out)
}

/// Writes one field, which begins behind its `%`; gives what follows.
fn percent_field<'p>(
    state: &mut State<'_, '_>,
    out: &mut String,
    field: &'p str,
    values: &mut Values<'_>,
) -> Result<&'p str, Error> {
    let mut named = None;
    let mut rest = field;
    if let Some(inner) = field.strip_prefix('(') {
        let (key, after) = inner.split_once(')').ok_or_else(|| refused("a `%(` without its `)`"))?;
        let mapping = values.mapping.ok_or_else(|| refused("`%(name)` needs a dict"))?;
        let found = mapping.get_item(&Value::from(key))?;
        if found.is_undefined() {
            return Err(refused(format!("a `%` pattern asks for {key:?}, which is not given")));
        }
        named = Some(found);
        rest = after;
    }
    let length = rest.find(|c: char| !"#0- +.*hlL".contains(c) && !c.is_ascii_digit()).unwrap_or(rest.len());
    let mut spec = String::new();
    for c in rest[..length].chars().filter(|c| !"hlL".contains(*c)) {
        match c {
            '*' => spec.push_str(&values.take()?.to_string()),
            c => spec.push(c),
        }
    }
    check_width(&spec)?;
    let kind = rest[length..]
        .chars()
        .next()
        .ok_or_else(|| refused("a `%` pattern ends in the middle of a field"))?;
    let after = &rest[length + kind.len_utf8()..];
    if kind == '%' {
        out.push('%');
        return Ok(after);
    }
    let value = named.map_or_else(|| values.take(), Ok)?;
    let (kind, value) = match kind {
        's' => ('s', Value::from(text(&value))),
        'r' => ('s', Value::from(repr(&value))),
        'i' | 'u' | 'd' if value.kind() == ValueKind::Number && !value.is_integer() => {
            ('d', Value::from(f64::try_from(value)?.trunc() as i128))
        }
        'i' | 'u' => ('d', value),
        kind => (kind, value),
    };
    let written = format(FormatStyle::Printf, &format!("%{spec}{kind}"), &[value])?;
    counted(state, out, &written)?;
    Ok(after)
}

/// `pattern.format(…)`.
pub(super) fn braces(state: &mut State<'_, '_>, pattern: &str, args: &[Value]) -> Result<String, Error> {
    let named = args.last().filter(|value| value.is_kwargs());
    let placed = &args[..args.len() - usize::from(named.is_some())];
    let named = named.map(|value| Kwargs::try_from(value.clone())).transpose()?;
    let lookup = |name: &str| -> Result<Option<Value>, Error> {
        Ok(match name.parse::<usize>() {
            Ok(place) => placed.get(place).cloned(),
            Err(_) => {
                named.as_ref().filter(|named| named.has(name)).map(|named| named.peek(name)).transpose()?
            }
        })
    };
    fill_braces(state, pattern, &lookup, &mut 0, 0)
}

/// `pattern.format_map(mapping)`.
pub(super) fn braces_of(state: &mut State<'_, '_>, pattern: &str, mapping: &Value) -> Result<String, Error> {
    let lookup =
        |name: &str| Ok(Some(mapping.get_item(&Value::from(name))?).filter(|value| !value.is_undefined()));
    fill_braces(state, pattern, &lookup, &mut 0, 0)
}

type Lookup<'l> = dyn Fn(&str) -> Result<Option<Value>, Error> + 'l;

fn fill_braces(
    state: &mut State<'_, '_>,
    pattern: &str,
    lookup: &Lookup<'_>,
    next: &mut usize,
    depth: usize,
) -> Result<String, Error> {
    let mut out = String::new();
    let mut rest = pattern;
    while let Some(at) = rest.find(['{', '}']) {
        counted(state, &mut out, &rest[..at])?;
        let brace = &rest[at..=at];
        let after = &rest[at + 1..];
        if let Some(doubled) = after.strip_prefix(brace) {
            out.push_str(brace);
            rest = doubled;
            continue;
        }
        let end = matching(after).filter(|_| brace == "{" && depth < 2);
        let end = end.ok_or_else(|| refused("a single brace in a pattern of `format`"))?;
        let written = brace_field(state, &after[..end], lookup, next, depth)?;
        counted(state, &mut out, &written)?;
        rest = &after[end + 1..];
    }
    counted(state, &mut out, rest)?;
    Ok(out)
}

/// Where the brace closes that was opened before `text`.
fn matching(text: &str) -> Option<usize> {
    let mut open = 1;
    text.char_indices().find_map(|(i, c)| {
        open += i32::from(c == '{') - i32::from(c == '}');
        (open == 0).then_some(i)
    })
}

fn brace_field(
    state: &mut State<'_, '_>,
    field: &str,
    lookup: &Lookup<'_>,
    next: &mut usize,
    depth: usize,
) -> Result<String, Error> {
    let (name, spec) = field.split_once(':').unwrap_or((field, ""));
    let (name, conversion) = name.split_once('!').map_or((name, None), |(name, c)| (name, Some(c)));
    let value = looked_up(name, lookup, next)?;
    let spec = fill_braces(state, spec, lookup, next, depth + 1)?;
    check_width(&spec)?;
    let value = match conversion {
        None => value,
        Some("s") => Value::from(text(&value)),
        Some("r") => Value::from(repr(&value)),
        Some(other) => return Err(refused(format!("`!{other}` in a pattern of `format`"))),
    };
    if spec.is_empty() {
        return Ok(text(&value));
    }
    if let Some(places) = spec.strip_suffix('%') {
        let hundredfold = Value::from(f64::try_from(value)? * 100.0);
        return Ok(format(FormatStyle::StrFormat, &format!("{{:{places}f}}"), &[hundredfold])? + "%");
    }
    format(FormatStyle::StrFormat, &format!("{{:{spec}}}"), &[value])
}

/// `0`, `name`, nothing, each with `[key]` and `.attribute` behind it.
fn looked_up(path: &str, lookup: &Lookup<'_>, next: &mut usize) -> Result<Value, Error> {
    let end = path.find(['.', '[']).unwrap_or(path.len());
    let name = if end == 0 {
        *next += 1;
        (*next - 1).to_string()
    } else {
        path[..end].to_string()
    };
    let mut value = lookup(&name)?
        .ok_or_else(|| refused(format!("a pattern of `format` asks for {name:?}, which is not given")))?;
    let mut rest = &path[end..];
    while !rest.is_empty() {
        let (key, after, is_item) = match rest.strip_prefix('[').and_then(|inner| inner.split_once(']')) {
            Some((key, after)) => (key, after, true),
            None => {
                let inner = &rest[1..];
                let end = inner.find(['.', '[']).unwrap_or(inner.len());
                (&inner[..end], &inner[end..], false)
            }
        };
        value = match key.parse::<usize>() {
            Ok(index) if is_item => value.get_item(&Value::from(index))?,
            _ => value.get_attr(key)?,
        };
        rest = after;
    }
    Ok(value)
}
