//! Prompts that begin alike are read once, and read on with the bits of one that was read whole.

use crate::parts::{Case, Draw, alone, cases, engine, model, one_thread, requests, run, tiered, written};
use candle_sparse_models::{
    KvConfig, KvDType,
    engine::{EngineOptions, Request},
    sampling::Sampling,
};

fn request(prompt: &[u32]) -> Request {
    Request::new(prompt).with_sampling(Sampling::greedy()).with_max_tokens(8).with_top_logprobs(Some(0))
}

fn cached(outcomes: &[crate::parts::Outcome]) -> Vec<usize> {
    outcomes.iter().map(|o| o.finished.as_ref().unwrap().cached_tokens).collect()
}

/// Prompts of 1 to 4 chunks that have 0 to all of their tokens in common with those before them.
#[test]
fn forks_write_what_they_would_write_alone() {
    for case in cases(&one_thread()) {
        let mut draw = Draw(11);
        let mut prompts = vec![draw.ids(400)];
        for _ in 0..12 {
            let from = &prompts[draw.below(prompts.len())];
            let common = draw.below(from.len() + 1);
            let own = 1 + draw.below(60);
            prompts.push([&from[..common], &draw.ids(own)].concat());
        }
        prompts.push(prompts[0].clone());
        prompts.push(prompts[0][..128].to_vec());
        prompts.push(prompts[0][..129].to_vec());
        let requests: Vec<_> = prompts.iter().map(|prompt| request(prompt)).collect();
        let wanted = alone(&case, &requests);
        // One after the other: all prefixes come from the store.
        let mut engine = engine(&case.model, EngineOptions::default().with_kv(case.kv));
        let mut came = Vec::new();
        for request in &requests {
            came.extend(run(&mut engine, [request.clone()]));
        }
        assert_eq!(written(&came), written(&wanted), "{}", case.name);
        let saved = cached(&came).iter().sum::<usize>();
        assert!(saved > 300, "{}: {saved} tokens were not read again", case.name);
        assert_eq!(engine.stats().prefix_tokens, saved as u64);
    }
}

#[test]
fn what_is_in_common_is_read_once() {
    let (model, mut draw) = (model(), Draw(5));
    let prompt = draw.ids(400);
    let exact = EngineOptions::default();
    // Four at once: the others wait for what the first one reads.
    let mut engine1 = engine(&model, exact.clone());
    let came = run(&mut engine1, vec![request(&prompt); 4]);
    assert_eq!(cached(&came), [0, 399, 399, 399]);
    assert_eq!(engine1.stats().tokens_read, 400 + 3);
    // With tiers what was read by the same chunks can be used.
    let mut engine2 = engine(&model, exact.clone().with_kv(tiered()));
    assert_eq!(cached(&run(&mut engine2, vec![request(&prompt); 4])), [0, 384, 384, 384]);
    // A beginning that several share is found where they part, once that was seen.
    for (options, wanted) in [(exact.clone(), [0, 200, 200]), (exact.with_kv(tiered()), [0, 0, 128])] {
        let mut engine = engine(&model, options);
        let mut found = Vec::new();
        for _ in 0..3 {
            let prompt = [&prompt[..200], &draw.ids(190)].concat();
            found.extend(cached(&run(&mut engine, [request(&prompt)])));
        }
        assert_eq!(found, wanted);
    }
}

#[test]
fn a_longer_prefix_replaces_those_it_contains() {
    let (model, mut draw) = (model(), Draw(5));
    let prompt = draw.ids(300);
    let mut engine = engine(&model, EngineOptions::default());
    for len in [100, 200, 300, 150] {
        run(&mut engine, [request(&prompt[..len])]);
        assert_eq!(engine.stats().prefixes, 1, "{len}");
    }
    assert_eq!(engine.stats().prefix_hits, 3);
    run(&mut engine, [request(&draw.ids(50))]);
    assert_eq!(engine.stats().prefixes, 2);
}

#[test]
fn what_was_used_longest_ago_goes_first() {
    let (model, mut draw) = (model(), Draw(5));
    // Of 4 layers with 2 heads of 32 channels a page in F16 takes 32 · 2 · 64 · 2 bytes.
    let bytes_of = |positions: usize| positions.div_ceil(32) * 4 * 32 * 2 * 64 * 2;
    let options = EngineOptions::default().with_prefix_bytes(bytes_of(128) * 2);
    let mut engine = engine(&model, options);
    let prompts: Vec<_> = (0..3).map(|_| draw.ids(128)).collect();
    let cached_of = |engine: &mut _, i: usize| cached(&run(engine, [request(&prompts[i])]))[0];
    assert_eq!([0, 1].map(|i| cached_of(&mut engine, i)), [0, 0]);
    assert_eq!(cached_of(&mut engine, 0), 127);
    assert_eq!(cached_of(&mut engine, 2), 0);
    assert_eq!((engine.stats().prefixes, engine.stats().prefix_bytes), (2, bytes_of(128) * 2));
    assert_eq!([0, 1].map(|i| cached_of(&mut engine, i)), [127, 0], "1 was used longest ago");
    // Nothing is shared where nothing may be held.
    let mut none = crate::parts::engine(&model, EngineOptions::default().with_prefix_bytes(0));
    assert_eq!(cached(&run(&mut none, vec![request(&prompts[0]); 2])), [0, 0]);
}

#[test]
fn what_was_written_serves_the_next_turn_where_that_is_wanted() {
    let (model, mut draw) = (model(), Draw(5));
    let prompt = draw.ids(150);
    for kv in [KvConfig::exact(KvDType::F16), tiered()] {
        let options = EngineOptions::default().with_kv(kv).with_reuse_written(true);
        let mut engine = engine(&model, options);
        let first = run(&mut engine, [request(&prompt)]).remove(0);
        // The last token that was written is not read yet.
        let held = prompt.len() + first.ids.len() - 1;
        let next = [&prompt[..], &first.ids, &draw.ids(9)].concat();
        assert_eq!(cached(&run(&mut engine, [request(&next)])), [held]);
    }
}

#[test]
fn the_store_changes_no_text_of_requests_that_come_again() {
    for case in cases(&one_thread()) {
        let requests = requests();
        let wanted = alone(&case, &requests);
        let mut engine = engine(&case.model, EngineOptions::default().with_kv(case.kv).with_max_sequences(3));
        for round in 0..3 {
            let came = run(&mut engine, requests.clone());
            assert_eq!(written(&came), written(&wanted), "{}, round {round}", case.name);
        }
        let Case { name, .. } = case;
        assert!(engine.stats().prefix_hits >= 10, "{name}: {:?}", engine.stats());
    }
}

/// Cuts that leave few tokens to read: a part of them alone would be summed in another way where there is a profile.
#[test]
fn few_tokens_behind_a_prefix_or_a_chunk_have_the_bits_of_the_whole() {
    for case in cases(&one_thread()) {
        let mut draw = Draw(21);
        let base = draw.ids(280);
        let mut prompts = vec![base.clone()];
        for cut in [120, 124, 127, 128, 129, 130, 135, 250, 255, 256, 257, 263] {
            prompts.push(base[..cut].to_vec());
            let own = 1 + draw.below(9);
            prompts.push([&base[..cut], &draw.ids(own)].concat());
        }
        let requests: Vec<_> = prompts.iter().map(|prompt| request(prompt).with_max_tokens(2)).collect();
        let wanted = alone(&case, &requests);
        let mut engine = engine(&case.model, EngineOptions::default().with_kv(case.kv));
        let came: Vec<_> = requests.iter().map(|r| run(&mut engine, [r.clone()]).remove(0)).collect();
        for ((came, wanted), prompt) in came.iter().zip(&wanted).zip(&prompts) {
            let same = written(std::slice::from_ref(came)) == written(std::slice::from_ref(wanted));
            assert!(same, "{}, a prompt of {}: {:?}", case.name, prompt.len(), came.finished);
        }
    }
}
