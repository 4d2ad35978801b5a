//! Requests that cannot be answered: each is told what is wrong with it, and the server goes on.

use super::{
    common::{example, one_line, program},
    server::{Server, reply, request, tale},
};
use serde_json::{Value, json};

const JSON: [(&str, &str); 1] = [("Content-Type", "application/json")];

#[test]
fn a_wrong_request_is_told_what_is_wrong() {
    let server = Server::start(&[]);
    let cases: &[(Value, u16, &str, &str)] = &[
        (json!([1]), 400, "", ""),
        (json!({}), 400, "missing_required_parameter", "prompt"),
        (json!({ "prompt": null }), 400, "missing_required_parameter", "prompt"),
        (json!({ "prompt": 5 }), 400, "invalid_value", "prompt"),
        (json!({ "prompt": [] }), 400, "invalid_value", "prompt"),
        (json!({ "prompt": ["a", 5] }), 400, "invalid_value", "prompt[1]"),
        (json!({ "prompt": [5, 99999] }), 400, "invalid_value", "prompt"),
        (json!({ "prompt": [5, -1] }), 400, "invalid_value", "prompt"),
        (json!({ "prompt": "a ".repeat(3000) }), 400, "context_length_exceeded", "prompt"),
        (json!({ "prompt": "a", "model": "gpt-4" }), 404, "model_not_found", ""),
        (json!({ "prompt": "a", "temperature": -1 }), 400, "invalid_value", "temperature"),
        (json!({ "prompt": "a", "temperature": "hot" }), 400, "invalid_value", "temperature"),
        (json!({ "prompt": "a", "top_p": 1.5 }), 400, "invalid_value", "top_p"),
        (json!({ "prompt": "a", "n": 0 }), 400, "invalid_value", "n"),
        (json!({ "prompt": "a", "n": 1e9 }), 400, "invalid_value", "n"),
        (json!({ "prompt": "a", "max_tokens": -5 }), 400, "invalid_value", "max_tokens"),
        (json!({ "prompt": "a", "max_tokens": 2.5 }), 400, "invalid_value", "max_tokens"),
        (json!({ "prompt": "a", "stop": "" }), 400, "invalid_value", "stop"),
        (json!({ "prompt": "a", "stop": [1] }), 400, "invalid_value", "stop[0]"),
        (json!({ "prompt": "a", "stop": vec!["x"; 99] }), 400, "invalid_value", "stop"),
        (json!({ "prompt": "a", "seed": "x" }), 400, "invalid_value", "seed"),
        (json!({ "prompt": "a", "stream": 1 }), 400, "invalid_value", "stream"),
        (json!({ "prompt": "a", "logprobs": 6 }), 400, "invalid_value", "logprobs"),
        (json!({ "prompt": "a", "echo": true }), 400, "unsupported_parameter", "echo"),
        (json!({ "prompt": "a", "best_of": 3 }), 400, "unsupported_parameter", "best_of"),
        (json!({ "prompt": "a", "suffix": "b" }), 400, "unsupported_parameter", "suffix"),
        (json!({ "prompt": "a", "logit_bias": { "5": 1 } }), 400, "unsupported_parameter", "logit_bias"),
        (json!({ "prompt": "a", "temprature": 1 }), 400, "unsupported_parameter", "temprature"),
        (json!({ "prompt": "a", "stream_options": {} }), 400, "invalid_value", "stream_options"),
        (json!({ "messages": [] }), 400, "missing_required_parameter", "prompt"),
    ];
    for (body, status, code, param) in cases {
        let reply = server.post("/v1/completions", body);
        let param = if param.is_empty() { Value::Null } else { json!(param) };
        let body = body.to_string();
        assert_eq!(reply.error(), (*status, code.to_string(), param), "{}", &body[..body.len().min(99)]);
    }
    assert_eq!(server.post("/v1/completions", &tale("The king", 3, 1)).status, 200);
}

#[test]
fn a_wrong_conversation_is_told_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let template = folder.path().join("t.jinja").display().to_string();
    let source = "{% if messages[0].role == 'assistant' %}{{ raise_exception('users begin') }}{% endif %}\
        {% for m in messages %}{{ m.content }}{% endfor %}";
    std::fs::write(&template, source).unwrap();
    let server = Server::start(&["--chat-template", &template]);
    let hi = json!([{ "role": "user", "content": "hi" }]);
    let with = |field: &str, value: Value| {
        let mut body = json!({ "messages": hi, "max_tokens": 2 });
        body[field] = value;
        body
    };
    let message = |message: Value| json!({ "messages": [message] });
    let cases: &[(Value, &str, &str)] = &[
        (json!({ "prompt": "a" }), "missing_required_parameter", "messages"),
        (json!({ "messages": "hi" }), "invalid_value", "messages"),
        (json!({ "messages": [] }), "invalid_value", "messages"),
        (json!({ "messages": ["hi"] }), "invalid_value", "messages[0]"),
        (message(json!({ "content": "hi" })), "missing_required_parameter", "messages[0].role"),
        (message(json!({ "role": "user" })), "missing_required_parameter", "messages[0].content"),
        (message(json!({ "role": "tool", "content": "hi" })), "invalid_value", "messages[0].role"),
        (message(json!({ "role": "user", "content": 5 })), "invalid_value", "messages[0].content"),
        (
            message(json!({ "role": "user", "content": [{ "type": "image_url", "image_url": {} }] })),
            "unsupported_parameter",
            "messages[0].content[0].type",
        ),
        (
            message(json!({ "role": "user", "content": "hi", "name": "me" })),
            "unsupported_parameter",
            "messages[0].name",
        ),
        // What the template says.
        (message(json!({ "role": "assistant", "content": "hi" })), "invalid_value", "messages"),
        (message(json!({ "role": "user", "content": "" })), "invalid_value", "messages"),
        (with("tools", json!([{ "type": "function" }])), "unsupported_parameter", "tools"),
        (with("tool_choice", json!("required")), "unsupported_parameter", "tool_choice"),
        (
            with("response_format", json!({ "type": "json_object" })),
            "unsupported_parameter",
            "response_format",
        ),
        (with("top_logprobs", json!(2)), "invalid_value", "top_logprobs"),
        (with("presence_penalty", json!(1)), "unsupported_parameter", "presence_penalty"),
        (with("reasoning_effort", json!("low")), "unsupported_parameter", "reasoning_effort"),
        (with("stream_options", json!({ "include_usage": true })), "invalid_value", "stream_options"),
    ];
    for (body, code, param) in cases {
        let reply = server.post("/v1/chat/completions", body);
        assert_eq!(reply.error(), (400, code.to_string(), json!(param)), "{body}");
    }
    assert_eq!(server.post("/v1/chat/completions", &with("user", json!("me"))).status, 200);
    // Without a template nobody knows how a conversation is written.
    let server = Server::start(&[]);
    let reply = server.post("/v1/chat/completions", &json!({ "messages": hi }));
    assert_eq!(reply.error().1, "no_chat_template");
    assert!(reply.body.contains("--chat-template"), "{reply:?}");
}

#[test]
fn what_is_no_such_request_gets_the_same_shape() {
    let server = Server::start(&["--max-body", "0.01"]);
    let error = |reply: super::server::Reply| {
        let (status, code, _) = reply.error();
        (status, code)
    };
    let shape = |status: u16, code: &str| (status, code.to_string());
    assert_eq!(error(server.get("/v2/completions")), shape(404, "unknown_url"));
    assert_eq!(error(server.get("/v1/completions")), shape(405, "method_not_supported"));
    assert_eq!(error(server.request("DELETE", "/health", &[], "")), shape(405, "method_not_supported"));
    let post =
        |headers: &[(&str, &str)], body: &str| server.request("POST", "/v1/completions", headers, body);
    assert_eq!(error(post(&[], "{}")), shape(415, "unsupported_media_type"));
    assert_eq!(error(post(&[("Content-Type", "text/plain")], "{}")), shape(415, "unsupported_media_type"));
    for body in ["", "{", "{\"prompt\": \"a\"} more", "\u{0}", "nul", &"[".repeat(5000)] {
        assert_eq!(error(post(&JSON, body)), shape(400, "invalid_json"), "{body}");
    }
    let long = json!({ "prompt": "a".repeat(20_000) }).to_string();
    assert_eq!(error(post(&JSON, &long)), shape(413, "request_too_large"));
    // A length that nobody sends: refused before it comes.
    let head = request("POST", "/v1/completions", &JSON, "").replace("Length: 0", "Length: 99999999999");
    assert_eq!(error(reply(&server.raw(head.as_bytes()))), shape(413, "request_too_large"));
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn with_a_key_only_who_has_it_may_ask() {
    let server = Server::with_env(&[], &[("CANDLE_SPARSE_API_KEY", "s3cret")]);
    for path in ["/v1/models", "/metrics", "/stats"] {
        assert_eq!(server.get(path).error().1, "invalid_api_key", "{path}");
        for (key, status) in [
            ("Bearer s3cret", 200),
            ("Bearer s3cre", 401),
            ("Bearer s3cret2", 401),
            ("Bearer ", 401),
            ("Basic s3cret", 401),
            ("bearer s3cret", 200),
        ] {
            let reply = server.request("GET", path, &[("Authorization", key)], "");
            assert_eq!(reply.status, status, "{path} {key}");
        }
    }
    let reply = server.post("/v1/completions", &tale("The king", 3, 1));
    assert_eq!(reply.status, 401);
    assert!(reply.head.contains("www-authenticate: Bearer"), "{reply:?}");
    assert!(!server.get("/v1/models").body.contains("s3cret"));
    let server = Server::with_env(&[], &[("CANDLE_SPARSE_API_KEY", "s3cret,k3y")]);
    for (key, status) in [
        ("Bearer s3cret", 200),
        ("Bearer k3y", 200),
        ("Bearer s3cret,k3y", 401),
        ("Bearer k3", 401),
        ("Basic k3y", 401),
    ] {
        assert_eq!(server.request("GET", "/stats", &[("Authorization", key)], "").status, status, "{key}");
    }
    // The page asks for the key itself; who watches over the server needs none.
    assert_eq!((server.get("/").status, server.get("/health").status), (200, 200));
    for key in ["", "two words", "one,,two", "one, two", "one,"] {
        let out = program("serve").env("CANDLE_SPARSE_API_KEY", key).output().unwrap();
        let text = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(2), "{text}");
        assert!(text.contains("CANDLE_SPARSE_API_KEY must be"), "{text}");
    }
}

#[test]
fn pages_of_other_sites_are_kept_out() {
    let server = Server::start(&[]);
    let body = tale("The king", 2, 1).to_string();
    let from = |origin: &str| {
        server.request("POST", "/v1/completions", &[JSON[0], ("Origin", origin)], &body).status
    };
    for other in ["https://example.com", "null", "http://localhost.example.com", "http://127.0.0.1.nip.io"] {
        assert_eq!(from(other), 403, "{other}");
    }
    assert_eq!((from(&server.url()), from("http://localhost:1234")), (200, 200));
    assert!(!server.get("/v1/models").head.contains("access-control"));
}

#[test]
fn flags_that_make_no_sense_are_one_line() {
    for (args, needle) in [
        (&["--patience", "0"][..], "--patience 0"),
        (&["--grace=-1"], "--grace -1"),
        (&["--max-body", "0"], "--max-body 0"),
        (&["--max-connections", "0"], "--max-connections 0"),
        (&["--max-queued", "0"], "--max-queued 0"),
        (&["--client-share", "0"], "--client-share 0"),
        (&["--client-share", "1.5"], "--client-share 1.5"),
        (&["--max-sequences", "0"], "max_sequences"),
        (&["--prefix-mb=-1"], "--prefix-mb -1"),
        (&["--temperature=-1"], "--temperature -1"),
        (&["--chat-template", "/no/such"], "/no/such"),
        (&["--model", "no-such-model"], "tales-silu"),
    ] {
        one_line(&example("serve", &[&["--port", "0"], args].concat()), needle);
    }
    let server = Server::start(&[]);
    let port = server.address.port().to_string();
    one_line(&example("serve", &["--port", &port]), "cannot listen on 127.0.0.1");
}
