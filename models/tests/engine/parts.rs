//! Models, requests, and engines that are run until nothing is left to do.

use candle_sparse_models::{
    AttentionConfig, AttentionMode, FfnMode, Format, Guard, KvConfig, KvDType, Selection, SparseConfig,
    Threads,
    engine::{Engine, EngineOptions, Event, EventKind, FinishReason, Finished, Request, SequenceId},
    files::ModelFiles,
    llama::{Llama, LoadOptions},
    pretrained::{self, Pretrained},
    sampling::Sampling,
};
use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, LazyLock},
};
use tokenizers::Tokenizer;

pub(crate) const VOCAB: usize = 2048;

/// The built-in model, with its profile where `options` force it: whether one pays is measured, and may come out otherwise the next time.
pub(crate) fn loaded(options: LoadOptions) -> Pretrained {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
    let mut files = ModelFiles::from_folder(folder).unwrap();
    files.sparse_profile = files.sparse_profile.filter(|_| options.sparse.force);
    Pretrained::load(&files, options).unwrap()
}

/// On one thread: tests run side by side.
pub(crate) fn one_thread() -> LoadOptions {
    LoadOptions::default().with_threads(Threads::new(1).ok())
}

static PLAIN: LazyLock<Pretrained> = LazyLock::new(|| loaded(one_thread()));
static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| Arc::new(PLAIN.tokenizer.clone()));

pub(crate) fn model() -> Llama {
    PLAIN.model.clone()
}

pub(crate) fn tokenizer() -> Arc<Tokenizer> {
    TOKENIZER.clone()
}

/// A model, and how its keys and values are kept.
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) model: Llama,
    pub(crate) kv: KvConfig,
}

/// As a Mistral: a token sees 100 positions.
fn windowed(options: &LoadOptions) -> Llama {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
    let files = ModelFiles::from_folder(folder).unwrap();
    let mut config = loaded(options.clone()).config;
    config.sliding_window = Some(100);
    Llama::load_with(pretrained::var_builder(&files, None).unwrap(), &config, options.clone()).unwrap()
}

pub(crate) fn tiered() -> KvConfig {
    KvConfig::tiered().with_hot(40).with_warm(100)
}

/// Every way to keep keys and values, to choose pages, and to choose neurons.
pub(crate) fn cases(options: &LoadOptions) -> Vec<Case> {
    let exact = KvConfig::exact(KvDType::F16);
    let forced = SparseConfig::default().with_force(true);
    let sparse = loaded(options.clone().with_format(Some(Format::Q8_0)).with_sparse(forced)).model;
    let dense = loaded(options.clone().with_format(Some(Format::Q8_0))).model;
    let dense = dense.with_gates(sparse.decoder().gates().to_vec()).unwrap();
    let attention = |mode| {
        let config = AttentionConfig::new(mode).with_window(64).with_budget(96);
        dense.with_attention(config).unwrap()
    };
    let setting = forced.with_mode(FfnMode::Cascade).with_selection(Selection::Share(0.3));
    let sparse = sparse.with_sparse(setting.with_guard(Some(Guard::new(4, 0.01)))).unwrap();
    let case = |name: &str, model: &Llama, kv| Case { name: name.into(), model: model.clone(), kv };
    vec![
        case("exact", &dense, exact),
        case("stored floats", &loaded(options.clone()).model, KvConfig::exact(KvDType::F32)),
        case("tiered", &dense, tiered()),
        case("recall", &attention(AttentionMode::Recall), exact),
        case("recall, tiered", &attention(AttentionMode::Recall), tiered()),
        case("gated", &attention(AttentionMode::Gated), exact),
        case("window", &windowed(options), exact),
        case("profile", &sparse, exact),
        case("profile, tiered", &sparse, tiered()),
    ]
}

/// Numbers that look drawn.
pub(crate) struct Draw(pub(crate) u64);

impl Draw {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }

    pub(crate) fn ids(&mut self, n: usize) -> Vec<u32> {
        (0..n).map(|_| self.below(VOCAB) as u32).collect()
    }
}

/// Prompts of one token, of some, of several chunks, and such that begin alike; texts of different lengths, half of them drawn.
pub(crate) fn requests() -> Vec<Request> {
    let mut draw = Draw(3);
    let common = draw.ids(300);
    let lengths = [(0, 1), (0, 9), (150, 0), (150, 20), (140, 31), (300, 5), (64, 1), (0, 129)];
    let request = |(i, (shared, own)): (usize, (usize, usize))| {
        let prompt = [&common[..shared], &draw.ids(own)].concat();
        let drawn = Sampling::default().with_temperature(1.0).with_top_k(200).with_seed(i as u64);
        let sampling = if i % 2 == 0 { Sampling::greedy() } else { drawn.with_repeat_penalty(1.1) };
        Request::new(prompt).with_sampling(sampling).with_max_tokens(10 + 3 * i).with_top_logprobs(Some(0))
    };
    lengths.into_iter().enumerate().map(request).collect()
}

/// What became of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) ids: Vec<u32>,
    pub(crate) text: String,
    /// Bits of the tokens' log-probabilities, where they were asked for: they tell whether all logits were the same.
    pub(crate) logprobs: Vec<u32>,
    pub(crate) finished: Option<Finished>,
}

impl Outcome {
    pub(crate) fn reason(&self) -> FinishReason {
        self.finished.as_ref().unwrap().reason
    }
}

/// Notes what some events tell.
pub(crate) fn note(outcomes: &mut HashMap<SequenceId, Outcome>, events: Vec<Event>) {
    for Event { id, kind } in events {
        let outcome = outcomes.entry(id).or_default();
        assert!(outcome.finished.is_none(), "nothing comes behind the end");
        match kind {
            EventKind::Token { id, text, logprobs } => {
                outcome.ids.push(id);
                outcome.logprobs.extend(logprobs.map(|l| l.logprob.to_bits()));
                outcome.text += &text;
            }
            EventKind::Finished(finished) => {
                outcome.text += &finished.text;
                assert_eq!(finished.completion_tokens, outcome.ids.len());
                outcome.finished = Some(finished);
            }
        }
    }
}

/// Steps until nothing is left to do.
pub(crate) fn drain(engine: &mut Engine, outcomes: &mut HashMap<SequenceId, Outcome>) {
    while !engine.is_idle() {
        note(outcomes, engine.step());
    }
    assert!(engine.step().is_empty());
}

/// All requests at once: what became of each, in their order.
pub(crate) fn run(engine: &mut Engine, requests: impl IntoIterator<Item = Request>) -> Vec<Outcome> {
    let ids: Vec<_> = requests.into_iter().map(|request| engine.add(request).unwrap()).collect();
    let mut outcomes = HashMap::new();
    drain(engine, &mut outcomes);
    ids.into_iter().map(|id| outcomes.remove(&id).unwrap()).collect()
}

pub(crate) fn engine(model: &Llama, options: EngineOptions) -> Engine {
    Engine::new(model, Some(tokenizer()), options).unwrap()
}

/// Each request in an engine of its own that shares nothing.
pub(crate) fn alone(case: &Case, requests: &[Request]) -> Vec<Outcome> {
    let options = EngineOptions::default().with_kv(case.kv).with_prefix_bytes(0);
    let one = |request: &Request| run(&mut engine(&case.model, options.clone()), [request.clone()]).remove(0);
    requests.iter().map(one).collect()
}

/// What was written, without what tells of shared prefixes.
pub(crate) fn written(outcomes: &[Outcome]) -> Vec<(&[u32], &str, &[u32], FinishReason)> {
    outcomes.iter().map(|o| (&*o.ids, &*o.text, &*o.logprobs, o.reason())).collect()
}

/// The order in which sequences wrote their first token.
pub(crate) fn order(engine: &mut Engine) -> Vec<SequenceId> {
    let mut first = Vec::new();
    while !engine.is_idle() {
        for event in engine.step() {
            if matches!(event.kind, EventKind::Token { .. }) && !first.contains(&event.id) {
                first.push(event.id);
            }
        }
    }
    first
}
