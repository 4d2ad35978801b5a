//! One file of a GGUF model, and which files belong together.
//!
//! llama.cpp's `gguf-split` cuts a model into `NAME-00001-of-00003.gguf` and so on. The metadata of each part say which one it
//! is (`split.no`, from 0) of how many (`split.count`); the first has all other metadata, and perhaps no tensor.

use super::{header, tokenizer::metadata::integer};
use candle_core::{Result, quantized::gguf_file::Content};
use candle_sparse::{
    Error, Format, Weight,
    buffer::Buffer,
    input::{Expected, InputFile},
    mapped_file::MappedFile,
    weight::Memory,
};
use std::{
    io::BufReader,
    path::{Path, PathBuf},
    sync::Arc,
};

/// What holds the bytes of a file.
#[derive(Clone, Debug)]
pub(super) enum Bytes {
    /// Used where they lie.
    Mapped(Arc<MappedFile>),
    /// Read when they are asked for.
    Read(Arc<InputFile>),
}

/// A tensor's place in a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) format: Format,
    /// From the first byte of the file.
    pub(crate) start: u64,
}

impl Place {
    pub(crate) fn bytes(&self) -> usize {
        self.rows.saturating_mul(self.format.row_bytes(self.cols))
    }
}

pub(super) fn failed(path: &Path, problem: impl Into<String>) -> candle_core::Error {
    Error::File { path: path.into(), problem: problem.into() }.into()
}

impl Bytes {
    pub(super) fn open(path: &Path) -> Result<Self> {
        InputFile::open(path, Expected::Gguf).map(Arc::new).map(Self::Read)
    }

    /// # Safety
    /// As [`MappedFile::map`].
    pub(super) unsafe fn map(path: &Path) -> Result<Self> {
        // SAFETY: the caller promises what it asks for.
        unsafe { MappedFile::map(path, Expected::Gguf) }.map(Arc::new).map(Self::Mapped)
    }

    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Mapped(file) => file.path(),
            Self::Read(file) => file.path(),
        }
    }

    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Mapped(file) => file.bytes().len() as u64,
            Self::Read(file) => file.len(),
        }
    }

    pub(super) fn header(&self) -> Result<Content> {
        let content = match self {
            Self::Mapped(file) => header::read(file.bytes(), self.len()),
            Self::Read(file) => header::read(BufReader::new(file.reader()), self.len()),
        };
        content.map_err(|problem| failed(self.path(), format!("{problem}{}", cut_by_hand(self.path()))))
    }

    /// A copy of some bytes, or those of the mapping.
    fn memory(&self, start: u64, len: usize) -> Result<Memory> {
        match self {
            Self::Mapped(file) => {
                // Inside the file, which was mapped as a whole: its places are addresses.
                let start = usize::try_from(start).unwrap_or(usize::MAX);
                Ok(Memory::File(Arc::clone(file), start..start.saturating_add(len)))
            }
            Self::Read(file) => {
                let mut buffer = Buffer::zeroed(len)?;
                file.read_at(start, &mut buffer.bytes_mut()[..len])?;
                Ok(Memory::Buffer(buffer))
            }
        }
    }

    pub(super) fn weight(&self, place: &Place) -> Result<Weight> {
        let memory = self.memory(place.start, place.bytes())?;
        Weight::from_memory(place.rows, place.cols, place.format, memory)
    }

    /// The last bytes.
    pub(super) fn tail(&self, len: usize) -> Result<Vec<u8>> {
        let start = self.len().saturating_sub(len as u64);
        match self {
            Self::Mapped(file) => Ok(file.bytes()[start as usize..].to_vec()),
            Self::Read(file) => {
                let mut bytes = vec![0; len];
                file.read_at(start, &mut bytes)?;
                Ok(bytes)
            }
        }
    }
}

/// Which part of how many a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Split {
    pub(super) no: usize,
    pub(super) count: usize,
    /// Tensors of all parts.
    pub(super) tensors: Option<usize>,
}

impl Split {
    /// `None`: the file is whole.
    pub(super) fn of(content: &Content) -> core::result::Result<Option<Self>, String> {
        let number = |key: &str| match content.metadata.get(key) {
            None => Ok(None),
            Some(value) => match integer(value).and_then(|n| usize::try_from(n).ok()) {
                Some(n) => Ok(Some(n)),
                None => Err(format!("{key} is a {:?}, a number is needed", value.value_type())),
            },
        };
        let count = number("split.count")?.unwrap_or(0);
        let (no, tensors) = (number("split.no")?, number("split.tensors.count")?);
        match no {
            _ if count < 2 => Ok(None),
            Some(no) if no < count => Ok(Some(Self { no, count, tensors })),
            Some(no) => Err(format!("split.no is {no}, but there are {count} parts")),
            None => Err(format!("is a part of a split model, one of {count}, but does not say which")),
        }
    }

    /// The files of all parts, of which one lies at `path`.
    pub(super) fn files(&self, path: &Path) -> Result<Vec<PathBuf>> {
        let (part, count) = (self.no + 1, self.count);
        let names = path.file_name().and_then(|name| part_names(name.to_str()?));
        let Some(names) = names.filter(|names| {
            names.len() == count && path.file_name().is_some_and(|name| *names[self.no] == *name)
        }) else {
            return Err(failed(
                path,
                format!(
                    "is part {part} of {count} of a split model; the other parts are found by their names, so it must be \
                     called NAME-{part:05}-of-{count:05}.gguf"
                ),
            ));
        };
        let files: Vec<_> = names.iter().map(|name| path.with_file_name(name)).collect();
        let missing: Vec<_> = files
            .iter()
            .zip(&names)
            .filter(|(file, _)| !file.exists())
            .map(|(_, name)| name.as_str())
            .collect();
        if missing.is_empty() {
            return Ok(files);
        }
        let more = if missing.len() > 4 { ", …" } else { "" };
        Err(failed(
            path,
            format!(
                "is part {part} of {count} of a split model; {} of the parts are missing beside it: {}{more}",
                missing.len(),
                missing[..missing.len().min(4)].join(", ")
            ),
        ))
    }
}

/// The names of all parts, if `name` is that of one: `NAME-00002-of-00003.gguf`.
pub(crate) fn part_names(name: &str) -> Option<Vec<String>> {
    let (base, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (base, part) = base.rsplit_once('-')?;
    let number =
        |s: &str| s.parse::<usize>().ok().filter(|_| s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit()));
    let (part, count) = (number(part)?, number(count)?);
    let all = (1..=count).map(|part| format!("{base}-{part:05}-of-{count:05}.gguf"));
    (1..=count).contains(&part).then(|| all.collect())
}

/// What to do with a piece of a file that was cut without regard to its content, as old uploads are.
fn cut_by_hand(path: &Path) -> &'static str {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let piece = name.rsplit_once(".part").is_some_and(|(_, n)| n.starts_with(|c: char| c.is_ascii_digit()));
    if name.contains("gguf-split-") || piece {
        " (by its name a piece of a file: join the pieces with `cat`, in order)"
    } else {
        ""
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_parts() {
        let names = part_names("a-b-00002-of-00003.gguf").unwrap();
        assert_eq!(names, ["a-b-00001-of-00003.gguf", "a-b-00002-of-00003.gguf", "a-b-00003-of-00003.gguf"]);
        for name in [
            "a.gguf",
            "a-2-of-3.gguf",
            "a-00004-of-00003.gguf",
            "a-00000-of-00003.gguf",
            "a-00001-of-00002.bin",
        ] {
            assert_eq!(part_names(name), None, "{name}");
        }
        assert_eq!(part_names("a-+0001-of-00002.gguf"), None);
    }
}
