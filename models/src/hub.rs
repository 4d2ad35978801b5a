//! Files of a model on the Hugging Face Hub, in the cache folder that Python's `huggingface_hub`
//! shares.
//!
//! The folder's layout is [`hf_hub`]'s; the requests are our own (`hub/client.rs`), since its version 0.5 shows the token to
//! other hosts and waits for ever. A file comes into a staging folder under a lock, its size is compared with the announced one, and
//! only then it is renamed into the cache. `.no_exist` remembers files that a model does not have, as in Python.

use core::fmt;
use core::time::Duration;
use std::fs::File;
use std::io::{self, IsTerminal, Read as _, Write as _};
use std::path::PathBuf;

use candle_core::Result;
use candle_sparse::Error;
use hf_hub::{Repo, RepoType};
use indicatif::{ProgressBar, ProgressStyle};
use ureq::http::Uri;

use cache::{RepoCache, Wanted};
use client::{Announced, Client, Failure};
pub use settings::HubSettings;

mod cache;
mod client;
mod settings;

const PUBLIC_ENDPOINT: &str = "https://huggingface.co";
const DEFAULT_REVISION: &str = "main";
/// How often a download that broke off goes on.
const RETRIES: u32 = 3;

/// One model of the Hub at one revision. Displayed as in `` model `org/name` at revision `main` on
/// https://huggingface.co ``.
///
/// ```
/// use candle_sparse_models::hub::{HubRepo, HubSettings};
///
/// # let cache = tempfile::tempdir()?;
/// let settings = HubSettings::default().with_cache_dir(Some(cache.path().into())).with_offline(true);
/// let repo = HubRepo::new(&settings, "org/model", Some("v1.0"))?;
/// assert_eq!(repo.id(), "org/model");
/// // Nothing is in the cache, and the network is not to be used.
/// assert!(repo.get("config.json").is_err());
/// assert_eq!(repo.get_optional("config.json")?, None);
/// assert!(HubRepo::new(&settings, "not an id", None).is_err());
/// # Ok::<(), candle_core::Error>(())
/// ```
pub struct HubRepo {
    id: String,
    repo: Repo,
    client: Client,
    endpoint: String,
    cache: RepoCache,
    cache_dir: PathBuf,
    settings: HubSettings,
}

impl HubRepo {
    /// Names a model by its id, `org/name`, and a revision: a branch (`None` is `main`),
    /// a tag or a commit. Nothing is asked of the Hub yet.
    ///
    /// # Errors
    /// If the id or the revision is not of that form, the endpoint is no address, or there is no folder for the cache.
    pub fn new(settings: &HubSettings, id: &str, revision: Option<&str>) -> Result<Self> {
        let revision = revision.unwrap_or(DEFAULT_REVISION);
        check_id(id)?;
        check_path("revision", revision)?;
        let endpoint = settings.endpoint.as_deref().unwrap_or(PUBLIC_ENDPOINT);
        let endpoint = endpoint.trim_end_matches('/').to_string();
        let address: Option<Uri> = endpoint.parse().ok();
        let can_be_asked =
            |url: &Uri| matches!(url.scheme_str(), Some("http" | "https")) && url.host().is_some();
        let Some(address) = address.filter(can_be_asked) else {
            let problem = format!("`{endpoint}` is no address; one looks like {PUBLIC_ENDPOINT}");
            return Err(Error::Setting { name: "HF_ENDPOINT", problem }.into());
        };
        let cache_dir = settings.cache_dir.clone().or_else(settings::default_cache_dir);
        let Some(cache_dir) = cache_dir else {
            let problem = "there is no home folder for the cache; name another folder".to_string();
            return Err(Error::Setting { name: "HF_HUB_CACHE", problem }.into());
        };
        let repo = Repo::with_revision(id.to_string(), RepoType::Model, revision.to_string());
        let cache = RepoCache::new(&cache_dir, &repo);
        let client = Client::new(address, settings);
        Ok(Self { id: id.to_string(), client, endpoint, cache, cache_dir, repo, settings: settings.clone() })
    }

    /// The model's id, `org/name`.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Path of `file` in the cache, after a download if it is not there yet. No request is made
    /// for a cached file, so a branch that moved on the Hub is not noticed.
    ///
    /// # Errors
    /// In one line, what failed, where, and how to mend it: the model, revision or file is unknown
    /// or needs a token, the server cannot be reached, the download broke off or has the wrong
    /// size. The cache then holds no part of the file.
    pub fn get(&self, file: &str) -> Result<PathBuf> {
        check_path("file name", file)?;
        self.find(file)?.ok_or_else(|| self.missing(file))
    }

    /// As [`get`](Self::get), but `None` for a file that the model does not have (offline: that
    /// the cache does not have).
    ///
    /// # Errors
    /// As [`get`](Self::get), except for the missing file.
    pub fn get_optional(&self, file: &str) -> Result<Option<PathBuf>> {
        check_path("file name", file)?;
        if self.cache.is_known_missing(file) {
            return Ok(None);
        }
        let found = self.find(file)?;
        if found.is_none() && !self.settings.offline {
            self.cache.remember_missing(file);
        }
        Ok(found)
    }

    fn find(&self, file: &str) -> Result<Option<PathBuf>> {
        if let Some(path) = self.cache.get(file) {
            return Ok(Some(path));
        }
        if self.settings.offline {
            return Ok(None);
        }
        match self.probe(file)? {
            Some(announced) => self.download(file, &announced).map(Some),
            None => Ok(None),
        }
    }

    fn url(&self, file: &str) -> Result<Uri> {
        let (repo, revision) = (self.repo.url(), self.repo.url_revision());
        let url = format!("{}/{repo}/resolve/{revision}/{file}", self.endpoint);
        url.parse().map_err(|e| self.error(file, &format!("`{url}` is no address ({e})")))
    }

    /// What the Hub announces of the file before anything is written; `None` on a 404.
    fn probe(&self, file: &str) -> Result<Option<Wanted>> {
        let url = self.url(file)?;
        let answer = self.patiently(|| self.client.announced(&url));
        let Announced { commit, etag, size } = match answer {
            Err(Failure::Status(404)) => return Ok(None),
            Err(failure) => return Err(self.explain(file, &failure)),
            Ok(announced) => announced,
        };
        // A mirror need not say what the revision says already.
        let revision = self.repo.revision();
        let is_commit = revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit());
        let commit = commit.or_else(|| (is_commit && etag.is_some()).then(|| revision.to_string()));
        let Some(commit) = commit else {
            let text = "the server does not answer as the Hub does: it names no commit (X-Repo-Commit); check HF_ENDPOINT, \
                        or whether a proxy or a login page answers in its place";
            return Err(self.error(file, text));
        };
        // Both become names in the cache folder.
        check_path("X-Repo-Commit in the server's answer", &commit)?;
        // A tag that could be no file's name is none; one that would be another file's is no accident.
        let etag = etag.filter(|etag| etag.contains('/') || is_plain_path(etag));
        etag.as_deref().map_or(Ok(()), |etag| check_path("ETag in the server's answer", etag))?;
        Ok(Some(Wanted { commit, etag, size }))
    }

    /// Asks again where that may help.
    fn patiently<T>(
        &self,
        ask: impl Fn() -> core::result::Result<T, Failure>,
    ) -> core::result::Result<T, Failure> {
        let mut answer = ask();
        for wait in [200, 800] {
            match &answer {
                Err(failure) if failure.may_pass() => std::thread::sleep(Duration::from_millis(wait)),
                _ => break,
            }
            answer = ask();
        }
        answer
    }

    fn download(&self, file: &str, wanted: &Wanted) -> Result<PathBuf> {
        let unwritable = |error: io::Error| self.cache_error(&error);
        let _lock = self.cache.lock().map_err(unwritable)?;
        // Another process may have brought the file while this one waited.
        if let Some(path) = self.cache.get(file) {
            return Ok(path);
        }
        if let Some(path) = self.cache.reuse(file, wanted).map_err(unwritable)? {
            return Ok(path);
        }
        let staging = self.cache.stage().map_err(unwritable)?;
        let staged = staging.file();
        self.bring(file, wanted, File::create(&staged).map_err(unwritable)?)?;
        self.cache.publish(file, &staged, wanted).map_err(unwritable)
    }

    /// Writes the file's content; what breaks off goes on where it broke off.
    fn bring(&self, file: &str, wanted: &Wanted, mut out: File) -> Result<()> {
        let url = self.url(file)?;
        let bar = bar(self.settings.progress, file, wanted.size);
        let (mut got, mut tries) = (0, 0);
        loop {
            match self.bring_on(&url, wanted, &mut out, &mut got, &bar) {
                Ok(()) => break,
                Err(Broken::Cache(error)) => return Err(self.cache_error(&error)),
                Err(Broken::Changed) => {
                    return Err(self.error(file, "changed on the Hub during the download; run it again"));
                }
                Err(Broken::Server(failure)) if tries < RETRIES && failure.may_pass() => {
                    tries += 1;
                    std::thread::sleep(Duration::from_millis(200 << tries));
                }
                Err(Broken::Server(failure)) => return Err(self.explain(file, &failure)),
            }
        }
        bar.finish();
        match wanted.size {
            Some(expected) if expected != got => {
                let text = format!(
                    "the download has {got} bytes instead of the announced {expected}; it was thrown away, run it again"
                );
                Err(self.error(file, &text))
            }
            _ => out.sync_all().map_err(|error| self.cache_error(&error)),
        }
    }

    fn bring_on(
        &self,
        url: &Uri,
        wanted: &Wanted,
        out: &mut File,
        got: &mut u64,
        bar: &ProgressBar,
    ) -> core::result::Result<(), Broken> {
        if wanted.size == Some(*got) {
            return Ok(());
        }
        let answer = self.client.content(url, *got, wanted.etag.as_deref());
        let answer = match answer {
            // The part that is here is none of this file.
            Err(Failure::Status(416)) if *got > 0 => self.client.content(url, 0, None),
            answer => answer,
        }
        .map_err(Broken::Server)?;
        let said = &answer.announced;
        // A file of one commit is one file, whatever tags are told.
        let changed = match &said.commit {
            Some(commit) => *commit != wanted.commit,
            None => wanted.etag.as_ref().zip(said.etag.as_ref()).is_some_and(|(ours, theirs)| ours != theirs),
        };
        if changed {
            return Err(Broken::Changed);
        }
        if answer.start() != Some(*got) {
            io::Seek::rewind(out).and_then(|()| out.set_len(0)).map_err(Broken::Cache)?;
            *got = 0;
        }
        if !matches!(answer.start(), Some(start) if start == *got) {
            let text = "the server sends another part of the file than it was asked for";
            return Err(Broken::Server(Failure::Body(io::Error::other(text))));
        }
        let mut body = answer.read();
        let mut buffer = vec![0; 1 << 16];
        loop {
            bar.set_position(*got);
            let count = match body.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) => return Err(Broken::Server(Failure::Body(error))),
            };
            out.write_all(&buffer[..count]).map_err(Broken::Cache)?;
            *got += count as u64;
        }
    }

    fn error(&self, file: &str, text: &str) -> candle_core::Error {
        let what = format!("`{file}` of {self}");
        Error::Download { what, problem: text.to_string() }.into()
    }

    fn cache_error(&self, error: &io::Error) -> candle_core::Error {
        let problem = format!(
            "{self} cannot be written to the cache folder: {error}; HF_HUB_CACHE names another folder"
        );
        Error::File { path: self.cache_dir.clone(), problem }.into()
    }

    fn missing(&self, file: &str) -> candle_core::Error {
        if self.settings.offline {
            let text = format!(
                "not in the cache folder {}, and HF_HUB_OFFLINE forbids a download: unset it, or name a folder with the model",
                self.cache_dir.display()
            );
            return self.error(file, &text);
        }
        self.error(file, "not found (404); check the model id, the revision and the file name")
    }

    fn explain(&self, file: &str, failure: &Failure) -> candle_core::Error {
        let text = match failure {
            Failure::Status(code @ (401 | 403)) if self.settings.token.is_some() => format!(
                "access denied ({code}); it does not exist, or it is private or gated and this HF_TOKEN may not read it"
            ),
            Failure::Status(code @ (401 | 403)) => format!(
                "access denied ({code}); it does not exist, or it is private or gated: set HF_TOKEN to a token that may read it"
            ),
            Failure::Status(404) => "not found (404); check the model id, the revision and the file name".to_string(),
            Failure::Status(429) => {
                "the server answered 429, too many requests; wait some minutes, or set HF_TOKEN, which has a larger share".to_string()
            }
            Failure::Status(code) => format!("the server answered {code}; try again later"),
            Failure::Request(cause) => format!(
                "cannot reach the server ({cause}); check the network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to use the cache only"
            ),
            Failure::Body(cause) => format!("the download broke off ({cause}); no part of it was kept, run it again"),
            other => format!("{other}; check HF_ENDPOINT"),
        };
        self.error(file, &text)
    }
}

/// Why a download does not go on.
enum Broken {
    Server(Failure),
    Cache(io::Error),
    Changed,
}

impl fmt::Display for HubRepo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (id, revision) = (&self.id, self.repo.revision());
        write!(f, "model `{id}` at revision `{revision}`")?;
        if self.settings.offline { Ok(()) } else { write!(f, " on {}", self.endpoint) }
    }
}

impl fmt::Debug for HubRepo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubRepo")
            .field("id", &self.id)
            .field("revision", &self.repo.revision())
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

fn bar(wanted: bool, file: &str, size: Option<u64>) -> ProgressBar {
    if !wanted || !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let template = if size.is_some() {
        "{msg} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} ({eta})"
    } else {
        "{msg} {bytes} {bytes_per_sec}"
    };
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::with_draw_target(size, indicatif::ProgressDrawTarget::stderr())
        .with_style(style)
        .with_message(file.to_string())
}

fn check_id(id: &str) -> Result<()> {
    let plain = |part: &str| {
        let letters = part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        let edges = [part.chars().next(), part.chars().last()];
        let ends = edges.iter().all(|c| c.is_some_and(|c| c != '-' && c != '.'));
        letters && ends && !part.contains("..") && !part.contains("--")
    };
    if id.len() <= 96 && id.split('/').count() == 2 && id.split('/').all(plain) {
        return Ok(());
    }
    let problem = format!(
        "`{id}` is not a model id of the Hub: one looks like `org/name`, the end of the address of the model's page"
    );
    Err(Error::Setting { name: "model", problem }.into())
}

fn is_plain_path(path: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/-_.+@=,~".contains(&b);
    path.bytes().all(plain) && path.split('/').all(|part| !["", ".", ".."].contains(&part))
}

/// Refuses what would leave the cache folder or change the meaning of the URL.
fn check_path(what: &str, path: &str) -> Result<()> {
    if is_plain_path(path) {
        return Ok(());
    }
    Err(candle_core::Error::Msg(format!("`{path}` is not a valid {what}")))
}
