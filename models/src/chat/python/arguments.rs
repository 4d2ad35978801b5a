//! Arguments by place or name.

use super::{refused, type_name};
use minijinja::value::{Kwargs, Rest, ValueKind, ValueOrKwargs};
use minijinja::{Error, Value};

/// What the engine hands to a filter: values, then what was given by name.
pub(super) type Given = Rest<ValueOrKwargs>;

pub(super) fn values(given: Given) -> Vec<Value> {
    given.0.into_iter().map(ValueOrKwargs::into_value).collect()
}

pub(super) struct Arguments<'a> {
    of: &'a str,
    names: &'a [&'a str],
    values: Vec<Option<Value>>,
}

impl<'a> Arguments<'a> {
    /// The arguments of the method or filter `of`, which has them in this order.
    pub(super) fn new(of: &'a str, names: &'a [&'a str], args: &[Value]) -> Result<Self, Error> {
        let named = args.last().filter(|value| value.is_kwargs());
        let placed = &args[..args.len() - usize::from(named.is_some())];
        if placed.len() > names.len() {
            return Err(refused(format!(
                "{of} takes {} arguments at most, {} are given",
                names.len(),
                placed.len()
            )));
        }
        let mut values: Vec<_> = placed.iter().cloned().map(Some).collect();
        values.resize(names.len(), None);
        if let Some(named) = named {
            let named = Kwargs::try_from(named.clone())?;
            for name in named.args() {
                let Some(place) = names.iter().position(|known| *known == name) else {
                    return Err(refused(format!("{of} has no argument `{name}`")));
                };
                if values[place].replace(named.peek(name)?).is_some() {
                    return Err(refused(format!("{of} is given `{name}` twice")));
                }
            }
        }
        Ok(Self { of, names, values })
    }

    pub(super) fn get(&self, at: usize) -> Option<&Value> {
        self.values[at].as_ref()
    }

    /// An argument that is there and not `None`.
    pub(super) fn some(&self, at: usize) -> Option<&Value> {
        self.get(at).filter(|value| !value.is_none())
    }

    pub(super) fn needed(&self, at: usize) -> Result<&Value, Error> {
        self.get(at).ok_or_else(|| refused(format!("{} needs the argument `{}`", self.of, self.names[at])))
    }

    fn wrong(&self, at: usize, wanted: &str, value: &Value) -> Error {
        refused(format!("`{}` of {} is {}, not {wanted}", self.names[at], self.of, type_name(value)))
    }

    pub(super) fn text(&self, at: usize) -> Result<&str, Error> {
        let value = self.needed(at)?;
        value.as_str().ok_or_else(|| self.wrong(at, "str", value))
    }

    pub(super) fn text_or<'s>(&'s self, at: usize, default: &'s str) -> Result<&'s str, Error> {
        if self.some(at).is_some() { self.text(at) } else { Ok(default) }
    }

    pub(super) fn integer(&self, at: usize) -> Result<Option<i64>, Error> {
        let whole = |value: &Value| match value.kind() {
            ValueKind::Bool => Some(i64::from(value.is_true())),
            _ => value.as_i64().filter(|_| value.is_integer()),
        };
        self.some(at).map(|value| whole(value).ok_or_else(|| self.wrong(at, "int", value))).transpose()
    }

    pub(super) fn flag(&self, at: usize, default: bool) -> bool {
        self.get(at).map_or(default, Value::is_true)
    }

    /// A length; one that is negative is none.
    pub(super) fn length(&self, at: usize, default: usize) -> Result<usize, Error> {
        let length = self.integer(at)?;
        Ok(length.map_or(default, |length| usize::try_from(length).unwrap_or(0)))
    }
}
