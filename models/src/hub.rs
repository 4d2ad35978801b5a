//! Files of a model on the Hugging Face Hub, in the cache folder that Python's `huggingface_hub`
//! shares.
//!
//! [`hf_hub`] makes the requests; what its version 0.5 leaves out stands here:
//!
//! - It reads `HF_HOME` and `HF_ENDPOINT` only: [`HubSettings::from_env`] reads the others.
//! - It takes a body that ends early for a whole file, keeps a `.part` file of a cut connection
//!   (and may resume it at the wrong place), and gives up after 5 s when another process
//!   downloads. So a file comes into a staging folder under a lock, its size is compared with the
//!   announced one, and only then it is renamed into the cache.
//! - It asks again for a file that the Hub does not have: `.no_exist` remembers that, as in Python.

use core::fmt;
use std::fs;
use std::io::{self, IsTerminal};
use std::path::PathBuf;

use candle_core::{Error, Result};
use hf_hub::api::Progress;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, Metadata};
use hf_hub::{Cache, Repo, RepoType};
use indicatif::{ProgressBar, ProgressStyle};

use cache::RepoCache;
pub use settings::HubSettings;

mod cache;
mod settings;

const PUBLIC_ENDPOINT: &str = "https://huggingface.co";
const DEFAULT_REVISION: &str = "main";
const RETRIES: usize = 2;

/// One model of the Hub at one revision. Displayed as in `` model `org/name` at revision `main` on
/// https://huggingface.co ``.
pub struct HubRepo {
    id: String,
    repo: Repo,
    api: Api,
    endpoint: String,
    cache: RepoCache,
    cache_dir: PathBuf,
    settings: HubSettings,
}

impl HubRepo {
    /// Names a model by its id, `org/name` or `name`, and a revision: a branch (`None` is `main`),
    /// a tag or a commit. Nothing is asked of the Hub yet.
    ///
    /// # Errors
    /// If the id or the revision is not of that form.
    pub fn new(settings: &HubSettings, id: &str, revision: Option<&str>) -> Result<Self> {
        let revision = revision.unwrap_or(DEFAULT_REVISION);
        check_id(id)?;
        check_path("revision", revision)?;
        let endpoint = settings.endpoint.as_deref().unwrap_or(PUBLIC_ENDPOINT);
        let endpoint = endpoint.trim_end_matches('/').to_string();
        let default_dir = || Cache::from_env().path().clone();
        let cache_dir = settings.cache_dir.clone().unwrap_or_else(default_dir);
        let repo = Repo::with_revision(id.to_string(), RepoType::Model, revision.to_string());
        let cache = RepoCache::new(&cache_dir, &repo);
        let api = ApiBuilder::from_env()
            .with_endpoint(endpoint.clone())
            .with_cache_dir(cache.staging_dir())
            .with_token(settings.token.clone())
            .with_retries(RETRIES)
            .build()
            .map_err(|e| Error::Msg(format!("cannot set up the Hub client: {e}")))?;
        Ok(Self { id: id.to_string(), api, endpoint, cache, cache_dir, repo, settings: settings.clone() })
    }

    /// The model's id, `org/name` or `name`.
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

    /// What the Hub announces of the file before anything is written; `None` on a 404.
    fn probe(&self, file: &str) -> Result<Option<Metadata>> {
        let url = self.api.repo(self.repo.clone()).url(file);
        let announced = match self.api.metadata(&url) {
            Err(error) if status(&error) == Some(404) => return Ok(None),
            Err(error) => return Err(self.explain(file, &error)),
            Ok(announced) => announced,
        };
        // Both become names in the cache folder.
        check_path("ETag in the server's answer", announced.etag())?;
        check_path("X-Repo-Commit in the server's answer", announced.commit_hash())?;
        Ok(Some(announced))
    }

    fn download(&self, file: &str, announced: &Metadata) -> Result<PathBuf> {
        let unwritable = |error: io::Error| self.cache_error(&error);
        let _lock = self.cache.lock().map_err(unwritable)?;
        // Another process may have brought the file while this one waited.
        if let Some(path) = self.cache.get(file) {
            return Ok(path);
        }
        if let Some(path) = self.cache.reuse(file, announced).map_err(unwritable)? {
            return Ok(path);
        }
        let _staging = self.cache.stage().map_err(unwritable)?;
        let staged = self
            .api
            .repo(self.repo.clone())
            .download_with_progress(file, Bar::new(self.settings.progress))
            .map_err(|e| self.explain(file, &e))?;
        let got = fs::metadata(&staged).map_err(unwritable)?.len();
        let expected = announced.size();
        if got != expected as u64 {
            let text = format!(
                "the download has {got} bytes instead of the announced {expected}; \
                 it was thrown away, run it again"
            );
            return Err(self.error(file, &text));
        }
        let changed = "changed on the Hub during the download; run it again";
        let published = self.cache.publish(file, &staged, announced).map_err(unwritable)?;
        published.ok_or_else(|| self.error(file, changed))
    }

    fn error(&self, file: &str, text: &str) -> Error {
        // No backtrace, as `bail!` would add one: these are not mistakes in the code.
        Error::Msg(format!("`{file}` of {self}: {text}"))
    }

    fn cache_error(&self, error: &io::Error) -> Error {
        Error::Msg(format!(
            "cannot write {self} to the cache folder {}: {error}; HF_HUB_CACHE names another folder",
            self.cache_dir.display()
        ))
    }

    fn missing(&self, file: &str) -> Error {
        if self.settings.offline {
            let text = format!(
                "not in the cache folder {}, and offline mode (HF_HUB_OFFLINE) forbids a download",
                self.cache_dir.display()
            );
            return self.error(file, &text);
        }
        self.error(file, "not found (404); check the model id, the revision and the file name")
    }

    fn explain(&self, file: &str, error: &ApiError) -> Error {
        let root = root_cause(error);
        let text = match (status(root), root) {
            (Some(code @ (401 | 403)), _) if self.settings.token.is_some() => format!(
                "access denied ({code}); it does not exist, or it is private or gated and this \
                 HF_TOKEN may not read it"
            ),
            (Some(code @ (401 | 403)), _) => format!(
                "access denied ({code}); it does not exist, or it is private or gated: \
                 set HF_TOKEN to a token that may read it"
            ),
            (Some(code), _) => format!("the server answered {code}; try again later"),
            (None, ApiError::RequestError(cause)) => format!(
                "cannot reach the server ({cause}); check the network and HF_ENDPOINT, \
                 or set HF_HUB_OFFLINE=1 to use the cache only"
            ),
            (None, ApiError::IoError(cause)) => {
                format!("the download broke off ({cause}); no part of it was kept, run it again")
            }
            (None, cause) => {
                format!("the server does not answer as the Hub does ({cause}); check HF_ENDPOINT")
            }
        };
        self.error(file, &text)
    }
}

impl fmt::Display for HubRepo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (id, revision) = (&self.id, self.repo.revision());
        let place = if self.settings.offline { "the cache, HF_HUB_OFFLINE is set; else on " } else { "" };
        write!(f, "model `{id}` at revision `{revision}` on {place}{}", self.endpoint)
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

/// A bar that stands still while a resumed download catches up; hf-hub's own counts the first
/// part twice.
struct Bar {
    bar: ProgressBar,
    done: u64,
}

impl Bar {
    fn new(wanted: bool) -> Self {
        if !wanted || !io::stderr().is_terminal() {
            return Self { bar: ProgressBar::hidden(), done: 0 };
        }
        let template = "{msg} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} ({eta})";
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        Self { bar: ProgressBar::new(0).with_style(style), done: 0 }
    }
}

impl Progress for Bar {
    fn init(&mut self, size: usize, filename: &str) {
        self.bar.set_length(size as u64);
        self.bar.set_message(filename.to_string());
        self.done = 0;
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        self.bar.set_position(self.done.max(self.bar.position()));
    }

    fn finish(&mut self) {
        self.bar.finish();
    }
}

fn root_cause(error: &ApiError) -> &ApiError {
    match error {
        ApiError::TooManyRetries(inner) => root_cause(inner),
        other => other,
    }
}

/// HTTP status of a refused request. hf-hub does not export the error type of its HTTP crate, so
/// the number is read from the text; the tests would notice another wording.
fn status(error: &ApiError) -> Option<u16> {
    let ApiError::RequestError(error) = root_cause(error) else {
        return None;
    };
    error.to_string().strip_prefix("http status: ")?.parse().ok()
}

fn check_id(id: &str) -> Result<()> {
    let plain = |part: &str| {
        let letters = part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        let edges = [part.chars().next(), part.chars().last()];
        let ends = edges.iter().all(|c| c.is_some_and(|c| c != '-' && c != '.'));
        letters && ends && !part.contains("..") && !part.contains("--")
    };
    if id.len() <= 96 && id.split('/').count() <= 2 && id.split('/').all(plain) {
        return Ok(());
    }
    Err(Error::Msg(format!(
        "`{id}` is not a model id of the Hub: one looks like `org/name`, the end of the address of \
         the model's page"
    )))
}

/// Refuses what would leave the cache folder or change the meaning of the URL.
fn check_path(what: &str, path: &str) -> Result<()> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/-_.+@=,~".contains(&b);
    let parts = path.split('/').all(|part| !["", ".", ".."].contains(&part));
    if parts && path.bytes().all(plain) {
        return Ok(());
    }
    Err(Error::Msg(format!("`{path}` is not a valid {what}")))
}
