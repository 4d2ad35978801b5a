//! The folder of one repository in the cache, laid out as Python's `huggingface_hub` does:
//! `blobs/<etag>`, `snapshots/<commit>/<file>` linked to them, `refs/<revision>` and
//! `.no_exist/<commit>/<file>`.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use hf_hub::{Cache, CacheRepo, Repo};

const STAGING: &str = ".candle-sparse";

/// What the cache holds of one repository at one revision, and the way new files take into it.
pub(super) struct RepoCache {
    revision: String,
    folder: PathBuf,
    lock: PathBuf,
    repo: CacheRepo,
}

/// A file that is to be brought into the cache.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) commit: String,
    /// Its content's name, if the server gives it one.
    pub(super) etag: Option<String>,
    pub(super) size: Option<u64>,
}

impl RepoCache {
    pub(super) fn new(cache_dir: &Path, repo: &Repo) -> Self {
        let folder = cache_dir.join(repo.folder_name());
        Self {
            revision: repo.revision().to_string(),
            lock: cache_dir.join(".locks").join(repo.folder_name()).join("candle-sparse.lock"),
            repo: Cache::new(cache_dir.to_path_buf()).repo(repo.clone()),
            folder,
        }
    }

    /// The commit that the cache knows the revision by; a commit is its own name.
    fn commit(&self) -> String {
        let known = fs::read_to_string(self.folder.join("refs").join(&self.revision));
        known.map_or_else(|_| self.revision.clone(), |commit| commit.trim().to_string())
    }

    pub(super) fn get(&self, file: &str) -> Option<PathBuf> {
        let path = self.repo.pointer_path(&self.commit()).join(file);
        path.is_file().then_some(path)
    }

    fn marker(&self, file: &str) -> PathBuf {
        self.folder.join(".no_exist").join(self.commit()).join(file)
    }

    pub(super) fn is_known_missing(&self, file: &str) -> bool {
        self.marker(file).is_file()
    }

    pub(super) fn remember_missing(&self, file: &str) {
        // Before the first file no commit is known, and a folder for it would only litter.
        if self.repo.pointer_path(&self.commit()).is_dir() {
            let marker = self.marker(file);
            // Best effort: without the marker, the next run asks the Hub once more.
            let folder = marker.parent().map_or(Ok(()), fs::create_dir_all);
            let _ = folder.and_then(|()| File::create(&marker));
        }
    }

    /// Waits until no other thread or process downloads from this repository, until the returned
    /// file is dropped.
    pub(super) fn lock(&self) -> io::Result<File> {
        create_parent(&self.lock)?;
        let file = File::create(&self.lock)?;
        file.lock()?;
        Ok(file)
    }

    /// The place for a file that comes, empty and gone at the end however that comes; to be called under the lock.
    pub(super) fn stage(&self) -> io::Result<Staging> {
        let staging = Staging { folder: self.folder.clone() };
        // Left by a process that was killed; whoever made it no longer holds the lock.
        staging.clear()?;
        fs::create_dir_all(self.folder.join(STAGING))?;
        Ok(staging)
    }

    /// Takes over the content that another revision has brought already, if there is any.
    pub(super) fn reuse(&self, file: &str, wanted: &Wanted) -> io::Result<Option<PathBuf>> {
        let Some(etag) = &wanted.etag else { return Ok(None) };
        let held = self.repo.blob_path(etag).metadata();
        let is_whole =
            held.is_ok_and(|held| held.is_file() && wanted.size.is_none_or(|size| held.len() == size));
        let pointer = if is_whole { self.point(file, wanted, etag)? } else { None };
        if pointer.is_some() {
            self.repo.create_ref(&wanted.commit)?;
        }
        Ok(pointer)
    }

    /// Moves a downloaded file into its place.
    pub(super) fn publish(&self, file: &str, staged: &Path, wanted: &Wanted) -> io::Result<PathBuf> {
        let mut pointer = None;
        if let Some(etag) = &wanted.etag {
            let blob = self.repo.blob_path(etag);
            create_parent(&blob)?;
            fs::rename(staged, &blob)?;
            pointer = self.point(file, wanted, etag)?;
            if pointer.is_none() {
                fs::rename(&blob, staged)?;
            }
        }
        let pointer = match pointer {
            Some(pointer) => pointer,
            // Without a name for its content, or without links, the file itself stands in the snapshot.
            None => {
                let pointer = self.pointer(file, wanted)?;
                fs::rename(staged, &pointer)?;
                pointer
            }
        };
        self.repo.create_ref(&wanted.commit)?;
        Ok(pointer)
    }

    /// Links a file of the snapshot to its content; `None` where links are forbidden, as on Windows.
    fn point(&self, file: &str, wanted: &Wanted, etag: &str) -> io::Result<Option<PathBuf>> {
        let pointer = self.pointer(file, wanted)?;
        let up = "../".repeat(file.split('/').count() + 1);
        Ok(symlink(&format!("{up}blobs/{etag}"), &pointer).is_ok().then_some(pointer))
    }

    /// The place of a new file, with its folder made and a broken link removed.
    fn pointer(&self, file: &str, wanted: &Wanted) -> io::Result<PathBuf> {
        let pointer = self.repo.pointer_path(&wanted.commit).join(file);
        create_parent(&pointer)?;
        if pointer.is_symlink() {
            fs::remove_file(&pointer)?;
        }
        Ok(pointer)
    }
}

/// The staging folder of a repository, gone at the end, however that comes.
pub(super) struct Staging {
    folder: PathBuf,
}

impl Staging {
    /// The file to write.
    pub(super) fn file(&self) -> PathBuf {
        self.folder.join(STAGING).join("part")
    }

    fn clear(&self) -> io::Result<()> {
        match fs::remove_dir_all(self.folder.join(STAGING)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let _ = self.clear();
        // Succeeds only on an empty folder, that of a model whose first download failed.
        let _ = fs::remove_dir(&self.folder);
    }
}

fn create_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)
}

#[cfg(unix)]
fn symlink(target: &str, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(windows)]
fn symlink(target: &str, link: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target.replace('/', "\\"), link)
}

#[cfg(not(any(unix, windows)))]
fn symlink(_target: &str, _link: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
