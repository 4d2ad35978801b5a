use super::*;
use candle_sparse_core::{Activation, KernelSet, Rope, RopeScaling, Scalar};

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
        gated_mlp: true,
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
                    other => panic!("{other:?}"),
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
