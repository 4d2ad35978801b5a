//! The output: one line per result, added as a whole, so that what a killed run has written can be gone on with.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::{
    collections::HashSet,
    fs::{File, OpenOptions, TryLockError},
    io::{BufRead, BufReader, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

/// Ids, as they are written in JSON.
pub(crate) type Ids = HashSet<String>;

/// The file with the results.
#[derive(Debug)]
pub(crate) struct Results {
    path: PathBuf,
    file: File,
}

impl Results {
    /// Opens a file, or makes one; what it holds already is done. A last line that was not written to its end is cut off.
    pub(crate) fn open(path: &Path, retry_errors: bool) -> Result<(Self, Ids)> {
        let named = || format!("cannot write to {}", path.display());
        let open = OpenOptions::new().read(true).append(true).create(true).open(path);
        let mut file = open.with_context(named)?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => bail!("{}: another run writes to it", path.display()),
            // Some file systems have no locks.
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        let (done, whole) = read(&mut file, retry_errors).with_context(|| path.display().to_string())?;
        if file.metadata().with_context(named)?.len() > whole {
            file.set_len(whole).with_context(named)?;
        }
        Ok((Self { path: path.to_path_buf(), file }, done))
    }

    /// Adds a result.
    pub(crate) fn add(&mut self, result: &Value) -> Result<()> {
        let line = format!("{result}\n");
        self.file
            .write_all(line.as_bytes())
            .with_context(|| format!("cannot write to {}", self.path.display()))
    }
}

/// The ids of whole lines, and the bytes of these.
fn read(file: &mut File, retry_errors: bool) -> Result<(Ids, u64)> {
    file.seek(SeekFrom::Start(0))?;
    let (mut done, mut whole, mut lines) = (Ids::new(), 0, BufReader::new(file));
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        lines.read_until(b'\n', &mut line)?;
        if line.last() != Some(&b'\n') {
            break;
        }
        // A file of another kind, named by mistake, is not to be written to.
        let value: Option<Value> = serde_json::from_slice(&line).ok();
        let Some(id) = value.as_ref().and_then(|value| value.get("id")) else {
            bail!("line {number} is no result: give a file that `batch` wrote, or a new one");
        };
        let id = id.to_string();
        // The last one counts.
        match retry_errors && value.as_ref().is_some_and(|value| value.get("error").is_some()) {
            true => done.remove(&id),
            false => done.insert(id),
        };
        whole += line.len() as u64;
    }
    // What is left must be the beginning of a result, or nothing.
    if !line.is_empty() && !line.starts_with(b"{") {
        bail!("its last line is no result: give a file that `batch` wrote, or a new one");
    }
    Ok((done, whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reopened(text: &str, retry_errors: bool) -> Result<(Vec<String>, String)> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.jsonl");
        std::fs::write(&path, text).unwrap();
        let (mut results, done) = Results::open(&path, retry_errors)?;
        results.add(&serde_json::json!({ "id": 9 })).unwrap();
        let mut done: Vec<_> = done.into_iter().collect();
        done.sort();
        Ok((done, std::fs::read_to_string(&path).unwrap()))
    }

    #[test]
    fn half_a_line_is_cut_off_and_whole_ones_stay() {
        let (done, text) =
            reopened("{\"id\":1}\n{\"id\":\"b\",\"text\":\"x\"}\n{\"id\":3,\"te", false).unwrap();
        assert_eq!(done, ["\"b\"", "1"]);
        assert_eq!(text, "{\"id\":1}\n{\"id\":\"b\",\"text\":\"x\"}\n{\"id\":9}\n");
        assert_eq!(reopened("", false).unwrap(), (Vec::new(), "{\"id\":9}\n".to_string()));
    }

    #[test]
    fn errors_are_done_again_where_that_is_asked_for() {
        let text = "{\"id\":1,\"error\":{}}\n{\"id\":2}\n{\"id\":3,\"error\":{}}\n{\"id\":3}\n";
        assert_eq!(reopened(text, false).unwrap().0, ["1", "2", "3"]);
        assert_eq!(reopened(text, true).unwrap().0, ["2", "3"]);
    }

    #[test]
    fn a_file_of_another_kind_is_left_alone() {
        for text in ["my notes\n", "{\"name\":1}\n", "half of a note", "{\"id\":1}\nhalf"] {
            assert!(reopened(text, false).is_err(), "{text}");
        }
    }

    #[test]
    fn two_runs_do_not_write_to_one_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.jsonl");
        let first = Results::open(&path, false).unwrap();
        assert!(Results::open(&path, false).unwrap_err().to_string().contains("another run"));
        drop(first);
        Results::open(&path, false).unwrap();
    }
}
