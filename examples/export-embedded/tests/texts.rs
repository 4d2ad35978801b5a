//! The tables of an image against the tokenizer they were made of.

use crate::embedded::EMBEDDED;
use crate::vocabulary::{Vocabulary, room};
use candle_sparse_core::tokenizer::{TextStream, Tokenizer};
use candle_sparse_models::{
    files::ModelFiles,
    tokenizer::{self, prompt_tokens},
};
use std::path::PathBuf;

/// Every kind of character that a split or a fallback can treat otherwise.
const ALPHABET: &[&str] = &[
    "a",
    "e",
    "t",
    "the",
    " ",
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "\u{a0}",
    "\u{3000}",
    "\u{85}",
    "'s",
    "'ll",
    "'",
    "\"",
    ".",
    ",",
    "!?",
    "-",
    "0",
    "7",
    "42",
    "\u{660}",
    "\u{bd}",
    "\u{2167}",
    "\u{e9}",
    "\u{df}",
    "\u{e9}",
    "\u{301}",
    "\u{3b1}",
    "\u{436}",
    "\u{4f60}",
    "\u{3042}",
    "\u{ac00}",
    "\u{928}\u{92e}\u{94d}",
    "\u{1f600}",
    "\u{200d}",
    "\u{2581}",
    "<s>",
    "</s>",
    "<unk>",
    "<|im_start|>",
    "<0x0A>",
    "\u{0}",
    "\u{7f}",
    "A",
    "Once",
    " upon",
    "\u{1d400}",
    "\u{10ffff}",
];

fn random_text(seed: &mut u32) -> String {
    let mut next = |n: usize| {
        *seed ^= *seed << 13;
        *seed ^= *seed >> 17;
        *seed ^= *seed << 5;
        *seed as usize % n
    };
    (0..next(24)).map(|_| ALPHABET[next(ALPHABET.len())]).collect()
}

fn check(files: &ModelFiles, texts: &[String]) {
    let theirs = files.load_tokenizer().unwrap();
    let vocabulary = Vocabulary::new(&theirs, &[]).unwrap();
    let ours = Tokenizer::new(vocabulary.parts()).unwrap();
    for text in texts {
        let want = prompt_tokens(&theirs, text).unwrap();
        let (mut ids, mut ranks) = (vec![0; room(text)], vec![0; room(text)]);
        let n = ours.encode_prompt(text, &mut ids, &mut ranks).unwrap();
        assert_eq!(ids[..n], want, "{}: {text:?}", files.name);
        let (mut stream, mut said) = (TextStream::default(), String::new());
        let (mut their_stream, mut their_said) = (tokenizer::TextStream::new(&theirs), String::new());
        for &id in &want {
            stream.push(&ours, id, &mut said).unwrap();
            their_said += &their_stream.push(id);
            assert_eq!(said, their_said, "{}: {text:?}", files.name);
        }
        stream.finish(&mut said).unwrap();
        assert_eq!(said, their_said + &their_stream.finish(), "{}: {text:?}", files.name);
    }
}

#[test]
fn tokens_and_texts_equal_those_of_tokenizers() {
    let mut seed = 5;
    let mut texts: Vec<String> = (0..3000).map(|_| random_text(&mut seed)).collect();
    for page in [include_str!("../../../README.md"), include_str!("../../../ARCHITECTURE.md")] {
        texts.extend(page.split("\n\n").map(str::to_string));
    }
    let mut all: Vec<ModelFiles> = EMBEDDED.iter().map(ModelFiles::from_embedded).collect();
    all.extend(super::reference_models().iter().map(|path| ModelFiles::from_folder(path).unwrap()));
    // Another checkpoint or GGUF file, such as SmolLM2, where somebody names one.
    let named = std::env::var_os("CANDLE_SPARSE_TEST_TOKENIZER").map(PathBuf::from);
    all.extend(named.iter().map(|path| ModelFiles::local(path.to_str().unwrap()).unwrap().unwrap()));
    for files in &all {
        check(files, &texts);
    }
}
