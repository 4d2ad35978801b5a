//! Texts from any model, one by one.

use crate::parts::{loaded, model};
use candle_core::{Device, Tensor};
use candle_sparse_models::{
    Error, KvConfig, KvDType,
    causal_lm::{CausalLm, LlamaSession},
    engine::FinishReason,
    generate::{Generate, GenerateOptions, Token},
    llama::LoadOptions,
    sampling::Sampling,
    tokenizer::prompt_tokens,
};

fn session() -> LlamaSession {
    LlamaSession::new(&model(), KvConfig::exact(KvDType::F16))
}

#[test]
fn tokens_are_those_of_a_loop_by_hand() {
    let (mut session, prompt) = (session(), [0, 5, 6, 7]);
    let options = GenerateOptions::default().with_sampling(Sampling::greedy()).with_max_tokens(20);
    let came: Vec<u32> = session.generate(&prompt, options).unwrap().map(|t| t.unwrap().id).collect();
    session.clear().unwrap();
    let (mut ids, mut fed) = (prompt.to_vec(), 0);
    while ids.len() < 24 {
        let x = Tensor::new(&ids[fed..], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let logits = session.forward(&x, fed).unwrap().squeeze(0).unwrap();
        fed = ids.len();
        ids.push(logits.argmax(0).unwrap().to_scalar().unwrap());
    }
    assert_eq!(came, ids[4..]);
}

#[test]
fn a_text_goes_on_where_one_was_dropped() {
    let options = || GenerateOptions::default().with_sampling(Sampling::greedy()).with_max_tokens(20);
    let whole: Vec<u32> = session().generate(&[0, 5], options()).unwrap().map(|t| t.unwrap().id).collect();
    let mut session = session();
    let first: Vec<u32> =
        session.generate(&[0, 5], options()).unwrap().take(7).map(|t| t.unwrap().id).collect();
    assert_eq!((first.as_slice(), session.cached_len()), (&whole[..7], 2 + 6), "the last one is not read");
    let rest = session.generate(&first[6..], options()).unwrap().take(13).map(|t| t.unwrap().id);
    assert_eq!(rest.collect::<Vec<_>>(), whole[7..]);
    // The same through a reference to any model.
    session.clear().unwrap();
    let any: &mut dyn CausalLm = &mut session;
    assert_eq!(any.generate(&[0, 5], options()).unwrap().map(|t| t.unwrap().id).collect::<Vec<_>>(), whole);
}

#[test]
fn the_last_token_says_why() {
    let loaded = loaded(LoadOptions::default());
    let prompt = prompt_tokens(&loaded.tokenizer, "Once upon a time").unwrap();
    let options = || GenerateOptions::of(&loaded).with_sampling(Sampling::greedy()).with_max_tokens(30);
    let run = |options| -> Vec<Token> {
        session().generate(&prompt, options).unwrap().map(Result::unwrap).collect()
    };
    let text = |tokens: &[Token]| tokens.iter().map(|t| &*t.text).collect::<String>();
    let whole = run(options());
    assert_eq!((whole.len(), whole[29].end), (30, Some(FinishReason::Length)));
    assert!(whole[..29].iter().all(|t| t.end.is_none()));
    let ids: Vec<u32> = whole.iter().map(|t| t.id).collect();
    assert_eq!(text(&whole), loaded.tokenizer.decode(&ids, true).unwrap());

    let ended = run(options().with_end_tokens(vec![ids[9]]));
    let at = ids.iter().position(|id| *id == ids[9]).unwrap();
    assert_eq!(
        ended.last().unwrap(),
        &Token { id: ids[9], text: String::new(), end: Some(FinishReason::EndToken) }
    );
    assert_eq!((ended.len(), text(&ended)), (at + 1, text(&whole[..at])));

    let all = text(&whole);
    let stopped = run(options().with_stop(vec![all[25..33].to_string()]));
    assert_eq!(text(&stopped), all[..all.find(&all[25..33]).unwrap()]);
    assert_eq!(stopped.last().unwrap().end, Some(FinishReason::StopText));
    // What only looked like a stop comes with the last token.
    let almost = format!("{}#", &all[all.len() - 2..]);
    assert_eq!(text(&run(options().with_stop(vec![almost]))), all);
}

#[test]
fn what_makes_no_sense_is_an_error() {
    let mut session = session();
    let or = GenerateOptions::default;
    for (prompt, options, name) in [
        (&[][..], or(), "prompt"),
        (&[0][..], or().with_stop(vec!["so".into()]), "stop"),
        (&[0][..], or().with_sampling(Sampling::default().with_temperature(-1.0)), "temperature"),
    ] {
        let error = session.generate(prompt, options).unwrap_err();
        assert!(matches!(Error::of(&error), Some(Error::Setting { name: of, .. }) if *of == name), "{error}");
    }
    assert_eq!(session.generate(&[0], or().with_max_tokens(0)).unwrap().count(), 0);
    // The context has 1024 positions: the error is the last that comes.
    let all: Vec<_> = session.generate(&[0; 1020], or()).unwrap().collect();
    assert_eq!(all.len(), 6);
    assert!(matches!(all[5].as_ref().err().and_then(Error::of), Some(Error::Full { .. })));
}
