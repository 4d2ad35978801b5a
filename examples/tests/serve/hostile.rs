//! Requests that were made to do harm: the server says no, stays small and goes on.

use super::server::Server;
use serde_json::{Value, json};
use std::path::Path;

/// What bodies are damaged with.
const SIGNS: &[u8] = b"0\"[]{},:-.ex\\\xff\0";

#[test]
fn what_multiplies_is_refused_before_it_is_made() {
    let server = Server::start(&[]);
    server.text(&json!({ "prompt": "a", "max_tokens": 1 }));
    let before = server.resident_bytes();
    let long = "x".repeat(1_000_000);
    for (body, param) in [
        // Each of these texts would have its own megabyte.
        (json!({ "prompt": vec!["a"; 100_000], "stop": long }), "stop"),
        (json!({ "prompt": "a", "n": 16, "stop": vec![&long[..100_000]; 16] }), "stop"),
        (json!({ "prompt": vec!["a"; 100_000], "n": 16 }), "n"),
        (json!({ "prompt": vec![vec![5]; 100_000] }), "n"),
        (json!({ "prompt": vec![5; 300_000] }), "prompt"),
        (json!({ "prompt": "a", "logit_bias": vec![json!({}); 300_000] }), "logit_bias"),
    ] {
        let reply = server.post("/v1/completions", &body);
        assert_eq!((reply.error().0, reply.error().2), (400, json!(param)), "{param}");
        assert!(reply.body.len() < 1000, "{param}: an answer of {} bytes", reply.body.len());
    }
    let grown = server.resident_bytes().saturating_sub(before);
    assert!(grown < 150_000_000, "{grown} bytes more");
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn damaged_bodies_are_refused_or_answered() {
    let folder = tempfile::tempdir().unwrap();
    let template = folder.path().join("t.jinja").display().to_string();
    std::fs::write(&template, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}").unwrap();
    let server = Server::start(&["--chat-template", &template, "--time-limit", "2"]);
    let message = json!([{ "role": "user", "content": [{ "type": "text", "text": "Once" }] }]);
    let bodies = [
        (
            "/v1/completions",
            json!({ "prompt": ["a", "b"], "max_tokens": 2, "stop": ["x"], "seed": 5, "logprobs": 1 }),
        ),
        (
            "/v1/completions",
            json!({ "prompt": [5, 7], "max_tokens": 2, "stream": true, "top_p": 0.5, "n": 2 }),
        ),
        (
            "/v1/chat/completions",
            json!({ "messages": message, "max_tokens": 2, "temperature": 0.5, "user": "é" }),
        ),
    ];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % n as u64) as usize
    };
    let (mut answered, mut refused) = (0, 0);
    for round in 0..600 {
        let (path, body) = &bodies[round % bodies.len()];
        let mut bytes = body.to_string().into_bytes();
        for _ in 0..=next(2) {
            let at = next(bytes.len());
            match next(7) {
                0 => bytes.truncate(at.max(1)),
                1 => bytes[at] = SIGNS[next(SIGNS.len())],
                2 => drop(bytes.remove(at)),
                3 => bytes.insert(at, bytes[at]),
                4 | 5 => bytes.insert(at, b' '),
                _ => bytes.splice(at..at, br#""n":1e3,"#.iter().copied()).for_each(drop),
            }
        }
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        );
        let request = [format!("{head}Content-Length: {}\r\n\r\n", bytes.len()).as_bytes(), &bytes].concat();
        let reply = server.raw(&request);
        let status: u16 = reply.get(9..12).and_then(|status| status.parse().ok()).unwrap_or_default();
        match status {
            200 => answered += 1,
            400 | 404 => refused += 1,
            _ => panic!("{status} for {}: {reply}", String::from_utf8_lossy(&bytes)),
        }
    }
    assert!(answered > 10 && refused > 100, "{answered} answered, {refused} refused");
    assert_eq!(server.wait_idle()["running"], Value::from(0));
}

/// What the fuzz target `requests` began with and has found.
#[test]
fn kept_bodies_are_refused_or_answered() {
    let folder = tempfile::tempdir().unwrap();
    let template = folder.path().join("t.jinja").display().to_string();
    std::fs::write(&template, "{% for m in messages %}{{ m.content }}{% endfor %}").unwrap();
    let server = Server::start(&["--chat-template", &template, "--time-limit", "2", "--name", "tiny"]);
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
    let folders = ["seeds/requests", "regressions/requests"].map(|name| fuzz.join(name));
    let kept = folders.iter().filter_map(|folder| std::fs::read_dir(folder).ok()).flatten();
    let (mut answered, mut all) = (0, 0);
    for path in kept.map(|entry| entry.unwrap().path()) {
        let body = std::fs::read(&path).unwrap();
        for url in ["/v1/completions", "/v1/chat/completions"] {
            let head = format!(
                "POST {url} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
            );
            let head = format!("{head}Content-Length: {}\r\n\r\n", body.len());
            let reply = super::server::reply(&server.raw(&[head.as_bytes(), &body].concat()));
            assert!([200, 400, 404].contains(&reply.status), "{}: {reply:?}", path.display());
            if reply.status != 200 {
                let message = reply.json()["error"]["message"].as_str().unwrap().to_string();
                assert!(message.len() < 1000 && !message.contains(char::is_control), "{message:?}");
            }
            (answered, all) = (answered + usize::from(reply.status == 200), all + 1);
        }
    }
    assert!(answered >= 5 && all > answered, "{answered} of {all} answered");
}
