//! What the cache holds: bounded by the window, cut back, saved, taken back.

use crate::{
    CONTEXT, WINDOWS,
    cases::{tokens, worst},
    config, decode, model, part, relative,
};
use candle_core::Tensor;
use candle_sparse::{DeadlineExceeded, KvConfig, kv_cache::KvDType};
use std::time::Duration;

const EXACT: KvConfig = KvConfig::exact(KvDType::F32);
const TIERED: KvConfig = KvConfig::tiered().with_hot(32).with_warm(64);

#[test]
fn bytes_are_constant_after_the_window() {
    let x = tokens(1, CONTEXT, 1);
    for (window, kv) in [48, 20, 130].into_iter().flat_map(|w| [(w, EXACT), (w, TIERED)]) {
        let c = config(Some(window));
        let full = model(&config(None)).with_kv(kv).unwrap();
        let mut model = model(&c).with_kv(kv).unwrap();
        decode(&mut model, &x, window + 6 * 32);
        let bytes = model.cache().kv_bytes();
        while model.cache().len() < CONTEXT {
            decode(&mut model, &x, 1);
            assert_eq!(model.cache().kv_bytes(), bytes, "window {window}, {kv:?} at {}", model.cache().len());
        }
        let all = full.cache().kv().bytes_at(1, CONTEXT);
        let most = full.cache().kv().bytes_at(1, window + 96);
        // In tiers a page of each waits for the next.
        let small = if kv.is_tiered() { bytes < all } else { bytes <= most };
        assert!(small && bytes <= 2 * most, "window {window}, {kv:?}: {bytes} of {all} bytes");
    }
}

#[test]
fn long_prompts_hold_the_window_and_what_goes_through_together() {
    for kv in [EXACT, TIERED] {
        let x = tokens(1, CONTEXT, 1);
        let mut model = model(&config(Some(48))).with_kv(kv).unwrap();
        let mut bytes = Vec::new();
        for start in (0..CONTEXT).step_by(64) {
            model.forward(&part(&x, start, 64), start).unwrap();
            bytes.push(model.cache().kv_bytes());
        }
        assert!(bytes[4..].iter().all(|b| *b == bytes[4]), "{kv:?}: {bytes:?}");
        let held = model.cache().kv().bytes_at(1, CONTEXT);
        assert!(bytes[9] <= held + model.cache().kv().bytes_at(1, 64) * 2, "{bytes:?}, {held} held");
    }
}

#[test]
fn tiers_stay_near_what_is_exact() {
    let (x, c) = (tokens(1, 400, 1), config(Some(100)));
    let exact = decode(&mut model(&c), &x, 400);
    // Steps of 1/254 and 1/15 of the range of normal numbers, 4.4 σ in a block, over √12; three layers add.
    for (kv, bound) in [(EXACT.with_hot(32), 0.02), (TIERED, 0.3)] {
        let tiered = decode(&mut model(&c).with_kv(kv).unwrap(), &x, 400);
        let off = relative(&tiered, &exact);
        assert!(off > 0.0 && off < bound, "{kv:?}: {off}");
    }
}

#[test]
fn a_page_can_be_taken_back_and_further_is_an_error() {
    for window in &WINDOWS[..2] {
        let x = tokens(1, 300, 1);
        let mut model = model(&config(Some(*window)));
        let want = decode(&mut model, &x, 300);
        for back in [1, 17, 32] {
            let got = model.forward(&part(&x, 300 - back, 1), 300 - back).unwrap().squeeze(0).unwrap();
            assert_eq!(worst(&got, &want.narrow(0, 300 - back, 1).unwrap()), 0.0, "back by {back}");
            if back > 1 {
                decode(&mut model, &x, back - 1);
            }
        }
        for position in [200, 100, 1] {
            let error = model.forward(&part(&x, position, 1), position).unwrap_err().to_string();
            let named = format!("sliding window of {window}");
            assert!(error.contains(&named) && error.contains("start again at 0"), "{error}");
            assert_eq!(model.cache().len(), 300);
        }
        assert!(model.forward(&part(&x, 0, 1), 301).unwrap_err().to_string().contains("gap"));
        // Again from the beginning, with and without asking for it.
        let again = model.forward(&part(&x, 0, 1), 0).unwrap().squeeze(0).unwrap();
        assert_eq!(worst(&again, &want.narrow(0, 0, 1).unwrap()), 0.0);
        assert_eq!(worst(&decode(&mut model, &x, 299), &want.narrow(0, 1, 299).unwrap()), 0.0);
        model.cache_mut().truncate(100);
        assert!(model.forward(&part(&x, 100, 1), 100).unwrap_err().to_string().contains("start again at 0"));
        model.clear_kv_cache();
        assert_eq!(worst(&decode(&mut model, &x, 300), &want), 0.0);
    }
}

#[test]
fn a_clone_is_a_snapshot() {
    let x = tokens(1, 400, 1);
    let mut model = model(&config(Some(48)));
    decode(&mut model, &x, 200);
    let mut snapshot = model.clone();
    let want = decode(&mut model, &x, 150);
    assert_eq!(snapshot.cache().len(), 200);
    assert_eq!(worst(&decode(&mut snapshot, &x, 150), &want), 0.0);
}

#[test]
fn a_saved_chat_continues_past_the_window() {
    let (folder, x) = (tempfile::tempdir().unwrap(), tokens(1, 400, 1));
    let path = folder.path().join("chat.safetensors");
    for kv in [EXACT, TIERED] {
        let mut first = model(&config(Some(48))).with_kv(kv).unwrap();
        decode(&mut first, &x, 270);
        first.cache().save(&path).unwrap();
        let mut second = model(&config(Some(48)));
        second.cache_mut().load(&path).unwrap();
        assert_eq!(second.cache().len(), 270);
        assert_eq!(worst(&decode(&mut first, &x, 100), &decode(&mut second, &x, 100)), 0.0);
        let mut other = model(&config(Some(20)));
        let error = other.cache_mut().load(&path).unwrap_err().to_string();
        assert!(error.contains("window of 48") && other.cache().is_empty(), "{error}");
    }
}

#[test]
fn a_step_out_of_time_changes_nothing_past_the_window() {
    for kv in [EXACT, TIERED] {
        let x = tokens(1, CONTEXT, 1);
        let mut model = model(&config(Some(48))).with_kv(kv).unwrap();
        decode(&mut model, &x, 200);
        let mut other = model.clone();
        model.set_time_limit(Some(Duration::ZERO));
        for (position, n) in [(200, 300), (200, 1), (190, 100), (0, 64)] {
            let error = model.forward(&part(&x, position, n), position).unwrap_err();
            assert!(DeadlineExceeded::of(&error).is_some(), "{error}");
            assert_eq!(model.cache().len(), 200);
        }
        model.set_time_limit(Some(Duration::from_secs(3600)));
        let got = model.forward(&part(&x, 200, 300), 200).unwrap();
        let want = other.forward(&part(&x, 200, 300), 200).unwrap();
        assert_eq!(worst(&got, &want), 0.0);
        let held = |m: &candle_sparse_models::mistral::Model| m.cache().kv().bytes_at(1, 500);
        assert_eq!(held(&model), held(&other));
        assert_eq!(worst(&decode(&mut model, &x, 50), &decode(&mut other, &x, 50)), 0.0);
    }
}

#[test]
fn a_warm_up_leaves_everything_as_it_was() {
    let x = tokens(1, 400, 1);
    let mut warm = model(&config(Some(48)));
    let mut cold = warm.clone();
    let run = |model: &mut candle_sparse_models::mistral::Model, warm: bool| {
        let mut all = Vec::new();
        for _ in 0..8 {
            if warm {
                let len = model.cache().len();
                model.warm_up().unwrap();
                assert_eq!(model.cache().len(), len);
            }
            all.push(decode(model, &x, 33));
        }
        Tensor::cat(&all, 0).unwrap()
    };
    assert_eq!(worst(&run(&mut warm, true), &run(&mut cold, false)), 0.0);
}
