//! The tokens inside a tag.

use super::is_space;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Tag {
    Variable,
    Block,
}

/// A token; strings are decoded, and those that stand side by side are one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Token {
    Name(String),
    Number(String),
    Text(String),
    Operator(&'static str),
}

/// A tag that was read: its tokens, its length with the end, and the sign before that.
pub(super) struct Read {
    pub(super) tokens: Vec<Token>,
    pub(super) length: usize,
    pub(super) sign: Option<char>,
}

/// Longer ones first.
const OPERATORS: [&str; 26] = [
    "**", "//", "==", "!=", "<=", ">=", "+", "-", "*", "/", "%", "~", "(", ")", "[", "]", "{", "}", ".", ":",
    "|", ",", "=", "<", ">", ";",
];

/// Reads a tag from behind its opening bracket and sign.
pub(super) fn read(source: &str, tag: Tag) -> Result<Read, String> {
    let (end, signs) = match tag {
        Tag::Variable => ("}}", "-"),
        Tag::Block => ("%}", "-+"),
    };
    let mut tokens: Vec<Token> = Vec::new();
    let mut open = 0_usize;
    let mut at = 0;
    loop {
        at += source[at..].len() - source[at..].trim_start_matches(is_space).len();
        let rest = &source[at..];
        let Some(first) = rest.chars().next() else { return Err("a tag has no end".to_string()) };
        if open == 0 {
            let sign = Some(first).filter(|&c| signs.contains(c));
            if rest[sign.map_or(0, char::len_utf8)..].starts_with(end) {
                let length = at + sign.map_or(0, char::len_utf8) + end.len();
                return Ok(Read { tokens, length, sign });
            }
        }
        let (token, length) = match first {
            '"' | '\'' => string(rest)?,
            '0'..='9' => number(rest, source[..at].ends_with('.')),
            c if c.is_alphanumeric() || c == '_' => name(rest),
            c => operator(rest).ok_or_else(|| format!("unexpected character {c:?}"))?,
        };
        open = match token {
            Token::Operator("(" | "[" | "{") => open + 1,
            Token::Operator(")" | "]" | "}") => open.saturating_sub(1),
            _ => open,
        };
        at += length;
        match (tokens.last_mut(), token) {
            (Some(Token::Text(before)), Token::Text(more)) => before.push_str(&more),
            (_, token) => tokens.push(token),
        }
    }
}

fn name(rest: &str) -> (Token, usize) {
    let length = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
    (Token::Name(rest[..length].to_string()), length)
}

fn operator(rest: &str) -> Option<(Token, usize)> {
    let found = OPERATORS.into_iter().find(|operator| rest.starts_with(operator))?;
    Some((Token::Operator(found), found.len()))
}

/// A number; behind a dot it is an index, which has no fraction.
fn number(rest: &str, index: bool) -> (Token, usize) {
    let run = |from: usize| {
        let digits =
            rest[from..].find(|c: char| !c.is_ascii_digit() && c != '_').unwrap_or(rest.len() - from);
        from + rest[from..from + digits].trim_end_matches('_').len()
    };
    let digit_at = |at: usize| rest.as_bytes().get(at).is_some_and(u8::is_ascii_digit);
    let radix = ["0x", "0X", "0o", "0O", "0b", "0B"].into_iter().any(|prefix| rest.starts_with(prefix));
    let mut end = if radix { name(rest).1 } else { run(0) };
    if !index && !radix {
        if rest[end..].starts_with('.') && digit_at(end + 1) {
            end = run(end + 1);
        }
        let exponent = rest[end..].starts_with(['e', 'E']);
        let signed =
            end + 1 + usize::from(rest[end..].get(1..2).is_some_and(|sign| ["+", "-"].contains(&sign)));
        if exponent && digit_at(signed) {
            end = run(signed);
        }
    }
    (Token::Number(rest[..end].replace('_', "")), end)
}

/// A string as Python's `unicode-escape` decodes it.
fn string(rest: &str) -> Result<(Token, usize), String> {
    let mut chars = rest.char_indices();
    let quote = chars.next().map_or('"', |(_, c)| c);
    let mut out = String::new();
    let mut high: Option<u32> = None;
    while let Some((at, c)) = chars.next() {
        let mut code = None;
        match c {
            c if c == quote && high.is_none() => return Ok((Token::Text(out), at + 1)),
            '\\' => match chars.next().ok_or("a string has no end")?.1 {
                'x' => code = Some(hexadecimal(&mut chars, 2)?),
                'u' => code = Some(hexadecimal(&mut chars, 4)?),
                'U' => code = Some(hexadecimal(&mut chars, 8)?),
                'N' => return Err("`\\N{…}` in a string is not supported: write the character".to_string()),
                digit @ '0'..='7' => code = Some(octal(digit, &mut chars)),
                '\n' => {}
                c => match "abfnrtv\\'\"".find(c) {
                    Some(i) => {
                        out.push(['\x07', '\x08', '\x0c', '\n', '\r', '\t', '\x0b', '\\', '\'', '"'][i]);
                    }
                    None => out.extend(['\\', c]),
                },
            },
            c => out.push(c),
        }
        match (high, code) {
            (None, Some(code @ 0xd800..0xdc00)) => high = Some(code),
            (Some(first), Some(second @ 0xdc00..0xe000)) => {
                out.extend(char::from_u32(0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00)));
                high = None;
            }
            (None, Some(code)) => out.push(char::from_u32(code).ok_or_else(lone)?),
            (None, None) => {}
            (Some(_), _) => return Err(lone()),
        }
    }
    Err("a string has no end".to_string())
}

fn lone() -> String {
    "an escape in a string names half a character".to_string()
}

fn hexadecimal(chars: &mut core::str::CharIndices<'_>, digits: usize) -> Result<u32, String> {
    let text = chars.as_str().get(..digits).filter(|text| text.bytes().all(|b| b.is_ascii_hexdigit()));
    let code = text.and_then(|text| u32::from_str_radix(text, 16).ok());
    chars.nth(digits - 1);
    code.ok_or_else(|| format!("an escape in a string needs {digits} hexadecimal digits"))
}

fn octal(first: char, chars: &mut core::str::CharIndices<'_>) -> u32 {
    let mut code = first.to_digit(8).unwrap_or(0);
    for _ in 0..2 {
        let Some(digit) = chars.as_str().chars().next().and_then(|c| c.to_digit(8)) else { break };
        code = code * 8 + digit;
        chars.next();
    }
    code
}
