use super::*;
use crate::{
    KvConfig, Threads,
    attention::{Queries, attention, tests::noise},
    kv_cache::KvDType,
    team::{Outputs, Team},
    weight::Compute,
};
use candle_sparse_core::{Activation, Rope, RopeScaling};
use std::sync::Mutex;

const CONFIG: Config = Config {
    hidden_size: 96,
    intermediate_size: 1,
    vocab_size: 1,
    num_hidden_layers: 2,
    num_attention_heads: 6,
    num_key_value_heads: 2,
    head_dim: 16,
    rms_norm_eps: 1e-5,
    rope: Rope { theta: 1e4, scaling: RopeScaling::None, interleaved: false },
    max_position_embeddings: 4096,
    hidden_act: Activation::Silu,
    gated_mlp: true,
    gate_shift: 0.0,
    norm_shift: None,
    sliding_window: None,
};

/// A cache of `len` positions in layer 1.
fn cache(dtype: KvDType, len: usize) -> KvCache {
    let mut cache = KvCache::new(&CONFIG, KvConfig::exact(dtype));
    cache.begin(1, 0, len).unwrap();
    for position in 0..len {
        let [k, v] = [0, 1].map(|kv| noise(CONFIG.kv_dim(), 2 * position + kv));
        cache.write(0, 1, position, &k, &v);
    }
    cache.advance(len);
    cache
}

fn decode(
    select: Selector<'_>,
    threads: Threads,
    cache: &KvCache,
    position: usize,
    queries: &[f32],
) -> Vec<f32> {
    let [keys, values] = [0, 1].map(|kv| {
        let mut row = noise(CONFIG.kv_dim(), 2 * position + kv);
        cache.round(&mut row);
        row
    });
    let mut plan = PagePlan::default();
    plan.update(&select, cache, [2, 2], position);
    let token =
        Token { cache, select, plan: &plan, layer: 1, position, queries, keys: &keys, values: &values };
    let own: Vec<_> = (0..threads.count())
        .map(|_| Mutex::new((LoneScratch::default(), vec![0.0; CONFIG.q_dim()])))
        .collect();
    let mut outputs = Outputs::of(threads.count());
    declare(&CONFIG, &select, 1, cache, &mut outputs);
    let kernels = Kernels::get().unwrap();
    let outcome = threads.team(&mut Team::default(), &outputs, &own, |member, (scratch, out)| {
        lone_token(member, kernels, &CONFIG, token, scratch, out)
    });
    assert_eq!(outcome, Ok(()));
    own.into_iter().next().unwrap().into_inner().unwrap().1
}

#[test]
fn a_token_not_yet_in_the_cache_sees_what_one_in_it_sees() {
    let (one, all) = (Threads::new(1).unwrap(), crate::threads::testing::several());
    let queries = noise(CONFIG.q_dim(), 5);
    for dtype in [KvDType::F32, KvDType::F16, KvDType::BF16] {
        for len in [1, 2, 32, 33, 128, 129, 257, 1000, 2100] {
            let full = cache(dtype, len);
            let q = Queries { rows: &queries, width: CONFIG.q_dim(), seq_len: 1, index_pos: len - 1 };
            let mut want = vec![0.0; CONFIG.q_dim()];
            attention(
                Compute { kernels: Kernels::get().unwrap(), threads: one },
                &CONFIG,
                &full,
                1,
                &Selector::DENSE,
                q,
                &mut want,
            );

            let past = cache(dtype, len - 1);
            let got = decode(Selector::DENSE, one, &past, len - 1, &queries);
            // Each of up to 2100 additions rounds by 6e-8, a random walk of 3e-6; a key not rounded is off by 5e-4 (F16).
            let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= 5e-6, "{dtype:?}, {len} positions: {worst}");
            assert_eq!(got, decode(Selector::DENSE, all, &past, len - 1, &queries), "threads change nothing");
        }
    }
}

#[test]
fn a_thread_that_takes_part_for_the_first_time_has_room_for_all_pages() {
    let cache = cache(KvDType::F16, 1000);
    let mut scratch = LoneScratch::default();
    scratch.resize(&CONFIG, &cache);
    let all = CONFIG.num_key_value_heads * cache.pages_with_room();
    assert!(cache.pages_with_room() >= 1000 / PAGE_LEN);
    assert!(scratch.recalled.capacity() >= all && scratch.pages.capacity() >= all);
}
