//! Chat templates against the Python reference, and conversations that are read once.
#![allow(clippy::unwrap_used, reason = "tests")]

use candle_core::quantized::gguf_file::Value;
use candle_sparse_models::chat::{Chat, ChatTemplate, Message, Turn, stop_tokens};
use std::{collections::HashMap, path::Path};
use tokenizers::{AddedToken, Tokenizer, models::bpe::BPE, pre_tokenizers::byte_level::ByteLevel};

const NAMES: [&str; 5] = ["llama-2", "llama-3", "mistral", "zephyr", "chatml"];

fn file(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/chat");
    std::fs::read_to_string(folder.join(name)).unwrap()
}

fn golden(name: &str) -> serde_json::Value {
    serde_json::from_str(&file(&format!("{name}.json"))).unwrap()
}

fn template(name: &str) -> ChatTemplate {
    let golden = golden(name);
    let token = |key: &str| golden[key].as_str().unwrap();
    ChatTemplate::new(&file(&format!("{name}.jinja")), token("bos_token"), token("eos_token")).unwrap()
}

fn jinja(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, "<s>", "</s>").unwrap()
}

fn rendered(source: &str) -> String {
    jinja(source).render(&[Message::user("a")], true).unwrap()
}

fn message(json: &serde_json::Value) -> Message {
    let text = |key: &str| json[key].as_str().unwrap().to_string();
    Message { role: text("role"), content: text("content") }
}

#[test]
fn templates_render_what_the_reference_renders() {
    for name in NAMES {
        let (template, golden) = (template(name), golden(name));
        let cases = golden["cases"].as_array().unwrap();
        assert!(cases.len() >= 26, "{name}");
        for case in cases {
            let messages: Vec<_> = case["messages"].as_array().unwrap().iter().map(message).collect();
            let text = template.render(&messages, case["add_generation_prompt"].as_bool().unwrap());
            match case["error"].as_str() {
                Some(error) => assert!(text.unwrap_err().to_string().ends_with(error), "{name}: {case}"),
                None => assert_eq!(text.unwrap(), case["text"].as_str().unwrap(), "{name}: {case}"),
            }
        }
    }
}

#[test]
fn the_environment_is_that_of_transformers() {
    assert_eq!(
        rendered("{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}"),
        "13"
    );
    assert_eq!(rendered("{{ 'a,b'.split(',')[-1] ~ ' c '.strip() ~ 'd'.startswith('d') }}"), "bcTrue");
    assert_eq!(rendered("{{ tools }} {{ tools is none }} {{ nothing is defined }}"), "None True False");
    assert_eq!(
        rendered("{{ [1, 'ü<&', none, {'b': 1.5, 'a': true}] | tojson }}"),
        r#"[1, "ü<&", null, {"b": 1.5, "a": true}]"#
    );
    assert_eq!(
        rendered("{{ messages | tojson(indent=2) }}"),
        "[\n  {\n    \"role\": \"user\",\n    \"content\": \"a\"\n  }\n]"
    );
    assert_eq!(
        rendered("{% if true %}\n  {% generation %}\n{{ 'x' }}\n{%- endgeneration -%}  y{% endif %}\n"),
        "xy"
    );
    assert_eq!(
        rendered("{{ tools is iterable and tools | length > 0 }} {{ [] is iterable }} {{ 'a' is iterable }}"),
        "False True True"
    );
    let year: u32 = rendered("{{ strftime_now('%Y') }}").parse().unwrap();
    assert!(year >= 2026);
    let error = |source: &str| jinja(source).render(&[], true).unwrap_err().to_string();
    assert_eq!(error("{{ raise_exception('no!') }}"), "the chat template refuses this conversation: no!");
    assert_eq!(
        error("{% macro m() %}{{ raise_exception('deep') }}{% endmacro %}{{ m() }}"),
        "the chat template refuses this conversation: deep"
    );
    assert!(error("{{ strftime_now('%') }}").contains("strftime"));
    assert!(error("{{ nothing.at.all }}").starts_with("the chat template fails: undefined"));
}

#[test]
fn one_liners_render_what_the_reference_renders() {
    let golden = golden("one-liners");
    let variables = golden["variables"].as_str().unwrap();
    let results = golden["results"].as_array().unwrap();
    assert!(results.len() > 350);
    let messages = [Message::system("Sys"), Message::user("Hello big world")];
    let mut wrong = Vec::new();
    for result in results {
        let line = result[0].as_str().unwrap().replace('⏎', "\n").replace('␍', "\r");
        let source = if result[1].as_bool().unwrap() { format!("{variables}{line}") } else { line };
        let text = ChatTemplate::new(&source, "<s>", "</s>").and_then(|t| t.render(&messages, true));
        if text.as_ref().ok().map(String::as_str) != result[2].as_str() {
            wrong.push(format!("{}\n  wanted {}\n  got {text:?}", result[0], result[2]));
        }
    }
    assert!(wrong.is_empty(), "{} of {} differ:\n{}", wrong.len(), results.len(), wrong.join("\n"));
}

#[test]
fn what_jinja_has_and_we_have_not_fails_by_name() {
    for (source, needle) in [
        ("{{ 'a'|wordwrap(3) }}", "wordwrap"),
        ("{{ 'a'.encode() }}", "encode"),
        ("{{ [1].append(2) }}", "`append` changes a list"),
        ("{% autoescape true %}{% endautoescape %}", "autoescape"),
        ("{% do [1].append(2) %}", "`do`"),
        ("{{ lipsum() }}", "lipsum"),
        ("{{ '\\N{BULLET}' }}", "\\N"),
        ("{{ 2 ** 200 }}", "2 ** 200"),
        ("{{ 'a'|split }}", "split"),
        ("{{ 'a'|__add('b') }}", "__add"),
    ] {
        let text = ChatTemplate::new(source, "", "").and_then(|template| template.render(&[], true));
        let error = text.expect_err(source).to_string();
        assert!(error.contains(needle) && error.lines().count() == 1, "{source}: {error}");
    }
}

#[test]
fn a_template_makes_no_more_than_its_share_of_memory() {
    let twice = |step: &str| {
        format!(
            "{{% set ns = namespace(s='xxxx', l=[1]) %}}{{% for i in range(99) %}}{{% set {step} %}}{{% endfor %}}"
        )
    };
    let text = "y".repeat(10_000);
    for source in [
        "{{ 'x' * 10**9 }}".to_string(),
        "{{ 'a'.ljust(10**9) }}{{ 'a'|center(10**9) }}".to_string(),
        "{{ 'a\\n'|indent(10**9) }}".to_string(),
        "{{ [0] * 10**12 }}".to_string(),
        "{{ [0]|batch(10**12, 'x')|list }}".to_string(),
        twice("ns.s = ns.s ~ ns.s"),
        twice("ns.s = [ns.s, ns.s]|join"),
        twice("ns.l = ns.l + ns.l"),
        twice("ns.s = ns.s|replace('xx', 'xxxx')"),
        format!("{{% set x %}}{{% for i in range(100000) %}}{text}{{% endfor %}}{{% endset %}}"),
    ] {
        let error = jinja(&source).render(&[], true).unwrap_err().to_string();
        assert!(error.contains("more than 48 MB of text"), "{source}: {error}");
    }
    for (source, needle) in [
        ("{{ '%99999999d' | format(1) }}".to_string(), "a field of more than"),
        ("{{ '{:{}}'.format(1, 99999999) }}".to_string(), "a field of more than"),
        ("{{ 1|tojson(indent=10**9) }}".to_string(), "indent"),
        ("{{ range(10**6) }}".to_string(), "range"),
        ("{% set ns = namespace() %}{% set ns.a = [ns] %}{{ ns == ns }}".to_string(), "a namespace"),
        (twice("ns.l = [ns.l]"), "nests too deep"),
        ("{% set l = [0] * 1100000 %}".to_string(), "too many parts"),
    ] {
        let error = jinja(&source).render(&[], true).unwrap_err().to_string();
        assert!(error.contains(needle) && error.lines().count() == 1, "{source}: {error}");
    }
    for long in
        [format!("{{{{ {}1 }}}}", "(".repeat(100_000)), format!("{{{{ 1{} }}}}", "+1".repeat(100_000))]
    {
        let error = ChatTemplate::new(&long, "", "").unwrap_err().to_string();
        assert!(error.contains("an expression") || error.contains("no end"), "{error}");
    }
}

#[test]
fn a_template_comes_to_an_end() {
    let endless = "{% for a in range(10000) %}{% for b in range(10000) %}{{ a * b }}{% endfor %}{% endfor %}";
    let error = jinja(endless).render(&[], true).unwrap_err().to_string();
    assert!(error.contains("fuel") && error.lines().count() == 1, "{error}");
    let error = ChatTemplate::new("a\n{% for x %}", "", "").unwrap_err().to_string();
    assert!(error.contains("cannot be read") && error.contains(":2"), "{error}");
}

#[test]
fn the_template_is_found_where_the_hub_has_it() {
    let one = |config: &str, jinja: Option<&[u8]>| {
        let template = ChatTemplate::from_tokenizer_config(config.as_bytes(), jinja).unwrap();
        template.map(|t| t.render(&[], false).unwrap())
    };
    let config = r#"{"chat_template": "{{ bos_token }}|{{ eos_token }}", "bos_token": {"content": "<s>", "lstrip": false},
        "eos_token": "</s>", "model_max_length": 1000000000000000019884624838656}"#;
    assert_eq!(one(config, None).unwrap(), "<s>|</s>");
    assert_eq!(one(config, Some(b"file {{ eos_token }}")).unwrap(), "file </s>");
    assert_eq!(one(r#"{"bos_token": null, "chat_template": null}"#, None), None);
    let named =
        r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#;
    assert_eq!(one(named, None).unwrap(), "d");
    for (config, needle) in [
        (r#"{"chat_template": [{"name": "rag", "template": "r"}]}"#, "'rag' is called 'default'"),
        (r#"{"chat_template": "{% if"}"#, "cannot be read"),
        ("[", "tokenizer_config.json"),
        (r#"{"chat_template": 3}"#, "tokenizer_config.json"),
    ] {
        let error = ChatTemplate::from_tokenizer_config(config.as_bytes(), None).unwrap_err().to_string();
        assert!(error.contains(needle), "{error}");
    }
    assert!(ChatTemplate::from_tokenizer_config(b"{}", Some(b"\xff")).is_err());
}

#[test]
fn the_template_is_found_in_gguf_metadata() {
    let text = |s: &str| Value::String(s.to_string());
    let with = |changes: &[(&str, Value)]| {
        let mut metadata = HashMap::from([
            ("tokenizer.chat_template".to_string(), text("{{ bos_token }}{{ eos_token }}")),
            ("tokenizer.ggml.tokens".to_string(), Value::Array(vec![text("?"), text("<s>"), text("</s>")])),
            ("tokenizer.ggml.bos_token_id".to_string(), Value::U32(1)),
            ("tokenizer.ggml.eos_token_id".to_string(), Value::I64(2)),
        ]);
        metadata.extend(changes.iter().map(|(key, value)| ((*key).to_string(), value.clone())));
        ChatTemplate::from_gguf(&metadata)
    };
    assert_eq!(with(&[]).unwrap().unwrap().render(&[], true).unwrap(), "<s></s>");
    for (key, value, needle) in [
        (
            "tokenizer.ggml.bos_token_id",
            Value::U32(3),
            "3 tokens, none with id 3 (`tokenizer.ggml.bos_token_id`)",
        ),
        ("tokenizer.ggml.eos_token_id", text("2"), "`tokenizer.ggml.eos_token_id` is not the id"),
        ("tokenizer.ggml.tokens", Value::Array(vec![Value::U8(1); 9]), "token 1 of `tokenizer.ggml.tokens`"),
        ("tokenizer.chat_template", Value::U8(1), "`tokenizer.chat_template` is not a string"),
    ] {
        let error = with(&[(key, value)]).unwrap_err().to_string();
        assert!(error.contains(needle), "{error}");
    }
    assert!(ChatTemplate::from_gguf(&HashMap::new()).unwrap().is_none());
}

/// Three turns; the text that a model read and wrote, and the template's own rendering of it all.
fn conversation(template: &ChatTemplate, answers: [&str; 2], fed_end: Option<&str>) -> (String, String) {
    let mut chat = Chat::new(template.clone(), None);
    let mut read = String::new();
    for (user, answer) in ["What is the sea?", " And a lake? "].into_iter().zip(answers) {
        let turn = chat.say(user).unwrap();
        assert!(turn.continues, "{turn:?}");
        read = read + &turn.text + answer + fed_end.unwrap_or_default();
        chat.answered(answer, fed_end);
    }
    let last = chat.say("Grüße 🦀").unwrap();
    assert!(last.continues, "{last:?}");
    (read + &last.text, template.render(chat.messages(), true).unwrap())
}

fn filled(text: &str) -> String {
    text.split_whitespace().collect()
}

#[test]
fn what_was_said_is_not_read_again() {
    for name in NAMES {
        let template = template(name);
        for answers in
            [["Salt water.", "Sweet water."], [" Salt water. \n", "\n\nSweet.  "], ["", " "], ["</s>", "a b"]]
        {
            let (read, whole) = conversation(&template, answers, None);
            assert_eq!(filled(&read), filled(&whole), "{name}");
        }
        // Where the template leaves the answers as they are, so do the turns.
        let (read, whole) = conversation(&template, [" Salt\n", "Sweet "], None);
        assert_eq!(read == whole, matches!(name, "mistral" | "zephyr" | "chatml"), "{name}");
    }
}

#[test]
fn an_end_token_that_was_fed_is_not_fed_again() {
    for (name, end) in [
        ("llama-2", "</s>"),
        ("llama-3", "<|eot_id|>"),
        ("mistral", "</s>"),
        ("zephyr", "</s>"),
        ("chatml", "<|im_end|>"),
    ] {
        for answers in [["Salt water.", "Sweet"], [" Salt water. ", "\n"]] {
            let (read, whole) = conversation(&template(name), answers, Some(end));
            assert_eq!(filled(&read), filled(&whole), "{name}");
        }
    }
}

#[test]
fn a_history_that_is_rendered_otherwise_is_read_again() {
    // Thoughts before an answer are dropped once it is history.
    let source =
        "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}{% endfor %}<assistant>";
    let mut chat = Chat::new(jinja(source), Some("s"));
    assert_eq!(chat.say("a").unwrap().text, "<system>s<user>a<assistant>");
    chat.answered("hm</think>b", None);
    let turn = chat.say("c").unwrap();
    let whole = "<system>s<user>a<assistant>b<user>c<assistant>";
    assert_eq!((turn.text.as_str(), turn.continues), (whole, false));
    chat.answered("d", None);
    let turn = chat.say("e").unwrap();
    assert_eq!((turn.text.as_str(), turn.continues), ("<user>e<assistant>", true));
}

#[test]
fn a_refused_message_leaves_the_conversation_as_it_was() {
    let source = "{% for m in messages %}{{ raise_exception('bad') if m.content == 'bad' }}{{ m.content }}>{% endfor %}";
    let mut chat = Chat::new(jinja(source), None);
    chat.say("a").unwrap();
    let error = chat.say("bad").unwrap_err().to_string();
    assert!(error.contains("refuses"), "{error}");
    assert_eq!(chat.messages(), [Message::user("a")]);
    chat.answered("b", None);
    assert_eq!(chat.say("c").unwrap().text, ">c>");
    let error = Chat::new(template("mistral"), Some("s")).say("a").unwrap_err().to_string();
    assert!(error.contains("refuses"), "{error}");
}

#[test]
fn a_turn_that_was_not_answered_can_be_said_again() {
    for name in NAMES {
        let mut chat = Chat::new(template(name), None);
        let failed = chat.say("A").unwrap();
        assert_eq!(chat.say("A").unwrap(), failed, "{name}");
        let first = chat.say("B").unwrap();
        assert!(
            first.text.contains('B') && !first.text.contains('A'),
            "{name}: the model has not read the failed turn"
        );
        chat.answered("b", None);
        let lost = chat.say("C").unwrap();
        assert!(lost.continues && lost.text.contains('C'), "{name}");
        let second = chat.say("D").unwrap();
        assert!(
            second.continues && second.text.contains('D') && !second.text.contains('C'),
            "{name}: {second:?}"
        );
        assert_eq!(chat.messages(), [Message::user("B"), Message::assistant("b"), Message::user("D")]);
    }
    // A history that had to be read again, and was not.
    let source = "{% for m in messages %}<{{ m.content.split('.')[-1] }}>{% endfor %}";
    let mut chat = Chat::new(jinja(source), None);
    chat.say("a").unwrap();
    chat.answered("hm.b", None);
    for _ in 0..2 {
        let turn = chat.say("c").unwrap();
        assert_eq!((turn.text.as_str(), turn.continues), ("<a><b><c>", false));
    }
}

/// Bytes, a merge of two blanks, and special tokens.
fn tokenizer(special: &[&str]) -> Tokenizer {
    let mut alphabet: Vec<_> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let mut vocab: Vec<_> = alphabet.iter().map(ToString::to_string).collect();
    vocab.push("\u{120}\u{120}".to_string());
    let vocab: tokenizers::models::bpe::Vocab = vocab.into_iter().zip(0..).collect();
    let merges = vec![("\u{120}".to_string(), "\u{120}".to_string())];
    let bpe = BPE::builder().vocab_and_merges(vocab, merges).build().unwrap();
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, false, false)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    tokenizer.add_special_tokens(special.iter().map(|s| AddedToken::from(*s, true))).unwrap();
    tokenizer
}

#[test]
fn what_a_template_writes_behind_an_answer_ends_answers() {
    let tokenizer = tokenizer(&["<s>", "</s>", "<|im_end|>", "<|im_start|>", "<|im", "<|eot_id|>"]);
    let id = |text: &str| tokenizer.token_to_id(text).unwrap();
    for (name, end) in [
        ("llama-2", "</s>"),
        ("llama-3", "<|eot_id|>"),
        ("mistral", "</s>"),
        ("zephyr", "</s>"),
        ("chatml", "<|im_end|>"),
    ] {
        assert_eq!(stop_tokens(&tokenizer, &template(name)), [id(end)], "{name}");
    }
    assert_eq!(stop_tokens(&tokenizer, &jinja("{{ messages[1].content }} and more")), [0_u32; 0]);
    // A template for one turn alone.
    let once = "{{ raise_exception('one') if messages | length > 2 }}{{ messages[1].content }}</s>";
    assert_eq!(stop_tokens(&tokenizer, &jinja(once)), [id("</s>")]);
}

#[test]
fn turns_are_encoded_as_in_the_middle_of_a_text() {
    let mut tokenizer = tokenizer(&["<s>", "</s>"]);
    let decode = |tokenizer: &Tokenizer, turn: &Turn| {
        let ids = turn.encode(tokenizer).unwrap();
        (ids.len(), tokenizer.decode(&ids, false).unwrap())
    };
    let source = "{% for m in messages %}{{ m.content }}  {% endfor %}";
    let mut chat = Chat::new(jinja(source), None);
    let first = chat.say("a").unwrap();
    assert_eq!(decode(&tokenizer, &first), (2, "a  ".to_string()));
    chat.answered("b", None);
    assert_eq!(decode(&tokenizer, &chat.say("c").unwrap()), (3, "  c  ".to_string()));
    // The answer's blank and the template's would be one token: they are not, for the answer's was read.
    chat.answered("d ", None);
    assert_eq!(decode(&tokenizer, &chat.say("e").unwrap()), (3, "  e  ".to_string()));
    // What the tokenizer writes at the start of a text is there once, at the start.
    let start = tokenizers::processors::template::TemplateProcessing::builder()
        .try_single("<s> $A </s>")
        .unwrap()
        .special_tokens(vec![("<s>", tokenizer.token_to_id("<s>").unwrap()), ("</s>", 999)])
        .build()
        .unwrap();
    tokenizer.with_post_processor(Some(start));
    assert_eq!(decode(&tokenizer, &first), (3, "<s>a  ".to_string()));
    let own = Chat::new(jinja("<s>{{ messages[0].content }}"), None).say("a").unwrap();
    assert_eq!(decode(&tokenizer, &own), (2, "<s>a".to_string()));
    chat.answered("f", None);
    assert_eq!(decode(&tokenizer, &chat.say("g").unwrap()), (3, "  g  ".to_string()));
}
