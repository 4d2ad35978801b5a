//! What many requests leave behind.

use crate::parts::{Draw, drain, engine, model, tiered};
use candle_sparse_models::{
    KvConfig, KvDType,
    engine::{EngineOptions, Request},
};
use std::collections::HashMap;

#[test]
fn bytes_do_not_grow_with_the_number_of_requests() {
    for kv in [KvConfig::exact(KvDType::F16), tiered()] {
        let prefix_bytes = 1 << 20;
        let options = EngineOptions::default().with_kv(kv).with_max_sequences(4).with_max_queued(200);
        let mut engine = engine(&model(), options.with_prefix_bytes(prefix_bytes));
        let mut draw = Draw(9);
        let common = draw.ids(200);
        for i in 0..200 {
            let (shared, own) = (draw.below(201), 1 + draw.below(60));
            let prompt = [&common[..shared], &draw.ids(own)].concat();
            engine.add(Request::new(prompt).with_max_tokens(1 + i % 13)).unwrap();
        }
        let (mut outcomes, mut most) = (HashMap::new(), [0; 2]);
        for half in 0..2 {
            while engine.stats().finished < 100 * (half as u64 + 1) {
                crate::parts::note(&mut outcomes, engine.step());
                let stats = engine.stats();
                assert!(stats.running <= 4 && stats.prefix_bytes <= prefix_bytes, "{stats:?}");
                most[half] = most[half].max(stats.kv_bytes);
            }
        }
        drain(&mut engine, &mut outcomes);
        assert_eq!(outcomes.len(), 200);
        // Four of 273 positions at most, and the prefixes.
        let each = 273_usize.div_ceil(32) * 4 * 32 * 2 * 64 * 2;
        assert!(most.iter().all(|most| *most <= prefix_bytes + 5 * each), "{most:?}");
        assert!(most[1] as f64 <= 1.15 * most[0] as f64, "{most:?}");
        let after = engine.stats();
        assert_eq!(after.kv_bytes, after.prefix_bytes, "nothing is left but prefixes");
    }
}
