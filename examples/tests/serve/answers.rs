//! What is answered: texts, pieces, probabilities, numbers.

use super::{
    common::ok,
    server::{Server, tale},
};
use serde_json::{Value, json};
use std::path::Path;

const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}\
    {% if add_generation_prompt %}assistant: {% endif %}";

/// A server that converses, and the file with its template.
fn chat_server(args: &[&str]) -> (Server, tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("chat.jinja");
    std::fs::write(&path, TEMPLATE).unwrap();
    let path = path.display().to_string();
    (Server::start(&[&["--chat-template", &path], args].concat()), folder, path)
}

/// What `llama-sparse` writes after a prompt.
fn alone(prompt: &str, tokens: usize, seed: u64, args: &[&str]) -> String {
    let (tokens, seed) = (tokens.to_string(), seed.to_string());
    let common = ["--prompt", prompt, "-n", &tokens, "--seed", &seed, "--json"];
    let text = ok("llama-sparse", &[&common, args].concat()).json()["text"].as_str().unwrap().to_string();
    text.strip_prefix(prompt).unwrap_or_else(|| panic!("{text}")).to_string()
}

/// In any company a text is the one that the program writes alone: nothing of one comes into another.
#[test]
fn texts_are_those_of_llama_sparse() {
    for args in
        [&[][..], &["--kv", "tiered", "--hot", "32", "--warm", "64"], &["--ffn", "dense", "--threads", "1"]]
    {
        let server = Server::start(args);
        let prompts = ["Once upon a time", "The king had three sons", "In the forest there lived a wolf who"];
        let cases: Vec<_> = (0..6).map(|i| (prompts[i % 3], 20 + 13 * i, i as u64)).collect();
        let together: Vec<String> = std::thread::scope(|scope| {
            let ask = |&(prompt, tokens, seed)| {
                let server = &server;
                scope.spawn(move || server.text(&tale(prompt, tokens, seed)))
            };
            let threads: Vec<_> = cases.iter().map(ask).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for (&(prompt, tokens, seed), text) in cases.iter().zip(&together) {
            assert_eq!(*text, alone(prompt, tokens, seed, args), "{prompt} {seed} {args:?}");
        }
        // Once more, now that what was read is held.
        assert_eq!(server.text(&tale(prompts[0], 20, 0)), together[0]);
    }
}

#[test]
fn a_conversation_is_that_of_llama_sparse() {
    let (server, _folder, template) = chat_server(&["--ffn", "dense"]);
    let args =
        ["--chat", "--chat-template", &template, "--ffn", "dense", "--seed", "7", "-n", "30", "--json"];
    let out = super::common::example_reading("llama-sparse", &args, "Who is the king?\n").json();
    let message = json!({ "role": "user", "content": "Who is the king?" });
    let body = json!({ "messages": [message], "max_completion_tokens": 30, "seed": 7 });
    let reply = server.post("/v1/chat/completions", &body).json();
    assert_eq!(reply["choices"][0]["message"]["content"], out["turns"][0]["text"], "{reply} {out}");
    assert_eq!(reply["usage"]["prompt_tokens"], out["turns"][0]["read"]);
    // The same message in parts, and what clients send back of an answer.
    let parts = json!([{ "type": "text", "text": "Who is " }, { "type": "text", "text": "the king?" }]);
    let body = json!({ "messages": [{ "role": "user", "content": parts, "name": null }], "max_tokens": 30, "seed": 7 });
    assert_eq!(server.post("/v1/chat/completions", &body).json()["choices"], reply["choices"]);
    let mut answer = reply["choices"][0]["message"].clone();
    answer["tool_calls"] = Value::Null;
    let more = json!({ "messages": [message, answer, message], "max_tokens": 5 });
    let second = server.post("/v1/chat/completions", &more);
    assert_eq!(second.status, 200, "{second:?}");
    assert!(second.json()["usage"]["prompt_tokens"].as_u64() > reply["usage"]["prompt_tokens"].as_u64());
}

/// The pieces of one choice.
fn joined(events: &[&str], index: usize, text: impl Fn(&Value) -> Option<&str>) -> String {
    let pieces = events.iter().filter(|data| **data != "[DONE]");
    let pieces: Vec<Value> = pieces.map(|data| serde_json::from_str(data).unwrap()).collect();
    let choices = pieces.iter().filter_map(|piece| piece["choices"].get(0));
    choices.filter(|choice| choice["index"] == index).filter_map(text).collect()
}

#[test]
fn a_stream_has_the_same_text_in_pieces() {
    let (server, _folder, _) = chat_server(&[]);
    let mut body = json!({ "messages": [{ "role": "user", "content": "Tell me of the wolf" }], "max_tokens": 25,
        "seed": 3, "n": 2 });
    let whole = server.post("/v1/chat/completions", &body).json();
    body["stream"] = true.into();
    body["stream_options"] = json!({ "include_usage": true });
    let reply = server.post("/v1/chat/completions", &body);
    assert!(
        reply.head.contains("text/event-stream") && reply.head.contains("x-accel-buffering: no"),
        "{reply:?}"
    );
    let events = reply.events();
    assert_eq!(events.last(), Some(&"[DONE]"));
    for index in 0..2 {
        let text = joined(&events, index, |choice| choice["delta"]["content"].as_str());
        assert_eq!(whole["choices"][index]["message"]["content"], text);
    }
    let piece = |i: usize| serde_json::from_str::<Value>(events[i]).unwrap();
    assert_eq!(piece(0)["choices"][0]["delta"]["role"], "assistant");
    assert_eq!((&piece(0)["object"], &piece(0)["usage"]), (&json!("chat.completion.chunk"), &Value::Null));
    let last = piece(events.len() - 2);
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], whole["usage"]["completion_tokens"]);

    let mut body = tale("The king", 25, 4);
    let whole = server.text(&body);
    body["stream"] = true.into();
    let reply = server.post("/v1/completions", &body);
    assert_eq!(joined(&reply.events(), 0, |choice| choice["text"].as_str()), whole);
    assert!(!reply.body.contains("usage"), "{reply:?}");
}

#[test]
fn several_answers_have_seeds_of_their_own() {
    let server = Server::start(&[]);
    let mut body = tale("The king", 15, 40);
    body["n"] = 3.into();
    body["prompt"] = json!(["The king", "The wolf"]);
    let reply = server.post("/v1/completions", &body).json();
    let choices = reply["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 6);
    for (i, choice) in choices.iter().enumerate() {
        let prompt = if i < 3 { "The king" } else { "The wolf" };
        assert_eq!(choice["text"], server.text(&tale(prompt, 15, 40 + (i % 3) as u64)), "{i}");
        assert_eq!(choice["index"], i);
    }
    let one = server.post("/v1/completions", &tale("The king", 15, 40)).json();
    let two = server.post("/v1/completions", &tale("The wolf", 15, 40)).json();
    let read = |reply: &Value| reply["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(read(&reply), read(&one) + read(&two));
    assert_eq!(reply["usage"]["completion_tokens"], 90);
    // Without a seed texts differ.
    let body = json!({ "prompt": "The king", "max_tokens": 30, "temperature": 1.5 });
    assert_ne!(server.text(&body), server.text(&body));
}

#[test]
fn a_text_ends_where_it_is_told_to() {
    let server = Server::start(&[]);
    let body = json!({ "prompt": "Once upon a time", "max_tokens": 40, "temperature": 0 });
    let whole = server.text(&body);
    let stop: String = whole.chars().skip(21).take(6).collect();
    let before = &whole[..whole.find(&stop).unwrap()];
    for stop in [json!(stop), json!(["nowhere", stop])] {
        let mut body = body.clone();
        body["stop"] = stop;
        let choice = server.post("/v1/completions", &body).json()["choices"][0].clone();
        assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(before), &json!("stop")));
        body["stream"] = true.into();
        let reply = server.post("/v1/completions", &body);
        assert_eq!(joined(&reply.events(), 0, |choice| choice["text"].as_str()), before);
    }
    // Where nothing is said, as many tokens as OpenAI writes.
    let reply = server.post("/v1/completions", &json!({ "prompt": "The sea", "temperature": 0 })).json();
    assert_eq!(reply["usage"]["completion_tokens"], 16);
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
}

#[test]
fn probabilities_are_told_with_the_text_they_belong_to() {
    let (server, _folder, _) = chat_server(&[]);
    let body = json!({ "prompt": "The king", "max_tokens": 12, "temperature": 0, "logprobs": 2 });
    let choice = server.post("/v1/completions", &body).json()["choices"][0].clone();
    let logprobs = &choice["logprobs"];
    let tokens: Vec<_> = logprobs["tokens"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    assert_eq!(tokens.len(), 12);
    assert_eq!(tokens.concat(), choice["text"].as_str().unwrap());
    assert_eq!(logprobs["text_offset"][1], tokens[0].chars().count());
    for (i, token) in tokens.iter().enumerate() {
        let (own, top) = (&logprobs["token_logprobs"][i], logprobs["top_logprobs"][i].as_object().unwrap());
        // The most likely token was taken.
        assert_eq!((top.len(), &top[*token]), (2, own));
        let sum: f64 = top.values().map(|p| p.as_f64().unwrap().exp()).sum();
        assert!(top.values().all(|p| p.as_f64() <= own.as_f64()) && sum > 0.0 && sum <= 1.0001, "{top:?}");
    }
    let mut body = json!({ "messages": [{ "role": "user", "content": "The king" }], "max_tokens": 6,
        "temperature": 0, "logprobs": true, "top_logprobs": 3 });
    let choice = server.post("/v1/chat/completions", &body).json()["choices"][0].clone();
    let content = choice["logprobs"]["content"].as_array().unwrap().clone();
    let bytes = content.iter().flat_map(|entry| entry["bytes"].as_array().unwrap());
    let bytes: Vec<u8> = bytes.map(|byte| byte.as_u64().unwrap() as u8).collect();
    assert_eq!(String::from_utf8(bytes).unwrap(), choice["message"]["content"].as_str().unwrap());
    assert!(content.iter().all(|entry| entry["top_logprobs"].as_array().unwrap().len() == 3), "{content:?}");
    body["stream"] = true.into();
    let reply = server.post("/v1/chat/completions", &body);
    let pieces = reply.events().into_iter().filter_map(|data| serde_json::from_str::<Value>(data).ok());
    let told =
        pieces.flat_map(|p| p["choices"][0]["logprobs"]["content"].as_array().cloned().unwrap_or_default());
    assert_eq!(told.collect::<Vec<_>>(), content);
}

#[test]
fn a_prompt_that_was_read_is_not_read_again() {
    let server = Server::start(&[]);
    let prompt = "The king had a daughter who was beautiful beyond all measure. ".repeat(12);
    let ask = || server.post("/v1/completions", &tale(&prompt, 5, 1)).json();
    let (first, second) = (ask(), ask());
    assert_eq!(first["choices"], second["choices"]);
    let cached = |reply: &Value| reply["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    let read = first["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(cached(&first) == 0 && 2 * cached(&second) > read, "{first} {second}");
}

#[test]
fn models_health_numbers_and_the_page_are_there() {
    let server = Server::start(&["--ffn", "cascade"]);
    assert_eq!(server.get("/v1/models").json()["data"][0]["id"], "tales-silu");
    assert_eq!(server.get("/v1/models/tales-silu").json()["object"], "model");
    assert_eq!(server.get("/v1/models/other/one").error().1, "model_not_found");
    assert_eq!(server.get("/health").json(), json!({ "status": "ok" }));
    server.text(&tale("The king", 20, 1));
    // Clients may make up addresses without end, and did above.
    for i in 0..9 {
        assert_eq!(server.get(&format!("/made/up/{i}")).status, 404);
    }
    let stats = server.wait_idle();
    assert_eq!(stats["tokens"]["written"], 20);
    let shares = stats["active_share"].as_array().unwrap();
    assert!(shares.len() == 4 && shares.iter().all(|s| s.as_f64().unwrap() < 1.0), "{stats}");
    let metrics = server.get("/metrics");
    assert!(metrics.head.contains("text/plain; version=0.0.4"), "{metrics:?}");
    for line in [
        "candle_sparse_tokens_written_total 20",
        "candle_sparse_requests_total{path=\"/v1/completions\",status=\"200\"} 1",
        "candle_sparse_requests_total{path=\"other\",status=\"404\"} 10",
        "candle_sparse_first_token_seconds_count 1",
        "candle_sparse_first_token_seconds_bucket{le=\"+Inf\"} 1",
        "candle_sparse_running 0",
    ] {
        assert!(metrics.body.lines().any(|l| l == line), "{line}: {}", metrics.body);
    }
    // Each line of numbers belongs to a name that was introduced.
    for line in metrics.body.lines().filter(|line| !line.starts_with('#')) {
        let name = line.split(['{', ' ']).next().unwrap();
        let name = ["_bucket", "_sum", "_count"].iter().fold(name, |n, end| n.strip_suffix(end).unwrap_or(n));
        assert!(metrics.body.contains(&format!("# TYPE {name} ")), "{line}");
        assert!(line.rsplit(' ').next().unwrap().parse::<f64>().is_ok(), "{line}");
    }
    let page = server.get("/");
    assert!(page.head.contains("content-security-policy: default-src 'none'"), "{}", page.head);
    let nonce = page.head.split("nonce-").nth(1).unwrap().split('\'').next().unwrap();
    assert_eq!(page.body.matches(nonce).count(), 2);
    assert!(
        !page.body.contains("NONCE") && !page.body.contains("http://") && !page.body.contains("https://")
    );
}

/// Its file stands beside the program.
#[test]
fn a_name_may_be_given() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/testdata/tales-relu");
    let server = Server::start(&["--model", &folder.display().to_string(), "--name", "a/b"]);
    assert_eq!(server.get("/v1/models/a/b").json()["id"], "a/b");
    let reply = server.post("/v1/completions", &json!({ "model": "a/b", "prompt": "The" }));
    assert_eq!((reply.status, &reply.json()["model"]), (200, &json!("a/b")));
}
