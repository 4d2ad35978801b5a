use super::super::{
    KvConfig, KvDType, Page,
    tests::{config, fill, noise, read, tiered},
};
use super::*;
use candle_sparse_core::Config;

/// Reads a prompt as a model does, at once.
fn read_prompt(cache: &mut KvCache, c: &Config, n: usize) -> Result<()> {
    let from = cache.len();
    cache.begin(1, from, n)?;
    for position in from..from + n {
        for layer in 0..c.num_hidden_layers {
            let [k, v] = [0, 1].map(|kv| noise(c.kv_dim(), 4 * position + 2 * layer + kv));
            cache.write(0, layer, position, &k, &v);
        }
    }
    assert!(
        cache.bytes() <= cache.config.max_bytes.unwrap_or(usize::MAX),
        "{} bytes in a prompt",
        cache.bytes()
    );
    cache.advance(n);
    Ok(())
}

fn is_full(e: &candle_core::Error) -> bool {
    matches!(Error::of(e), Some(Error::Full { .. }))
}

#[test]
fn a_budget_is_an_error_and_changes_nothing() {
    let c = config(2, 32);
    for kv in [tiered(32, 64), KvConfig::q4(), KvConfig::exact(KvDType::F16)] {
        let max = 60_000;
        let mut cache = KvCache::new(&c, KvConfig { max_bytes: Some(max), ..kv });
        let mut most = 0;
        while cache.check(1, most, 1).is_ok() {
            fill(&mut cache, &c, most..most + 1);
            assert!(cache.pool.bytes() <= max && cache.bytes() == cache.pool.bytes(), "{kv:?} at {most}");
            most += 1;
        }
        // All but a page of each layer and one more.
        assert!(
            cache.bytes_at(1, most + 1) + 3 * cache.shape.page.bytes(Tier::Hot, kv.dtype) > max,
            "{kv:?}: {most}"
        );
        let error = cache.begin(1, most, 1).unwrap_err();
        assert!(is_full(&error) && error.to_string().contains("60000"), "{error}");
        assert_eq!(cache.len(), most);
    }
}

#[test]
fn a_budget_is_kept_while_prompts_are_read() {
    let c = config(2, 32);
    for kv in [tiered(32, 64), KvConfig::q4()] {
        let settled = KvCache::new(&c, kv).bytes_at(1, 512);
        let within = |max| KvCache::new(&c, KvConfig { max_bytes: Some(max), ..kv });
        // What the prompt has become fits, the prompt while it is read does not.
        let mut cache = within(settled);
        let error = read_prompt(&mut cache, &c, 512).unwrap_err();
        assert!(is_full(&error) && cache.is_empty() && cache.bytes() == 0, "{error}");
        let page = cache.shape.page.bytes(Tier::Hot, kv.dtype);
        let mut cache = within(settled + 6 * page);
        (0..16).for_each(|_| read_prompt(&mut cache, &c, 32).unwrap());
        assert_eq!(cache.len(), 512);
        // Also when the cache was cleared, which leaves pages of every tier.
        cache.clear();
        (0..8).for_each(|_| read_prompt(&mut cache, &c, 64).unwrap());
        fill(&mut cache, &c, 512..530);
        assert!(cache.pool.bytes() <= settled + 6 * page);
    }
}

#[test]
fn hot_pages_of_a_prompt_are_given_back() {
    let c = config(2, 32);
    for kv in [tiered(32, 64), KvConfig::q4(), KvConfig::tiered()] {
        let mut cache = KvCache::new(&c, kv);
        read_prompt(&mut cache, &c, 1024).unwrap();
        let page = cache.shape.page.bytes(Tier::Hot, kv.dtype);
        // One per layer for the next page, one of each other tier.
        assert!(cache.bytes() <= cache.bytes_at(1, 1024) + 4 * page, "{kv:?}: {}", cache.bytes());
        assert_eq!(cache.bytes(), cache.pool.bytes());
        cache.shrink_to_fit();
        assert_eq!(cache.bytes(), cache.bytes_at(1, 1024));
        fill(&mut cache, &c, 1024..1100);
        cache.clear();
        cache.shrink_to_fit();
        assert_eq!((cache.bytes(), cache.len()), (0, 0));
        cache.reserve(1, 600).unwrap();
        let reserved = cache.bytes();
        read_prompt(&mut cache, &c, 300).unwrap();
        assert!(cache.bytes() <= reserved + 2 * page, "{kv:?}: {} after {reserved}", cache.bytes());
    }
}

#[test]
fn layers_grow_old_one_after_the_other() {
    for layers in [1, 5, 32, 80] {
        let c = Config { num_hidden_layers: layers, ..config(1, 32) };
        let tiers = |cache: &KvCache| -> Vec<Vec<Tier>> {
            cache.sequences[0].iter().map(|pages| pages.iter().map(Page::tier).collect()).collect()
        };
        for kv in [tiered(64, 160), KvConfig::q8(), KvConfig::q4()] {
            let mut cache = KvCache::new(&c, kv);
            let mut before = Vec::new();
            for len in 1..300 {
                fill(&mut cache, &c, len - 1..len);
                let now = tiers(&cache);
                let colder =
                    |(a, b): (&Vec<Tier>, &Vec<Tier>)| a.iter().zip(b).filter(|(a, b)| a != b).count();
                let changed: usize = before.iter().zip(&now).map(colder).sum();
                // A page that becomes warm and one that becomes cold, of as few layers as can be.
                assert!(
                    changed <= 2 * layers.div_ceil(PAGE_LEN),
                    "{layers} layers, {kv:?} at {len}: {changed}"
                );
                before = now;
            }
            // However the text was cut: the same tiers, the same bits.
            let mut whole = KvCache::new(&c, kv);
            [100, 150, 49].into_iter().for_each(|n| read_prompt(&mut whole, &c, n).unwrap());
            assert_eq!(tiers(&whole), before, "{kv:?}");
            assert!(
                (0..299).all(|p| read(&whole, &c, layers - 1, p) == read(&cache, &c, layers - 1, p)),
                "{kv:?}"
            );
            let bytes: usize = before.iter().flatten().map(|t| cache.shape.page.bytes(*t, kv.dtype)).sum();
            assert_eq!(cache.bytes_at(1, 299), bytes);
        }
    }
}

/// `cargo test -p candle-sparse --lib -- --ignored --nocapture longest`: what a token of a 7B model waits for pages that grow old.
#[test]
#[ignore = "a measurement"]
fn longest_wait_for_pages_that_grow_old() {
    let c = Config { num_hidden_layers: 32, ..config(32, 128) };
    for (name, kv) in [("tiered", tiered(64, 128)), ("q4", KvConfig::q4())] {
        let mut cache = KvCache::new(&c, kv);
        let [k, v] = [noise(c.kv_dim(), 1), noise(c.kv_dim(), 2)];
        let (mut longest, mut of_a_page) = (0.0_f64, Vec::new());
        for position in 0..320 {
            cache.begin(1, position, 1).unwrap();
            (0..32).for_each(|layer| cache.write(0, layer, position, &k, &v));
            let start = std::time::Instant::now();
            cache.advance(1);
            let time = start.elapsed().as_secs_f64() * 1e3;
            if position >= 224 {
                longest = longest.max(time);
                of_a_page.push(time);
            }
        }
        let page: f64 = of_a_page.iter().sum::<f64>() / 3.0;
        println!("{name}: {longest:.2} ms at most; all layers at once would be {page:.2} ms");
    }
}

#[test]
fn no_size_is_too_large_to_be_asked_for() {
    let large = [usize::MAX, usize::MAX / 2, 1 << 62, 1_000_000_000_000_000, 4_294_967_295, 0, 1];
    let c = config(1, 16);
    for n in large {
        for kv in [
            KvConfig { hot: n, ..KvConfig::tiered() },
            KvConfig { warm: n, ..KvConfig::tiered() },
            KvConfig { hot: n, warm: n, max_bytes: Some(usize::MAX), ..KvConfig::q4() },
            KvConfig { max_bytes: Some(n), ..KvConfig::q4() },
        ] {
            let mut cache = KvCache::new(&c, kv);
            let _ = (
                cache.bytes_at(1, 1 << 20),
                cache.bytes_at(n, n),
                cache.check(1, 0, n),
                cache.check(n, 0, 1),
            );
            if cache.check(1, 0, 100).is_ok() {
                fill(&mut cache, &c, 0..100);
            }
        }
        for c in [
            Config { max_position_embeddings: n.max(1), ..c },
            Config { sliding_window: Some(n), ..c },
            Config { max_position_embeddings: n.max(1), sliding_window: Some(n / 2), ..c },
        ] {
            let mut cache = KvCache::new(&c, KvConfig::tiered());
            let most = cache.max_positions().min(70);
            fill(&mut cache, &c, 0..most);
            assert!(cache.reserve(1, usize::MAX).is_err());
            // More than any address space has, and no abort.
            if cache.max_positions() > 1 << 20 && cache.window.is_none() {
                assert!(cache.check(1, most, 1 << 20).is_ok());
            }
        }
    }
}
