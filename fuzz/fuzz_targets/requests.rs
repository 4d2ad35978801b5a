//! Bodies of requests, read as `serve` reads them and answered by a tiny model: what is asked for is refused by a message that fits, or
//! ends.
#![no_main]
#![allow(dead_code, reason = "the server has more")]

#[path = "../../examples/serve/answer.rs"]
mod answer;
#[path = "../../examples/common/ask.rs"]
mod ask;
#[path = "../../examples/serve/asked.rs"]
mod asked;
#[path = "../../examples/common/cli.rs"]
mod cli;
#[path = "../../examples/serve/error.rs"]
mod error;
#[path = "../../examples/common/fields.rs"]
mod fields;
#[path = "../../examples/serve/logprobs.rs"]
mod logprobs;
#[path = "../../examples/common/sampling.rs"]
mod sampling;

use answer::{Choice, Shape};
use ask::{Asker, Seeds};
use asked::{Asked, Kind};
use candle_sparse_models::{
    engine::{Engine, EngineOptions},
    pretrained::Pretrained,
};
use clap::Parser;
use error::ApiError;
use logprobs::Spelling;
use serde_json::Value;
use std::sync::LazyLock;

/// Texts that may be asked for, and tokens of each that are written.
const MOST_TEXTS: usize = 8;
const MOST_TOKENS: usize = 8;
const TEMPLATE: &str = "{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}";

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    sampling: sampling::SamplingArgs,
}

struct Server {
    model: Pretrained,
    asker: Asker,
}

static SERVER: LazyLock<Server> = LazyLock::new(|| {
    let model = candle_sparse_fuzz::model(Some(TEMPLATE));
    let flags = Flags::parse_from(["serve"]);
    let asker = Asker::new(&model, &flags.sampling, Seeds::Fixed).expect("a model that can be asked");
    Server { model, asker }
});

libfuzzer_sys::fuzz_target!(|body: &[u8]| {
    for kind in [Kind::Chat, Kind::Text] {
        let answered = Asked::new(&SERVER.asker, kind, "tiny", MOST_TEXTS, body).and_then(answer);
        if let Err(error) = answered {
            refused(&error);
        }
    }
});

fn refused(error: &ApiError) {
    let json = error.json();
    candle_sparse_fuzz::fits(json["error"]["message"].as_str().expect("a message"));
    if let Some(param) = json["error"]["param"].as_str() {
        assert!(param.len() < 1000 && !param.contains(char::is_control), "{param:?}");
    }
}

fn answer(mut asked: Asked) -> Result<(), ApiError> {
    let Server { model, asker } = &*SERVER;
    let mut engine = Engine::new(&model.model, Some(asker.tokenizer.clone()), EngineOptions::default())
        .expect("an engine");
    let mut ids = Vec::new();
    for mut request in std::mem::take(&mut asked.requests) {
        request.max_tokens = request.max_tokens.min(MOST_TOKENS);
        ids.push(engine.add(request).map_err(|error| ApiError::from_engine(&error))?);
    }
    assert!((1..=MOST_TEXTS).contains(&ids.len()), "{} texts", ids.len());
    let shape = Shape::new(&asked, 1, 2, "tiny", Spelling::new(asker.tokenizer.clone()));
    let mut choices: Vec<Choice> = ids.iter().map(|_| Choice::default()).collect();
    while !engine.is_idle() {
        for event in engine.step() {
            let index = ids.iter().position(|id| *id == event.id).expect("a text that was asked for");
            if let Some(piece) = shape.take(index, &mut choices[index], event.kind)? {
                is_json(&piece);
            }
        }
    }
    assert!(choices.iter().all(Choice::is_finished), "a text has no end");
    is_json(&shape.whole(&choices));
    Ok(())
}

/// A number that is none would be `null`.
fn is_json(value: &Value) {
    let text = value.to_string();
    assert!(serde_json::from_str::<Value>(&text).is_ok() && !text.contains("\"logprob\":null"), "{text}");
}
