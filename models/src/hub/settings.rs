//! How to reach the Hub, from the environment variables of the Hugging Face tools.

use core::fmt;
use core::time::Duration;
use std::fs;
use std::path::PathBuf;

/// As long as Python's `huggingface_hub` waits.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Where the Hub is and how to speak to it. The default is the public Hub without a token.
///
/// ```
/// use candle_sparse_models::hub::HubSettings;
/// use std::time::Duration;
///
/// let settings = HubSettings::default()
///     .with_endpoint(Some("https://mirror.example".into()))
///     .with_token(Some("hf_secret".into()))
///     .with_timeout(Duration::from_secs(30));
/// assert!(!settings.offline);
/// // The token is not shown.
/// assert!(!format!("{settings:?}").contains("hf_secret"));
/// ```
#[derive(Clone)]
#[non_exhaustive]
pub struct HubSettings {
    /// Address of the Hub; `None` is `https://huggingface.co`.
    pub endpoint: Option<String>,
    /// Cache folder; `None` is the one that Python's `huggingface_hub` takes: `$HF_HUB_CACHE`, `$HF_HOME/hub`,
    /// `$XDG_CACHE_HOME/huggingface/hub` or `~/.cache/huggingface/hub`.
    pub cache_dir: Option<PathBuf>,
    /// Access token for private and gated models. No other host than the endpoint's ever sees it.
    pub token: Option<String>,
    /// Use the cache only, never the network.
    pub offline: bool,
    /// Draw a progress bar while downloading, if the standard error is a terminal.
    pub progress: bool,
    /// How long a server may be silent; zero is for ever.
    pub timeout: Duration,
}

impl Default for HubSettings {
    fn default() -> Self {
        Self {
            endpoint: None,
            cache_dir: None,
            token: None,
            offline: false,
            progress: false,
            timeout: TIMEOUT,
        }
    }
}

impl HubSettings {
    /// The same with another [`endpoint`](Self::endpoint).
    #[must_use]
    pub fn with_endpoint(self, endpoint: Option<String>) -> Self {
        Self { endpoint, ..self }
    }

    /// The same with another [`cache_dir`](Self::cache_dir).
    #[must_use]
    pub fn with_cache_dir(self, cache_dir: Option<PathBuf>) -> Self {
        Self { cache_dir, ..self }
    }

    /// The same with another [`token`](Self::token).
    #[must_use]
    pub fn with_token(self, token: Option<String>) -> Self {
        Self { token, ..self }
    }

    /// The same with another [`offline`](Self::offline).
    #[must_use]
    pub fn with_offline(self, offline: bool) -> Self {
        Self { offline, ..self }
    }

    /// The same with another [`progress`](Self::progress).
    #[must_use]
    pub fn with_progress(self, progress: bool) -> Self {
        Self { progress, ..self }
    }

    /// The same with another [`timeout`](Self::timeout).
    #[must_use]
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Reads the environment variables of the Hugging Face tools, as Python's `huggingface_hub` does; an empty one is none.
    ///
    /// - `HF_ENDPOINT`;
    /// - `HF_HUB_CACHE` (or `HUGGINGFACE_HUB_CACHE`), `HF_HOME`, `XDG_CACHE_HOME`, `HF_TOKEN_PATH`: paths, in which `~`, `$NAME` and
    ///   `${NAME}` are replaced;
    /// - `HF_TOKEN` (or `HUGGING_FACE_HUB_TOKEN`), else the file `$HF_TOKEN_PATH`, else `$HF_HOME/token`, which `hf auth login`
    ///   writes; `HF_HUB_DISABLE_IMPLICIT_TOKEN` keeps all of them at home;
    /// - `HF_HUB_OFFLINE` (or `TRANSFORMERS_OFFLINE`), `HF_HUB_DISABLE_PROGRESS_BARS`: 1, on, yes or true;
    /// - `HF_HUB_DOWNLOAD_TIMEOUT`: seconds.
    #[must_use]
    pub fn from_env() -> Self {
        let token = || {
            variable("HF_TOKEN")
                .or_else(|| variable("HUGGING_FACE_HUB_TOKEN"))
                .and_then(|text| token(&text))
                .or_else(token_file)
        };
        let seconds = variable("HF_HUB_DOWNLOAD_TIMEOUT").and_then(|seconds| seconds.parse().ok());
        Self {
            endpoint: variable("HF_ENDPOINT"),
            cache_dir: default_cache_dir(),
            token: if switch("HF_HUB_DISABLE_IMPLICIT_TOKEN") { None } else { token() },
            offline: switch(if variable("HF_HUB_OFFLINE").is_some() {
                "HF_HUB_OFFLINE"
            } else {
                "TRANSFORMERS_OFFLINE"
            }),
            progress: !switch("HF_HUB_DISABLE_PROGRESS_BARS"),
            timeout: seconds.map_or(TIMEOUT, Duration::from_secs),
        }
    }
}

impl fmt::Debug for HubSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubSettings")
            .field("endpoint", &self.endpoint)
            .field("cache_dir", &self.cache_dir)
            .field("token", &self.token.as_ref().map(|_| "(hidden)"))
            .field("offline", &self.offline)
            .field("progress", &self.progress)
            .field("timeout", &self.timeout)
            .finish()
    }
}

/// The cache folder that the environment asks for; `None` where there is no home.
pub(super) fn default_cache_dir() -> Option<PathBuf> {
    let named = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE"));
    named.or_else(|| Some(home()?.join("hub")))
}

/// The folder of all Hugging Face tools.
fn home() -> Option<PathBuf> {
    let in_cache = || {
        Some(
            path("XDG_CACHE_HOME")
                .or_else(|| Some(std::env::home_dir()?.join(".cache")))?
                .join("huggingface"),
        )
    };
    path("HF_HOME").or_else(in_cache)
}

/// What may stand in a header: a token that was pasted brings line ends, or an editor's mark of UTF-8.
fn token(text: &str) -> Option<String> {
    let token: String = text.chars().filter(|c| !c.is_control() && *c != '\u{feff}').collect();
    let token = token.trim();
    (!token.is_empty()).then(|| token.to_string())
}

fn variable(name: &str) -> Option<String> {
    let value = std::env::var(name).ok()?.trim().to_string();
    (!value.is_empty()).then_some(value)
}

fn switch(name: &str) -> bool {
    let value = variable(name).unwrap_or_default().to_ascii_lowercase();
    ["1", "on", "yes", "true"].contains(&value.as_str())
}

/// A path, which need not be UTF-8 where there is nothing to replace.
fn path(name: &str) -> Option<PathBuf> {
    let value = std::env::var_os(name).filter(|value| !value.is_empty())?;
    match value.to_str() {
        Some(text) if text.trim().is_empty() => None,
        Some(text) => {
            Some(expanded(text.trim(), &|name| std::env::var(name).ok(), std::env::home_dir()).into())
        }
        None => Some(value.into()),
    }
}

fn token_file() -> Option<String> {
    let file = path("HF_TOKEN_PATH").or_else(|| Some(home()?.join("token")))?;
    token(&fs::read_to_string(file).ok()?)
}

/// As Python's `expandvars(expanduser(path))`: a `~` at the front, then variables; unknown ones stay as they are.
fn expanded(path: &str, variable: &dyn Fn(&str) -> Option<String>, home: Option<PathBuf>) -> String {
    let path = match (path.strip_prefix('~'), home) {
        (Some(rest), Some(home)) if rest.is_empty() || rest.starts_with(std::path::is_separator) => {
            format!("{}{rest}", home.display())
        }
        _ => path.to_string(),
    };
    let mut out = String::new();
    let mut rest = path.as_str();
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let plain = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len());
        let (name, length) = match after.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            Some((name, _)) => (name, name.len() + 2),
            None => (&after[..plain], plain),
        };
        match variable(name) {
            Some(value) if !name.is_empty() => out.push_str(&value),
            _ => out.push_str(&rest[at..=at + length]),
        }
        rest = &after[length..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_expanded_as_in_python() {
        let variable = |name: &str| {
            [("A", "/a"), ("B_1", "b~"), ("E", "")]
                .iter()
                .find(|(n, _)| *n == name)
                .map(|(_, v)| (*v).to_string())
        };
        for (path, wanted) in [
            ("~/hf", "/home/me/hf"),
            ("~", "/home/me"),
            ("~other/hf", "~other/hf"),
            ("a/~", "a/~"),
            ("$A/hf", "/a/hf"),
            ("${A}b/$B_1", "/ab/b~"),
            ("$NONE/${NONE}/$", "$NONE/${NONE}/$"),
            ("${A", "${A"),
            ("$E/x", "/x"),
            ("$$A", "$/a"),
            ("~/$A é", "/home/me//a é"),
        ] {
            assert_eq!(expanded(path, &variable, Some("/home/me".into())), wanted, "{path}");
        }
        assert_eq!(expanded("~/x", &variable, None), "~/x");
    }
}
