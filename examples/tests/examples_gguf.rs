//! GGUF files through the example programs.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "examples_gguf/ab.rs"]
mod ab;
mod common;
#[path = "examples_gguf/convert.rs"]
mod convert;
#[path = "examples_gguf/peak.rs"]
mod peak;
#[path = "examples_gguf/text.rs"]
mod text;

use common::{ok, one_line, testdata};
use serde_json::Value;

fn number(json: &Value, key: &str) -> f64 {
    json[key].as_f64().unwrap_or_else(|| panic!("{key}: {json}"))
}

/// A folder for files that programs write.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    /// A built-in model as a file, and what the program said about it.
    fn convert(&self, name: &str, model: &str, more: &[&str]) -> (String, Value) {
        let path = self.path(name);
        let args = [&["--model", model, "--out", &path, "--json"], more].concat();
        (path.clone(), ok("convert", &args).json())
    }
}
