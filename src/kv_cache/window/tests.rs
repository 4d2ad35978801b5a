use super::super::{
    KvConfig, KvDType, Tier,
    tests::{config, fill, noise, read, tiered},
};
use super::*;
use crate::gate::FastGrnnGate;
use candle_sparse_kernels::Kernels;

const WINDOWS: [usize; 8] = [1, 2, 31, 32, 33, 48, 64, 130];

fn windowed(window: usize, head_dim: usize) -> Config {
    Config { sliding_window: Some(window), ..config(2, head_dim) }
}

fn settings() -> [KvConfig; 4] {
    [KvConfig::exact(KvDType::F32), tiered(32, 96), KvConfig::q8(), KvConfig::q4()]
}

/// Bytes that the pages of the sequences have in fact.
fn held(cache: &KvCache) -> usize {
    cache.sequences.iter().flatten().flatten().map(|p| p.as_bytes().len()).sum()
}

#[test]
fn bytes_are_constant_after_the_window_and_as_counted() {
    for (window, kv) in WINDOWS.into_iter().flat_map(|w| settings().map(|kv| (w, kv))) {
        let c = windowed(window, 16);
        let mut cache = KvCache::new(&c, kv);
        let mut after = None;
        for len in 1..600 {
            fill(&mut cache, &c, len - 1..len);
            assert_eq!(held(&cache), cache.bytes_at(1, len), "{kv:?}, window {window} at {len}");
            // A window and three pages, in each tier once.
            if len >= window + 6 * PAGE_LEN {
                assert_eq!(cache.bytes(), *after.get_or_insert(cache.bytes()), "window {window} at {len}");
            }
        }
        let pages = 2 * (window.div_ceil(PAGE_LEN) + 2);
        let tiers = if kv.is_tiered() { 3 } else { 1 };
        let most = pages * tiers * cache.shape.page.bytes(Tier::Hot, kv.dtype);
        assert!(cache.bytes() <= most, "{kv:?}, window {window}: {} bytes", cache.bytes());
    }
}

#[test]
fn what_the_window_leaves_is_what_a_cache_of_everything_holds() {
    for (window, kv) in WINDOWS.into_iter().flat_map(|w| settings().map(|kv| (w, kv))) {
        let (c, all) = (windowed(window, 16), config(2, 16));
        let [mut cache, mut whole] = [&c, &all].map(|c| KvCache::new(c, kv));
        for len in 1..400 {
            fill(&mut cache, &c, len - 1..len);
            fill(&mut whole, &all, len - 1..len);
            let first = cache.first_visible(len);
            assert_eq!(first, (len + 1).saturating_sub(window));
            // And the same where the last page was taken back.
            for position in first.saturating_sub(PAGE_LEN)..len {
                let [a, b] = [&cache, &whole].map(|cache| read(cache, &c, 1, position));
                assert_eq!(a, b, "{kv:?}, window {window}: {position} of {len}");
            }
        }
    }
}

#[test]
fn what_a_window_needs_is_reserved_whatever_the_length() {
    for (window, kv) in WINDOWS.into_iter().flat_map(|w| settings().map(|kv| (w, kv))) {
        let c = windowed(window, 16);
        let mut cache = KvCache::new(&c, kv);
        cache.reserve(1, 1 << 20).unwrap();
        let bytes = cache.bytes();
        for len in 1..700 {
            fill(&mut cache, &c, len - 1..len);
            assert_eq!(cache.bytes(), bytes, "{kv:?}, window {window} at {len}");
        }
    }
}

#[test]
fn long_prompts_take_the_window_and_a_part() {
    let c = windowed(48, 16);
    for kv in settings() {
        let mut cache = KvCache::new(&c, kv);
        let mut bytes = Vec::new();
        for part in 0..12 {
            cache.check(1, 128 * part, 128).unwrap();
            cache.extend(1, 128);
            for position in 128 * part..128 * (part + 1) {
                for layer in 0..2 {
                    let [k, v] = [0, 1].map(|kv| noise(c.kv_dim(), 4 * position + 2 * layer + kv));
                    cache.write(0, layer, position, &k, &v);
                }
            }
            cache.advance(128);
            bytes.push(cache.bytes());
            assert_eq!(held(&cache), cache.bytes_at(1, cache.len()), "{kv:?}");
        }
        assert!(bytes[3..].iter().all(|b| *b == bytes[3]), "{kv:?}: {bytes:?}");
        let mut whole = KvCache::new(&config(2, 16), kv);
        fill(&mut whole, &config(2, 16), 0..1536);
        assert_eq!(read(&cache, &c, 1, 1500), read(&whole, &c, 1, 1500));
    }
}

#[test]
fn a_page_can_be_taken_back_and_further_is_named() {
    for window in WINDOWS {
        let c = windowed(window, 16);
        let mut cache = KvCache::new(&c, tiered(32, 96));
        fill(&mut cache, &c, 0..450);
        let was = cache.clone();
        for back in 0..=PAGE_LEN {
            let mut cache = was.clone();
            cache.begin(1, 450 - back, 1).unwrap();
            assert_eq!(cache.len(), 450 - back);
        }
        // 450 lies in page 14, 13 begins at 416.
        for index_pos in [1, 32, 300, 415] {
            let error = cache.begin(1, index_pos, 1).unwrap_err().to_string();
            let needles = [format!("sliding window of {window} "), format!("index_pos {index_pos} ")];
            assert!(needles.iter().all(|n| error.contains(n)), "{error}");
            assert!(error.contains("start again at 0, or at 416 or later"), "{error}");
            assert_eq!((cache.len(), cache.first), (450, was.first), "nothing is changed");
        }
        // Without a result the error comes with the next step.
        cache.truncate(300);
        let folder = tempfile::tempdir().unwrap();
        for error in
            [cache.check(1, 300, 1), cache.reserve(1, 400), cache.save(folder.path().join("kv.safetensors"))]
        {
            assert!(error.unwrap_err().to_string().contains("start again at 0"));
        }
        fill(&mut cache, &c, 0..200);
        let mut fresh = KvCache::new(&c, tiered(32, 96));
        fill(&mut fresh, &c, 0..200);
        assert!((200 - window.min(40)..200).all(|p| read(&cache, &c, 0, p) == read(&fresh, &c, 0, p)));
        assert_eq!(held(&cache), held(&fresh));
    }
}

#[test]
fn a_step_taken_back_brings_dropped_pages_back() {
    for (window, kv) in WINDOWS.into_iter().flat_map(|w| settings().map(|kv| (w, kv))) {
        let c = windowed(window, 16);
        let mut cache = KvCache::new(&c, kv);
        fill(&mut cache, &c, 0..300);
        let was = cache.clone();
        for from in [300, 299, 270, 0] {
            let before = cache.remember(from);
            fill(&mut cache, &c, from..from + 300);
            cache.restore(before);
            assert_eq!((cache.len(), &cache.cooled, cache.first), (was.len(), &was.cooled, was.first));
            let first = was.first * PAGE_LEN;
            let same = |p: usize| (0..2).all(|l| read(&cache, &c, l, p) == read(&was, &c, l, p));
            assert!((first..300).all(same), "{kv:?}, window {window} from {from}");
        }
        // One that stays gives back what it kept.
        let before = cache.remember(300);
        fill(&mut cache, &c, 300..500);
        assert_eq!(cache.first, was.first);
        drop(before);
        cache.settled();
        assert_eq!(held(&cache), cache.bytes_at(1, 500), "{kv:?}, window {window}");
    }
}

#[test]
fn a_file_keeps_where_the_window_stands() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("chat.safetensors");
    for kv in settings() {
        let c = windowed(48, 16);
        let mut cache = KvCache::new(&c, kv);
        fill(&mut cache, &c, 0..333);
        cache.save(&path).unwrap();
        let mut other = KvCache::new(&c, kv);
        other.load(&path).unwrap();
        assert_eq!((other.len(), other.first, held(&other)), (333, cache.first, held(&cache)));
        for cache in [&mut cache, &mut other] {
            fill(cache, &c, 333..390);
        }
        assert!((343..390).all(|p| read(&cache, &c, 1, p) == read(&other, &c, 1, p)), "{kv:?}");
    }
    for (c, name) in [(config(2, 16), "none"), (windowed(47, 16), "47")] {
        let mut wrong = KvCache::new(&c, KvConfig::q4());
        let error = wrong.load(&path).unwrap_err().to_string();
        assert!(
            error.contains("sliding window of 48") && error.contains(name) && wrong.is_empty(),
            "{error}"
        );
        assert!(!wrong.fits(&windowed(48, 16)) && wrong.fits(&c));
    }
}

#[test]
fn what_is_known_of_pages_is_bounded_too() {
    let kernels = Kernels::get().unwrap();
    let gate = FastGrnnGate::new(8, noise(16, 1), vec![0.0; 2], vec![0.0; 2]).unwrap();
    let [c, all] = [windowed(100, 16), config(2, 16)];
    let [mut cache, mut whole] = [&c, &all].map(|c| KvCache::new(c, KvConfig::exact(KvDType::F32)));
    let mut bytes = 0;
    for position in 0..6000 {
        for (cache, c) in [(&mut cache, &c), (&mut whole, &all)] {
            cache.begin(1, position, 1).unwrap();
            cache.observe(0, 0, &gate, kernels, position, &noise(8, position));
            fill(cache, c, position..position + 1);
            cache.update_bounds(0, (position + 1) / PAGE_LEN);
        }
        // Two groups of 32 pages: the one that is left, and the next.
        assert!(cache.bounds_bytes() <= 2 * 2 * 2 * 16 * 32 * 2);
        bytes = bytes.max(cache.notes[0][0].salience.bytes());
        let page = position / PAGE_LEN;
        for page in cache.first_page(page)..page {
            assert_eq!(cache.salience(0, 0, page, 1), whole.salience(0, 0, page, 1), "page {page}");
            let [a, b] = [&cache, &whole].map(|cache| {
                let mut row = [0.0; 32];
                cache.bounds(0, 0, page / 32, 1).dequantize_row(3, &mut row);
                row[page % 32]
            });
            assert_eq!(a, b, "bounds of page {page}");
        }
    }
    assert!(bytes < 4096, "{bytes} bytes of salience");
}
