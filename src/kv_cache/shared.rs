//! What several caches take that share pages.

use super::KvCache;
use std::collections::HashSet;

/// Bytes of all pages of some caches, those that several of them share counted once.
///
/// ```
/// use candle_sparse::{KvCache, KvConfig, KvDType, kv_cache::unique_bytes};
///
/// # use candle_sparse_models::llama::LlamaConfig;
/// # let json = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/models/testdata/tales-silu/config.json"));
/// # let config: LlamaConfig = serde_json::from_slice(json).map_err(candle_core::Error::wrap)?;
/// # let config = config.into_config(false).to_core()?;
/// let mut cache = KvCache::new(&config, KvConfig::exact(KvDType::F16));
/// cache.begin(1, 0, 100)?;
/// (0..4).for_each(|layer| cache.write(0, layer, 99, &[0.5; 64], &[1.0; 64]));
/// cache.advance(100);
/// let mut fork = cache.clone();
/// assert_eq!(unique_bytes([&cache, &fork]), cache.bytes());
/// // Who writes gets the page that is written, of each of 4 layers.
/// fork.begin(1, 100, 1)?;
/// (0..4).for_each(|layer| fork.write(0, layer, 100, &[0.5; 64], &[1.0; 64]));
/// assert_eq!(unique_bytes([&cache, &fork]), cache.bytes() / 4 * 5);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[must_use]
pub fn unique_bytes<'a>(caches: impl IntoIterator<Item = &'a KvCache>) -> usize {
    let mut seen = HashSet::new();
    let one = |cache: &KvCache| -> usize {
        let pages = cache.sequences.iter().flatten().flatten().chain(cache.pool.spare());
        pages.map(|page| page.as_bytes()).filter(|bytes| seen.insert(bytes.as_ptr())).map(<[u8]>::len).sum()
    };
    caches.into_iter().map(one).sum()
}
