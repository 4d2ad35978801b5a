//! A text depends on its request alone.

use crate::parts::{Case, alone, cases, drain, engine, note, one_thread, requests, run, written};
use candle_sparse_models::{
    Threads,
    causal_lm::LlamaSession,
    engine::{Engine, EngineOptions, Request},
    generate::{Generate, GenerateOptions},
    llama::LoadOptions,
};
use std::collections::HashMap;

fn options(case: &Case) -> EngineOptions {
    EngineOptions::default().with_kv(case.kv)
}

#[test]
fn texts_are_the_same_in_any_company_and_order() {
    for case in cases(&one_thread()) {
        let (requests, name) = (requests(), &case.name);
        let wanted = alone(&case, &requests);
        assert!(wanted.iter().zip(&requests).all(|(o, r)| o.ids.len() == r.max_tokens), "{name}");
        for places in [2, 8] {
            let together =
                run(&mut engine(&case.model, options(&case).with_max_sequences(places)), requests.clone());
            assert_eq!(written(&together), written(&wanted), "{name}, {places} places");
        }
        let mut backwards = run(&mut engine(&case.model, options(&case)), requests.iter().rev().cloned());
        backwards.reverse();
        assert_eq!(written(&backwards), written(&wanted), "{name}, backwards");
    }
}

#[test]
fn texts_are_the_same_when_requests_come_one_by_one() {
    for case in cases(&one_thread()) {
        let requests = requests();
        let wanted = alone(&case, &requests);
        let mut engine = engine(&case.model, options(&case).with_max_sequences(4));
        let (mut ids, mut outcomes) = (Vec::new(), HashMap::new());
        for (i, request) in requests.iter().enumerate() {
            ids.push(engine.add(request.clone().with_priority(i as i32 % 3)).unwrap());
            for _ in 0..3 {
                note(&mut outcomes, engine.step());
            }
        }
        drain(&mut engine, &mut outcomes);
        let came: Vec<_> = ids.iter().map(|id| outcomes.remove(id).unwrap()).collect();
        assert_eq!(written(&came), written(&wanted), "{}", case.name);
    }
}

#[test]
fn texts_are_the_same_with_any_number_of_threads() {
    let texts = |threads| {
        let all = cases(&LoadOptions::default().with_threads(Threads::new(threads).ok()));
        let text = |case: Case| {
            let came = run(&mut engine(&case.model, options(&case)), requests());
            came.into_iter().map(|o| (o.ids, o.logprobs)).collect::<Vec<_>>()
        };
        all.into_iter().map(text).collect::<Vec<_>>()
    };
    let wanted = texts(1);
    for threads in [2, 4] {
        assert!(texts(threads) == wanted, "{threads} threads");
    }
}

/// What an app writes that knows nothing of engines.
#[test]
fn texts_are_those_of_generate() {
    for case in cases(&one_thread()).into_iter().filter(|c| !c.kv.is_tiered()) {
        let requests = requests();
        let came = run(&mut engine(&case.model, options(&case)), requests.clone());
        let plain = |request: &Request| -> Vec<u32> {
            let mut session = LlamaSession::new(&case.model, case.kv);
            let options = GenerateOptions::default()
                .with_sampling(request.sampling)
                .with_max_tokens(request.max_tokens);
            session.generate(&request.prompt, options).unwrap().map(|token| token.unwrap().id).collect()
        };
        for (request, came) in requests.iter().zip(&came) {
            assert_eq!(came.ids, plain(request), "{}, a prompt of {}", case.name, request.prompt.len());
        }
    }
}

#[test]
fn an_engine_can_be_sent_to_a_thread() {
    fn sent<T: Send>() {}
    sent::<Engine>();
}
