//! Whether a tokenizer came back as it was.

use candle_core::{Error, Result};
use candle_sparse::error::plain;
use std::collections::BTreeSet;
use tokenizers::{ModelWrapper, Tokenizer};

/// What tokenizers differ on: runs of blanks, digits, code, scripts, marks, line ends, emoji, composed and decomposed
/// letters, capitals.
const TEXTS: [&str; 26] = [
    "",
    " ",
    "Hello, world! It's what they'd said; I'll, WE'RE, don't.",
    " leading, trailing ",
    "a  b   c    d          e",
    "  two\n\n  lines\r\n\r\n\tand \t tabs \n ",
    "\n",
    "\n\n\n x",
    "1 12 123 1234 12345678901234567890",
    "Total =    42 + (  7) - 3.14e-10, 1,000,000 x2 a1b22c333",
    "\u{b2}\u{b3} \u{bd} \u{2167} \u{0664}\u{0665}\u{0666} \u{096a}\u{096b}",
    "fn main() {\n    let x: Vec<u8> = vec![0x1F; n];\n\tif x[0] != y { return; } // done\n}\n",
    "def f(self, *args): return {k: v for k, v in args.items() if k}  # ok\n",
    "SELECT * FROM \"t\" WHERE a<>'b' AND c>=-1;--x\n",
    "https://example.org/a_b/c-d?e=%20f&g=#h user@example.org C:\\dir\\file",
    "<html><b>&amp;</b></html> [INST] <<SYS>> {{x}} $y `z` ~~~ ***",
    "Grüße aus Köln, naïve façade, Ærøskøbing, İstanbul, ŁÓDŹ, ﬁ",
    "Cafe\u{301} e\u{301}\u{302} A\u{30a} \u{212b} n\u{303}o",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם مرحبا بالعالم",
    "नमस्ते दुनिया สวัสดีชาวโลก გამარჯობა Բարեւ",
    "你好，世界。漢字 かな カナ ｶﾅ 안녕하세요 한글",
    "🦀 👩\u{200d}👩\u{200d}👧 🇩🇪 ❤\u{fe0f} 🏳\u{fe0f}\u{200d}🌈!",
    "\u{2018}q\u{2019} \u{201c}q\u{201d} \u{2014} \u{2026} \u{ab}x\u{bb} \u{20ac}5 \u{a3}6 \u{b0}C \u{221e}\u{2260}\u{2264}",
    "\u{a0}no\u{2009}break\u{3000}space\u{200b}zero\u{feff}",
    "\u{2581}block \u{2581}\u{2581} \u{0} \u{7f} \u{fffd}",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa AAAA ____ ---- ==== .... !!!!?",
];

/// Refuses a tokenizer that gives other tokens, or another text for them, than the model's own. Tokens past `vocab_size` have no
/// place in a file; texts with them are left out.
pub(super) fn same_tokens(own: &Tokenizer, written: &Tokenizer, vocab_size: usize) -> Result<()> {
    for id in 0..u32::try_from(vocab_size).unwrap_or(u32::MAX) {
        let (a, b) = (own.id_to_token(id), written.id_to_token(id));
        if a != b {
            let text = |t: Option<String>| t.map_or("none".to_string(), |t| format!("'{t}'"));
            return differs(format!("token {id} would be {} instead of {}", text(b), text(a)));
        }
    }
    same_merges(own, written)?;
    let added = own.get_added_tokens_decoder();
    let around = added.values().flat_map(|token| {
        let t = &token.content;
        [t.clone(), format!("a{t}b"), format!("1 {t} 2"), format!("x\n{t}\n{t} y"), format!("{t}  z{t}")]
    });
    // A long list of reserved tokens says the same again and again.
    let around = around.take(MOST_ADDED * 5).collect::<Vec<_>>();
    for text in TEXTS.into_iter().chain(around.iter().map(String::as_str)) {
        same_text(own, written, vocab_size, text)?;
    }
    Ok(())
}

/// Added tokens whose surroundings are compared.
const MOST_ADDED: usize = 2000;

fn same_text(own: &Tokenizer, written: &Tokenizer, vocab_size: usize, text: &str) -> Result<()> {
    let shown = || text.escape_debug().to_string();
    for special in [true, false] {
        let ids = |t: &Tokenizer| t.encode(text, special).map(|e| e.get_ids().to_vec()).map_err(Error::wrap);
        let (a, b) = (ids(own)?, ids(written)?);
        if a.iter().any(|id| *id as usize >= vocab_size) {
            return Ok(());
        }
        if a != b {
            let at = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
            return differs(format!(
                "\"{}\" would be read as {:?} instead of {:?}, from token {at} on",
                shown(),
                &b[at..],
                &a[at..]
            ));
        }
        let texts = |t: &Tokenizer| t.decode(&a, special).map_err(Error::wrap);
        let (a, b) = (texts(own)?, texts(written)?);
        if a != b {
            return differs(format!("\"{}\" would be printed as \"{b}\" instead of \"{a}\"", shown()));
        }
    }
    Ok(())
}

/// No list of texts is long enough to show that merges are the same: they are compared themselves.
fn same_merges(own: &Tokenizer, written: &Tokenizer) -> Result<()> {
    let (a, b) = (merges(own)?, merges(written)?);
    let other = a.symmetric_difference(&b).next();
    match other {
        Some((left, right)) => {
            differs(format!("'{left}' and '{right}' are put together by one of them alone"))
        }
        None => Ok(()),
    }
}

/// Merges that make a token which can be made: a special one stands in a text before any merge.
fn merges(tokenizer: &Tokenizer) -> Result<BTreeSet<(String, String)>> {
    let ModelWrapper::BPE(_) = tokenizer.get_model() else { return Ok(BTreeSet::new()) };
    let json = serde_json::to_value(tokenizer.get_model()).map_err(Error::wrap)?;
    let added = tokenizer.get_added_vocabulary();
    let pair = |merge: &serde_json::Value| -> Option<(String, String)> {
        match merge {
            serde_json::Value::String(text) => text.split_once(' ').map(|(a, b)| (a.into(), b.into())),
            _ => Some((merge[0].as_str()?.into(), merge[1].as_str()?.into())),
        }
    };
    let all = json["merges"].as_array().into_iter().flatten().filter_map(pair);
    let byte = |t: &str| t.len() == 6 && t.starts_with("<0x") && t.ends_with('>');
    let made = |(a, b): &(String, String)| {
        !added.get_vocab().contains_key(&format!("{a}{b}"))
            && ![a, b].into_iter().any(|t| byte(t) || added.get_vocab().contains_key(t))
    };
    Ok(all.filter(made).collect())
}

fn differs<T>(how: String) -> Result<T> {
    Err(Error::Msg(plain(&format!("the tokenizer would not come back from a GGUF file as it is: {how}"))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn tokenizer(change: impl Fn(&mut Value)) -> Tokenizer {
        let mut bytes: Vec<char> =
            tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
        bytes.sort_unstable();
        let tokens = bytes.iter().map(ToString::to_string).chain(["12", "ab", "abc"].map(str::to_string));
        let vocab: serde_json::Map<String, Value> = tokens.zip(0..).map(|(t, id)| (t, json!(id))).collect();
        let mut json = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
            "added_tokens": [{
                "id": 259, "content": "<think>", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": false,
            }],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab,
                "merges": ["1 2", "a b", "ab c"],
            },
        });
        change(&mut json);
        Tokenizer::from_bytes(json.to_string()).unwrap()
    }

    #[test]
    fn a_difference_is_found_and_shown() {
        let own = tokenizer(|_| ());
        same_tokens(&own, &tokenizer(|_| ()), 260).unwrap();
        let digits = |json: &mut Value| {
            let level = json["pre_tokenizer"].take();
            json["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, level]});
        };
        type Case<'a> = (&'a str, &'a dyn Fn(&mut Value));
        let cases: [Case<'_>; 7] = [
            ("would be read as", &digits),
            ("would be read as", &|json| json["normalizer"] = json!({"type": "Lowercase"})),
            ("would be read as", &|json| json["added_tokens"][0]["rstrip"] = json!(true)),
            ("would be printed as", &|json| json["added_tokens"][0]["special"] = json!(true)),
            ("token 259 would be '<thunk>' instead of '<think>'", &|json| {
                json["added_tokens"][0]["content"] = json!("<thunk>");
            }),
            ("token 259 would be none instead of '<think>'", &|json| json["added_tokens"] = json!([])),
            ("'ab' and 'c' are put together", &|json| json["model"]["merges"] = json!(["1 2", "a b"])),
        ];
        for (needle, change) in cases {
            let error = same_tokens(&own, &tokenizer(change), 260).unwrap_err().to_string();
            assert!(error.contains(needle) && error.lines().count() == 1, "{needle}: {error}");
        }
    }
}
