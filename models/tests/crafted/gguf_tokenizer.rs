//! Tokenizers in the metadata of GGUF files.

use crate::{
    bounded,
    gguf::{ARRAY, F32, Header, I32, TEXT, U32, array, text, write},
    memory, refused,
};
use candle_sparse_models::gguf::{GgufFile, tokenizer::tokenizer};

/// A vocabulary of normal tokens whose scores are all 0.
fn pieces(tokens: &[String]) -> Header {
    let n = tokens.len() as u64;
    let texts: Vec<u8> = tokens.iter().flat_map(text).collect();
    let ones = 1_u32.to_le_bytes().repeat(tokens.len());
    Header::default()
        .value("tokenizer.ggml.model", TEXT, &text("llama"))
        .value("tokenizer.ggml.tokens", ARRAY, &array(TEXT, n, &texts))
        .value("tokenizer.ggml.scores", ARRAY, &array(F32, n, &vec![0; 4 * tokens.len()]))
        .value("tokenizer.ggml.token_type", ARRAY, &array(I32, n, &ones))
}

fn byte_level(tokens: &[String], merges: &[String]) -> Header {
    let list =
        |texts: &[String]| array(TEXT, texts.len() as u64, &texts.iter().flat_map(text).collect::<Vec<_>>());
    Header::default()
        .value("tokenizer.ggml.model", TEXT, &text("gpt2"))
        .value("tokenizer.ggml.pre", TEXT, &text("gpt-2"))
        .value("tokenizer.ggml.tokens", ARRAY, &list(tokens))
        .value("tokenizer.ggml.merges", ARRAY, &list(merges))
}

fn refuse(what: &str, header: &Header, needle: &str) {
    let (dir, bytes) = (tempfile::tempdir().unwrap(), header.bytes());
    let path = write(&dir, &bytes);
    refused(what, bytes.len(), needle, || tokenizer(GgufFile::open(&path)?.content()));
}

#[test]
fn pieces_that_are_put_together_in_every_way() {
    let _alone = memory::alone();
    // Of n blanks each piece is two others in n - 1 ways: n³ / 6 bytes of merges.
    let tokens: Vec<String> = (0..3000).map(|n| "a".repeat(n + 1)).collect();
    refuse("a, aa, aaa", &pieces(&tokens), "merges");
}

#[test]
fn many_pieces_of_many_lengths() {
    let _alone = memory::alone();
    // 4000 prefixes of different lengths, and long pieces that begin and end with many of them.
    let mut tokens: Vec<String> = (1..2000).map(|n| "a".repeat(n)).collect();
    tokens.extend((0..2000).map(|n| format!("{}b{}", "a".repeat(n), "a".repeat(8000 - n))));
    let bytes = pieces(&tokens).bytes();
    let dir = tempfile::tempdir().unwrap();
    let path = write(&dir, &bytes);
    let _ = bounded("lengths", bytes.len(), || tokenizer(GgufFile::open(&path)?.content()).map(drop));
}

#[test]
fn one_token_of_10_mb() {
    let _alone = memory::alone();
    let long = "ab".repeat(5_000_000);
    let tokens = ["a", "b", "ab"].map(String::from).into_iter().chain([long.clone()]).collect::<Vec<_>>();
    for header in [pieces(&tokens), byte_level(&tokens, &["a b".into(), format!("{long} a")])] {
        let (dir, bytes) = (tempfile::tempdir().unwrap(), header.bytes());
        let path = write(&dir, &bytes);
        let ids = bounded("10 MB", bytes.len(), || {
            let tokenizer = tokenizer(GgufFile::open(&path)?.content())?;
            Ok::<_, candle_core::Error>(tokenizer.encode("ab", false).map(|e| e.len()).unwrap_or(0))
        });
        if let Err(e) = ids {
            assert!(e.to_string().lines().next().unwrap().len() < 1000, "{e}");
        }
    }
    // A control token is looked for in every text: what finds it is many times as large.
    let types = [1_u32, 1, 1, 3].map(u32::to_le_bytes).concat();
    let header = byte_level(&tokens, &["a b".into()]).value(
        "tokenizer.ggml.token_type",
        ARRAY,
        &array(I32, 4, &types),
    );
    refuse("a control token of 10 MB", &header, "token 3");
}

#[test]
fn ids_and_kinds_out_of_range() {
    let _alone = memory::alone();
    let tokens = ["<unk>", "<s>", "</s>", "a"].map(String::from);
    for (key, id) in [("bos", u32::MAX), ("eos", 4), ("eot", 1 << 31), ("unknown", u32::MAX), ("eom", 4)] {
        let key = format!("tokenizer.ggml.{key}_token_id");
        refuse(&key, &pieces(&tokens).value(&key, U32, &id.to_le_bytes()), &key);
    }
    let header = byte_level(&tokens, &["a \u{1f600}".into()]);
    refuse("a merge of no token", &header, "GGUF metadata");
    refuse("a merge of one", &byte_level(&tokens, &["a".into()]), "no two tokens");
    refuse("twice", &byte_level(&["a", "a"].map(String::from), &[]), "both");
    let types = [99_u32; 4].map(u32::to_le_bytes).concat();
    let header = byte_level(&tokens, &[]).value("tokenizer.ggml.token_type", ARRAY, &array(I32, 4, &types));
    refuse("types", &header, "no type of token");
    let nested = "[".repeat(100_000);
    refuse(
        "own",
        &byte_level(&tokens, &[]).value("candle_sparse.tokenizer", TEXT, &text(nested)),
        "candle_sparse.tokenizer",
    );
}
