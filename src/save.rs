//! Putting a file in its place: whole, or not at all.

mod part;

use crate::input::{file_error, irregular};
use candle_core::{Error, Result};
use part::Part;
use std::{
    fs::{self, File},
    io::{self, ErrorKind},
    path::{Path, PathBuf},
};

/// So many symbolic links may lead to a file, as in Linux.
const MOST_LINKS: usize = 40;

/// Checks that [`save`] can put a file at `path`: worth a call before a long computation.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// assert!(candle_sparse::save::check(folder.path().join("profile.safetensors")).is_ok());
/// assert!(candle_sparse::save::check(folder.path().join("no-such-folder/profile.safetensors")).is_err());
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// [`Error::File`](crate::Error::File), as [`save`], except for what happens while writing.
pub fn check(path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    // A new file beside it is what saving needs; this one is gone when the value is dropped.
    Part::beside(&place(path)?).map(drop).map_err(|e| unwritable(path, &e))
}

/// Writes a file by way of a new one beside it that is renamed when it is whole, so that a crash, a full disk or an error of
/// `write` leaves what was there before, and a reader sees the old content or the new.
///
/// A symbolic link stays one: the file that it names is written. Permissions of a file that is replaced are kept.
///
/// ```
/// use std::io::Write;
///
/// # let folder = tempfile::tempdir()?;
/// let path = folder.path().join("answer.txt");
/// candle_sparse::save::save(&path, |file| Ok(file.write_all(b"42")?))?;
/// // What fails changes nothing.
/// let failed = candle_sparse::save::save(&path, |file| {
///     file.write_all(b"half of")?;
///     candle_core::bail!("the rest is not known")
/// });
/// assert!(failed.is_err());
/// assert_eq!(std::fs::read(&path)?, b"42");
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// Those of `write`; [`Error::File`](crate::Error::File): the folder is missing or cannot be written to, or what is there is
/// no regular file (a device, a pipe, a folder) or is write-protected, which is never replaced.
pub fn save(path: impl AsRef<Path>, write: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    save_checked(path, write, |_| Ok(()))
}

/// As [`save`], but the new file is put in place only if `check` finds nothing wrong with it; it is told where the file is until
/// then.
///
/// ```
/// use std::io::Write;
///
/// # let folder = tempfile::tempdir()?;
/// let path = folder.path().join("numbers.json");
/// let written = candle_sparse::save::save_checked(
///     &path,
///     |file| Ok(file.write_all(b"[1, 2")?),
///     |new| match serde_json::from_slice::<Vec<u32>>(&std::fs::read(new)?) {
///         Ok(_) => Ok(()),
///         Err(e) => candle_core::bail!("would not be read again: {e}"),
///     },
/// );
/// assert!(written.is_err() && !path.exists());
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// Those of [`save`] and of `check`.
pub fn save_checked(
    path: impl AsRef<Path>,
    write: impl FnOnce(&mut File) -> Result<()>,
    check: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let path = path.as_ref();
    let failed = |e: &io::Error| unwritable(path, e);
    let place = place(path)?;
    let mut part = Part::beside(&place).map_err(|e| failed(&e))?;
    write(&mut part.file).map_err(|e| match e {
        Error::Io(io) if io.get_ref().is_none_or(|inner| !inner.is::<crate::Error>()) => failed(&io),
        other => other,
    })?;
    check(&part.path)?;
    part.put(&place).map_err(|e| failed(&e))
}

fn unwritable(path: &Path, e: &io::Error) -> Error {
    let mend = match e.kind() {
        ErrorKind::NotFound => " (its folder must exist)",
        ErrorKind::StorageFull | ErrorKind::FileTooLarge | ErrorKind::QuotaExceeded => {
            " (what was there before is unchanged)"
        }
        _ => "",
    };
    file_error(path, format!("cannot be written: {e}{mend}"))
}

/// Where the file really goes: behind symbolic links, be there a file already or not.
fn place(path: &Path) -> Result<PathBuf> {
    let refuse =
        |what: &str| Err(file_error(path, format!("{what}; a file is written to a regular file only")));
    if path.as_os_str().as_encoded_bytes().ends_with(b"/") {
        return refuse("names a folder");
    }
    // Follows links too, also those of /dev and /proc that name no path.
    match fs::metadata(path) {
        Ok(about) => {
            if let Some(what) = irregular(&about) {
                return refuse(&format!("is {what}"));
            }
            if about.permissions().readonly() {
                return refuse("is write-protected");
            }
        }
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(unwritable(path, &e)),
    }
    let mut place = path.to_path_buf();
    for _ in 0..MOST_LINKS {
        // Such a link names what a process has opened: a file put beside it would not be what the process writes to.
        if place.parent().is_some_and(|folder| folder.ends_with("fd") && folder.starts_with("/proc")) {
            return refuse("names an open file, not a path");
        }
        match fs::read_link(&place) {
            // A relative link counts from the folder that it is in.
            Ok(target) => place = place.with_file_name("").join(target),
            Err(_) if place.file_name().is_none() => return refuse("names no file"),
            Err(_) => return Ok(place),
        }
    }
    refuse("leads through too many symbolic links")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn put(path: &Path, text: &str) -> Result<()> {
        save(path, |file| Ok(file.write_all(text.as_bytes())?))
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn refused(path: &Path, needle: &str) {
        for e in [check(path).unwrap_err(), put(path, "x").unwrap_err()] {
            assert!(
                matches!(crate::Error::of(&e), Some(crate::Error::File { path: p, .. }) if p == path),
                "{e}"
            );
            let e = e.to_string();
            assert!(e.contains(needle) && !e.contains('\n'), "{e}");
        }
    }

    #[test]
    fn what_is_found_wrong_is_not_put_in_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        put(&path, "old").unwrap();
        let write = |file: &mut File| Ok(file.write_all(b"new")?);
        let e = save_checked(&path, write, |part| {
            assert_eq!(fs::read_to_string(part).unwrap(), "new");
            candle_core::bail!("the reason")
        });
        assert!(e.unwrap_err().to_string().contains("the reason"));
        assert_eq!((fs::read_to_string(&path).unwrap().as_str(), names(dir.path()).len()), ("old", 1));
        save_checked(&path, write, |_| Ok(())).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn an_open_file_is_no_place() {
        let dir = tempfile::tempdir().unwrap();
        let (link, open) = (dir.path().join("out"), File::create(dir.path().join("redirected")).unwrap());
        let fd = std::os::fd::AsRawFd::as_raw_fd(&open);
        std::os::unix::fs::symlink(format!("/proc/self/fd/{fd}"), &link).unwrap();
        refused(&link, "names an open file");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    }

    #[test]
    fn a_file_is_replaced_whole_and_nothing_else_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        check(&path).unwrap();
        assert!(!path.exists());
        put(&path, "old").unwrap();
        put(&path, "new").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        let e = save(&path, |file| {
            file.write_all(b"half")?;
            candle_core::bail!("the reason")
        });
        assert!(e.unwrap_err().to_string().contains("the reason"));
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(names(dir.path()), ["a.txt"]);
    }

    #[cfg(unix)]
    #[test]
    fn what_a_killed_save_left_of_the_same_file_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let part = |name: &str, n: u32| format!("{}1-{n}.part", part::start_of_parts(&at(name)));
        for (name, n) in [("a.txt", 0), ("a.txt", 1), ("b.txt", 0)] {
            fs::write(at(&part(name, n)), "half").unwrap();
        }
        // A process that still writes holds its own.
        let held = File::open(at(&part("a.txt", 1))).unwrap();
        held.lock().unwrap();
        put(&at("a.txt"), "new").unwrap();
        let mut left = [part("a.txt", 1), part("b.txt", 0), "a.txt".to_string()];
        left.sort();
        assert_eq!(names(dir.path()), left);
        drop(held);
        check(at("a.txt")).unwrap();
        assert_eq!(names(dir.path()), [part("b.txt", 0), "a.txt".to_string()]);
    }

    #[test]
    fn many_threads_save_beside_one_another() {
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for who in ["alice", "bob", "carol", "dave"] {
                let path = dir.path().join(format!("session.{who}"));
                scope.spawn(move || {
                    let text = who.repeat(5000);
                    for _ in 0..50 {
                        put(&path, &text).unwrap();
                        assert_eq!(fs::read_to_string(&path).unwrap(), text);
                    }
                });
            }
        });
        assert_eq!(names(dir.path()), ["session.alice", "session.bob", "session.carol", "session.dave"]);
    }

    #[test]
    fn what_is_no_place_for_a_file_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        refused(dir.path(), "is a folder");
        refused(&dir.path().join("none/x"), "folder must exist");
        refused(Path::new(""), "names no file");
        refused(&dir.path().join("new/"), "names a folder");
        let protected = dir.path().join("protected");
        put(&protected, "keep").unwrap();
        let mut permissions = fs::metadata(&protected).unwrap().permissions();
        permissions.set_readonly(true);
        fs::set_permissions(&protected, permissions).unwrap();
        refused(&protected, "write-protected");
        assert_eq!(names(dir.path()), ["protected"]);
    }

    #[cfg(unix)]
    #[test]
    fn devices_pipes_and_sockets_stay_what_they_are() {
        use std::os::unix::fs::FileTypeExt;

        let dir = tempfile::tempdir().unwrap();
        refused(Path::new("/dev/null"), "is a device");
        assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        refused(&socket, "is a socket");
        let pipe = dir.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        refused(&pipe, "is a named pipe");
        // A link to one is one.
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&pipe, &link).unwrap();
        refused(&link, "is a named pipe");
        assert!(fs::metadata(&pipe).unwrap().file_type().is_fifo());
    }

    #[cfg(unix)]
    #[test]
    fn links_are_written_through() {
        use std::os::unix::fs::{PermissionsExt, symlink};

        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("far")).unwrap();
        fs::write(at("far/target"), "old").unwrap();
        fs::set_permissions(at("far/target"), fs::Permissions::from_mode(0o600)).unwrap();
        symlink("far/target", at("one")).unwrap();
        symlink(at("one"), at("two")).unwrap();
        // One whose target is not there yet makes it.
        symlink("far/new", at("dangling")).unwrap();
        for (link, target) in [("one", "far/target"), ("two", "far/target"), ("dangling", "far/new")] {
            check(at(link)).unwrap();
            put(&at(link), link).unwrap();
            assert!(fs::symlink_metadata(at(link)).unwrap().is_symlink(), "{link}");
            assert_eq!(fs::read_to_string(at(target)).unwrap(), link);
        }
        let mode = fs::metadata(at("far/target")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "permissions are kept");
        symlink("round", at("round")).unwrap();
        refused(&at("round"), "");
        assert_eq!(names(dir.path()), ["dangling", "far", "one", "round", "two"]);
        assert_eq!(names(&at("far")), ["new", "target"]);
    }
}
