//! Requests to the Hub.
//!
//! [`hf_hub`]'s own requests are not used: they have no time limits, show the token to the host that a redirect names, panic on a
//! redirect without `Location`, and need a server that answers `Range`.

use super::settings::HubSettings;
use core::time::Duration;
use std::io;
use ureq::http::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, LOCATION,
};
use ureq::http::header::{IF_RANGE, RANGE};
use ureq::http::{Response, Uri};
use ureq::{Agent, Body};

const MOST_REDIRECTS: usize = 10;
const CONNECT_SECONDS: u64 = 10;

/// What a server says of a file.
#[derive(Debug)]
pub(super) struct Announced {
    pub(super) commit: Option<String>,
    pub(super) etag: Option<String>,
    /// The length, where it is told.
    pub(super) size: Option<u64>,
}

/// Why there is no answer, or not the wanted one.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("the server answered {0}")]
    Status(u16),
    #[error("the server answered {0}, which sends elsewhere, without saying where to")]
    Nowhere(u16),
    #[error("the server sends to the address {0:?}, which cannot be followed")]
    BadAddress(String),
    #[error("the server sends from address to address, more than {MOST_REDIRECTS} times")]
    TooManyRedirects,
    #[error("{0}")]
    Request(ureq::Error),
    #[error("{0}")]
    Body(io::Error),
}

impl Failure {
    /// Whether another try may help.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::Status(code) => *code == 429 || *code >= 500,
            Self::Request(error) => !matches!(error, ureq::Error::BadUri(_) | ureq::Error::Http(_)),
            Self::Body(_) => true,
            Self::Nowhere(_) | Self::BadAddress(_) | Self::TooManyRedirects => false,
        }
    }
}

pub(super) struct Client {
    agent: Agent,
    endpoint: Uri,
    token: Option<String>,
}

impl Client {
    pub(super) fn new(endpoint: Uri, settings: &HubSettings) -> Self {
        let limit = |timeout: Duration| Some(timeout).filter(|timeout| !timeout.is_zero());
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("candle-sparse/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(Duration::from_secs(CONNECT_SECONDS)))
            .timeout_recv_response(limit(settings.timeout))
            .timeout_per_read(limit(settings.timeout))
            .build();
        Self { agent: config.into(), endpoint, token: settings.token.clone() }
    }

    /// What is announced of the file at `url`.
    pub(super) fn announced(&self, url: &Uri) -> Result<Announced, Failure> {
        let answer = match self.follow(url, |agent, url| agent.head(url), false) {
            // Servers that know GET only, and addresses that are signed for it.
            Err(Failure::Status(400 | 403 | 405 | 501)) => {
                self.follow(url, |agent, url| agent.get(url), false)
            }
            answer => answer,
        };
        answer.map(|answer| answer.announced)
    }

    /// The content of the file at `url` from byte `start`, if it still is the one with this `etag`.
    pub(super) fn content(&self, url: &Uri, start: u64, etag: Option<&str>) -> Result<Answer, Failure> {
        let request = |agent: &Agent, url: &Uri| {
            let request = agent.get(url);
            if start == 0 {
                return request;
            }
            let request = request.header(RANGE, format!("bytes={start}-"));
            match etag {
                Some(etag) => request.header(IF_RANGE, format!("\"{etag}\"")),
                None => request,
            }
        };
        self.follow(url, request, true)
    }

    /// Asks, goes where the answers send, and gathers what they say. The token is for the endpoint alone.
    fn follow(
        &self,
        url: &Uri,
        request: impl Fn(&Agent, &Uri) -> ureq::RequestBuilder<ureq::typestate::WithoutBody>,
        to_the_end: bool,
    ) -> Result<Answer, Failure> {
        let mut url = url.clone();
        let mut announced = Announced { commit: None, etag: None, size: None };
        for _ in 0..=MOST_REDIRECTS {
            let mut request = request(&self.agent, &url).header(ACCEPT_ENCODING, "identity");
            if let Some(token) = self.token.as_ref().filter(|_| self.is_endpoint(&url)) {
                request = request.header(AUTHORIZATION, format!("Bearer {token}"));
            }
            let response = request.call().map_err(Failure::Request)?;
            let code = response.status().as_u16();
            let redirects = matches!(code, 301 | 302 | 303 | 307 | 308);
            if !redirects && !response.status().is_success() {
                return Err(Failure::Status(code));
            }
            announced.add(&response, redirects);
            let is_known = announced.commit.is_some() && announced.etag.is_some() && announced.size.is_some();
            if !redirects || (is_known && !to_the_end) {
                return Ok(Answer { announced, response });
            }
            let location = response.headers().get(LOCATION).ok_or(Failure::Nowhere(code))?;
            url = location.to_str().ok().and_then(|location| resolved(&url, location)).ok_or_else(|| {
                Failure::BadAddress(String::from_utf8_lossy(location.as_bytes()).into_owned())
            })?;
        }
        Err(Failure::TooManyRedirects)
    }

    fn is_endpoint(&self, url: &Uri) -> bool {
        let place = |url: &Uri| {
            let default = if url.scheme_str() == Some("https") { 443 } else { 80 };
            let scheme = url.scheme_str().map(str::to_ascii_lowercase);
            (scheme, url.host().map(str::to_ascii_lowercase), url.port_u16().unwrap_or(default))
        };
        place(url) == place(&self.endpoint)
    }
}

/// An answer with what it, and those that led to it, announce.
pub(super) struct Answer {
    pub(super) announced: Announced,
    response: Response<Body>,
}

impl Answer {
    /// Where the content begins: a server may send all of it, whatever was asked for.
    pub(super) fn start(&self) -> Option<u64> {
        if self.response.status().as_u16() != 206 {
            return Some(0);
        }
        let range = self.response.headers().get(CONTENT_RANGE)?.to_str().ok()?;
        range.trim().strip_prefix("bytes")?.trim_start().split('-').next()?.parse().ok()
    }

    pub(super) fn read(self) -> impl io::Read {
        self.response.into_body().into_reader()
    }
}

impl Announced {
    /// Adds what an answer says; of the file itself the last one knows, of the model's the first.
    fn add(&mut self, response: &Response<Body>, redirects: bool) {
        let header = |name: &str| {
            let value = response.headers().get(name)?.to_str().ok()?.trim();
            (!value.is_empty()).then(|| value.to_string())
        };
        let own = |name: &str| if redirects { None } else { header(name) };
        let is_whole =
            response.status().as_u16() != 206 && !response.headers().contains_key(CONTENT_ENCODING);
        let length = || own(CONTENT_LENGTH.as_str()).filter(|_| is_whole);
        self.commit = self.commit.take().or_else(|| header("x-repo-commit"));
        let etag = self.etag.take().or_else(|| header("x-linked-etag"));
        self.etag =
            etag.or_else(|| own(ETAG.as_str()).map(|etag| plain_etag(&etag))).map(|etag| plain_etag(&etag));
        self.size = self.size.or_else(|| header("x-linked-size").or_else(length)?.parse().ok());
    }
}

/// `W/"…"` without what is around it.
fn plain_etag(etag: &str) -> String {
    etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"').to_string()
}

/// Where a `Location` leads from `base`.
fn resolved(base: &Uri, location: &str) -> Option<Uri> {
    let (scheme, authority) = (base.scheme_str()?, base.authority()?.as_str());
    let location = location.split('#').next()?;
    let absolute = if location.contains("://") {
        location.to_string()
    } else if let Some(rest) = location.strip_prefix("//") {
        format!("{scheme}://{rest}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else {
        let folder = base.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{scheme}://{authority}{folder}/{location}")
    };
    let url: Uri = absolute.parse().ok()?;
    let can_be_asked = url.host().is_some() && matches!(url.scheme_str(), Some("http" | "https"));
    can_be_asked.then_some(url)
}
