//! Jinja's filters, tests and globals for lists and dicts, where the engine has others or none.

use super::arguments::{Arguments, Given, values};
use super::containers::{attribute, pairs};
use super::{ELEMENT_BYTES, refused, repr, spend, text, type_name};
use core::fmt;
use minijinja::value::{Enumerator, Kwargs, Object, ObjectRepr, Rest, Tuple, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value, filters};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

type Engine = fn(&State<'_, '_>, Value, Kwargs) -> Result<Value, Error>;

pub(super) fn install(env: &mut Environment<'_>) {
    for name in ["length", "count"] {
        env.add_filter(name, |value: Value| length(&value));
    }
    for name in ["default", "d"] {
        env.add_filter(name, |value: Value, args: Given| {
            let args = Arguments::new("default", &["default_value", "boolean"], &values(args))?;
            let missing = value.is_undefined() || (args.flag(1, false) && !value.is_true());
            Ok::<_, Error>(if missing {
                args.get(0).cloned().unwrap_or_else(|| Value::from(""))
            } else {
                value
            })
        });
    }
    env.add_filter("attr", |value: Value, name: String| {
        // An attribute of a dict is a method, never a key.
        let is_dict = value.as_object().is_some_and(|object| object.type_name().contains("IndexMap"));
        let found = attribute(&value, &name)?;
        let key = is_dict && found == value.get_item(&Value::from(name)).unwrap_or_default();
        Ok::<_, Error>(if key { Value::UNDEFINED } else { found })
    });
    env.add_filter("first", |value: Value| {
        Ok::<_, Error>(checked(&value)?.try_iter()?.next().unwrap_or_default())
    });
    env.add_filter("last", |value: Value| {
        Ok::<_, Error>(checked(&value)?.try_iter()?.last().unwrap_or_default())
    });
    env.add_filter("list", |state: &mut State<'_, '_>, value: Value| {
        collected(state, &value).map(Value::from)
    });
    env.add_filter("reverse", reverse);
    env.add_filter("items", items);
    env.add_filter("groupby", group_by);
    env.add_filter("batch", |state: &mut State<'_, '_>, value: Value, args: Given| {
        batch(state, &value, &values(args))
    });
    env.add_filter("slice", |state: &mut State<'_, '_>, value: Value, args: Given| {
        slice(state, &value, &values(args))
    });
    let by_place: [(&str, &[&str], Engine); 5] = [
        ("sort", &["reverse", "case_sensitive", "attribute"], |state, value, args| {
            filters::sort(state, value, args)
        }),
        ("unique", &["case_sensitive", "attribute"], |state, value, args| {
            filters::unique(state, value, args)
        }),
        ("min", &["case_sensitive", "attribute"], |state, value, args| filters::min(state, value, args)),
        ("max", &["case_sensitive", "attribute"], |state, value, args| filters::max(state, value, args)),
        ("dictsort", &["case_sensitive", "by", "reverse"], |_, value, args| filters::dictsort(&value, args)),
    ];
    for (name, names, filter) in by_place {
        env.add_filter(name, move |state: &mut State<'_, '_>, value: Value, args: Given| {
            filter(state, value, named(name, names, &values(args))?)
        });
    }
    install_tests(env);
    install_globals(env);
}

fn install_tests(env: &mut Environment<'_>) {
    for name in ["startingwith", "endingwith", "int"] {
        env.remove_test(name);
    }
    // An undefined value has a `__call__`, which fails.
    env.add_test("callable", |value: &Value| value.is_undefined() || value.kind() == ValueKind::Plain);
    // Whatever has a length and items by key: a string and a dict too.
    env.add_test("sequence", |value: Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Undefined)
    });
    // Templates ask this of `tools`, which are none: the engine would call none an empty sequence.
    env.add_test("iterable", |value: &Value| !value.is_none() && minijinja::tests::is_iterable(value));
}

fn install_globals(env: &mut Environment<'_>) {
    env.remove_global("debug");
    env.add_function("dict", dict);
    env.add_function("range", range);
    env.add_function("cycler", |items: Rest<Value>| match items.is_empty() {
        true => Err(refused("cycler needs at least one item")),
        false => Ok(Value::from_object(Cycler { items: items.to_vec(), at: AtomicUsize::new(0) })),
    });
    env.add_function("joiner", |between: Option<Value>| {
        Value::from_object(Joiner {
            between: between.unwrap_or_else(|| Value::from(", ")),
            used: AtomicUsize::new(0),
        })
    });
}

/// Arguments that the engine takes by name only.
fn named(filter: &str, names: &[&'static str], args: &[Value]) -> Result<Kwargs, Error> {
    let args = Arguments::new(filter, names, args)?;
    let given = |(at, name): (usize, &&'static str)| {
        let value = args.some(at)?;
        let is_path = *name == "attribute" && value.is_integer();
        Some((*name, if is_path { Value::from(text(value)) } else { value.clone() }))
    };
    Ok(Kwargs::from_iter(names.iter().enumerate().filter_map(given)))
}

fn length(value: &Value) -> Result<usize, Error> {
    match value.kind() {
        ValueKind::Undefined => Ok(0),
        ValueKind::String => Ok(value.as_str().unwrap_or_default().chars().count()),
        _ => value.len().ok_or_else(|| refused(format!("{} has no length", type_name(value)))),
    }
}

/// The value, if it can be gone through; the engine would do so with `None`.
pub(super) fn checked(value: &Value) -> Result<&Value, Error> {
    if matches!(value.kind(), ValueKind::None | ValueKind::Bool | ValueKind::Number) {
        return Err(refused(format!("{} cannot be gone through", type_name(value))));
    }
    Ok(value)
}

fn collected(state: &mut State<'_, '_>, value: &Value) -> Result<Vec<Value>, Error> {
    let mut items = Vec::new();
    for item in checked(value)?.try_iter()? {
        spend(state, ELEMENT_BYTES)?;
        items.push(item);
    }
    Ok(items)
}

fn reverse(state: &mut State<'_, '_>, value: Value) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        spend(state, text.len())?;
        return Ok(Value::from(text.chars().rev().collect::<String>()));
    }
    let mut items = collected(state, &value)?;
    items.reverse();
    Ok(Value::from(items))
}

fn items(state: &mut State<'_, '_>, value: Value) -> Result<Value, Error> {
    let found = match value.kind() {
        ValueKind::Undefined => Vec::new(),
        ValueKind::Map => pairs(&value)?,
        _ => return Err(refused(format!("items of {}, which is no dict", type_name(&value)))),
    };
    spend(state, found.len() * ELEMENT_BYTES)?;
    let pair = |(key, item)| Value::from(Tuple::from([key, item]));
    Ok(Value::from(found.into_iter().map(pair).collect::<Vec<_>>()))
}

/// A number that must not be zero.
fn positive(args: &Arguments<'_>, at: usize) -> Result<usize, Error> {
    args.needed(at)?;
    match args.length(at, 0)? {
        0 => Err(refused("a list in parts of no items, or in no parts")),
        number => Ok(number),
    }
}

/// Lists of so many items; the last may be filled up.
fn batch(state: &mut State<'_, '_>, value: &Value, args: &[Value]) -> Result<Value, Error> {
    let args = Arguments::new("batch", &["linecount", "fill_with"], args)?;
    let size = positive(&args, 0)?;
    let items = collected(state, value)?;
    let mut parts: Vec<Vec<Value>> = items.chunks(size).map(<[Value]>::to_vec).collect();
    if let (Some(filler), Some(last)) = (args.some(1), parts.last_mut()) {
        spend(state, size.saturating_mul(ELEMENT_BYTES))?;
        last.resize(size, filler.clone());
    }
    Ok(Value::from(parts.into_iter().map(Value::from).collect::<Vec<_>>()))
}

/// So many lists, as long as each other but for one item.
fn slice(state: &mut State<'_, '_>, value: &Value, args: &[Value]) -> Result<Value, Error> {
    let args = Arguments::new("slice", &["slices", "fill_with"], args)?;
    let count = positive(&args, 0)?;
    spend(state, count.saturating_mul(2 * ELEMENT_BYTES))?;
    let items = collected(state, value)?;
    let (size, longer) = (items.len() / count, items.len() % count);
    let part = |i: usize| {
        let start = i * size + i.min(longer);
        let mut part = items[start..start + size + usize::from(i < longer)].to_vec();
        part.extend(args.some(1).filter(|_| i >= longer).cloned());
        Value::from(part)
    };
    Ok(Value::from((0..count).map(part).collect::<Vec<_>>()))
}

/// A group of `groupby`: a tuple whose parts have names.
#[derive(Debug)]
pub(super) struct Group {
    key: Value,
    items: Value,
}

impl Object for Group {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        match (key.as_usize(), key.as_str()) {
            (Some(0), _) | (_, Some("grouper")) => Some(self.key.clone()),
            (Some(1), _) | (_, Some("list")) => Some(self.items.clone()),
            _ => None,
        }
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(2)
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "({}, {})", repr(&self.key), repr(&self.items))
    }
}

/// Whether it is a sequence that does not print as a list.
pub(super) fn shows_itself(value: &Value) -> bool {
    value.downcast_object_ref::<Group>().is_some() || value.downcast_object_ref::<Range>().is_some()
}

fn group_by(value: Value, args: Given) -> Result<Value, Error> {
    let args = Arguments::new("groupby", &["attribute", "default", "case_sensitive"], &values(args))?;
    let path = text(args.needed(0)?);
    let mut options = vec![("case_sensitive", Value::from(args.flag(2, false)))];
    options.extend(args.some(1).map(|default| ("default", default.clone())));
    let groups = filters::groupby(value, Some(&path), Kwargs::from_iter(options))?;
    let group = |group: Value| {
        let items: Vec<_> = group.get_item_by_index(1)?.try_iter()?.collect();
        // The engine shows the last item's key, Jinja the first's.
        let key = items.first().map(|first| at_path(first, &path)).transpose()?.unwrap_or_default();
        let key = if key.is_undefined() { args.some(1).cloned().unwrap_or_default() } else { key };
        Ok(Value::from_object(Group { key, items: Value::from(items) }))
    };
    Ok(Value::from(groups.try_iter()?.map(group).collect::<Result<Vec<_>, Error>>()?))
}

fn at_path(value: &Value, path: &str) -> Result<Value, Error> {
    path.split('.').try_fold(value.clone(), |value, part| match part.parse::<usize>() {
        Ok(index) => value.get_item_by_index(index),
        Err(_) => value.get_attr(part),
    })
}

fn dict(from: Option<Value>, named: Kwargs) -> Result<Value, Error> {
    let mut found = Vec::new();
    if let Some(from) = from {
        if from.kind() == ValueKind::Map {
            found = pairs(&from)?;
        } else {
            for pair in from.try_iter()? {
                found.push((pair.get_item_by_index(0)?, pair.get_item_by_index(1)?));
            }
        }
    }
    for name in named.args() {
        found.push((Value::from(name), named.peek(name)?));
    }
    Ok(Value::from_pairs(found))
}

/// Python's range; the sandbox has none that is longer.
const MOST_RANGE: usize = 100_000;

#[derive(Debug)]
pub(super) struct Range {
    start: i64,
    stop: i64,
    step: i64,
}

impl Range {
    fn len(&self) -> usize {
        let (from, to) = if self.step > 0 { (self.start, self.stop) } else { (self.stop, self.start) };
        let length = i128::from(to) - i128::from(from);
        let step = i128::from(self.step.unsigned_abs());
        usize::try_from((length + step - 1) / step).unwrap_or(0)
    }
}

impl Object for Range {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let at = key.as_usize().filter(|&at| at < self.len())?;
        Some(Value::from(self.start + self.step * i64::try_from(at).ok()?))
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(self.len())
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "range({}, {}", self.start, self.stop)?;
        if self.step == 1 { f.write_str(")") } else { write!(f, ", {})", self.step) }
    }
}

fn range(args: Rest<Value>) -> Result<Value, Error> {
    let args = Arguments::new("range", &["start", "stop", "step"], &args)?;
    args.needed(0)?;
    let number = |at: usize| {
        let whole = args.integer(at)?.ok_or_else(|| refused("range: None is no number"))?;
        if whole.unsigned_abs() > 1 << 60 { Err(refused("range: a number is too large")) } else { Ok(whole) }
    };
    let (start, stop) = if args.get(1).is_some() { (number(0)?, number(1)?) } else { (0, number(0)?) };
    let range = Range { start, stop, step: if args.get(2).is_some() { number(2)? } else { 1 } };
    if range.step == 0 {
        return Err(refused("range: the step is 0"));
    }
    if range.len() > MOST_RANGE {
        return Err(refused(format!("range: more than {MOST_RANGE} numbers")));
    }
    Ok(Value::from_object(range))
}

#[derive(Debug)]
struct Cycler {
    items: Vec<Value>,
    at: AtomicUsize,
}

impl Cycler {
    fn current(&self) -> Value {
        self.items[self.at.load(Ordering::Relaxed) % self.items.len()].clone()
    }
}

impl Object for Cycler {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        (key.as_str() == Some("current")).then(|| self.current())
    }

    fn call_method(
        self: &Arc<Self>,
        _: &mut State<'_, '_>,
        method: &str,
        args: &[Value],
    ) -> Result<Value, Error> {
        Arguments::new(method, &[], args)?;
        match method {
            "next" => {
                let current = self.current();
                self.at.fetch_add(1, Ordering::Relaxed);
                Ok(current)
            }
            "reset" => {
                self.at.store(0, Ordering::Relaxed);
                Ok(Value::from(()))
            }
            _ => Err(Error::from(ErrorKind::UnknownMethod)),
        }
    }
}

/// Gives nothing at first, then what stands between.
#[derive(Debug)]
struct Joiner {
    between: Value,
    used: AtomicUsize,
}

impl Object for Joiner {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, _: &mut State<'_, '_>, args: &[Value]) -> Result<Value, Error> {
        Arguments::new("joiner", &[], args)?;
        let first = self.used.swap(1, Ordering::Relaxed) == 0;
        Ok(if first { Value::from("") } else { self.between.clone() })
    }
}
