//! Programs of others before and behind the server: OpenAI's Python client, a browser, nginx.
//!
//! They want `CANDLE_SPARSE_TEST_CLIENTS`, a Python that has the package `openai`, and Debian's `chromium-driver` and `nginx-light`.

use super::server::{Server, reply, request, rest, wait};
use serde_json::{Value, json};
use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command},
};

const SKIPPED: &str = "skipped: CANDLE_SPARSE_TEST_CLIENTS names no Python with OpenAI's client";

/// The Python to use, where these tests are wanted.
fn python() -> Option<PathBuf> {
    std::env::var_os("CANDLE_SPARSE_TEST_CLIENTS").map(PathBuf::from)
}

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("serve/test").join(name)
}

/// A server that converses and wants a key.
fn chat_server(folder: &Path, level: &str) -> Server {
    let template = folder.join("chat.jinja");
    let source = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}\
        {% if add_generation_prompt %}assistant: {% endif %}";
    fs::write(&template, source).unwrap();
    let args = ["--chat-template", template.to_str().unwrap(), "--sample-len", "300", "--threads", "1"];
    Server::with_env(&args, &[("CANDLE_SPARSE_API_KEY", "s3cret"), ("CANDLE_SPARSE_LEVEL", level)])
}

fn succeeds(command: &mut Command) {
    let out = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(out.status.success(), "{command:?}: {}{}", text(&out.stdout), text(&out.stderr));
}

#[test]
fn the_official_client_is_served() {
    let Some(python) = python() else {
        println!("{SKIPPED}");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let server = chat_server(folder.path(), "");
    succeeds(Command::new(python).arg(file("openai_client.py")).args([&server.url(), "s3cret"]));
    // The client that stopped reading.
    wait("nothing runs", || {
        let stats = server.request("GET", "/stats", &[("Authorization", "Bearer s3cret")], "").json();
        (stats["running"] == 0).then_some(())
    });
}

#[test]
fn the_page_works_in_a_browser() {
    let Some(python) = python() else {
        println!("{SKIPPED}");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    // Slow enough for a click on Stop.
    let server = chat_server(folder.path(), "scalar");
    let plain = Server::start(&[]);
    succeeds(Command::new(python).arg(file("page.py")).args([&server.url(), "s3cret", &plain.url()]));
}

/// Rude clients of many kinds from a few addresses, and an ordinary one from another.
#[test]
#[cfg(target_os = "linux")]
fn a_crowd_neither_fills_the_memory_nor_keeps_others_out() {
    let Some(python) = python() else {
        println!("{SKIPPED}");
        return;
    };
    let server = Server::start(&["--patience", "3", "--client-share", "0.5"]);
    let pid = server.id().to_string();
    let args = ["--clients", "100", "--from", "3", "--seconds", "12", "--patience", "3", "--mb", "200"];
    succeeds(Command::new(python).arg(file("abuse.py")).args([&server.url(), "--pid", &pid]).args(args));
}

/// nginx with the configuration that the documentation gives, for these replicas.
struct Nginx {
    child: Child,
    address: SocketAddr,
    _folder: tempfile::TempDir,
}

impl Nginx {
    fn start(replicas: [&Server; 2]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        // A port that is free now.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut config = fs::read_to_string(file("nginx.conf")).unwrap();
        let ports = [("8080", address), ("8081", replicas[0].address), ("8082", replicas[1].address)];
        for (port, to) in ports {
            config = config.replace(&format!("127.0.0.1:{port}"), &to.to_string());
        }
        fs::write(folder.path().join("nginx.conf"), config).unwrap();
        let mut command = Command::new("nginx");
        command.arg("-p").arg(folder.path()).args(["-e", "stderr", "-c", "nginx.conf"]);
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        wait("nginx listens", || TcpStream::connect(address).ok());
        Self { child, address, _folder: folder }
    }

    fn connect(&self, session: &str, body: &Value) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        let headers = [("Content-Type", "application/json"), ("X-Session", session)];
        let headers = if session.is_empty() { &headers[..1] } else { &headers };
        stream.write_all(request("POST", "/v1/completions", headers, &body.to_string()).as_bytes()).unwrap();
        stream
    }

    fn ask(&self, session: &str, body: &Value) -> Value {
        let reply = reply(&rest(&mut self.connect(session, body)));
        assert_eq!(reply.status, 200, "{reply:?}");
        reply.json()
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // Its workers end with it where it is told so, not where it is killed.
        let _ = Command::new("kill").args(["-s", "TERM", &self.child.id().to_string()]).status();
        let _ = self.child.wait();
    }
}

#[test]
fn replicas_behind_nginx_know_what_belongs_to_them() {
    if python().is_none() {
        println!("{SKIPPED}");
        return;
    }
    let [a, b] = [(); 2].map(|()| Server::slow(&["--threads", "1"]));
    let nginx = Nginx::start([&a, &b]);
    let document =
        |i: usize| format!("Tale {i}: {}", "the king had a daughter who was beautiful. ".repeat(20));
    let ask = |i: usize, session: &str| {
        let prompt = document(i) + "She said";
        nginx.ask(session, &json!({ "prompt": prompt, "max_tokens": 8, "seed": 1 }))
    };
    let cached = |reply: &Value| reply["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    let sessions: Vec<_> = (0..12).map(|i| format!("session-{i}")).collect();
    let first: Vec<_> = sessions.iter().enumerate().map(|(i, session)| ask(i, session)).collect();
    // Both have something to do, and each knows what it has read.
    assert!([&a, &b].iter().all(|s| s.stats()["tokens"]["written"].as_u64().unwrap() >= 8));
    for (i, session) in sessions.iter().enumerate() {
        let again = ask(i, session);
        assert_eq!(again["choices"], first[i]["choices"]);
        assert!(cached(&again) > 100, "{again}");
    }
    // Tokens come one by one through it.
    let body =
        json!({ "prompt": "The king", "max_tokens": 700, "seed": 1, "stream": true, "temperature": 1.2 });
    let mut stream = nginx.connect("", &body);
    let mut some = [0; 2000];
    stream.read_exact(&mut some).unwrap();
    assert!(a.stats()["running"] == 1 || b.stats()["running"] == 1, "all of it came at once");
    assert!(rest(&mut stream).contains("[DONE]"));
    // One that is gone is passed over.
    drop(a);
    for (i, session) in sessions.iter().enumerate() {
        assert_eq!(ask(i, session)["choices"], first[i]["choices"]);
    }
}
