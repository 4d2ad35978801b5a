//! Operators, slices and loops where Python's differ from the engine's: the source's translation calls these.

use super::containers::attribute;
use super::{ELEMENT_BYTES, MOST_DEPTH, format, made, refused, spend, text, type_name};
use minijinja::value::{Rest, Tuple, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};

/// Parts that a value with a name may have.
const MOST_PARTS: usize = 1_000_000;

pub(super) fn install(env: &mut Environment<'_>) {
    env.add_filter("__add", add);
    env.add_filter("__concat", concatenate);
    env.add_filter("__times", times);
    env.add_filter("__modulo", modulo);
    env.add_filter("__compare", compare);
    env.add_filter("__plus", |value: Value| signed(&value, false));
    env.add_filter("__minus", |value: Value| signed(&value, true));
    env.add_filter("__attribute", |value: Value, name: String| attribute(&value, &name));
    env.add_filter("__slice", slice);
    env.add_filter("__each", each);
    env.add_filter("__stored", stored);
    env.add_filter("__cycle", |of: Value, items: Rest<Value>| {
        let at = of.get_attr("index0")?.as_usize().ok_or_else(|| refused("`cycle` of what is no loop"))?;
        let at = at.checked_rem(items.len()).ok_or_else(|| refused("loop.cycle needs at least one item"))?;
        Ok::<_, Error>(items[at].clone())
    });
    env.add_filter("__counted", |state: &mut State<'_, '_>, value: Value| {
        spend(state, value.len().unwrap_or(0).saturating_mul(ELEMENT_BYTES))?;
        Ok::<_, Error>(value)
    });
}

#[derive(Clone, Copy)]
enum Number {
    Whole(i128),
    Real(f64),
}

impl Number {
    fn real(self) -> f64 {
        match self {
            // What Python does as well.
            Self::Whole(number) => number as f64,
            Self::Real(number) => number,
        }
    }
}

fn number(value: &Value) -> Option<Number> {
    match value.kind() {
        ValueKind::Bool => Some(Number::Whole(i128::from(value.is_true()))),
        ValueKind::Number if value.is_integer() => i128::try_from(value.clone()).ok().map(Number::Whole),
        ValueKind::Number => f64::try_from(value.clone()).ok().map(Number::Real),
        _ => None,
    }
}

fn whole(value: Option<i128>) -> Result<Value, Error> {
    let value = value.ok_or_else(|| refused("a number is too large"))?;
    Ok(i64::try_from(value).map_or_else(|_| Value::from(value), Value::from))
}

fn mixed(operator: &str, left: &Value, right: &Value) -> Error {
    if left.is_undefined() || right.is_undefined() {
        return Error::new(ErrorKind::UndefinedError, format!("`{operator}` with an undefined value"));
    }
    refused(format!("`{operator}` with {} and {}", type_name(left), type_name(right)))
}

fn signed(value: &Value, negative: bool) -> Result<Value, Error> {
    let sign = if negative { -1 } else { 1 };
    match number(value) {
        Some(Number::Whole(number)) => whole(number.checked_mul(sign)),
        Some(Number::Real(number)) => Ok(Value::from(if negative { -number } else { number })),
        None => Err(mixed(if negative { "-" } else { "+" }, value, value)),
    }
}

fn compare(left: Value, right: Value, operator: &str) -> Result<bool, Error> {
    let order = match (number(&left), number(&right)) {
        (Some(Number::Whole(a)), Some(Number::Whole(b))) => Some(a.cmp(&b)),
        (Some(a), Some(b)) => a.real().partial_cmp(&b.real()),
        _ if left.as_str().is_some() && right.as_str().is_some() => Some(left.cmp(&right)),
        _ if is_list(&left) && is_list(&right) && left.is_tuple() == right.is_tuple() => {
            Some(left.cmp(&right))
        }
        _ => return Err(mixed(operator, &left, &right)),
    };
    Ok(order.is_some_and(|order| match operator {
        "<" => order.is_lt(),
        "<=" => order.is_le(),
        ">" => order.is_gt(),
        _ => order.is_ge(),
    }))
}

fn is_list(value: &Value) -> bool {
    value.kind() == ValueKind::Seq
}

fn sequence(tuple: bool, items: Vec<Value>) -> Value {
    if tuple { Value::from(Tuple::from(items)) } else { Value::from(items) }
}

fn add(state: &mut State<'_, '_>, left: Value, right: Value) -> Result<Value, Error> {
    if let (Some(first), Some(second)) = (left.as_str(), right.as_str()) {
        spend(state, first.len() + second.len())?;
        return Ok(Value::from([first, second].concat()));
    }
    if is_list(&left) && is_list(&right) && left.is_tuple() == right.is_tuple() {
        let length = left.len().unwrap_or(0) + right.len().unwrap_or(0);
        spend(state, length * ELEMENT_BYTES)?;
        return Ok(sequence(left.is_tuple(), left.try_iter()?.chain(right.try_iter()?).collect()));
    }
    match (number(&left), number(&right)) {
        (Some(Number::Whole(a)), Some(Number::Whole(b))) => whole(a.checked_add(b)),
        (Some(a), Some(b)) => Ok(Value::from(a.real() + b.real())),
        _ => Err(mixed("+", &left, &right)),
    }
}

fn concatenate(state: &mut State<'_, '_>, first: Value, rest: Rest<Value>) -> Result<Value, Error> {
    let mut out = text(&first);
    for part in rest.iter() {
        out.push_str(&text(part));
        spend(state, out.len())?;
    }
    Ok(Value::from(out))
}

fn times(state: &mut State<'_, '_>, left: Value, right: Value) -> Result<Value, Error> {
    for (repeated, count) in [(&left, &right), (&right, &left)] {
        let Some(Number::Whole(count)) = number(count) else { continue };
        let count = usize::try_from(count.max(0)).unwrap_or(usize::MAX);
        if let Some(part) = repeated.as_str() {
            spend(state, part.len().saturating_mul(count))?;
            return Ok(Value::from(part.repeat(count)));
        }
        if is_list(repeated) {
            let items: Vec<_> = repeated.try_iter()?.collect();
            spend(state, items.len().saturating_mul(count).saturating_mul(ELEMENT_BYTES))?;
            let length = items.len().saturating_mul(count);
            return Ok(sequence(repeated.is_tuple(), items.into_iter().cycle().take(length).collect()));
        }
    }
    match (number(&left), number(&right)) {
        (Some(Number::Whole(a)), Some(Number::Whole(b))) => whole(a.checked_mul(b)),
        (Some(a), Some(b)) => Ok(Value::from(a.real() * b.real())),
        _ => Err(mixed("*", &left, &right)),
    }
}

fn modulo(state: &mut State<'_, '_>, left: Value, right: Value) -> Result<Value, Error> {
    if let Some(pattern) = left.as_str() {
        let text = format::percent(state, pattern, &right)?;
        return made(state, text);
    }
    match (number(&left), number(&right)) {
        (Some(_), Some(b)) if b.real() == 0.0 => Err(refused("the remainder of a division by zero")),
        (Some(Number::Whole(a)), Some(Number::Whole(b))) => {
            let rest = a.checked_rem(b).unwrap_or(0);
            whole(Some(if rest != 0 && (rest < 0) != (b < 0) { rest + b } else { rest }))
        }
        (Some(a), Some(b)) => {
            let (rest, divisor) = (a.real() % b.real(), b.real());
            let rest = if rest != 0.0 && (rest < 0.0) != (divisor < 0.0) { rest + divisor } else { rest };
            Ok(Value::from(if rest == 0.0 { 0.0_f64.copysign(divisor) } else { rest }))
        }
        _ => Err(mixed("%", &left, &right)),
    }
}

/// The places that `[start:stop:step]` takes of `length`.
fn places(length: usize, start: &Value, stop: &Value, step: &Value) -> Result<Vec<usize>, Error> {
    let index = |value: &Value| match (value.is_none(), number(value)) {
        (true, _) => Ok(None),
        (_, Some(Number::Whole(number))) => Ok(Some(number.clamp(i64::MIN.into(), i64::MAX.into()))),
        _ => Err(refused(format!("a slice's ends are int or None, not {}", type_name(value)))),
    };
    let length = length as i128;
    let step = index(step)?.unwrap_or(1);
    if step == 0 {
        return Err(refused("a slice's step is 0"));
    }
    let (first, last) = if step > 0 { (0, length) } else { (-1, length - 1) };
    let end = |value: &Value, default: i128| -> Result<i128, Error> {
        let end = index(value)?.map(|i| if i < 0 { i + length } else { i });
        Ok(end.map_or(default, |i| i.clamp(first, last)))
    };
    let (mut at, stop) = if step > 0 {
        (end(start, 0)?, end(stop, length)?)
    } else {
        (end(start, length - 1)?, end(stop, -1)?)
    };
    let mut places = Vec::new();
    while if step > 0 { at < stop } else { at > stop } {
        places.extend(usize::try_from(at));
        at += step;
    }
    Ok(places)
}

fn slice(
    state: &mut State<'_, '_>,
    value: Value,
    start: Value,
    stop: Value,
    step: Option<Value>,
) -> Result<Value, Error> {
    let step = step.unwrap_or_else(|| Value::from(()));
    if let Some(text) = value.as_str() {
        let chars: Vec<char> = text.chars().collect();
        spend(state, chars.len() * 4)?;
        let places = places(chars.len(), &start, &stop, &step)?;
        return Ok(Value::from(places.into_iter().map(|i| chars[i]).collect::<String>()));
    }
    match value.kind() {
        ValueKind::Undefined => Err(Error::new(ErrorKind::UndefinedError, "a slice of an undefined value")),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<_> = value.try_iter()?.collect();
            spend(state, items.len() * ELEMENT_BYTES)?;
            let places = places(items.len(), &start, &stop, &step)?;
            Ok(sequence(value.is_tuple(), places.into_iter().map(|i| items[i].clone()).collect()))
        }
        _ => Err(refused(format!("a slice of {}", type_name(&value)))),
    }
}

/// What a loop goes over: the characters of a string by number, so that the loop knows its last; nothing that Python would not.
fn each(state: &mut State<'_, '_>, value: Value) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        spend(state, text.len().saturating_mul(ELEMENT_BYTES))?;
        return Ok(Value::from(text.chars().map(Value::from).collect::<Vec<_>>()));
    }
    match value.kind() {
        ValueKind::None | ValueKind::Bool | ValueKind::Number | ValueKind::Plain => {
            Err(refused(format!("a loop over {}", type_name(&value))))
        }
        _ => Ok(value),
    }
}

/// What is given a name: nothing that nests without end, which would overflow the stack where it is compared or dropped.
fn stored(state: &mut State<'_, '_>, value: Value, in_namespace: bool) -> Result<Value, Error> {
    let mut seen = 0;
    check_nesting(&value, in_namespace, 0, &mut seen)?;
    spend(state, seen)?;
    Ok(value)
}

fn check_nesting(value: &Value, in_namespace: bool, depth: usize, seen: &mut usize) -> Result<(), Error> {
    *seen += 1;
    if depth > MOST_DEPTH || *seen > MOST_PARTS {
        return Err(refused("a value nests too deep or has too many parts"));
    }
    if in_namespace && is_namespace(value) {
        return Err(refused("a namespace that holds a namespace"));
    }
    if matches!(value.kind(), ValueKind::Seq | ValueKind::Map)
        && !is_namespace(value)
        && value.len().is_some()
    {
        for item in value.try_iter()? {
            let inner = if value.kind() == ValueKind::Map { value.get_item(&item)? } else { item };
            check_nesting(&inner, in_namespace, depth + 1, seen)?;
        }
    }
    Ok(())
}

fn is_namespace(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace"))
}
