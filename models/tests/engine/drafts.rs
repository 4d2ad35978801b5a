//! Drafts change no token.

use crate::parts::{Case, Draw, Outcome, alone, cases, engine, model, one_thread, requests, run, written};
use candle_sparse_models::{
    Format, KvConfig, KvDType,
    engine::{EngineOptions, FinishReason, Request},
    sampling::Sampling,
    speculation::Speculation,
};

fn options(kv: KvConfig, speculation: Speculation) -> EngineOptions {
    EngineOptions::default().with_kv(kv).with_speculation(speculation)
}

fn lookup(tokens: usize) -> Speculation {
    Speculation::off().with_lookup(true).with_tokens(Some(tokens))
}

/// Prompts that repeat themselves, so that much is guessed.
fn repeating() -> Vec<Request> {
    let mut draw = Draw(6);
    let request = |(i, mut request): (usize, Request)| {
        let pattern = draw.ids(3 + i);
        request.prompt.extend(pattern.iter().cycle().take(50));
        request.sampling = request.sampling.with_top_k(2);
        request.with_max_tokens(30 + i)
    };
    requests().into_iter().enumerate().map(request).collect()
}

#[test]
fn texts_are_the_same_with_drafts_in_any_company() {
    for case in cases(&one_thread()) {
        let (requests, Case { name, model, kv }) = (repeating(), &case);
        let wanted = alone(&case, &requests);
        for speculation in [lookup(1), lookup(4), lookup(31), Speculation::auto()] {
            for places in [1, 8] {
                let options = options(*kv, speculation.clone()).with_max_sequences(places);
                let mut engine = engine(model, options);
                let came = run(&mut engine, requests.clone());
                assert!(written(&came) == written(&wanted), "{name}, {places} places, {speculation:?}");
                let stats = engine.stats();
                assert!(stats.drafts_accepted <= stats.drafts_made, "{stats:?}");
                let forced = speculation.tokens.is_some_and(|tokens| tokens > 1);
                assert!(!forced || stats.drafts_made > 15 && stats.drafts_accepted > 5, "{name}: {stats:?}");
            }
        }
    }
}

#[test]
fn a_copy_drafts_for_one_that_is_alone() {
    for case in cases(&one_thread()).into_iter().filter(|c| matches!(&*c.name, "stored floats" | "tiered")) {
        let requests = repeating();
        let wanted = alone(&case, &requests);
        let copy = case.model.in_format(Format::Q4_0).unwrap();
        for tokens in [Some(3), None] {
            let speculation = lookup(3).with_copy(Some(copy.clone())).with_tokens(tokens);
            for places in [1, 4] {
                let options = options(case.kv, speculation.clone()).with_max_sequences(places);
                let mut engine = engine(&case.model, options);
                let came = run(&mut engine, requests.clone());
                assert!(written(&came) == written(&wanted), "{}, {places} places, {tokens:?}", case.name);
                let stats = engine.stats();
                assert!(tokens.is_none() || places > 1 || stats.drafts_accepted > 50, "{stats:?}");
            }
        }
    }
}

/// Ends that lie within drafts: tokens, texts, lengths, the context.
#[test]
fn a_text_ends_within_a_draft_where_it_would_without() {
    let (model, exact) = (model(), KvConfig::exact(KvDType::F16));
    let pattern = Draw(4).ids(6);
    // It has repeated itself often, so that drafts are long.
    let prompt: Vec<u32> = pattern.iter().copied().cycle().take(90).collect();
    let plain = EngineOptions::default().with_prefix_bytes(0);
    let one = |speculation: Speculation, request: &Request| -> Outcome {
        let options = options(exact, speculation).with_prefix_bytes(0);
        run(&mut engine(&model, options), [request.clone()]).remove(0)
    };
    let base = Request::new(prompt).with_sampling(Sampling::greedy()).with_max_tokens(40);
    let whole = run(&mut engine(&model, plain), [base.clone()]).remove(0);
    let mut all: Vec<Request> = (1..40).map(|n| base.clone().with_max_tokens(n)).collect();
    all.extend(whole.ids.iter().map(|id| base.clone().with_end_tokens(vec![*id])));
    let places: Vec<usize> = whole.text.char_indices().map(|(at, _)| at).step_by(3).collect();
    all.extend(
        places.windows(2).map(|at| base.clone().with_stop(vec![whole.text[at[0]..at[1]].to_string()])),
    );
    let mut reasons = Vec::new();
    for request in &all {
        let wanted = one(Speculation::off(), request);
        for tokens in [5, 31] {
            assert_eq!(one(lookup(tokens), request), wanted);
        }
        reasons.push(wanted.reason());
    }
    for reason in [FinishReason::Length, FinishReason::EndToken, FinishReason::StopText] {
        assert!(reasons.contains(&reason), "{reason:?}");
    }
    // The context, of 1024 positions.
    let mut long = base;
    long.prompt = pattern.iter().copied().cycle().take(1010).collect();
    long.max_tokens = 100;
    let wanted = one(Speculation::off(), &long);
    assert_eq!((wanted.reason(), wanted.ids.len()), (FinishReason::Context, 14));
    assert_eq!(one(lookup(31), &long), wanted);
}

#[test]
fn a_text_that_repeats_itself_takes_fewer_steps() {
    let prompt: Vec<u32> = Draw(4).ids(6).into_iter().cycle().take(90).collect();
    let request = Request::new(prompt).with_sampling(Sampling::greedy()).with_max_tokens(60);
    let steps = |speculation| {
        let mut engine = engine(&model(), options(KvConfig::exact(KvDType::F16), speculation));
        engine.add(request.clone()).unwrap();
        let mut steps = 0;
        while !engine.is_idle() {
            engine.step();
            steps += 1;
        }
        steps
    };
    let (plain, drafted) = (steps(Speculation::off()), steps(lookup(7)));
    assert!(plain == 60 && drafted < 50, "{plain} and {drafted}");
}
