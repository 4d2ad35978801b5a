//! Several clients: none can take the places of others, however much it asks for.

use crate::parts::{Draw, Outcome, drain, engine, model, note, order, run};
use candle_sparse_models::{
    KvConfig, KvDType,
    engine::{Engine, EngineOptions, Request, SequenceId},
    sampling::Sampling,
};
use std::collections::HashMap;

fn request(client: u64, seed: u64, prompt: usize, tokens: usize) -> Request {
    let sampling = Sampling::default().with_temperature(0.8).with_seed(seed);
    Request::new(Draw(seed).ids(prompt)).with_sampling(sampling).with_max_tokens(tokens).with_client(client)
}

#[test]
fn clients_take_turns() {
    let mut engine = engine(&model(), EngineOptions::default().with_max_sequences(1));
    let add = |engine: &mut Engine, client| engine.add(request(client, client, 40, 3)).unwrap();
    let a = [(); 4].map(|()| add(&mut engine, 1));
    let b = [(); 2].map(|()| add(&mut engine, 2));
    let c = add(&mut engine, 3);
    assert_eq!([1, 2, 3, 4].map(|client| engine.waiting(Some(client))), [4, 2, 1, 0]);
    assert_eq!(order(&mut engine), [a[0], b[0], c, a[1], b[1], a[2], a[3]]);
    // Who comes late does not catch up on rounds that are over: it has its turn in the next one.
    let a = [(); 3].map(|()| add(&mut engine, 1));
    engine.step();
    let d = [(); 3].map(|()| add(&mut engine, 4));
    assert_eq!(order(&mut engine), [a[0], a[1], d[0], a[2], d[1], d[2]]);
}

#[test]
fn a_newcomer_has_its_share_at_once_and_nobodys_text_changes() {
    let model = model();
    let requests: Vec<_> = (0..6).map(|seed| request(1, seed, 40, 60)).collect();
    let others: Vec<_> = (6..8).map(|seed| request(2, seed, 40, 10)).collect();
    let alone = |requests: &[Request]| run(&mut engine(&model, EngineOptions::default()), requests.to_vec());
    let wanted = [alone(&requests), alone(&others)].concat();
    let mut engine = engine(&model, EngineOptions::default().with_max_sequences(4));
    let mut ids: Vec<_> = requests.into_iter().map(|r| engine.add(r).unwrap()).collect();
    let mut outcomes = HashMap::new();
    for _ in 0..8 {
        note(&mut outcomes, engine.step());
    }
    assert_eq!((engine.stats().running, engine.stats().paused, engine.waiting(Some(1))), (4, 0, 2));
    ids.extend(others.into_iter().map(|r| engine.add(r).unwrap()));
    note(&mut outcomes, engine.step());
    // Two of four for each; of the other client's the youngest stand still.
    assert_eq!((engine.stats().running, engine.stats().paused, engine.waiting(Some(2))), (4, 2, 0));
    let written =
        |outcomes: &HashMap<SequenceId, Outcome>| [2, 3].map(|i: usize| outcomes[&ids[i]].ids.len());
    let before = written(&outcomes);
    for _ in 0..2 {
        note(&mut outcomes, engine.step());
    }
    assert!(ids[6..].iter().all(|id| !outcomes[id].ids.is_empty()), "they are written");
    assert_eq!(written(&outcomes), before, "they stand still");
    drain(&mut engine, &mut outcomes);
    for (id, wanted) in ids.iter().zip(&wanted) {
        assert_eq!(outcomes[id].ids, wanted.ids);
    }
}

#[test]
fn who_is_more_urgent_does_not_make_room() {
    let mut engine = engine(&model(), EngineOptions::default().with_max_sequences(2));
    for seed in 0..2 {
        engine.add(request(1, seed, 40, 30).with_priority(1)).unwrap();
    }
    engine.step();
    let late = engine.add(request(2, 7, 40, 3)).unwrap();
    engine.step();
    assert_eq!((engine.stats().paused, engine.waiting(Some(2))), (0, 1));
    assert_eq!(order(&mut engine).last(), Some(&late));
}

/// Whatever comes and goes, in whatever room there is: all is bounded, everything ends, and no text changes.
#[test]
fn all_are_served() {
    let (model, mut stood_still) = (model(), 0);
    for seed in 0..8 {
        let mut draw = Draw(seed);
        let requests: Vec<_> = (0..16)
            .map(|i| {
                let (prompt, tokens) = (20 + draw.below(200), 1 + draw.below(40));
                let crowd = draw.below(3) * draw.below(4);
                request(crowd as u64, 100 * seed + i, prompt, tokens)
                    .with_priority(i32::from(draw.below(8) == 0))
            })
            .collect();
        let wanted = run(&mut engine(&model, EngineOptions::default()), requests.clone());
        let (places, budget) = (1 + draw.below(4), 700_000);
        let kv = KvConfig::exact(KvDType::F16).with_max_bytes(Some(budget));
        let options = EngineOptions::default().with_max_sequences(places).with_kv(kv);
        let mut engine = engine(&model, options);
        let (mut ids, mut outcomes, mut paused) = (Vec::new(), HashMap::new(), 0);
        let mut rest = requests.into_iter();
        for step in 0.. {
            let more = draw.below(3).min(usize::from(step % 4 == 0) * 2);
            ids.extend(rest.by_ref().take(more).map(|r| engine.add(r).unwrap()));
            note(&mut outcomes, engine.step());
            let stats = engine.stats();
            assert!(
                stats.running <= places && stats.paused <= places && stats.kv_bytes <= budget,
                "{stats:?}"
            );
            paused = paused.max(stats.paused);
            if engine.is_idle() && rest.len() == 0 {
                break;
            }
            assert!(step < 10_000, "seed {seed}: {stats:?}");
        }
        stood_still += usize::from(paused > 0);
        for (id, wanted) in ids.iter().zip(&wanted) {
            assert_eq!(outcomes[id].ids, wanted.ids, "seed {seed}");
        }
    }
    assert!(stood_still >= 3, "{stood_still}");
}
