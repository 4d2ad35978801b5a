//! A tokenizer as the tables of an image.

use anyhow::{Context, Result, bail, ensure};
use candle_sparse_core::tokenizer::{self, Blanks, Kind, Merge, NONE, Parts, Range};
use candle_sparse_models::tokenizer::prompt_tokens;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use tokenizers::Tokenizer;

const BLANK: &str = "\u{2581}";

/// The tables, held.
pub(crate) struct Vocabulary {
    kind: Kind,
    ignore_merges: bool,
    unknown: u32,
    text_ends: Vec<u32>,
    sorted: Vec<u32>,
    merge_starts: Vec<u32>,
    merges: Vec<Merge>,
    bytes: Vec<u32>,
    added: Vec<u32>,
    special: Vec<u32>,
    first: Vec<u32>,
    ends: Vec<u32>,
    letters: Vec<Range>,
    numbers: Vec<Range>,
    texts: Vec<u8>,
}

impl Vocabulary {
    /// The tables of a tokenizer; `ends` are the tokens that end what the model says.
    ///
    /// # Errors
    /// A tokenizer that does something an image has no words for, or whose tables do not give its tokens.
    pub(crate) fn new(tokenizer: &Tokenizer, ends: &[u32]) -> Result<Self> {
        let text = tokenizer.to_string(false).map_err(|e| anyhow::anyhow!("{e}"))?;
        let json: Value = serde_json::from_str(&text)?;
        let vocabulary = Self::from_json(&json, prompt_tokens(tokenizer, "")?, ends)?;
        vocabulary.compare(tokenizer)?;
        Ok(vocabulary)
    }

    fn from_json(json: &Value, first: Vec<u32>, ends: &[u32]) -> Result<Self> {
        let model = &json["model"];
        ensure!(model["type"] == "BPE", "the tokenizer is no BPE: an image holds byte-pair merges only");
        for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
            let plain = model[key].is_null() || model[key] == "";
            ensure!(plain, "the tokenizer has a {key}, which an image has no words for");
        }
        let kind = kind(json)?;
        let ids: HashMap<&str, u32> = entries(&model["vocab"])?;
        let mut texts: BTreeMap<u32, Vec<u8>> =
            ids.iter().map(|(t, id)| (*id, t.as_bytes().to_vec())).collect();
        let mut sorted = Vec::new();
        for (text, id) in &ids {
            match (kind, bytes_of(text)) {
                (Kind::Pieces { .. }, _) => sorted.push(*id),
                (Kind::ByteLevel { .. }, Some(bytes)) => {
                    texts.insert(*id, bytes);
                    sorted.push(*id);
                }
                // No word has such a text.
                (Kind::ByteLevel { .. }, None) => {}
            }
        }
        sorted.sort_by(|a, b| texts[a].cmp(&texts[b]));
        let (added, special) = added(json, &mut texts)?;
        sorted.retain(|id| !added.contains(id) || matches!(kind, Kind::Pieces { .. }));
        let n = texts.keys().next_back().map_or(0, |id| *id as usize + 1);
        let (merge_starts, merges) = merges(&model["merges"], &ids, n)?;
        let mut ends: Vec<u32> = ends.iter().copied().filter(|&id| (id as usize) < n).collect();
        ends.dedup();
        let (text_ends, texts) = flat(&texts, n);
        let unknown = model["unk_token"].as_str().and_then(|t| ids.get(t)).copied().unwrap_or(NONE);
        let bytes = byte_tokens(kind, &ids, model["byte_fallback"] == true);
        let word_classes = matches!(kind, Kind::ByteLevel { .. });
        let class = |name| if word_classes { class(name) } else { Ok(Vec::new()) };
        Ok(Self {
            kind,
            ignore_merges: model["ignore_merges"] == true,
            unknown,
            text_ends,
            sorted,
            merge_starts,
            merges,
            bytes,
            added,
            special: bits(&special, n),
            first,
            ends,
            letters: class(r"\p{L}")?,
            numbers: class(r"\p{N}")?,
            texts,
        })
    }

    /// As the core reads them.
    pub(crate) fn parts(&self) -> Parts<'_> {
        Parts {
            kind: self.kind,
            ignore_merges: self.ignore_merges,
            unknown: self.unknown,
            text_ends: &self.text_ends,
            sorted: &self.sorted,
            merge_starts: &self.merge_starts,
            merges: &self.merges,
            bytes: &self.bytes,
            added: &self.added,
            special: &self.special,
            first: &self.first,
            ends: &self.ends,
            letters: &self.letters,
            numbers: &self.numbers,
            texts: &self.texts,
        }
    }

    /// The bytes of the tables.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.parts().write(|piece| bytes.extend_from_slice(piece));
        bytes
    }

    /// Encodes a few texts of all kinds, and all tokens one after the other, by both.
    fn compare(&self, tokenizer: &Tokenizer) -> Result<()> {
        let ours = tokenizer::Tokenizer::new(self.parts())?;
        let mut texts: Vec<String> = PROBES.map(String::from).into();
        texts.extend((0..ours.len() as u32).filter_map(|id| tokenizer.id_to_token(id)));
        for text in &texts {
            let want = prompt_tokens(tokenizer, text)?;
            let (mut ids, mut ranks) = (vec![0; room(text)], vec![0; room(text)]);
            let n = ours.encode_prompt(text, &mut ids, &mut ranks)?;
            if ids[..n] != want {
                bail!(
                    "the tokenizer makes other tokens of {text:?} than its tables: {want:?}, not {:?}",
                    &ids[..n]
                );
            }
        }
        Ok(())
    }
}

/// Elements that are enough for the tokens of a text.
pub(crate) fn room(text: &str) -> usize {
    4 * text.len() + 16
}

const PROBES: [&str; 10] = [
    "",
    "Once upon a time, there was a little girl named Lily.",
    "  two  blanks,\ttabs\n\n and lines \r\n ",
    "It's, we'll, they've, I'm, you'd: 'quoted' 'S",
    "1234567 3.14159 x2 H2O \u{00bd}\u{0664}\u{4e09}",
    "Gr\u{00fc}\u{00df}e aus K\u{00f6}ln, \u{00e9}t\u{00e9}, na\u{00ef}ve",
    "\u{4f60}\u{597d}\u{ff0c}\u{4e16}\u{754c} \u{3053}\u{3093}\u{306b}\u{3061}\u{306f} \u{0928}\u{092e}\u{0938}\u{094d}\u{0924}\u{0947}",
    "\u{1f600}\u{1f468}\u{200d}\u{1f469}\u{200d}\u{1f467} \u{2581}\u{2581}x",
    "<s>[INST] a </s> b<|im_start|>user\n",
    " \u{00a0}\u{3000}x",
];

/// What stands around the merges.
fn kind(json: &Value) -> Result<Kind> {
    let (normalizer, splits, decoder) =
        (steps(&json["normalizer"]), steps(&json["pre_tokenizer"]), steps(&json["decoder"]));
    let types = |steps: &[Value]| -> Vec<String> {
        steps.iter().map(|s| s["type"].as_str().unwrap_or_default().to_string()).collect()
    };
    let names = [types(&normalizer), types(&splits)].map(|names| names.join(" "));
    let strip = decoder.iter().any(|s| s["type"] == "Strip" || s["type"] == "Metaspace");
    let fuse_unknown = json["model"]["fuse_unk"] == true;
    let pieces = |blanks, words| Kind::Pieces { blanks, words, strip, fuse_unknown };
    let last = splits.last().cloned().unwrap_or_default();
    let plain_bytes = last["add_prefix_space"] != true && last["use_regex"] != false;
    Ok(match [names[0].as_str(), names[1].as_str()] {
        ["", "ByteLevel"] if plain_bytes => Kind::ByteLevel { digits: false },
        ["", "Digits ByteLevel"] if plain_bytes && splits[0]["individual_digits"] == true => {
            Kind::ByteLevel { digits: true }
        }
        ["Prepend Replace", ""] if normalizer[0]["prepend"] == BLANK && replaces_blanks(&normalizer[1]) => {
            pieces(Blanks::Parts, false)
        }
        ["Replace", ""] if replaces_blanks(&normalizer[0]) => pieces(Blanks::None, false),
        ["", "Metaspace"] if last["replacement"] == BLANK => {
            let blanks = match last["prepend_scheme"].as_str() {
                Some("never") => Blanks::None,
                Some("first") => Blanks::First,
                _ => Blanks::Always,
            };
            pieces(blanks, last["split"] != false)
        }
        [normalizer, splits] => bail!(
            "the tokenizer treats texts in a way that an image has no words for (normalizer: {normalizer:?}, pre-tokenizer: \
             {splits:?})"
        ),
    })
}

fn replaces_blanks(step: &Value) -> bool {
    step["pattern"]["String"] == " " && step["content"] == BLANK
}

/// The steps of a part of a `tokenizer.json`, whether they stand alone or in sequences.
fn steps(part: &Value) -> Vec<Value> {
    for list in ["normalizers", "pretokenizers", "decoders"] {
        if let Some(parts) = part[list].as_array() {
            return parts.iter().flat_map(steps).collect();
        }
    }
    if part.is_null() { Vec::new() } else { vec![part.clone()] }
}

fn entries(vocab: &Value) -> Result<HashMap<&str, u32>> {
    let vocab = vocab.as_object().context("the tokenizer has no vocabulary")?;
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    vocab.iter().map(|(t, v)| Ok((t.as_str(), id(v).context("a token's id is no number")?))).collect()
}

/// Added tokens, and those of them that decoding leaves out.
fn added(json: &Value, texts: &mut BTreeMap<u32, Vec<u8>>) -> Result<(Vec<u32>, Vec<u32>)> {
    let (mut added, mut special) = (Vec::new(), Vec::new());
    let normalizes = !json["normalizer"].is_null();
    for token in json["added_tokens"].as_array().into_iter().flatten() {
        let text = token["content"].as_str().unwrap_or_default();
        let id =
            token["id"].as_u64().and_then(|id| u32::try_from(id).ok()).context("an added token has no id")?;
        for flag in ["lstrip", "rstrip", "single_word"] {
            ensure!(token[flag] != true, "added token {text:?} has {flag}, which an image has no words for");
        }
        let after = normalizes && token["normalized"] == true;
        ensure!(
            !after,
            "added token {text:?} is looked for in normalised text, which an image has no words for"
        );
        ensure!(!text.is_empty(), "added token {id} has no text");
        texts.insert(id, text.as_bytes().to_vec());
        added.push(id);
        if token["special"] == true {
            special.push(id);
        }
    }
    Ok((added, special))
}

/// Where the merges of each left token begin, and all of them in this order.
fn merges(list: &Value, ids: &HashMap<&str, u32>, n: usize) -> Result<(Vec<u32>, Vec<Merge>)> {
    let mut merges = BTreeMap::new();
    let id = |text: &str| {
        ids.get(text).copied().with_context(|| format!("merges name {text:?}, which is no token"))
    };
    for (rank, pair) in list.as_array().into_iter().flatten().enumerate() {
        let (left, right) = match pair {
            Value::String(pair) => pair.split_once(' ').context("a merge is no pair")?,
            pair => (pair[0].as_str().unwrap_or_default(), pair[1].as_str().unwrap_or_default()),
        };
        let token = id(&format!("{left}{right}"))?;
        // Of two merges of one pair the later one counts, as where a map is filled.
        merges.insert((id(left)?, id(right)?), (rank as u32, token));
    }
    let mut starts = vec![0; n + 1];
    for (left, _) in merges.keys() {
        starts[*left as usize + 1] += 1;
    }
    for i in 0..n {
        starts[i + 1] += starts[i];
    }
    let merges = merges.into_iter().map(|((_, right), (rank, token))| Merge { right, rank, token }).collect();
    Ok((starts, merges))
}

/// Texts one behind the other, and where each ends.
fn flat(texts: &BTreeMap<u32, Vec<u8>>, n: usize) -> (Vec<u32>, Vec<u8>) {
    let (mut ends, mut all) = (Vec::new(), Vec::new());
    for id in 0..n as u32 {
        all.extend(texts.get(&id).into_iter().flatten());
        ends.push(all.len() as u32);
    }
    (ends, all)
}

fn byte_tokens(kind: Kind, ids: &HashMap<&str, u32>, byte_fallback: bool) -> Vec<u32> {
    let mut tokens = vec![NONE; 256];
    match kind {
        Kind::ByteLevel { .. } => {
            for (text, id) in ids {
                if let Some([byte]) = bytes_of(text).as_deref() {
                    tokens[usize::from(*byte)] = *id;
                }
            }
        }
        Kind::Pieces { .. } if byte_fallback => {
            for (byte, token) in tokens.iter_mut().enumerate() {
                *token = ids.get(format!("<0x{byte:02X}>").as_str()).copied().unwrap_or(NONE);
            }
        }
        Kind::Pieces { .. } => {}
    }
    tokens
}

fn bits(ids: &[u32], n: usize) -> Vec<u32> {
    let mut words = vec![0; n.div_ceil(32)];
    ids.iter().for_each(|id| words[*id as usize / 32] |= 1 << (id % 32));
    words
}

/// The characters of a class, as the expressions of `tokenizers` know them.
fn class(expression: &str) -> Result<Vec<Range>> {
    let parsed = regex_syntax::parse(expression)?;
    let regex_syntax::hir::HirKind::Class(regex_syntax::hir::Class::Unicode(class)) = parsed.kind() else {
        bail!("{expression} is no class of characters")
    };
    Ok(class.ranges().iter().map(|r| Range { first: r.start().into(), last: r.end().into() }).collect())
}

/// The bytes that a byte-level token stands for: GPT-2 shows printable bytes as themselves and moves the others, in their
/// order, behind U+0100.
fn bytes_of(token: &str) -> Option<Vec<u8>> {
    let shown = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let moved = |at: u32| (0..=u8::MAX).filter(|byte| !shown(byte)).nth(at as usize);
    let byte = |c: char| match u8::try_from(u32::from(c)) {
        Ok(byte) => Some(byte).filter(shown),
        Err(_) => moved(u32::from(c).checked_sub(0x100)?),
    };
    token.chars().map(byte).collect()
}
