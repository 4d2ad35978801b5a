//! Drafts change no token: whatever is drafted, however tokens are drawn, whatever the cache and attention.
#![allow(clippy::unwrap_used, reason = "tests")]

use candle_core::{DType, Device, Tensor};
use candle_sparse_models::{
    AttentionConfig, AttentionMode, FfnMode, Format, KvConfig, KvDType, SparseConfig, Threads,
    causal_lm::{CausalLm, LlamaSession},
    files::ModelFiles,
    generate::{Generate, GenerateOptions},
    llama::{Llama, LoadOptions},
    pretrained::Pretrained,
    sampling::Sampling,
    speculation::{Speculation, SpeculationStats, Speculative},
    tokenizer::prompt_tokens,
};
use std::path::Path;

fn load() -> Pretrained {
    load_with(LoadOptions::default())
}

fn load_with(options: LoadOptions) -> Pretrained {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
    // A copy is made of dense blocks.
    let dense = SparseConfig::default().with_mode(FfnMode::Dense);
    let options = options.with_format(Some(Format::Q8_0)).with_sparse(dense);
    Pretrained::load(&ModelFiles::from_folder(folder).unwrap(), options).unwrap()
}

/// Text that repeats itself, as a draft from the text likes it.
const PROMPT: &str =
    "Once upon a time there was a little girl. The little girl had a dog. Once upon a time there was a";

struct Case<'a> {
    loaded: &'a Pretrained,
    model: Llama,
    kv: KvConfig,
    sampling: Sampling,
    stop: Vec<String>,
    tokens: usize,
}

impl Case<'_> {
    fn text(&self, speculation: Speculation) -> (Vec<u32>, String, SpeculationStats) {
        let mut session = Speculative::new(LlamaSession::new(&self.model, self.kv), speculation);
        let prompt = prompt_tokens(&self.loaded.tokenizer, PROMPT).unwrap();
        let options = GenerateOptions::of(self.loaded)
            .with_sampling(self.sampling)
            .with_stop(self.stop.clone())
            .with_max_tokens(self.tokens)
            .with_end_tokens(Vec::new());
        let (mut ids, mut text) = (Vec::new(), String::new());
        for token in session.generate(&prompt, options).unwrap() {
            let token = token.unwrap();
            ids.push(token.id);
            text += &token.text;
        }
        assert_eq!(session.cached_len(), prompt.len() + ids.len() - 1, "what was guessed is not held");
        (ids, text, session.stats())
    }

    /// The same text with every draft.
    fn check(&self, name: &str) {
        let plain = self.text(Speculation::off());
        let copies =
            [self.model.in_format(Format::Q4_0).unwrap(), self.model.in_format(Format::Q2K).unwrap()];
        // A model that guesses as if it were another one.
        let stranger = self.loaded.model.in_format(Format::F32).unwrap();
        let stranger =
            stranger.with_attention(AttentionConfig::new(AttentionMode::Window).with_window(32)).unwrap();
        for copy in copies.into_iter().chain([stranger]).map(Some).chain([None]) {
            for tokens in [None, Some(1), Some(9)] {
                for lookup in [true, false] {
                    let speculation =
                        Speculation::off().with_lookup(lookup).with_copy(copy.clone()).with_tokens(tokens);
                    let drafted = self.text(speculation);
                    assert_eq!((&drafted.0, &drafted.1), (&plain.0, &plain.1), "{name}: {tokens:?} {lookup}");
                    let SpeculationStats { drafted, accepted, .. } = drafted.2;
                    assert!(accepted <= drafted);
                    assert!(tokens.is_none() || copy.is_none() || drafted > 0, "{name}: nothing was drafted");
                }
            }
        }
    }
}

#[test]
fn greedy_and_sampled() {
    let loaded = load();
    for (name, sampling) in [
        ("greedy", Sampling::greedy()),
        ("sampled", Sampling::default()),
        (
            "hot",
            Sampling::default()
                .with_temperature(1.5)
                .with_top_k(0)
                .with_top_p(1.0)
                .with_min_p(0.0)
                .with_seed(7),
        ),
        ("penalised", Sampling::default().with_repeat_penalty(1.3)),
    ] {
        let (model, kv) = (loaded.model.clone(), KvConfig::exact(KvDType::F16));
        Case { loaded: &loaded, model, kv, sampling, stop: Vec::new(), tokens: 60 }.check(name);
    }
}

#[test]
fn every_cache_and_attention() {
    let loaded = load();
    let tiered = KvConfig::tiered().with_hot(40).with_warm(64);
    for mode in [AttentionMode::Dense, AttentionMode::Gated, AttentionMode::Recall, AttentionMode::Sampled] {
        let model =
            loaded.model.with_attention(AttentionConfig::new(mode).with_window(32).with_budget(64)).unwrap();
        let sampling = Sampling::default();
        Case { loaded: &loaded, model, kv: tiered, sampling, stop: Vec::new(), tokens: 70 }
            .check(&format!("{mode:?}"));
    }
}

#[test]
fn any_number_of_threads() {
    for threads in [1, 2, 4] {
        let loaded = load_with(LoadOptions::default().with_threads(Threads::new(threads).ok()));
        let (model, kv) = (loaded.model.clone(), KvConfig::exact(KvDType::F16));
        Case { loaded: &loaded, model, kv, sampling: Sampling::greedy(), stop: Vec::new(), tokens: 50 }
            .check("threads");
    }
}

#[test]
fn stop_texts_across_tokens_and_drafts() {
    let loaded = load();
    let kv = KvConfig::exact(KvDType::F16);
    let case = |stop: &[&str]| Case {
        loaded: &loaded,
        model: loaded.model.clone(),
        kv,
        sampling: Sampling::greedy(),
        stop: stop.iter().map(ToString::to_string).collect(),
        tokens: 60,
    };
    let (_, text, _) = case(&[]).text(Speculation::off());
    // In the middle of a word or between two, wherever they stand.
    for at in [20, 47, 90].into_iter().filter(|at| at + 6 < text.len()) {
        case(&[&text[at..at + 6]]).check("stop");
    }
}

/// Always right: every token of the draft is written, and steps are few.
#[test]
fn a_perfect_draft_saves_steps() {
    let loaded = load();
    let (model, kv) = (loaded.model.clone(), KvConfig::exact(KvDType::F16));
    let case =
        Case { loaded: &loaded, model, kv, sampling: Sampling::default(), stop: Vec::new(), tokens: 61 };
    let itself = Speculation::off().with_copy(Some(loaded.model.clone())).with_tokens(Some(9));
    let (ids, _, stats) = case.text(itself);
    assert_eq!(ids, case.text(Speculation::off()).0);
    assert_eq!((stats.steps, stats.drafted, stats.accepted), (6, 54, 54));
}

#[test]
fn a_session_goes_back_and_forth() {
    let loaded = load();
    let kv = KvConfig::exact(KvDType::F16);
    let speculation = Speculation::off().with_copy(Some(loaded.model.clone())).with_tokens(Some(5));
    let mut plain = LlamaSession::new(&loaded.model, kv);
    let mut drafting = Speculative::new(LlamaSession::new(&loaded.model, kv), speculation);
    let ids = |ids: &[u32]| Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    // Prompts, tokens that follow, a step back, the same place again, an error, a new text.
    let steps: [(&[u32], usize); 12] = [
        (&[5, 6, 7, 8], 0),
        (&[9], 4),
        (&[10], 5),
        (&[11], 5),
        (&[12, 13], 6),
        (&[14], 8),
        (&[15], 3),
        (&[9999], 4),
        (&[16], 4),
        (&[17], 9),
        (&[18], 0),
        (&[19], 1),
    ];
    for (tokens, at) in steps {
        let both = [plain.forward(&ids(tokens), at), drafting.forward(&ids(tokens), at)];
        let [a, b] = both.map(|l| l.map(|l| l.flatten_all().unwrap().to_vec1::<f32>().unwrap()).ok());
        assert!(a == b, "{tokens:?} at {at}");
        assert_eq!(plain.cached_len(), drafting.cached_len(), "{tokens:?} at {at}");
    }
    drafting.truncate(1).unwrap();
    assert_eq!(drafting.into_model().unwrap().cached_len(), 1);
}

#[test]
fn what_the_model_read_by_itself_stays() {
    let loaded = load();
    let kv = KvConfig::exact(KvDType::F16);
    let ids = |ids: &[u32]| Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let mut plain = LlamaSession::new(&loaded.model, kv);
    plain.forward(&ids(&[5, 6, 7]), 0).unwrap();
    let speculation = Speculation::auto().with_copy(Some(loaded.model.clone())).with_tokens(Some(4));
    let mut drafting = Speculative::new(plain.clone(), speculation);
    assert_eq!(drafting.cached_len(), 3);
    for (token, at) in [(8, 3), (9, 4), (10, 5), (11, 3)] {
        let both = [plain.forward(&ids(&[token]), at), drafting.forward(&ids(&[token]), at)];
        let [a, b] = both.map(|l| l.unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap());
        assert!(a == b, "{token} at {at}");
        assert_eq!(drafting.cached_len(), at + 1);
    }
    // Token ids may be I64, as the model takes them.
    let id = ids(&[12]).to_dtype(DType::I64).unwrap();
    let both = [plain.forward(&id, 4), drafting.forward(&id, 4)];
    let [a, b] = both.map(|l| l.unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap());
    assert!(a == b);
}
