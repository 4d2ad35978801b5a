//! The methods of `list`, `tuple` and `dict` that change nothing.

use super::arguments::Arguments;
use super::{ELEMENT_BYTES, METHODS, call_method, refused, repr, spend, type_name};
use core::fmt;
use minijinja::value::{Enumerator, Object, ObjectRepr, Tuple, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};
use std::sync::Arc;

/// Methods that change a list or dict, which the sandbox of transformers refuses as well.
const CHANGING: [&str; 11] = [
    "append",
    "clear",
    "extend",
    "insert",
    "pop",
    "popitem",
    "remove",
    "reverse",
    "setdefault",
    "sort",
    "update",
];

pub(super) fn call(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if CHANGING.contains(&name) {
        return Err(refused(format!("`{name}` changes a {}, which templates may not", type_name(value))));
    }
    match (value.kind(), name) {
        (ValueKind::Seq, "index") => {
            let args = Arguments::new(name, &["value", "start", "stop"], args)?;
            let length = value.len().unwrap_or(0);
            let place = |at: i64| {
                usize::try_from(if at < 0 { at.saturating_add_unsigned(length as u64) } else { at })
            };
            let start = args.integer(1)?.map_or(0, |at| place(at).unwrap_or(0));
            let end = args.integer(2)?.map_or(length, |at| place(at).unwrap_or(0));
            let sought = args.needed(0)?;
            let found = value.try_iter()?.take(end).enumerate().skip(start).find(|(_, item)| item == sought);
            found
                .map(|(i, _)| Value::from(i))
                .ok_or_else(|| refused(format!("index: {} is not in the list", repr(sought))))
        }
        (ValueKind::Seq, "count") => {
            let args = Arguments::new(name, &["value"], args)?;
            let sought = args.needed(0)?;
            Ok(Value::from(value.try_iter()?.filter(|item| item == sought).count()))
        }
        (ValueKind::Seq | ValueKind::Map, "copy") if !value.is_tuple() => {
            Arguments::new(name, &[], args)?;
            Ok(value.clone())
        }
        (ValueKind::Map, "keys" | "values" | "items") => {
            Arguments::new(name, &[], args)?;
            view(state, value, name)
        }
        (ValueKind::Map, "get") => {
            let args = Arguments::new(name, &["key", "default"], args)?;
            let found = value.as_object().and_then(|dict| dict.get_value(args.needed(0).ok()?));
            args.needed(0)?;
            Ok(found.unwrap_or_else(|| args.get(1).cloned().unwrap_or_else(|| Value::from(()))))
        }
        (ValueKind::Map, "fromkeys") => {
            let args = Arguments::new(name, &["iterable", "value"], args)?;
            let filler = args.get(1).cloned().unwrap_or_else(|| Value::from(()));
            let keys: Vec<_> = args.needed(0)?.try_iter()?.collect();
            spend(state, keys.len() * ELEMENT_BYTES)?;
            Ok(Value::from_pairs(keys.into_iter().map(|key| (key, filler.clone()))))
        }
        _ => Err(Error::new(
            ErrorKind::UnknownMethod,
            format!("{} has no method `{name}` here", type_name(value)),
        )),
    }
}

/// What `keys`, `values` and `items` of a dict give: no list, so without an index and no sequence.
#[derive(Debug)]
struct View {
    of: &'static str,
    items: Vec<Value>,
}

impl Object for View {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.items.clone())
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        Some(self.items.len())
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({})", self.of, repr(&Value::from(self.items.clone())))
    }
}

pub(super) fn pairs(value: &Value) -> Result<Vec<(Value, Value)>, Error> {
    value.try_iter()?.map(|key| value.get_item(&key).map(|item| (key, item))).collect()
}

fn view(state: &mut State<'_, '_>, value: &Value, name: &str) -> Result<Value, Error> {
    let pairs = pairs(value)?;
    spend(state, pairs.len() * ELEMENT_BYTES)?;
    let (of, items) = match name {
        "keys" => ("dict_keys", pairs.into_iter().map(|(key, _)| key).collect()),
        "values" => ("dict_values", pairs.into_iter().map(|(_, item)| item).collect()),
        _ => (
            "dict_items",
            pairs.into_iter().map(|(key, item)| Value::from(Tuple::from([key, item]))).collect(),
        ),
    };
    Ok(Value::from_object(View { of, items }))
}

/// A method that is looked at before it is called, if it is: `x.get is defined`.
#[derive(Debug)]
struct Method {
    of: Value,
    name: String,
}

impl Object for Method {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, state: &mut State<'_, '_>, args: &[Value]) -> Result<Value, Error> {
        call_method(state, &self.of, &self.name, args)
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<method {} of {}>", self.name, type_name(&self.of))
    }
}

/// `value.name` where `name` is a method of some type. A dict's own key comes first: what Python would find there instead, the
/// method, no template can want.
pub(super) fn attribute(value: &Value, name: &str) -> Result<Value, Error> {
    let found = value.get_attr(name)?;
    let is_method = match value.kind() {
        ValueKind::String => {
            !CHANGING.contains(&name)
                && !["copy", "fromkeys", "get", "items", "keys", "values"].contains(&name)
        }
        ValueKind::Seq => ["copy", "count", "index"].contains(&name) || CHANGING.contains(&name),
        ValueKind::Map => ["copy", "fromkeys", "get", "items", "keys", "values"].contains(&name),
        _ => false,
    };
    if found.is_undefined() && is_method && METHODS.contains(&name) {
        return Ok(Value::from_object(Method { of: value.clone(), name: name.to_string() }));
    }
    Ok(found)
}
