//! The one place that maps files into memory.

use crate::input::{self, Expected, file_error};
use candle_core::Result;
use memmap2::Mmap;
use std::{
    fs::{File, TryLockError},
    io::Read,
    ops::Range,
    path::{Path, PathBuf},
};

/// A file mapped for reading: its pages come from the disk when they are first touched, and are the system's to take back.
///
/// Where the system has file locks a shared one is held, which keeps off writers that ask for a lock. Those that do not ask
/// are not kept off, so making one is `unsafe`; what is made is used safely.
///
/// ```
/// use candle_sparse::{input::Expected, mapped_file::MappedFile};
///
/// # let folder = tempfile::tempdir()?;
/// let path = folder.path().join("config.json");
/// std::fs::write(&path, "{}")?;
/// // SAFETY: the file is in a folder that only this program knows, and nothing writes to it any more.
/// let file = unsafe { MappedFile::map(&path, Expected::Json)? };
/// assert_eq!(file.bytes(), b"{}");
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct MappedFile {
    map: Mmap,
    path: PathBuf,
    /// Holds the lock.
    _file: File,
}

impl MappedFile {
    /// Maps a whole file.
    ///
    /// # Errors
    /// [`Error::File`](crate::Error::File): it cannot be opened or mapped, is something else than expected, or another
    /// program is writing it.
    ///
    /// # Safety
    /// As long as the value, or anything that uses its bytes, exists, nobody may write to the file or shorten it, in this
    /// process or another. A file that changes breaks what Rust takes for granted of `&[u8]`; one that gets shorter ends the
    /// process with a bus error. Replacing a file by renaming, as downloads and [`save`](crate::save) do, is no change to it.
    pub unsafe fn map(path: impl AsRef<Path>, expected: Expected) -> Result<Self> {
        let path = path.as_ref();
        let (file, len) = input::open_regular(path)?;
        lock(&file, path)?;
        let failed = |e: std::io::Error| file_error(path, format!("cannot be mapped: {e}"));
        let mut first = Vec::new();
        (&file).take(input::LOOK as u64).read_to_end(&mut first).map_err(failed)?;
        if let Some(what) = input::mistaken(&first, len, expected) {
            return Err(file_error(path, what));
        }
        // SAFETY: the mapping is read-only, and `self` owns it: it lives as long as every slice of it. That the file does not
        // change meanwhile is what the caller promises. All bytes are valid for the types they are read as.
        let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
        Ok(Self { map, path: path.into(), _file: file })
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

    /// Gives the pages that lie wholly in `range` and in the file back to the system, when they have been read for the last
    /// time.
    pub(crate) fn release(&self, range: Range<usize>) {
        const PAGE: usize = 4096;
        let end = range.end.min(self.map.len()) / PAGE * PAGE;
        let Some(start) = range.start.checked_next_multiple_of(PAGE).filter(|start| *start < end) else {
            return;
        };
        #[cfg(unix)]
        {
            // SAFETY: `start..end` lies inside the mapping, `end` being cut to its length above. Of a read-only mapping of a
            // file nothing is lost: bytes that are read again come from the file again, which has not changed (see `map`).
            // A system that refuses only keeps the pages.
            let _ = unsafe {
                self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start)
            };
        }
        #[cfg(not(unix))]
        let _ = start;
    }
}

/// A shared lock, which many readers may hold at once. Where there are no locks (some network file systems) there is none.
fn lock(file: &File, path: &Path) -> Result<()> {
    match file.try_lock_shared() {
        Err(TryLockError::WouldBlock) => {
            Err(file_error(path, "is being written by another program, which holds a lock on it"))
        }
        Ok(()) | Err(TryLockError::Error(_)) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(path: &Path) -> Result<MappedFile> {
        // SAFETY: the files of these tests are in folders of their own, and not written while they are mapped.
        unsafe { MappedFile::map(path, Expected::Gguf) }
    }

    fn content() -> Vec<u8> {
        let mut content: Vec<u8> = (0..40_000_u32).map(|i| (i % 251) as u8).collect();
        content[..4].copy_from_slice(b"GGUF");
        content
    }

    #[test]
    fn released_bytes_come_back_from_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, content()).unwrap();
        let file = map(&path).unwrap();
        assert_eq!(file.bytes(), content());
        for range in [0..40_000, 100..30_000, 5000..5001, 0..0] {
            file.release(range);
            assert_eq!(file.bytes(), content());
        }
        let err = map(&dir.path().join("none")).unwrap_err().to_string();
        assert!(err.contains("none"), "{err}");
    }

    /// Memory beside a mapping is somebody's: a range past the end must not reach it.
    #[test]
    fn a_range_past_the_file_releases_nothing_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, vec![b"GGUF".as_slice(); 16 * 1024].concat()).unwrap();
        // Mappings made one after the other lie side by side, mostly; so some buffer lies right behind a file.
        let mut all = Vec::new();
        for _ in 0..16 {
            let mut buffer = crate::buffer::Buffer::zeroed(64 << 10).unwrap();
            buffer.bytes_mut().fill(9);
            all.push((buffer, map(&path).unwrap()));
        }
        for (_, file) in &all {
            for range in [32 << 10..4 << 20, 64 << 10..1 << 20, 0..usize::MAX, usize::MAX - 1..usize::MAX] {
                file.release(range);
            }
        }
        assert!(
            all.iter().all(|(buffer, _)| buffer.bytes().iter().all(|b| *b == 9)),
            "memory of others was released"
        );
    }

    #[test]
    fn writers_that_lock_are_kept_off_and_keep_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, content()).unwrap();
        let writer = File::options().write(true).open(&path).unwrap();
        let (first, second) = (map(&path).unwrap(), map(&path).unwrap());
        assert!(matches!(writer.try_lock(), Err(TryLockError::WouldBlock)));
        drop((first, second));
        writer.try_lock().unwrap();
        let err = map(&path).unwrap_err();
        assert!(matches!(crate::Error::of(&err), Some(crate::Error::File { .. })), "{err}");
        assert!(err.to_string().contains("being written"), "{err}");
    }
}
