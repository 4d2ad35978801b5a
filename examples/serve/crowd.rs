//! What clients share, and how much of it one may take: connections, long bodies, texts that wait.

use crate::error::ApiError;
use axum::http::HeaderMap;
use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{sync::Notify, time::timeout};

/// Who asks, as far as an address or a key tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Client(u64);

impl Client {
    pub(crate) fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self(u64::from(address.to_bits())),
            // A customer of a provider has all addresses that begin alike so far. The first bit keeps them apart from those above.
            IpAddr::V6(address) => Self((address.to_bits() >> 64) as u64 | 1 << 63),
        }
    }

    /// Who has the `i`-th of several keys, from whatever address. The second bit keeps them apart from addresses.
    pub(crate) fn of_key(i: usize) -> Self {
        Self(1 << 62 | i as u64)
    }

    /// As the engine knows it.
    pub(crate) fn number(self) -> u64 {
        self.0
    }
}

/// Proxies whose word is taken for whom they ask.
#[derive(Clone, Debug, Default)]
pub(crate) struct Proxies(pub(crate) Vec<IpAddr>);

impl Proxies {
    pub(crate) fn has(&self, peer: IpAddr) -> bool {
        self.0.iter().any(|proxy| proxy.to_canonical() == peer.to_canonical())
    }

    /// Who asks: the peer, or whom a proxy names last in X-Forwarded-For, for what stands before that the client wrote itself.
    pub(crate) fn client(&self, peer: IpAddr, headers: &HeaderMap) -> Client {
        let last =
            || headers.get_all("x-forwarded-for").iter().next_back()?.to_str().ok()?.rsplit(',').next();
        let named = last().filter(|_| self.has(peer)).and_then(|address| address.trim().parse().ok());
        Client::of(named.unwrap_or(peer))
    }
}

/// What share of something one client may take, where nobody else wants any: 1 is all of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Share(pub(crate) f64);

impl Share {
    /// Whether a client that holds so much may take one more of what is free: as long as it holds less than its share of both. With a
    /// half a lone client gets a half of all, two get a third each, and something is left for the next one.
    pub(crate) fn allows(self, held: usize, free: usize) -> bool {
        free > 0 && held < self.of(held + free)
    }

    /// How much of `all` a lone client gets: at least one.
    pub(crate) fn of(self, all: usize) -> usize {
        ((all as f64 * self.0).ceil() as usize).max(1)
    }
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The client has its share.
    Share,
    /// All are taken.
    Full,
}

impl Refusal {
    /// What a client is told who wanted one of `what`.
    pub(crate) fn of(self, what: &str) -> ApiError {
        match self {
            Self::Full => ApiError::overloaded(format!("all {what} are taken: try again later")),
            Self::Share => ApiError::share(format!(
                "your share of the {what} is taken: try again when some of yours have ended"
            )),
        }
    }
}

/// So many places, and who holds them.
#[derive(Debug)]
pub(crate) struct Crowd {
    places: usize,
    share: Share,
    held: Mutex<HashMap<Client, usize>>,
    freed: Notify,
}

/// A place, until it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    crowd: Arc<Crowd>,
    client: Client,
}

impl Crowd {
    pub(crate) fn new(places: usize, share: Share) -> Arc<Self> {
        Arc::new(Self { places, share, held: Mutex::default(), freed: Notify::new() })
    }

    fn held(&self) -> MutexGuard<'_, HashMap<Client, usize>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a client, by its share or, `as_proxy`, whoever has how many.
    pub(crate) fn enter(self: &Arc<Self>, client: Client, as_proxy: bool) -> Result<Place, Refusal> {
        let mut held = self.held();
        let (own, free) =
            (held.get(&client).copied().unwrap_or_default(), self.places - held.values().sum::<usize>());
        if free == 0 {
            return Err(Refusal::Full);
        }
        if !as_proxy && !self.share.allows(own, free) {
            return Err(Refusal::Share);
        }
        *held.entry(client).or_default() += 1;
        Ok(Place { crowd: self.clone(), client })
    }

    /// Waits until there is any place.
    pub(crate) async fn any(&self) {
        loop {
            let freed = self.freed.notified();
            if self.held().values().sum::<usize>() < self.places {
                return;
            }
            freed.await;
        }
    }

    /// A place for a client that waits for it, so long at most.
    pub(crate) async fn wait(self: &Arc<Self>, client: Client, patience: Duration) -> Result<Place, Refusal> {
        let come = async {
            loop {
                let freed = self.freed.notified();
                if let Ok(place) = self.enter(client, false) {
                    return place;
                }
                freed.await;
            }
        };
        timeout(patience, come).await.or_else(|_| self.enter(client, false))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut held = self.crowd.held();
        if let Some(own) = held.get_mut(&self.client) {
            *own -= 1;
            if *own == 0 {
                held.remove(&self.client);
            }
        }
        drop(held);
        self.crowd.freed.notify_waiters();
    }
}
