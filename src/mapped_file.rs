//! The one place that maps files into memory.

use candle_core::{Error, Result};
use memmap2::{Mmap, UncheckedAdvice};
use std::{
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
};

/// A file mapped for reading: its pages come from the disk when they are first touched, and are the system's to take back.
///
/// A file that another program shortens while it is mapped ends this one with a bus error, as every mapped file does; one
/// that is rewritten in place shows the new bytes. So checkpoints are replaced by renaming, as the Hub's cache does.
#[derive(Debug)]
pub struct MappedFile {
    map: Mmap,
    path: PathBuf,
}

impl MappedFile {
    /// Maps a whole file.
    ///
    /// # Errors
    /// It cannot be opened or mapped; it is named.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let failed = |e| Error::Msg(format!("cannot map {}: {e}", path.display()));
        let file = File::open(path).map_err(failed)?;
        // SAFETY: the mapping is private to `Mmap`, read-only, and lives as long as every slice of it. That nobody shortens
        // or rewrites the file meanwhile is the user's part, stated above; all bytes are valid for the types they are read
        // as, so other content is another model, never undefined layout.
        let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
        Ok(Self { map, path: path.into() })
    }

    /// The content.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Which file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the pages that lie wholly in `range` back to the system, when they have been read for the last time.
    pub fn release(&self, range: Range<usize>) {
        const PAGE: usize = 4096;
        let (start, end) = (range.start.next_multiple_of(PAGE), range.end / PAGE * PAGE);
        if start < end {
            // SAFETY: of a read-only mapping of a file nothing is lost: bytes that are read again come from the file again.
            // A system that refuses only keeps the pages.
            let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn released_bytes_come_back_from_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let content: Vec<u8> = (0..40_000_u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let file = MappedFile::open(&path).unwrap();
        assert_eq!(file.bytes(), content);
        for range in [0..40_000, 100..30_000, 5000..5001, 0..0] {
            file.release(range);
            assert_eq!(file.bytes(), content);
        }
        let err = MappedFile::open(dir.path().join("none")).unwrap_err().to_string();
        assert!(err.contains("none"), "{err}");
    }
}
