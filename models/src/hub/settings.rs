//! How to reach the Hub, from the environment variables of the Hugging Face tools.

use core::fmt;
use std::fs;
use std::path::PathBuf;

use hf_hub::Cache;

/// Where the Hub is and how to speak to it. The default is the public Hub without a token.
#[derive(Clone, Default)]
pub struct HubSettings {
    /// Address of the Hub; `None` is `https://huggingface.co`.
    pub endpoint: Option<String>,
    /// Cache folder; `None` is `$HF_HOME/hub`, else `~/.cache/huggingface/hub`.
    pub cache_dir: Option<PathBuf>,
    /// Access token for private and gated models.
    pub token: Option<String>,
    /// Use the cache only, never the network.
    pub offline: bool,
    /// Draw a progress bar while downloading, if the standard error is a terminal.
    pub progress: bool,
}

impl HubSettings {
    /// Reads the environment variables of the Hugging Face tools: `HF_ENDPOINT`, `HF_HUB_CACHE`
    /// (or `HUGGINGFACE_HUB_CACHE`), `HF_HOME`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_OFFLINE` and
    /// `HF_HUB_DISABLE_PROGRESS_BARS`. Without a token variable, the file `$HF_HOME/token` that
    /// `hf auth login` writes is used.
    #[must_use]
    pub fn from_env() -> Self {
        let cache_dir = variable("HF_HUB_CACHE").or_else(|| variable("HUGGINGFACE_HUB_CACHE"));
        Self {
            endpoint: variable("HF_ENDPOINT"),
            cache_dir: cache_dir.map(PathBuf::from),
            token: variable("HF_TOKEN").or_else(token_file),
            offline: switch("HF_HUB_OFFLINE"),
            progress: !switch("HF_HUB_DISABLE_PROGRESS_BARS"),
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
            .finish()
    }
}

fn variable(name: &str) -> Option<String> {
    let value = std::env::var(name).ok()?.trim().to_string();
    (!value.is_empty()).then_some(value)
}

fn switch(name: &str) -> bool {
    let value = variable(name).unwrap_or_default().to_ascii_lowercase();
    ["1", "on", "yes", "true"].contains(&value.as_str())
}

fn token_file() -> Option<String> {
    let Some(path) = variable("HF_TOKEN_PATH") else {
        return Cache::from_env().token();
    };
    let token = fs::read_to_string(path).ok()?.trim().to_string();
    (!token.is_empty()).then_some(token)
}
