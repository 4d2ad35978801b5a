//! Downloads from a server on 127.0.0.1 that behaves as the Hub, well and badly.
#![cfg(feature = "hub")]
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod downloads;
mod environment;
mod failures;
mod server;

use core::time::Duration;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use candle_sparse_models::hub::{HubRepo, HubSettings};
use server::{Hub, Server};
use tempfile::TempDir;

const ID: &str = "org/tiny";
const TOKEN: &str = "hf_secret";

/// Runs a test on its own thread, so that a server that never answers fails it.
fn bounded(test: impl FnOnce() + Send + 'static) {
    let (done, finished) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        test();
        let _ = done.send(());
    });
    let hangs = finished.recv_timeout(Duration::from_mins(1)) == Err(mpsc::RecvTimeoutError::Timeout);
    assert!(!hangs, "the test hangs");
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn content(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 251).to_le_bytes()[0] ^ seed).collect()
}

fn weights() -> Vec<u8> {
    content(7, 200_000)
}

fn tiny() -> Hub {
    Hub::default()
        .with("main/config.json", br#"{"model_type":"llama"}"#)
        .with("main/tokenizer.json", b"{}")
        .with("main/model.safetensors", &weights())
}

fn settings(server: &Server, cache: &TempDir) -> HubSettings {
    HubSettings::default()
        .with_endpoint(Some(server.url.clone()))
        .with_cache_dir(Some(cache.path().to_path_buf()))
}

fn repo(server: &Server, cache: &TempDir) -> HubRepo {
    HubRepo::new(&settings(server, cache), ID, None).unwrap()
}

/// All files and links below `folder`.
fn walk(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.is_symlink() {
            found.extend(walk(&path));
        } else {
            found.push(path);
        }
    }
    found
}

/// Checks that the cache holds nothing but whole files of `expected`, refs, and empty lock files.
fn assert_clean(cache: &TempDir, expected: &[&[u8]]) {
    for path in walk(cache.path()) {
        assert!(path.exists(), "dangling link {}", path.display());
        let text = path.to_string_lossy().into_owned();
        assert!(!text.contains(".part") && !text.contains(".candle-sparse/"), "left over: {text}");
        if text.contains("/blobs/") || text.contains("/snapshots/") {
            let bytes = fs::read(&path).unwrap();
            assert!(expected.contains(&bytes.as_slice()), "{text} has {} bytes", bytes.len());
        } else if text.contains(".lock") {
            assert_eq!(path.metadata().unwrap().len(), 0, "{text}");
        } else {
            assert!(text.contains("/refs/") || text.contains("/.no_exist/"), "{text}");
        }
    }
}

/// Checks that the message is one line and holds every needle.
fn assert_says(error: &candle_core::Error, needles: &[&str]) {
    let text = error.to_string();
    assert!(!text.contains('\n'), "more than a line: {text}");
    for needle in needles {
        assert!(text.contains(needle), "no {needle:?} in: {text}");
    }
}
