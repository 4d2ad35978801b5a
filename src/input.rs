//! Opening the files that a model comes in. Content decides what a file is, and a message says what was found.
//!
//! Names lie: a clone without Git LFS leaves 130 bytes of text in place of the weights, a browser saves the login page under
//! the model's name. So every file is looked at where it is opened, once and for all kinds.

mod json;

use crate::Error;
use candle_core::Result;
pub use json::check_json;
use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// What a file should be; [`InputFile::open`] and [`read`] refuse one that plainly is something else.
///
/// ```
/// use candle_sparse::input::{self, Expected};
///
/// # let folder = tempfile::tempdir()?;
/// let path = folder.path().join("model.safetensors");
/// std::fs::write(&path, "version https://git-lfs.github.com/spec/v1\n")?;
/// let error = input::InputFile::open(&path, Expected::Safetensors).unwrap_err();
/// assert!(error.to_string().contains("git lfs pull"), "{error}");
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Expected {
    /// Weights, a profile or a saved cache.
    Safetensors,
    /// A model in one file, or a part of one.
    Gguf,
    /// A configuration, a tokenizer, an index of shards.
    Json,
    /// A template.
    Text,
}

impl Expected {
    fn name(self) -> &'static str {
        match self {
            Self::Safetensors => "a safetensors file",
            Self::Gguf => "a GGUF file",
            Self::Json => "a JSON text",
            Self::Text => "a text",
        }
    }
}

/// So much of a file is looked at.
pub(crate) const LOOK: usize = 512;
/// Longest file that is read as a whole: the largest tokenizers take some 40 MB.
const MOST_BYTES: u64 = 256 << 20;
/// Longest header of a safetensors file, as its format says.
pub(crate) const MAX_HEADER: u64 = 100_000_000;

/// First bytes that tell what a file is.
const SIGNS: [(&[u8], &str); 19] = [
    (b"GGUF", "a GGUF file: give it as the model by itself"),
    (b"PK\x03\x04", "a zip archive, as PyTorch's .bin and .pt files are: convert it to safetensors first"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it first"),
    (b"\xfd7zXZ\x00", "compressed with xz: unpack it first"),
    (b"BZh", "compressed with bzip2: unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
    (b"\x89HDF", "an HDF5 file, as Keras writes: convert it to safetensors first"),
    (b"\x93NUMPY", "a NumPy array: convert it to safetensors first"),
    (b"\x80\x02", "a Python pickle, as old PyTorch files are: convert it to safetensors first"),
    (b"\x80\x03", "a Python pickle, as old PyTorch files are: convert it to safetensors first"),
    (b"\x80\x04", "a Python pickle, as old PyTorch files are: convert it to safetensors first"),
    (b"lmgg", "a GGML file from before GGUF: convert it to GGUF first"),
    (b"fmgg", "a GGML file from before GGUF: convert it to GGUF first"),
    (b"tjgg", "a GGML file from before GGUF: convert it to GGUF first"),
    (b"algg", "a GGML file from before GGUF: convert it to GGUF first"),
    (b"%PDF", "a PDF document"),
    (b"\xff\xfe", "a text in UTF-16: save it as UTF-8"),
    (b"\xfe\xff", "a text in UTF-16: save it as UTF-8"),
];

/// First words of texts that stand in place of a file.
const POINTERS: [(&str, &str); 3] = [
    (
        "version https://git-lfs",
        "a Git LFS pointer in place of the file: run `git lfs pull` in its folder, or download the file itself",
    ),
    ("# xet version", "a Xet pointer in place of the file: download the file itself"),
    ("/annex/objects/", "a git-annex pointer in place of the file: run `git annex get` on it"),
];

/// An error that names a file.
pub(crate) fn file_error(path: &Path, problem: impl Into<String>) -> candle_core::Error {
    Error::File { path: path.into(), problem: problem.into() }.into()
}

/// A file that is read in parts, at any place.
///
/// ```
/// use candle_sparse::input::{Expected, InputFile};
///
/// # let folder = tempfile::tempdir()?;
/// let path = folder.path().join("names.json");
/// std::fs::write(&path, r#"["lily", "tom"]"#)?;
/// let file = InputFile::open(&path, Expected::Json)?;
/// let mut name = [0; 4];
/// file.read_at(2, &mut name)?;
/// assert_eq!((&name, file.len()), (b"lily", 15));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct InputFile {
    path: PathBuf,
    file: Mutex<File>,
    len: u64,
}

impl InputFile {
    /// Opens a regular file and looks at its first bytes.
    ///
    /// # Errors
    /// [`Error::File`]: there is none, it is a folder, a device or the like, or it clearly is something else than expected.
    pub fn open(path: impl AsRef<Path>, expected: Expected) -> Result<Self> {
        let path = path.as_ref();
        let (mut file, len) = open_regular(path)?;
        let mut first = Vec::with_capacity(LOOK);
        (&mut file).take(LOOK as u64).read_to_end(&mut first).map_err(|e| unreadable(path, &e))?;
        if let Some(what) = mistaken(&first, len, expected) {
            return Err(file_error(path, what));
        }
        Ok(Self { path: path.into(), file: Mutex::new(file), len })
    }

    /// Which file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its bytes when it was opened.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Fills `into` with the bytes from `start` on.
    ///
    /// # Errors
    /// [`Error::File`]: the file ends before, or cannot be read.
    pub fn read_at(&self, start: u64, into: &mut [u8]) -> Result<()> {
        self.fill(start, into).map_err(|e| unreadable(&self.path, &e))
    }

    fn fill(&self, start: u64, into: &mut [u8]) -> io::Result<()> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(into)
    }

    /// The bytes from the first on, one after the other.
    #[must_use]
    pub fn reader(&self) -> impl Read + '_ {
        Reader { file: self, at: 0 }
    }
}

struct Reader<'a> {
    file: &'a InputFile,
    at: u64,
}

impl Read for Reader<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = self.file.len.saturating_sub(self.at);
        let n = into.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        self.file.fill(self.at, &mut into[..n])?;
        self.at += n as u64;
        Ok(n)
    }
}

/// Reads a small file as a whole. A mark of UTF-8 before a text (Windows editors leave one) is taken off.
///
/// ```
/// use candle_sparse::input::{self, Expected};
///
/// # let folder = tempfile::tempdir()?;
/// let path = folder.path().join("config.json");
/// std::fs::write(&path, "\u{feff}{}")?;
/// assert_eq!(input::read(&path, Expected::Json)?, b"{}");
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// As [`InputFile::open`], but a pipe may be read; also a file of more than 256 MB, and JSON that [`check_json`] refuses.
pub fn read(path: impl AsRef<Path>, expected: Expected) -> Result<Vec<u8>> {
    let path = path.as_ref();
    let unreadable = |e: io::Error| unreadable(path, &e);
    if fs::metadata(path).map_err(unreadable)?.is_dir() {
        return Err(file_error(path, format!("is a folder, {} is needed", expected.name())));
    }
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MOST_BYTES + 1).read_to_end(&mut bytes))
        .map_err(unreadable)?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(file_error(
            path,
            format!("has more than {} MB: that is no {}", MOST_BYTES >> 20, &expected.name()[2..]),
        ));
    }
    let first = &bytes[..bytes.len().min(LOOK)];
    if let Some(what) = mistaken(first, bytes.len() as u64, expected) {
        return Err(file_error(path, what));
    }
    if bytes.starts_with(b"\xef\xbb\xbf") {
        bytes.drain(..3);
    }
    if expected == Expected::Json {
        check_json(&bytes).map_err(|e| file_error(path, e.to_string()))?;
    }
    Ok(bytes)
}

/// What is in a file, as far as its first bytes tell; `None` for what has no sign of its own.
///
/// ```
/// use candle_sparse::input::{self, Expected};
///
/// let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu");
/// assert_eq!(input::kind(format!("{folder}/model.safetensors"))?, Some(Expected::Safetensors));
/// // JSON has no sign of its own.
/// assert_eq!(input::kind(format!("{folder}/config.json"))?, None);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// As [`InputFile::open`].
pub fn kind(path: impl AsRef<Path>) -> Result<Option<Expected>> {
    let path = path.as_ref();
    let (file, len) = open_regular(path)?;
    let mut first = Vec::with_capacity(LOOK);
    file.take(LOOK as u64).read_to_end(&mut first).map_err(|e| unreadable(path, &e))?;
    Ok(if first.starts_with(b"GGUF") {
        Some(Expected::Gguf)
    } else if is_safetensors(&first, len) {
        Some(Expected::Safetensors)
    } else if let Some(what) = found(&first) {
        return Err(file_error(path, format!("is {what}")));
    } else {
        None
    })
}

/// A file whose parts can be read at any place, and its length. A pipe would block, or end before it was read twice.
pub(crate) fn open_regular(path: &Path) -> Result<(File, u64)> {
    let unreadable = |e: io::Error| unreadable(path, &e);
    let about = fs::metadata(path).map_err(unreadable)?;
    if let Some(what) = irregular(&about) {
        return Err(file_error(path, format!("is {what}, a regular file is needed")));
    }
    Ok((File::open(path).map_err(unreadable)?, about.len()))
}

/// What a node of the file system is that is no regular file.
pub(crate) fn irregular(about: &fs::Metadata) -> Option<&'static str> {
    let kind = about.file_type();
    if kind.is_file() {
        return None;
    }
    if kind.is_dir() {
        return Some("a folder");
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if kind.is_fifo() {
            return Some("a named pipe");
        }
        if kind.is_socket() {
            return Some("a socket");
        }
    }
    Some("a device")
}

fn unreadable(path: &Path, e: &io::Error) -> candle_core::Error {
    let problem = match e.kind() {
        io::ErrorKind::UnexpectedEof => {
            "ends too early (truncated download, or shortened since it was opened?)".to_string()
        }
        _ => format!("cannot be read: {e}"),
    };
    file_error(path, problem)
}

/// What is wrong with a file that begins with `first`, where that is plain to see.
pub(crate) fn mistaken(first: &[u8], len: u64, expected: Expected) -> Option<String> {
    if len == 0 && expected != Expected::Text {
        return Some(format!("is empty, {} is needed (interrupted download?)", expected.name()));
    }
    let right = match expected {
        Expected::Safetensors => is_safetensors(first, len),
        Expected::Gguf => first.starts_with(b"GGUF"),
        Expected::Json => matches!(trimmed(first).first(), Some(b'{' | b'[')),
        Expected::Text => false,
    };
    if right {
        return None;
    }
    let what = match expected {
        _ if is_safetensors(first, len) => Some("a safetensors file".to_string()),
        Expected::Text => pointer(first).or_else(|| sign(first)),
        Expected::Json => found(first),
        Expected::Safetensors | Expected::Gguf => found(first).or_else(|| quoted(first)),
    };
    what.map(|what| format!("is {what}; {} is needed", expected.name()))
}

/// Eight bytes of a plausible length, then the header.
fn is_safetensors(first: &[u8], len: u64) -> bool {
    let Some(header) = first.first_chunk().map(|n| u64::from_le_bytes(*n)) else { return false };
    first.get(8) == Some(&b'{') && header <= MAX_HEADER && header.checked_add(8).is_some_and(|end| end <= len)
}

/// Without the mark of UTF-8 and the blanks before a text.
fn trimmed(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes).trim_ascii_start()
}

fn pointer(first: &[u8]) -> Option<String> {
    let text = trimmed(first);
    let known = POINTERS.iter().find(|(start, _)| text.starts_with(start.as_bytes()));
    if let Some((_, what)) = known {
        return Some((*what).to_string());
    }
    let start: Vec<u8> = text.iter().take(14).map(u8::to_ascii_lowercase).collect();
    (start.starts_with(b"<!doctype html") || start.starts_with(b"<html")).then(|| {
        "a web page, such as a login or an error page that was saved under this name: download the file itself".to_string()
    })
}

fn sign(first: &[u8]) -> Option<String> {
    if first.len() >= 8 && first.iter().all(|b| *b == 0) {
        return Some(
            "zeros at its start (a download that reserved its place and did not fill it?)".to_string(),
        );
    }
    let known = SIGNS.iter().find(|(start, _)| first.starts_with(start));
    known.map(|(_, what)| (*what).to_string())
}

fn found(first: &[u8]) -> Option<String> {
    let markup = || {
        let text = trimmed(first);
        text.starts_with(b"<").then(|| format!("markup (XML or HTML) that begins {}", start_of(text)))
    };
    pointer(first).or_else(|| sign(first)).or_else(markup)
}

/// A text where there should be none: an answer of a server perhaps, which says what went wrong.
fn quoted(first: &[u8]) -> Option<String> {
    let text = trimmed(first);
    // A character may be cut in two where the look ends.
    let valid = std::str::from_utf8(text).map_or_else(|e| e.valid_up_to(), str::len);
    let plain = valid + 4 > text.len() && !text.iter().any(|b| *b < b' ' && !b.is_ascii_whitespace());
    let kind = if text.starts_with(b"{") || text.starts_with(b"[") { "a JSON text" } else { "a text" };
    (plain && text.len() >= 4).then(|| format!("{kind} that begins {}", start_of(text)))
}

/// The start of a text, on one line.
fn start_of(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let start: String = text.chars().take(60).map(|c| if c.is_control() { ' ' } else { c }).collect();
    let more = if text.chars().nth(60).is_some() { "…" } else { "" };
    format!("`{start}{more}`")
}
