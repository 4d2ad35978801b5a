//! Plain text in, training windows out: cleaning, the held-out split and the tokenizer.

use anyhow::{Context, Result, anyhow};
use std::path::{Path, PathBuf};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer};

use super::config::wrong;
use super::rng::Rng;

/// Token put in front of every text.
pub(crate) const BOS: &str = "<s>";
/// Token put at the end of every file.
pub(crate) const EOS: &str = "</s>";

/// The training and held-out part of each file, in the order given.
pub(crate) struct Corpus {
    /// Seen by the tokenizer and the model.
    pub(crate) train: Vec<String>,
    /// Seen by neither.
    pub(crate) heldout: Vec<String>,
}

impl Corpus {
    /// Reads, cleans and splits the files; the last `percent` of each is held out.
    pub(crate) fn read(files: &[PathBuf], percent: f64) -> Result<Self> {
        if !(percent > 0.0 && percent < 50.0) {
            return wrong(format!("--heldout-percent {percent} must lie between 0 and 50"));
        }
        let mut corpus = Self { train: vec![], heldout: vec![] };
        for file in files {
            let text = clean(&read_text(file)?);
            let (train, heldout) = split(&text, percent);
            if train.is_empty() || heldout.is_empty() {
                return wrong(format!("{} is too short to split", file.display()));
            }
            corpus.train.push(train.to_string());
            corpus.heldout.push(heldout.to_string());
        }
        Ok(corpus)
    }

    /// The held-out parts joined by an empty line.
    pub(crate) fn heldout_text(&self) -> String {
        self.heldout.join("\n\n") + "\n"
    }
}

fn read_text(file: &Path) -> Result<String> {
    let bytes = match std::fs::read(file) {
        Ok(bytes) => bytes,
        Err(err) => return wrong(format!("cannot read {}: {err}", file.display())),
    };
    match String::from_utf8(bytes) {
        Ok(text) => Ok(text),
        Err(_) => wrong(format!("{} is not UTF-8 text", file.display())),
    }
}

/// Cuts what Project Gutenberg puts around the text of a book.
fn strip_boilerplate(text: &str) -> String {
    let mark = |line: &str, word: &str| line.starts_with("***") && line.contains(word);
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.iter().position(|l| mark(l, "START OF")).map_or(0, |at| at + 1);
    let to = lines[from..].iter().position(|l| mark(l, "END OF"));
    lines[from..to.map_or(lines.len(), |at| from + at)].join("\n")
}

/// A line end is a hard wrap if the next word would not have fitted into this many columns.
const WRAP_COLUMNS: usize = 66;

fn is_wrap(line: &str, next: &str) -> bool {
    let word = next.split(' ').next().unwrap_or("").chars().count();
    !line.is_empty() && word > 0 && line.chars().count() + 1 + word > WRAP_COLUMNS
}

/// Unix line ends, straight quotes, paragraphs on one line, one empty line between them.
pub(crate) fn clean(text: &str) -> String {
    // Straight quotes are what a keyboard types, and both files then share their tokens.
    let text = strip_boilerplate(text.trim_start_matches('\u{feff}'))
        .replace(['‘', '’'], "'")
        .replace(['“', '”'], "\"");
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    let mut out = String::with_capacity(text.len());
    for (i, line) in lines.iter().enumerate() {
        if line.is_empty() && (out.is_empty() || out.ends_with("\n\n")) {
            continue;
        }
        out.push_str(line);
        let next = lines.get(i + 1).copied().unwrap_or("");
        out.push(if is_wrap(line, next) { ' ' } else { '\n' });
    }
    out.trim().to_string()
}

/// Cuts off the last `percent` of the text, at the first paragraph break inside it.
pub(crate) fn split(text: &str, percent: f64) -> (&str, &str) {
    let mut at = (text.len() as f64 * (1.0 - percent / 100.0)) as usize;
    while !text.is_char_boundary(at) {
        at += 1;
    }
    if let Some(gap) = text[at..].find("\n\n") {
        at += gap;
    }
    (text[..at].trim_end(), text[at..].trim_start())
}

/// `tokenizers` has its own boxed error type.
fn hf<T>(result: tokenizers::Result<T>) -> Result<T> {
    result.map_err(|err| anyhow!("tokenizer: {err}"))
}

/// Trains a byte-level BPE of `vocab_size` tokens that can encode any text.
pub(crate) fn train_tokenizer(texts: &[String], vocab_size: usize) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    tokenizer.with_decoder(Some(ByteLevel::new(false, true, true)));
    let special = [BOS, EOS].map(|token| AddedToken::from(token, true));
    let mut trainer = TrainerWrapper::from(
        BpeTrainer::builder()
            .vocab_size(vocab_size)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(special.to_vec())
            .show_progress(false)
            .build(),
    );
    hf(tokenizer.train(&mut trainer, texts.iter()))?;
    let found = tokenizer.get_vocab_size(true);
    if found != vocab_size {
        return wrong(format!("the text gives only {found} of {vocab_size} tokens: it is too short"));
    }
    let bos = token_id(&tokenizer, BOS)?;
    let template = TemplateProcessing::builder()
        .try_single(format!("{BOS} $A"))
        .and_then(|builder| builder.try_pair(format!("{BOS} $A $B")))
        .map_err(|err| anyhow!("tokenizer template: {err}"))?
        .special_tokens(vec![(BOS, bos)])
        .build()
        .context("tokenizer template")?;
    tokenizer.with_post_processor(Some(template));
    Ok(tokenizer)
}

/// The id of a special token.
pub(crate) fn token_id(tokenizer: &Tokenizer, token: &str) -> Result<u32> {
    tokenizer.token_to_id(token).with_context(|| format!("the tokenizer lacks {token}"))
}

/// The tokens of a text without special tokens.
pub(crate) fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    Ok(hf(tokenizer.encode(text, false))?.get_ids().to_vec())
}

/// The text of some tokens without special tokens.
pub(crate) fn decode(tokenizer: &Tokenizer, ids: &[u32]) -> Result<String> {
    hf(tokenizer.decode(ids, true))
}

/// `batch` windows of `len` tokens: what the model reads and what it has to predict.
pub(crate) struct Batch {
    /// Each row starts with `<s>`, as a prompt does.
    pub(crate) inputs: Vec<u32>,
    /// `inputs` moved by one token.
    pub(crate) targets: Vec<u32>,
}

/// Draws windows at random places of the token stream, which must be longer than `len`.
pub(crate) fn random_windows(stream: &[u32], bos: u32, batch: usize, len: usize, rng: &mut Rng) -> Batch {
    let mut out = Batch { inputs: vec![], targets: vec![] };
    for _ in 0..batch {
        let at = rng.below(stream.len() - len + 1);
        push_window(&mut out, &stream[at..at + len], bos);
    }
    out
}

/// One window as a batch of its own.
pub(crate) fn window(tokens: &[u32], bos: u32) -> Batch {
    let mut out = Batch { inputs: vec![], targets: vec![] };
    push_window(&mut out, tokens, bos);
    out
}

fn push_window(out: &mut Batch, tokens: &[u32], bos: u32) {
    out.inputs.push(bos);
    out.inputs.extend_from_slice(&tokens[..tokens.len() - 1]);
    out.targets.extend_from_slice(tokens);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_is_disjoint_and_complete() {
        let text: String = (0..200).map(|i| format!("Paragraph {i} é.\n\n")).collect();
        let text = clean(&text);
        let (train, heldout) = split(&text, 6.0);
        assert_eq!(format!("{train}\n\n{heldout}"), text);
        assert!(heldout.starts_with("Paragraph ") && !train.contains(heldout));
        let share = heldout.len() as f64 / text.len() as f64;
        assert!((0.04..=0.06).contains(&share), "{share}");
    }

    #[test]
    fn prose_is_joined_and_verse_is_kept() {
        let prose = "A certain king had a beautiful garden, and in the garden stood a tree\r\n\
                     which bore golden apples.\r\n\r\n\r\n\r\nFirst Citizen:\r\nSpeak, speak.\r\n";
        let want = "A certain king had a beautiful garden, and in the garden stood a tree \
                    which bore golden apples.\n\nFirst Citizen:\nSpeak, speak.";
        assert_eq!(clean(prose), want);
    }

    #[test]
    fn licence_text_is_cut() {
        let book = "Licence\n*** START OF THE BOOK ***\nOnce.\n*** END OF THE BOOK ***\nMore";
        assert_eq!(clean(book), "Once.");
        assert_eq!(clean("No marks"), "No marks");
    }

    #[test]
    fn tokenizer_round_trips_any_text() {
        let tokenizer = train_tokenizer(&["the king and the queen ".repeat(9)], 270).unwrap();
        for text in ["the king", " two  spaces\n\nand é 王 🦀 <b>", "\u{1}\t"] {
            let ids = encode(&tokenizer, text).unwrap();
            assert_eq!(decode(&tokenizer, &ids).unwrap(), text);
        }
        let ids = tokenizer.encode("the", true).unwrap();
        assert_eq!(ids.get_ids()[0], token_id(&tokenizer, BOS).unwrap());
    }

    #[test]
    fn windows_are_shifted_by_one() {
        let stream: Vec<u32> = (10..30).collect();
        let batch = random_windows(&stream, 0, 3, 8, &mut Rng::new(5));
        for (input, target) in batch.inputs.chunks(8).zip(batch.targets.chunks(8)) {
            assert_eq!(input[0], 0);
            assert_eq!(input[1..], target[..7]);
        }
    }
}
