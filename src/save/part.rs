//! The new file, as long as it is not in its place.

use crc::{CRC_32_ISO_HDLC, Crc};
use std::{
    fs::{self, File, TryLockError},
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

const NAME: Crc<u32> = Crc::<u32>::new(&CRC_32_ISO_HDLC);
/// Whether a lock tells others alone that a file is in use: on Windows it would keep them from reading it, too.
const LOCKS: bool = cfg!(unix);

/// A new file beside its later place, removed unless it was put there.
pub(super) struct Part {
    pub(super) path: PathBuf,
    pub(super) file: File,
    is_there: bool,
}

impl Part {
    /// What killed processes left of the same file is removed.
    pub(super) fn beside(place: &Path) -> io::Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let start = start_of_parts(place);
        remove_left(place, &start);
        loop {
            let n = COUNT.fetch_add(1, Ordering::Relaxed);
            let path = place.with_file_name(format!("{start}{}-{n}.part", std::process::id()));
            let file = match File::options().write(true).read(true).create_new(true).open(&path) {
                Ok(file) => file,
                // Left by a process of the same number that was killed, or that a container hides.
                Err(e) if e.kind() == ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(e),
            };
            // Held as long as the file is open: a killed process holds it no more.
            let taken = match LOCKS.then(|| file.try_lock()) {
                // Another process took it for one that was left, before it was locked.
                Some(Err(TryLockError::WouldBlock)) => true,
                Some(Ok(())) => !path.exists(),
                // Some file systems have no locks: nothing is removed there.
                Some(Err(TryLockError::Error(_))) | None => false,
            };
            if !taken {
                return Ok(Self { path, file, is_there: true });
            }
        }
    }

    pub(super) fn put(mut self, place: &Path) -> io::Result<()> {
        if let Ok(about) = fs::metadata(place) {
            self.file.set_permissions(about.permissions())?;
        }
        self.file.sync_all()?;
        fs::rename(&self.path, place)?;
        self.is_there = false;
        // The new name lasts when the folder is on the disk too. Some file systems cannot do that for a folder; the file
        // is whole and in its place either way.
        #[cfg(unix)]
        if let Some(folder) = place.parent() {
            let folder = if folder == Path::new("") { Path::new(".") } else { folder };
            let _ = File::open(folder).and_then(|folder| folder.sync_all());
        }
        Ok(())
    }
}

/// How the names of new files for one place begin: short whatever the file is called, since names have a greatest length.
pub(super) fn start_of_parts(place: &Path) -> String {
    let name = place.file_name().unwrap_or_default().as_encoded_bytes();
    format!(".candle-sparse-{:08x}-", NAME.checksum(name))
}

/// Removes what killed processes left beside a place. That something cannot be removed changes nothing.
fn remove_left(place: &Path, start: &str) {
    let folder = place.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."));
    let Some(Ok(entries)) = LOCKS.then(|| fs::read_dir(folder)) else { return };
    let is_part = |name: &str| name.starts_with(start) && name.ends_with(".part");
    for entry in entries.flatten() {
        // A pipe of that name would have to be waited for.
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if !is_file || !entry.file_name().to_str().is_some_and(is_part) {
            continue;
        }
        let path = entry.path();
        // Locked until it is removed, so that no process goes on with it.
        let Ok(file) = File::options().write(true).open(&path) else { continue };
        if file.try_lock().is_ok() {
            let _ = fs::remove_file(&path);
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if self.is_there {
            // What is there of it is of no use; that it cannot be removed either changes nothing.
            let _ = fs::remove_file(&self.path);
        }
    }
}
