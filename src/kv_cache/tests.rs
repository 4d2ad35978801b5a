use super::*;
use crate::core::{Activation, KernelSet, Rope, RopeScaling, Scalar};

pub(super) fn config(heads: usize, head_dim: usize) -> Config {
    Config {
        hidden_size: heads * head_dim,
        intermediate_size: 1,
        vocab_size: 1,
        num_hidden_layers: 2,
        num_attention_heads: heads,
        num_key_value_heads: heads,
        head_dim,
        rms_norm_eps: 1e-5,
        rope: Rope { theta: 1e4, scaling: RopeScaling::None, interleaved: false },
        max_position_embeddings: 1 << 20,
        hidden_act: Activation::Silu,
        gate_shift: 0.0,
        norm_shift: None,
        sliding_window: None,
    }
}

/// Numbers in −1 .. 1 without a pattern.
pub(super) fn noise(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| (i * 7919 + seed * 104_729) % 10_007).map(|v| v as f32 / 5_003.5 - 1.0).collect()
}

pub(super) fn fill(cache: &mut KvCache, c: &Config, positions: std::ops::Range<usize>) {
    for position in positions {
        cache.begin(1, position, 1).unwrap();
        for layer in 0..c.num_hidden_layers {
            let [k, v] = [0, 1].map(|kv| noise(c.kv_dim(), 4 * position + 2 * layer + kv));
            cache.write(0, layer, position, &k, &v);
        }
        cache.advance(1);
    }
}

/// Keys and values of a position as attention would read them.
pub(super) fn read(cache: &KvCache, c: &Config, layer: usize, position: usize) -> [Vec<f32>; 2] {
    let (page, at) = (position / PAGE_LEN, position % PAGE_LEN);
    let mut out = [Vec::new(), Vec::new()];
    for head in 0..c.num_key_value_heads {
        let (keys, mut row) = (cache.keys(0, layer, page, head), vec![0.0; PAGE_LEN]);
        for channel in 0..c.head_dim {
            keys.dequantize_row(channel, &mut row);
            out[0].push(row[at]);
        }
        let values = cache.values(0, layer, page, head, at + 1);
        let mut row = vec![0.0; values.cols()];
        values.dequantize_row(at, &mut row);
        out[1].extend_from_slice(&row[..c.head_dim]);
    }
    out
}

pub(super) fn tiered(hot: usize, warm: usize) -> KvConfig {
    KvConfig { hot, warm, ..KvConfig::exact(KvDType::F16) }
}

#[test]
fn every_tier_holds_what_was_written_within_its_step() {
    for head_dim in [16, 48, 64] {
        let c = config(3, head_dim);
        let mut cache = KvCache::new(&c, tiered(64, 160));
        fill(&mut cache, &c, 0..400);
        let tiers = |page: usize| cache.sequences[0][0][page].tier();
        // 12 whole pages and a part; the last 64 positions reach into page 10, the last 160 into page 7.
        assert!(
            (0..13).map(tiers).eq([Tier::Hot]
                .into_iter()
                .chain([Tier::Cold; 6])
                .chain([Tier::Warm; 3])
                .chain([Tier::Hot; 3]))
        );
        for layer in 0..2 {
            for position in 0..400 {
                // Of numbers in −1 .. 1: half a step of 11 bits; of 2/254, whose scale has 11 bits; of 2/15 after it.
                let step = match tiers(position / PAGE_LEN) {
                    Tier::Hot => 5e-4,
                    Tier::Warm => 4.8e-3,
                    Tier::Cold => 0.073,
                };
                let want = [0, 1].map(|kv| noise(c.kv_dim(), 4 * position + 2 * layer + kv));
                for (got, want) in read(&cache, &c, layer, position).iter().zip(&want) {
                    let worst = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(worst <= step, "head_dim {head_dim}, position {position}: {worst} above {step}");
                }
            }
        }
    }
}

#[test]
fn bytes_are_those_of_the_arithmetic() {
    let c = config(4, 64);
    let all = |kv: KvConfig, positions| KvCache::new(&c, kv).bytes_at(1, positions);
    let exact = all(KvConfig::exact(KvDType::F16), 32_768);
    assert_eq!(exact, 2 * 2 * 4 * 64 * 2 * 32_768);
    let small = all(KvConfig::tiered(), 32_768);
    assert!(exact as f64 / small as f64 >= 2.9, "{}", exact as f64 / small as f64);
    // 8.5 and 5 bits per element.
    let page = PageShape { heads: 4, head_dim: 64 };
    assert_eq!(page.bytes(Tier::Warm, KvDType::F16) * 8 * 2, 2 * 4 * 64 * 32 * 17);
    assert_eq!(page.bytes(Tier::Cold, KvDType::F16) * 8, 2 * 4 * 64 * 32 * 5);
    for kv in [KvConfig::exact(KvDType::F32), tiered(64, 160), KvConfig::q8(), KvConfig::q4()] {
        let mut cache = KvCache::new(&c, kv);
        for len in [1, 33, 200, 641] {
            let held = cache.len();
            fill(&mut cache, &c, held..len);
            let held: usize = cache.sequences.iter().flatten().flatten().map(|p| p.as_bytes().len()).sum();
            assert_eq!(held, cache.bytes_at(1, len), "{kv:?} at {len}");
            assert!(cache.bytes() >= held);
        }
    }
}

#[test]
fn positions_after_a_cut_are_as_written() {
    let c = config(2, 64);
    let mut cache = KvCache::new(&c, tiered(32, 96));
    fill(&mut cache, &c, 0..300);
    let before = read(&cache, &c, 1, 40);
    cache.truncate(50);
    // Half of a cold page stays, as it was rounded; what is written behind it is hot.
    fill(&mut cache, &c, 50..70);
    let after = read(&cache, &c, 1, 40);
    let worst = before[0].iter().zip(&after[0]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-3, "{worst}");
    let want = noise(c.kv_dim(), 4 * 60 + 2 + 1);
    let got = &read(&cache, &c, 1, 60)[1];
    assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 5e-4));
}

#[test]
fn clones_share_nothing() {
    let c = config(1, 32);
    let mut cache = KvCache::new(&c, tiered(32, 64));
    fill(&mut cache, &c, 0..100);
    let snapshot = cache.clone();
    let want: Vec<_> = (0..100).map(|p| read(&snapshot, &c, 0, p)).collect();
    cache.truncate(3);
    fill(&mut cache, &c, 3..200);
    cache.clear();
    assert!((0..100).all(|p| read(&snapshot, &c, 0, p) == want[p]));
}

#[test]
fn random_rounding_has_no_bias() {
    let x: [f32; 32] = std::array::from_fn(|i| (i as f32 * 0.37).sin());
    let mut sums = [0.0_f64; 32];
    let n = 20_000;
    for seed in 0..n {
        let mut out = [0.0; 32];
        Rounding::Stochastic(seed).quantize(&x).dequantize(&mut out);
        sums.iter_mut().zip(out).for_each(|(s, v)| *s += f64::from(v));
    }
    let step = f64::from(Rounding::Nearest.quantize(&x).d.to_f32());
    for (i, (sum, x)) in sums.iter().zip(x).enumerate() {
        // The ends of the grid are rounded to f16 and cannot be passed; a mean of n errors of a step is within 4·step/√n.
        let bias = (sum / n as f64 - f64::from(x)).abs();
        assert!(bias < 1e-3 + 4.0 * step / (n as f64).sqrt(), "element {i}: {bias}");
    }
    let nearest = Rounding::Nearest.quantize(&x);
    assert_ne!(nearest, Rounding::Stochastic(1).quantize(&x));
    assert_eq!(Rounding::Stochastic(1).quantize(&x), Rounding::Stochastic(1).quantize(&x));
}

#[test]
fn bounds_are_bounds() {
    let c = config(2, 16);
    let mut cache = KvCache::new(&c, KvConfig::exact(KvDType::F32));
    fill(&mut cache, &c, 0..PAGE_LEN * 40);
    cache.update_bounds(1, 40);
    for (page, head) in (0..40).flat_map(|p| [(p, 0), (p, 1)]) {
        let q = noise(c.head_dim, 1000 + page);
        let halves: Vec<f32> = q.iter().map(|q| q.min(0.0)).chain(q.iter().map(|q| q.max(0.0))).collect();
        let mut bounds = [0.0; 32];
        Scalar.matmul_t(cache.bounds(0, 1, page / 32, head), &[&halves], &mut [&mut bounds]);
        let mut scores = [0.0; PAGE_LEN];
        Scalar.matmul_t(cache.keys(0, 1, page, head), &[&q], &mut [&mut scores]);
        let (bound, best) = (bounds[page % 32], scores.iter().copied().fold(f32::MIN, f32::max));
        // Minima and maxima of 16 channels are rounded to f16, by 5e-4 at most.
        let slack = 16.0 * 5e-4;
        assert!(bound >= best - slack, "page {page}, head {head}: {bound} below {best}");
        assert!(bound <= best + 16.0, "page {page}: a bound that says nothing");
    }
}

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

fn origin(interleaved: bool, theta: f32, weight: f32) -> Arc<Origin> {
    let mut fingerprint = vec![weight; 65 * 19];
    fingerprint.iter_mut().step_by(65).for_each(|rounds| *rounds = 0.0);
    let inv_freq = [1.0, 1.0 / theta].into();
    Arc::new(Origin { interleaved, inv_freq, fingerprint: fingerprint.into() })
}

#[test]
fn a_file_of_another_model_is_refused() {
    let (c, folder) = (config(2, 16), tempfile::tempdir().unwrap());
    let path = folder.path().join("chat.safetensors");
    let own = origin(false, 1e4, 1.0);
    let mut cache = KvCache::new(&c, tiered(32, 64));
    cache.set_origin(&own);
    fill(&mut cache, &c, 0..130);
    cache.save(&path).unwrap();
    let others = [
        (origin(true, 1e4, 1.0), "GGUF"),
        (origin(false, 5e5, 1.0), "RoPE"),
        (origin(false, 1e4, 1.1), "differs"),
    ];
    for (other, needle) in others {
        let mut tied = KvCache::new(&c, KvConfig::q4());
        tied.set_origin(&other);
        let error = tied.load(&path).unwrap_err();
        assert!(matches!(Error::of(&error), Some(Error::WrongModel { .. })), "{error}");
        assert!(error.to_string().contains(needle) && tied.is_empty(), "{error}");
        // A cache that does not know its model yet hears it from the model.
        let mut free = KvCache::new(&c, KvConfig::q4());
        free.load(&path).unwrap();
        assert!(free.check_origin(&own).is_ok());
        let error = free.check_origin(&other).unwrap_err().to_string();
        assert!(error.contains(needle), "{error}");
        free.truncate(0);
        assert!(free.check_origin(&other).is_ok(), "nothing of the other model is left");
    }
    let mut same = KvCache::new(&c, KvConfig { max_bytes: Some(1 << 30), ..KvConfig::q4() });
    same.set_origin(&Arc::new((*own).clone()));
    same.load(&path).unwrap();
    assert_eq!(
        (same.config().max_bytes, same.config().hot),
        (Some(1 << 30), 32),
        "the budget is the caller's"
    );
    let mut small = KvCache::new(&c, KvConfig { max_bytes: Some(1000), ..KvConfig::q4() });
    assert!(is_full(&small.load(&path).unwrap_err()) && small.is_empty());
    // One that does not say.
    let mut silent = KvCache::new(&c, KvConfig::q4());
    fill(&mut silent, &c, 0..40);
    silent.save(&path).unwrap();
    assert!(same.load(&path).unwrap_err().to_string().contains("does not say"));
    assert!(KvCache::new(&c, KvConfig::q4()).load(&path).is_ok());
}

#[test]
fn files_that_no_cache_would_write_are_refused() {
    let (c, folder) = (config(1, 16), tempfile::tempdir().unwrap());
    let path = folder.path().join("chat.safetensors");
    let mut cache = KvCache::new(&c, tiered(32, 64));
    fill(&mut cache, &c, 0..200);
    cache.save(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let text = String::from_utf8_lossy(&bytes[8..]).to_string();
    let change = |from: &str, to: &str| {
        assert!(text.contains(from) && from.len() == to.len(), "{from}");
        let at = text.find(from).unwrap() + 8;
        let mut changed = bytes.clone();
        changed[at..at + to.len()].copy_from_slice(to.as_bytes());
        std::fs::write(&path, changed).unwrap();
        let mut cache = KvCache::new(&c, KvConfig::q4());
        let error = cache.load(&path).unwrap_err();
        assert!(
            Error::of(&error).is_some() && cache.is_empty() && !error.to_string().contains('\n'),
            "{error}"
        );
        error.to_string()
    };
    assert!(change("format\\\":2", "format\\\":1").contains("read the text again"));
    assert!(change("format\\\":2", "format\\\":3").contains("update"));
    assert!(change("positions\\\":200", "positions\\\":900").contains("tiers"));
    assert!(change("sequences\\\":1", "sequences\\\":9").contains("sequences.1"));
    // A page that is colder than the one before it.
    let mut changed = bytes.clone();
    let tiers: Vec<u8> = cache.sequences[0][0].iter().map(|p| p.tier() as u8).collect();
    let at = bytes.windows(tiers.len()).position(|w| w == tiers).unwrap();
    changed[at..at + 3].copy_from_slice(&[0, 1, 2]);
    std::fs::write(&path, changed).unwrap();
    assert!(KvCache::new(&c, KvConfig::q4()).load(&path).is_err());
}

#[test]
fn a_file_brings_everything_back() {
    let (c, folder) = (config(2, 48), tempfile::tempdir().unwrap());
    let path = folder.path().join("chat.safetensors");
    for kv in [KvConfig::exact(KvDType::BF16), tiered(32, 96)] {
        let mut cache = KvCache::new(&c, kv);
        fill(&mut cache, &c, 0..250);
        cache.save(&path).unwrap();
        let mut other = KvCache::new(&c, KvConfig::exact(KvDType::F32));
        other.load(&path).unwrap();
        assert_eq!((other.len(), other.config()), (250, cache.config()));
        fill(&mut cache, &c, 250..300);
        fill(&mut other, &c, 250..300);
        assert!((0..300).all(|p| read(&cache, &c, 1, p) == read(&other, &c, 1, p)), "{kv:?}");
    }
    let mut wrong = KvCache::new(&config(2, 64), KvConfig::exact(KvDType::F32));
    let error = wrong.load(&path).unwrap_err().to_string();
    assert!(error.contains("heads of 48") && wrong.is_empty(), "{error}");
    let bytes = std::fs::read(&path).unwrap();
    for cut in [0, 7, 100, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..cut]).unwrap();
        let mut cache = KvCache::new(&c, KvConfig::exact(KvDType::F32));
        assert!(cache.load(&path).is_err() && cache.is_empty(), "{cut} bytes of {}", bytes.len());
    }
}

#[test]
fn a_step_taken_back_leaves_nothing() {
    let c = config(2, 32);
    let mut cache = KvCache::new(&c, tiered(32, 96));
    fill(&mut cache, &c, 0..150);
    let was = cache.clone();
    for from in [150, 149, 90, 0] {
        let before = cache.remember(from);
        fill(&mut cache, &c, from..from + 300);
        cache.restore(before);
        assert_eq!((cache.len(), &cache.cooled), (was.len(), &was.cooled));
        let same = |s: &KvCache| (0..150).all(|p| (0..2).all(|l| read(s, &c, l, p) == read(&was, &c, l, p)));
        assert!(same(&cache), "from {from}");
    }
    let mut other = was.clone();
    fill(&mut cache, &c, 150..400);
    fill(&mut other, &c, 150..400);
    assert!((0..400).all(|p| read(&cache, &c, 0, p) == read(&other, &c, 0, p)));
}
