//! How byte-level tokenizers split texts before the merges: `tokenizer.ggml.pre`.

use super::{pieces::flat, wrong};
use crate::tokenizer::bytes_of;
use candle_core::Result;
use serde_json::Value;
use tokenizers::{
    NormalizerWrapper, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, PreTokenizerWrapper,
    SplitDelimiterBehavior,
    normalizers::NFC,
    pre_tokenizers::{
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

/// One way of splitting texts, as the `tokenizer.json` of its model has it.
#[derive(Debug)]
pub(crate) struct Splits {
    /// Its names in GGUF; files are written with the first.
    names: &'static [&'static str],
    steps: &'static [Step],
    /// Whether texts are composed (NFC) first; llama.cpp leaves that out.
    pub(crate) nfc: bool,
    /// What llama.cpp takes for granted: whole words are taken from the vocabulary.
    pub(crate) ignore_merges: bool,
    /// What llama.cpp takes for granted: a text begins with the first token.
    pub(crate) adds_bos: bool,
}

#[derive(Debug)]
enum Step {
    Regex(&'static str),
    Digits,
    /// GPT-2's own expression, as a part of the byte level.
    Words,
}

use Step::{Digits as D, Regex as R, Words as W};

const PLAIN: Splits = Splits { names: &[], steps: &[], nfc: false, ignore_merges: false, adds_bos: false };

const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same with letters written out, which some files have.
const CONTRACTIONS: [&str; 2] =
    ["(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"];
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK_LETTERS: &str = "\\s?[A-Za-z\u{b5}\u{c0}-\u{d6}\u{d8}-\u{f6}\u{f8}-\u{1ba}\u{1bc}-\u{1bf}\u{1c4}-\u{293}\u{295}-\u{2af}\u{370}-\u{373}\u{376}\u{377}\u{37b}-\u{37d}\u{37f}\u{386}\u{388}-\u{38a}\u{38c}\u{38e}-\u{3a1}\u{3a3}-\u{3f5}\u{3f7}-\u{481}\u{48a}-\u{52f}\u{531}-\u{556}\u{10a0}-\u{10c5}\u{13a0}-\u{13f5}\u{13f8}-\u{13fd}\u{1c90}-\u{1cba}\u{1cbd}-\u{1cbf}\u{1d00}-\u{1d2b}\u{1d6b}-\u{1d77}\u{1d79}-\u{1d9a}\u{1e00}-\u{1f15}\u{1f18}-\u{1f1d}\u{1f20}-\u{1f45}\u{1f48}-\u{1f4d}\u{1f50}-\u{1f57}\u{1f59}\u{1f5b}\u{1f5d}\u{1f5f}-\u{1f7d}\u{1f80}-\u{1fb4}\u{1fb6}-\u{1fbc}\u{1fbe}\u{1fc2}-\u{1fc4}\u{1fc6}-\u{1fcc}\u{1fd0}-\u{1fd3}\u{1fd6}-\u{1fdb}\u{1fe0}-\u{1fec}\u{1ff2}-\u{1ff4}\u{1ff6}-\u{1ffc}\u{2102}\u{2107}\u{210a}-\u{2113}\u{2115}\u{2119}-\u{211d}\u{2124}\u{2126}\u{2128}\u{212a}-\u{212d}\u{212f}-\u{2134}\u{2139}\u{213c}-\u{213f}\u{2145}-\u{2149}\u{214e}\u{2183}\u{2184}\u{2c00}-\u{2c7b}\u{2c7e}-\u{2ce4}\u{2ceb}-\u{2cee}\u{2cf2}\u{2cf3}\u{a640}-\u{a66d}\u{a680}-\u{a69b}\u{a722}-\u{a76f}\u{a771}-\u{a787}\u{a78b}-\u{a78e}\u{ab70}-\u{abbf}\u{fb00}-\u{fb06}\u{fb13}-\u{fb17}\u{ff21}-\u{ff3a}\u{ff41}-\u{ff5a}\u{10400}-\u{1044f}\u{104b0}-\u{104d3}\u{104d8}-\u{104fb}\u{10c80}-\u{10cb2}\u{10cc0}-\u{10cf2}\u{118a0}-\u{118df}\u{1e900}-\u{1e943}]+";
const DEEPSEEK_MARKS: &str =
    "\\s?[!-/:-~\u{ff01}-\u{ff0f}\u{ff1a}-\u{ff5e}\u{2018}-\u{201f}\u{3000}-\u{3002}]+";
const DEEPSEEK_IDEOGRAPHS: &str = "[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+";

/// All that are read and written. From [`llama_vocab::impl::load`], with the expressions of the models' own files.
///
/// [`llama_vocab::impl::load`]: https://github.com/ggml-org/llama.cpp/blob/00ad355e009e83abf98f96a6ded7193b95763681/src/llama-vocab.cpp
static KNOWN: [Splits; 10] = [
    Splits { names: &["smollm", "starcoder", "refact", "codeshell", "minerva-7b"], steps: &[D, W], ..PLAIN },
    Splits {
        names: &["gpt-2", "mpt", "olmo", "phi-2", "jais", "gigachat", "trillion"],
        steps: &[W],
        ..PLAIN
    },
    Splits { names: &["qwen2", "stablelm2", "hunyuan", "megrez"], steps: &[R(QWEN_2)], nfc: true, ..PLAIN },
    Splits { names: &["deepseek-r1-qwen"], steps: &[R(QWEN_2)], ..PLAIN },
    Splits {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "lfm2"],
        steps: &[R(LLAMA_3)],
        ignore_merges: true,
        adds_bos: true,
        ..PLAIN
    },
    Splits { names: &["smaug-bpe", "dbrx", "glm4", "chatglm-bpe"], steps: &[R(LLAMA_3)], ..PLAIN },
    Splits { names: &["tekken"], steps: &[R(TEKKEN)], ignore_merges: true, adds_bos: true, ..PLAIN },
    Splits {
        names: &["deepseek-llm"],
        steps: &[R("[\r\n]"), R(DEEPSEEK_LETTERS), R(DEEPSEEK_MARKS), R(r"\s+$"), R(DEEPSEEK_IDEOGRAPHS), D],
        ..PLAIN
    },
    Splits {
        names: &["deepseek-coder"],
        steps: &[R("[\r\n]"), R(r"\s?\p{L}+"), R(r"\s?\p{P}+"), R(DEEPSEEK_IDEOGRAPHS), D],
        ..PLAIN
    },
    Splits {
        names: &["deepseek-v3", "hunyuan-dense", "joyai-llm"],
        steps: &[
            R(r"\p{N}{1,3}"),
            R("[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+"),
            R(
                r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
            ),
        ],
        ..PLAIN
    },
];

impl Splits {
    /// By its name in GGUF.
    pub(super) fn named(name: &str) -> Option<&'static Self> {
        KNOWN.iter().find(|splits| splits.names.contains(&name))
    }

    /// The name that files are written with.
    pub(crate) fn name(&self) -> &'static str {
        self.names[0]
    }

    pub(super) fn normalizer(&self) -> Option<NormalizerWrapper> {
        self.nfc.then(|| NFC.into())
    }

    pub(super) fn pre_tokenizer(&self) -> Result<PreTokenizerWrapper> {
        let mut words = false;
        let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
        for step in self.steps {
            match step {
                Step::Regex(regex) => {
                    let pattern = SplitPattern::Regex((*regex).to_string());
                    steps.push(
                        Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(wrong)?.into(),
                    );
                }
                Step::Digits => steps.push(Digits::new(true).into()),
                Step::Words => words = true,
            }
        }
        steps.push(ByteLevel::new(false, true, words).into());
        Ok(Sequence::new(steps).into())
    }

    /// What a tokenizer does before its merges, of all that are known; `None`: something else. Of two that split alike the
    /// one is taken that treats the vocabulary so too.
    pub(crate) fn of(
        normalizer: Option<&NormalizerWrapper>,
        pre_tokenizer: Option<&PreTokenizerWrapper>,
        ignore_merges: bool,
    ) -> Result<Option<&'static Self>> {
        let (normalizers, found) = (steps(&normalizer)?, steps(&pre_tokenizer)?);
        let mut same = Vec::new();
        for splits in &KNOWN {
            if steps(&splits.normalizer())? == normalizers && steps(&splits.pre_tokenizer()?)? == found {
                same.push(splits);
            }
        }
        let exact = same.iter().find(|splits| splits.ignore_merges == ignore_merges);
        Ok(exact.or(same.first()).copied())
    }

    /// The way in which a vocabulary must have been made: the one of the usual four that splits most and leaves its tokens
    /// whole. `None`: too few tokens to tell, or none of the four.
    pub(super) fn recognise(texts: &[String]) -> Result<Option<&'static Self>> {
        let texts: Vec<String> = texts.iter().filter_map(|t| String::from_utf8(bytes_of(t)).ok()).collect();
        if texts.len() < FEWEST_TOKENS {
            return Ok(None);
        }
        for name in ["smollm", "gpt-2", "qwen2", "llama-bpe"] {
            let Some(splits) = Self::named(name) else { continue };
            let pre_tokenizer = splits.pre_tokenizer()?;
            let mut broken = 0;
            for text in &texts {
                let mut parts = PreTokenizedString::from(text.as_str());
                // A text that an expression gives up on is no token of its making.
                let failed = pre_tokenizer.pre_tokenize(&mut parts).is_err();
                let parts = parts.get_splits(OffsetReferential::Normalized, OffsetType::None);
                broken += usize::from(failed || parts.len() > 1);
                if broken * BROKEN_SHARE > texts.len() {
                    break;
                }
            }
            if broken * BROKEN_SHARE <= texts.len() {
                return Ok(Some(splits));
            }
        }
        Ok(None)
    }
}

/// A vocabulary of fewer tokens does not show how it was made.
const FEWEST_TOKENS: usize = 5000;
/// One token in so many may be there by other ways than by merges.
const BROKEN_SHARE: usize = 200;

/// The steps of a normalizer or pre-tokenizer.
fn steps(part: &impl serde::Serialize) -> Result<Vec<Value>> {
    let json = serde_json::to_value(part).map_err(wrong)?;
    Ok(flat(json).iter().map(bare).collect())
}

/// A step without what changes no token.
fn bare(step: &Value) -> Value {
    let mut step = step.clone();
    if let Some(fields) = step.as_object_mut() {
        fields.remove("trim_offsets");
        if let Some(Value::String(regex)) = fields.get_mut("pattern").and_then(|p| p.get_mut("Regex")) {
            *regex = regex.replace(CONTRACTIONS[1], CONTRACTIONS[0]);
        }
    }
    step
}
