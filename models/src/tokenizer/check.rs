//! What the crate `tokenizers` takes from a `tokenizer.json` and then fails on: by a panic, an overflow of the stack, or
//! gigabytes of memory. It is looked for before that crate sees the file.

mod charsmap;

use candle_core::{Error, Result};
use candle_sparse::error::plain;
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::Value;
use std::{borrow::Cow, fmt};
use tokenizers::Tokenizer;

/// Tokens that are looked for in texts as they stand, together: what finds them takes some 120 times as much. Files that have
/// most have 0.1 MB.
pub(crate) const MOST_ADDED_BYTES: usize = 800_000;
/// A text may become so many times as long before it is cut into tokens; in real files three times, where `▁` stands for a blank.
const MOST_GROWTH: usize = 64;
/// Pieces of a Unigram model: each byte of one is a level of a tree, and all that a text may begin with are copied for each of its
/// characters.
const LONGEST_PIECE: usize = 256;
/// All of them together, 250 bytes for each in memory; the largest vocabularies have 2 MB.
const MOST_PIECE_BYTES: usize = 4 << 20;

/// A normalizer, a pre-tokenizer, a decoder or a post-processor; the largest, with a table of characters, have 0.4 MB.
const MOST_PART_BYTES: usize = 2_000_000;
/// Tokens that are put around a text; models have one or two.
const MOST_AROUND: usize = 64;
/// Longest word that `WordPiece` cuts: the time grows with the third power. BERT's has 100.
const LONGEST_WORD: u64 = 200;

#[derive(Deserialize)]
struct Parts<'a> {
    #[serde(borrow, default)]
    added_tokens: Vec<Added<'a>>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    decoder: Value,
    #[serde(borrow)]
    model: Option<Model<'a>>,
}

#[derive(Deserialize)]
struct Added<'a> {
    #[serde(borrow, default)]
    content: Cow<'a, str>,
}

#[derive(Deserialize)]
struct Model<'a> {
    #[serde(default)]
    vocab: Lengths,
    #[serde(default)]
    merges: Lengths,
    #[serde(borrow, default)]
    continuing_subword_prefix: Option<Cow<'a, str>>,
    max_input_chars_per_word: Option<u64>,
}

/// Refuses what is known to do harm; everything else is for the crate to judge.
pub(super) fn check(tokenizer_json: &[u8]) -> Result<()> {
    candle_sparse::input::check_json(tokenizer_json)?;
    // A field that is there twice is refused here: which of the two the crate takes is its own affair.
    let parts: Parts<'_> =
        serde_json::from_slice(tokenizer_json).map_err(|e| Error::Msg(plain(&e.to_string())))?;
    let bytes: usize = parts.added_tokens.iter().map(|token| token.content.len()).sum();
    if bytes > MOST_ADDED_BYTES {
        return fail(format!("added_tokens have {bytes} bytes, {MOST_ADDED_BYTES} are possible"));
    }
    if let Some(model) = &parts.model {
        check_model(model)?;
    }
    let mut growth = 1;
    check_normalizer(&parts.normalizer, &mut growth)?;
    check_pre_tokenizer(&parts.pre_tokenizer)?;
    check_decoder(&parts.decoder, &mut 1)
}

/// As [`check`], of what the crate has read: it takes parts in more ways than one, and writes them in one alone.
pub(super) fn check_read(tokenizer: &Tokenizer) -> Result<()> {
    check_normalizer(&written(tokenizer.get_normalizer())?, &mut 1)?;
    check_pre_tokenizer(&written(tokenizer.get_pre_tokenizer())?)?;
    check_decoder(&written(tokenizer.get_decoder())?, &mut 1)?;
    check_post_processor(&written(tokenizer.get_post_processor())?)
}

fn written(part: impl Serialize) -> Result<Value> {
    let json = serde_json::to_vec(&part).map_err(Error::wrap)?;
    if json.len() > MOST_PART_BYTES {
        return fail(format!("a part of it has {} bytes, {MOST_PART_BYTES} are possible", json.len()));
    }
    serde_json::from_slice(&json).map_err(Error::wrap)
}

fn fail<T>(problem: impl Into<String>) -> Result<T> {
    Err(Error::Msg(problem.into()))
}

fn check_model(model: &Model<'_>) -> Result<()> {
    let (vocab, merges) = (&model.vocab, &model.merges);
    if vocab.listed && (vocab.longest > LONGEST_PIECE || vocab.all > MOST_PIECE_BYTES) {
        return fail(format!(
            "a piece has {} bytes and all have {}, {LONGEST_PIECE} and {MOST_PIECE_BYTES} are possible",
            vocab.longest, vocab.all
        ));
    }
    if let Some(chars) = model.max_input_chars_per_word.filter(|chars| *chars > LONGEST_WORD) {
        return fail(format!("max_input_chars_per_word is {chars}, {LONGEST_WORD} are possible"));
    }
    // Merges are copied to where the longest token has room.
    let prefix = model.continuing_subword_prefix.as_deref().unwrap_or_default().len();
    if merges.shortest_second.is_some_and(|second| second < prefix) || merges.longest > vocab.longest + prefix
    {
        return fail(format!(
            "merges put together a text of {} bytes, the longest token has {}",
            merges.longest.saturating_sub(prefix),
            vocab.longest
        ));
    }
    Ok(())
}

/// The steps of a sequence, or the one step that there is.
fn steps<'a>(part: &'a Value, list: &str) -> Vec<&'a Value> {
    match part[list].as_array() {
        Some(steps) => steps.iter().flat_map(|step| self::steps(step, list)).collect(),
        None => vec![part],
    }
}

fn check_normalizer(normalizer: &Value, growth: &mut usize) -> Result<()> {
    for step in steps(normalizer, "normalizers") {
        // By their fields: the crate takes steps that do not say which they are. No others make more than a few characters of one.
        let map = step["precompiled_charsmap"].as_str();
        if map.is_some() || step["type"] == "Precompiled" {
            let longest = charsmap::longest(map.unwrap_or_default()).map_err(Error::Msg)?;
            grow(growth, longest.max(1))?;
        }
        grow(growth, replaced(step))?;
        bounded(step["prepend"].as_str())?;
    }
    Ok(())
}

/// How many times as long as before a text may be when its parts are replaced; 1 for other steps.
fn replaced(step: &Value) -> usize {
    let content = step["content"].as_str().unwrap_or_default().len();
    if step["pattern"].is_null() {
        return 1;
    }
    match step["pattern"]["String"].as_str().map(str::len) {
        Some(len @ 1..) => content.div_ceil(len).max(1),
        // An expression may fit between any two characters.
        _ => content + 1,
    }
}

fn grow(growth: &mut usize, times: usize) -> Result<()> {
    *growth = growth.saturating_mul(times);
    if *growth > MOST_GROWTH {
        return fail(format!(
            "its normalizer makes texts {growth} times as long, {MOST_GROWTH} times are possible"
        ));
    }
    Ok(())
}

fn bounded(text: Option<&str>) -> Result<()> {
    match text.map_or(0, str::len) {
        len if len > MOST_GROWTH => {
            fail(format!("puts {len} bytes before a text, {MOST_GROWTH} are possible"))
        }
        _ => Ok(()),
    }
}

fn check_pre_tokenizer(pre_tokenizer: &Value) -> Result<()> {
    for step in steps(pre_tokenizer, "pretokenizers") {
        if step["length"] == 0 {
            return fail("its pre-tokenizer FixedLength has length 0");
        }
    }
    Ok(())
}

fn check_decoder(decoder: &Value, growth: &mut usize) -> Result<()> {
    for step in steps(decoder, "decoders") {
        match step["type"].as_str() {
            Some("Replace") => grow(growth, replaced(step))?,
            // Of a token that has fewer characters it takes more than there are.
            Some("Strip") if step["stop"].as_u64().is_some_and(|stop| stop > 0) => {
                return fail(
                    "its decoder Strip takes characters off the end of tokens, which is not supported",
                );
            }
            _ => {}
        }
    }
    Ok(())
}

/// A template may name tokens and texts that are not there, and a second one sees parts where it wants a text: the crate panics.
fn check_post_processor(post_processor: &Value) -> Result<()> {
    let mut around = steps(post_processor, "processors")
        .into_iter()
        .filter(|step| step["type"] != "ByteLevel" && !step.is_null());
    let Some(template) = around.next() else { return Ok(()) };
    if around.next().is_some() {
        return fail("its post-processor puts tokens around a text twice, which is not supported");
    }
    let (mut tokens, mut texts) = (0, 0);
    for piece in template["single"].as_array().into_iter().flatten() {
        match piece["SpecialToken"]["id"].as_str() {
            Some(id) => tokens += put_by(&template["special_tokens"][id])?,
            None if piece["Sequence"]["id"] == "A" => texts += 1,
            None => return fail("its post-processor asks for a second text, where there is one"),
        }
    }
    if tokens > MOST_AROUND || texts > 1 {
        return fail(format!(
            "its post-processor makes {texts} texts and {tokens} tokens of a text, 1 and {MOST_AROUND} are possible"
        ));
    }
    Ok(())
}

/// How many tokens a special token of a template stands for.
fn put_by(token: &Value) -> Result<usize> {
    match (token["ids"].as_array(), token["tokens"].as_array()) {
        (Some(ids), Some(tokens)) if ids.len() == tokens.len() => Ok(ids.len()),
        _ => fail("its post-processor names a special token that it does not have"),
    }
}

/// How long the texts of a vocabulary, or of merges with their two parts together, are.
#[derive(Default)]
struct Lengths {
    longest: usize,
    all: usize,
    /// They stand in a list, as in a Unigram model.
    listed: bool,
    /// The second part of a merge.
    shortest_second: Option<usize>,
}

impl Lengths {
    fn add(&mut self, text: usize) {
        self.longest = self.longest.max(text);
        self.all += text;
    }

    fn add_second(&mut self, text: usize) {
        self.shortest_second = Some(self.shortest_second.map_or(text, |least| least.min(text)));
    }
}

/// An element: a merge in one text or in two, or a piece with its score.
#[derive(Deserialize)]
#[serde(untagged)]
enum Element<'a> {
    Joined(#[serde(borrow)] Cow<'a, str>),
    Merge(#[serde(borrow)] Cow<'a, str>, #[serde(borrow)] Cow<'a, str>),
    Piece(#[serde(borrow)] Cow<'a, str>, IgnoredAny),
    Other(IgnoredAny),
}

impl<'de> Deserialize<'de> for Lengths {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> core::result::Result<Self, D::Error> {
        struct Texts;

        impl<'de> Visitor<'de> for Texts {
            type Value = Lengths;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("tokens")
            }

            fn visit_unit<E>(self) -> core::result::Result<Lengths, E> {
                Ok(Lengths::default())
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> core::result::Result<Lengths, A::Error> {
                let mut lengths = Lengths::default();
                while let Some((text, IgnoredAny)) = map.next_entry::<Cow<'de, str>, IgnoredAny>()? {
                    lengths.add(text.len());
                }
                Ok(lengths)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> core::result::Result<Lengths, A::Error> {
                let mut lengths = Lengths { listed: true, ..Lengths::default() };
                while let Some(element) = seq.next_element::<Element<'de>>()? {
                    match element {
                        Element::Joined(text) => {
                            let (first, second) = text.split_once(' ').unwrap_or((&text, ""));
                            lengths.add(first.len() + second.len());
                            lengths.add_second(second.len());
                        }
                        Element::Merge(first, second) => {
                            lengths.add(first.len() + second.len());
                            lengths.add_second(second.len());
                        }
                        Element::Piece(text, _) => lengths.add(text.len()),
                        Element::Other(_) => {}
                    }
                }
                Ok(lengths)
            }
        }

        deserializer.deserialize_any(Texts)
    }
}
