//! Whose turn it is, and what becomes of those that wait.

use crate::parts::{Draw, Outcome, drain, engine, model, note, order, run, tiered};
use candle_sparse_models::{
    Error, KvConfig, KvDType,
    engine::{EngineOptions, EventKind, FinishReason, Request, SequenceId},
    sampling::Sampling,
};
use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

fn request(seed: u64, prompt: usize, tokens: usize) -> Request {
    Request::new(Draw(seed).ids(prompt)).with_sampling(Sampling::greedy()).with_max_tokens(tokens)
}

#[test]
fn the_largest_priority_comes_first_and_then_the_first() {
    let options = EngineOptions::default().with_max_sequences(1);
    let mut engine = engine(&model(), options);
    let ids = [0, 5, -3, 5, 0].map(|p| engine.add(request(1, 40, 3).with_priority(p)).unwrap());
    assert_eq!(order(&mut engine), [1, 3, 0, 4, 2].map(|i| ids[i]));
}

#[test]
fn everybody_who_writes_gets_a_token_in_every_step() {
    let mut engine = engine(&model(), EngineOptions::default());
    let writers = [1, 2].map(|seed| engine.add(request(seed, 20, 60)).unwrap());
    for _ in 0..2 {
        engine.step();
    }
    // A long prompt and a short one come: they are read chunk by chunk, in turns, and nobody else waits.
    let long = engine.add(request(3, 900, 2)).unwrap();
    let short = engine.add(request(4, 200, 2)).unwrap();
    let mut steps = HashMap::new();
    for step in 1..=11 {
        let read = engine.stats().tokens_read;
        let events = engine.step();
        assert!(engine.stats().tokens_read - read <= 128, "one chunk at most");
        for writer in writers {
            let tokens =
                events.iter().filter(|e| e.id == writer && matches!(e.kind, EventKind::Token { .. }));
            assert_eq!(tokens.count(), 1, "step {step}");
        }
        for event in events {
            steps.entry(event.id).or_insert(step);
        }
    }
    // 900 positions are 8 chunks, 200 are 2: the short one is the second and the fourth.
    assert_eq!((steps[&short], steps[&long]), (4, 10));
}

#[test]
fn a_prompt_is_read_at_once_where_nobody_waits() {
    let model = model();
    let steps = |options: EngineOptions| {
        let mut engine = engine(&model, options);
        engine.add(request(3, 900, 1)).unwrap();
        let mut steps = 0;
        while !engine.is_idle() {
            engine.step();
            steps += 1;
        }
        steps
    };
    assert_eq!(steps(EngineOptions::default()), 2);
    assert_eq!(
        steps(EngineOptions::default().with_kv(tiered())),
        8,
        "with tiers the cut has a part in the text"
    );
}

#[test]
fn too_many_requests_are_refused_and_later_they_are_not() {
    let mut engine = engine(&model(), EngineOptions::default().with_max_sequences(1).with_max_queued(2));
    for seed in 0..2 {
        engine.add(request(seed, 10, 2)).unwrap();
    }
    let error = engine.add(request(7, 10, 2)).unwrap_err();
    assert!(matches!(Error::of(&error), Some(Error::Full { .. })), "{error}");
    assert_eq!(engine.stats().queued, 2);
    let mut outcomes = HashMap::new();
    note(&mut outcomes, engine.step());
    engine.add(request(7, 10, 2)).unwrap();
    drain(&mut engine, &mut outcomes);
    assert_eq!((engine.stats().finished, engine.stats().failed), (3, 0));
}

#[test]
fn what_makes_no_sense_is_named() {
    let mut engine = engine(&model(), EngineOptions::default());
    let some = request(1, 10, 5);
    let mut without =
        candle_sparse_models::engine::Engine::new(&model(), None, EngineOptions::default()).unwrap();
    for (request, name) in [
        (Request::new([]), "prompt"),
        (Request::new([1, 2048]), "prompt"),
        (request(1, 1024, 1), "prompt"),
        (some.clone().with_max_tokens(0), "max_tokens"),
        (some.clone().with_stop(vec![String::new()]), "stop"),
        (some.clone().with_sampling(Sampling::default().with_top_p(2.0)), "top_p"),
    ] {
        let error = engine.add(request).unwrap_err();
        assert!(matches!(Error::of(&error), Some(Error::Setting { name: of, .. }) if *of == name), "{error}");
    }
    let error = without.add(some.with_stop(vec!["so".into()])).unwrap_err();
    assert!(error.to_string().contains("tokenizer"), "{error}");
    assert!(engine.is_idle() && without.is_idle());
    for (options, name) in [
        (EngineOptions::default().with_max_sequences(0), "max_sequences"),
        (EngineOptions::default().with_prompt_chunk(0), "prompt_chunk"),
    ] {
        let error = candle_sparse_models::engine::Engine::new(&model(), None, options).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
}

#[test]
fn a_cancelled_sequence_ends_and_others_do_not() {
    let mut engine = engine(&model(), EngineOptions::default().with_max_sequences(3));
    let wanted = run(&mut engine, [request(1, 30, 20)]).remove(0);
    let ids = [1, 2, 3, 4].map(|seed| engine.add(request(seed, 30 * seed as usize, 20)).unwrap());
    let mut outcomes = HashMap::new();
    for _ in 0..4 {
        note(&mut outcomes, engine.step());
    }
    // One that writes, one that waits, and one that never was.
    assert!(engine.cancel(ids[1]) && engine.cancel(ids[3]));
    assert!(!engine.cancel(ids[1]), "it has ended");
    assert!(!engine.is_idle());
    drain(&mut engine, &mut outcomes);
    assert!(!engine.cancel(ids[0]));
    let reason = |i: usize| outcomes[&ids[i]].reason();
    use FinishReason::{Cancelled, Length};
    assert_eq!([0, 1, 2, 3].map(reason), [Length, Cancelled, Length, Cancelled]);
    assert_eq!(outcomes[&ids[0]].ids, wanted.ids);
    assert!(!outcomes[&ids[1]].ids.is_empty() && outcomes[&ids[3]].ids.is_empty());
}

#[test]
fn what_is_late_ends() {
    let mut engine = engine(&model(), EngineOptions::default().with_max_sequences(1));
    let (now, late) = (Instant::now(), Duration::from_millis(300));
    let writing = engine.add(request(1, 10, 1000).with_deadline(now.checked_add(late))).unwrap();
    let waiting = engine.add(request(2, 10, 1000).with_deadline(Some(now))).unwrap();
    let mut outcomes: HashMap<SequenceId, Outcome> = HashMap::new();
    note(&mut outcomes, engine.step());
    assert_eq!(outcomes[&waiting].reason(), FinishReason::Deadline);
    std::thread::sleep(late);
    drain(&mut engine, &mut outcomes);
    assert_eq!(outcomes[&writing].reason(), FinishReason::Deadline);
    assert_eq!(outcomes[&writing].ids.len(), 1);
}

#[test]
fn a_budget_is_kept_by_waiting() {
    let model = model();
    let free = EngineOptions::default();
    let requests: Vec<_> = (0..6).map(|seed| request(seed, 100, 50)).collect();
    let wanted = run(&mut engine(&model, free.clone()), requests.clone());
    for kv in [KvConfig::exact(KvDType::F16), tiered()] {
        let budget = 600_000;
        let mut small = engine(&model, free.clone().with_kv(kv.with_max_bytes(Some(budget))));
        let ids: Vec<_> = requests.iter().map(|r| small.add(r.clone()).unwrap()).collect();
        let (mut outcomes, mut most) = (HashMap::new(), 0);
        while !small.is_idle() {
            note(&mut outcomes, small.step());
            let stats = small.stats();
            assert!(stats.kv_bytes <= budget, "{stats:?}");
            most = most.max(stats.running);
        }
        assert!((2..6).contains(&most), "{most} at a time");
        if kv.is_tiered() {
            continue;
        }
        assert!(ids.iter().zip(&wanted).all(|(id, wanted)| outcomes[id].ids == wanted.ids));
        // What can never fit is refused at once.
        let error = small.add(request(1, 100, 5000)).unwrap_err();
        assert!(matches!(Error::of(&error), Some(Error::Setting { name: "max_tokens", .. })), "{error}");
    }
}
