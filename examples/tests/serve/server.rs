//! The server as a process, and a client that sends bytes as it likes.

use super::common::program;
use serde_json::{Value, json};
use std::{
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    process::{Child, ExitStatus, Stdio},
    time::{Duration, Instant},
};

/// No answer takes so long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A running server; it is killed with the test.
pub(crate) struct Server {
    child: Child,
    pub(crate) address: SocketAddr,
}

/// What the server said.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Reply {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// The data of a stream's events.
    pub(crate) fn events(&self) -> Vec<&str> {
        self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect()
    }

    /// The code of an error in OpenAI's shape.
    pub(crate) fn error(&self) -> (u16, String, Value) {
        let json = self.json();
        let error = json["error"].as_object().unwrap_or_else(|| panic!("{self:?}"));
        assert_eq!(error.keys().map(String::as_str).collect::<Vec<_>>().len(), 4, "{self:?}");
        assert!(error["message"].is_string() && error["type"].is_string(), "{self:?}");
        let text = |key: &str| error[key].as_str().unwrap_or_default().to_string();
        (self.status, text("code"), error["param"].clone())
    }
}

impl Server {
    pub(crate) fn start(args: &[&str]) -> Self {
        Self::with_env(args, &[])
    }

    /// One that takes its time, so that something can happen meanwhile.
    pub(crate) fn slow(args: &[&str]) -> Self {
        Self::with_env(args, &[("CANDLE_SPARSE_LEVEL", "scalar")])
    }

    pub(crate) fn with_env(args: &[&str], env: &[(&str, &str)]) -> Self {
        let mut command = program("serve");
        command.args(["--port", "0"]).args(args).env_remove("CANDLE_SPARSE_API_KEY");
        command.envs(env.iter().copied()).stderr(Stdio::null()).stdin(Stdio::null());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on http://").map(str::parse);
        let address = address.unwrap_or_else(|| panic!("'{line}'")).unwrap();
        Self { child, address }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Sends bytes and reads until the server closes.
    pub(crate) fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        // A server that has its answer may close before it has read all.
        let _ = stream.write_all(bytes);
        rest(&mut stream)
    }

    pub(crate) fn get(&self, path: &str) -> Reply {
        self.request("GET", path, &[], "")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Reply {
        self.request("POST", path, &[("Content-Type", "application/json")], &body.to_string())
    }

    pub(crate) fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Reply {
        reply(&self.raw(request(method, path, headers, body).as_bytes()))
    }

    /// The text that follows a prompt.
    pub(crate) fn text(&self, body: &Value) -> String {
        let reply = self.post("/v1/completions", body);
        assert_eq!(reply.status, 200, "{reply:?}");
        reply.json()["choices"][0]["text"].as_str().unwrap().to_string()
    }

    pub(crate) fn stats(&self) -> Value {
        self.get("/stats").json()
    }

    /// Waits until the engine has nothing to do.
    pub(crate) fn wait_idle(&self) -> Value {
        wait("nothing runs", || {
            let stats = self.stats();
            (stats["running"] == 0 && stats["waiting"] == 0).then_some(stats)
        })
    }

    #[cfg(unix)]
    pub(crate) fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(std::process::Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
    }

    /// Waits for its end.
    pub(crate) fn ended(&mut self) -> ExitStatus {
        wait("the server ends", || self.child.try_wait().unwrap())
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub(crate) fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for something that is sure to come.
pub(crate) fn wait<T>(what: &str, mut come: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(come) = come() {
            return come;
        }
        assert!(start.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) fn request(method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> String {
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let length = body.len();
    format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}Content-Length: {length}\r\n\r\n{body}"
    )
}

/// All that comes until the end, or until the connection is reset.
pub(crate) fn rest(stream: &mut TcpStream) -> String {
    let (mut all, mut part) = (Vec::new(), [0; 4096]);
    loop {
        match stream.read(&mut part) {
            Ok(n @ 1..) => all.extend_from_slice(&part[..n]),
            // A process that was stopped for a while goes on so.
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Ok(0) | Err(_) => break,
        }
    }
    String::from_utf8(all).unwrap()
}

pub(crate) fn reply(text: &str) -> Reply {
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no HTTP: '{text}'"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    let body = if chunked { unchunked(body) } else { body.to_string() };
    Reply { status, head: head.to_string(), body }
}

fn unchunked(body: &str) -> String {
    let (mut all, mut rest) = (String::new(), body);
    while let Some((size, more)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size.trim(), 16).unwrap();
        let Some(chunk) = more.get(..size).filter(|chunk| !chunk.is_empty()) else { break };
        all.push_str(chunk);
        rest = more[size..].trim_start_matches("\r\n");
    }
    all
}

/// A request whose text is the same whenever it is asked for.
pub(crate) fn tale(prompt: &str, tokens: usize, seed: u64) -> Value {
    json!({ "prompt": prompt, "max_tokens": tokens, "seed": seed })
}
