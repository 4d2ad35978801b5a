//! A server on 127.0.0.1 that answers as the Hugging Face Hub does, or as badly as a test wants.

use core::hash::{Hash, Hasher};
use core::net::SocketAddr;
use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::collections::BTreeMap;
use std::hash::DefaultHasher;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// A request as it came in; header names in lower case.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    headers: BTreeMap<String, String>,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// Whether the file itself is wanted, and not only what is announced of it.
    pub(crate) fn wants_body(&self) -> bool {
        self.method == "GET"
    }

    fn read(stream: &TcpStream) -> Option<Self> {
        let mut lines = BufReader::new(stream).lines();
        let first = lines.next()?.ok()?;
        let (method, path) = first.split_once(' ')?;
        let (method, path) = (method.to_string(), path.split(' ').next()?.to_string());
        let headers = lines
            .map_while(Result::ok)
            .take_while(|line| !line.is_empty())
            .filter_map(|line| {
                let (name, value) = line.split_once(':')?;
                Some((name.to_lowercase(), value.trim().to_string()))
            })
            .collect();
        Some(Self { method, path, headers })
    }
}

/// An answer; `cut` closes the connection after so many bytes of the body, `chunked` tells no length.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: Vec<u8>,
    pub(crate) cut: Option<usize>,
    pub(crate) chunked: bool,
}

impl Reply {
    pub(crate) fn new(status: u16, body: &[u8]) -> Self {
        Self { status, headers: Vec::new(), body: body.to_vec(), cut: None, chunked: false }
    }

    pub(crate) fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// The part of `file` that the request's `Range` asks for.
    pub(crate) fn range(request: &Request, file: &[u8]) -> Self {
        let Some(range) = request.header("range").and_then(|r| r.strip_prefix("bytes=")) else {
            return Self::new(200, file);
        };
        let (first, last) = range.split_once('-').unwrap();
        let first: usize = first.parse().unwrap();
        let last = last.parse().unwrap_or(file.len() - 1).min(file.len() - 1);
        if first > last {
            return Self::new(416, b"");
        }
        Self::new(206, &file[first..=last])
            .header("Content-Range", format!("bytes {first}-{last}/{}", file.len()))
    }

    fn write(&self, mut stream: &TcpStream, with_body: bool) -> std::io::Result<()> {
        write!(stream, "HTTP/1.1 {} x\r\nConnection: close\r\n", self.status)?;
        if self.chunked {
            write!(stream, "Transfer-Encoding: chunked\r\n")?;
        } else {
            write!(stream, "Content-Length: {}\r\n", self.body.len())?;
        }
        for (name, value) in &self.headers {
            write!(stream, "{name}: {value}\r\n")?;
        }
        stream.write_all(b"\r\n")?;
        let body = &self.body[..self.cut.unwrap_or(self.body.len())];
        if with_body && self.chunked {
            for part in body.chunks(1000) {
                write!(stream, "{:x}\r\n", part.len())?;
                stream.write_all(part)?;
                stream.write_all(b"\r\n")?;
            }
            return stream.write_all(if self.cut.is_none() { b"0\r\n\r\n" } else { b"" });
        }
        if with_body { stream.write_all(body) } else { Ok(()) }
    }
}

/// A running server; dropping it closes the port.
pub(crate) struct Server {
    pub(crate) url: String,
    address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub(crate) fn start(answer: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let (seen, stopped, answer) = (requests.clone(), stop.clone(), Arc::new(answer));
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if stopped.load(Ordering::SeqCst) {
                    break;
                }
                let (seen, answer) = (seen.clone(), answer.clone());
                std::thread::spawn(move || {
                    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                    if let Some(request) = Request::read(&stream) {
                        seen.lock().unwrap().push(request.clone());
                        // A client may hang up first.
                        let _ = answer(&request).write(&stream, request.method != "HEAD");
                    }
                });
            }
        });
        let url = format!("http://{address}");
        Self { url, address, requests, stop, thread: Some(thread) }
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// How often the content of `file` was asked for.
    pub(crate) fn downloads(&self, file: &str) -> usize {
        let requests = self.requests();
        requests.iter().filter(|r| r.path.ends_with(file) && r.wants_body()).count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the loop out of its wait for a connection.
        let _ = TcpStream::connect(self.address);
        let _ = self.thread.take().unwrap().join();
    }
}

/// The files of the model `org/tiny`, by revision and name: `main/config.json`.
#[derive(Clone, Default)]
pub(crate) struct Hub {
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    pub(crate) token: Option<&'static str>,
    /// Added to the commit's name: what a new commit on the same branch changes.
    pub(crate) change: &'static str,
    /// Where content is sent for: `/cdn` on this server or `http://…/cdn` on another.
    pub(crate) redirect: Option<String>,
}

impl Hub {
    pub(crate) fn with(mut self, path: &str, content: &[u8]) -> Self {
        self.files.insert(path.to_string(), content.to_vec());
        self
    }

    pub(crate) fn answer(&self, request: &Request) -> Reply {
        let bearer = self.token.map(|token| format!("Bearer {token}"));
        if bearer.is_some() && request.header("authorization") != bearer.as_deref() {
            return Reply::new(401, b"Invalid username or password.");
        }
        let moved = request.path.strip_prefix("/cdn/");
        let direct = request.path.strip_prefix("/org/tiny/resolve/");
        let Some((path, file)) = moved.or(direct).and_then(|p| self.files.get_key_value(p)) else {
            return Reply::new(404, b"Entry not found");
        };
        let commit = format!("commit-of-{}{}", path.split_once('/').unwrap().0, self.change);
        match &self.redirect {
            Some(target) if moved.is_none() => Reply::new(302, b"")
                .header("Location", format!("{target}/{path}"))
                .header("X-Linked-Etag", etag(file))
                .header("X-Linked-Size", file.len().to_string())
                .header("X-Repo-Commit", commit),
            _ => Reply::range(request, file).header("ETag", etag(file)).header("X-Repo-Commit", commit),
        }
    }

    pub(crate) fn serve(self) -> Server {
        Server::start(move |request| self.answer(request))
    }
}

pub(crate) fn etag(content: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    content.hash(&mut hasher);
    format!("\"{:016x}\"", hasher.finish())
}
