//! Steps of several sequences, and of several tokens of one: the bits of tokens decoded alone.
#![allow(clippy::unwrap_used, reason = "tests")]

use candle_sparse::{
    AttentionConfig, AttentionMode, FfnMode, Format, Guard, KvCache, KvConfig, KvDType, Selection,
    SparseConfig, Threads,
    decoder::{BatchScratch, Decoder, Input, Logits, Scratch, Step, Turn},
};
use candle_sparse_models::{
    files::ModelFiles,
    llama::{Llama, LoadOptions},
    pretrained::Pretrained,
};
use std::path::Path;

const PROMPT: usize = 45;
const TOKENS: usize = 100;

/// Numbers that look drawn.
struct Draw(u64);

impl Draw {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

fn load(options: LoadOptions) -> Llama {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tales-silu"));
    Pretrained::load(&ModelFiles::from_folder(folder).unwrap(), options).unwrap().model
}

fn text(seed: u64) -> Vec<u32> {
    let mut draw = Draw(seed);
    (0..PROMPT + TOKENS).map(|_| draw.below(2048) as u32).collect()
}

fn bits(logits: &[f32]) -> Vec<u32> {
    // Of zeros only the sign depends on what was not seen.
    logits.iter().map(|l| (l + 0.0).to_bits()).collect()
}

/// One sequence.
struct Sequence {
    ids: Vec<u32>,
    cache: KvCache,
    scratch: Scratch,
    /// After each token, decoded alone.
    wanted: Vec<Vec<u32>>,
}

impl Sequence {
    fn new(decoder: &Decoder, kv: KvConfig, seed: u64) -> Self {
        let ids = text(seed);
        let prompt = |cache: &mut KvCache, scratch: &mut Scratch| {
            let step = Step { batch: 1, seq_len: PROMPT, index_pos: 0 };
            let mut logits = vec![0.0; decoder.config().vocab_size];
            decoder
                .forward(Input::Ids(&ids[..PROMPT]), step, cache, scratch, Logits::Last, &mut logits)
                .unwrap();
        };
        let (mut alone, mut scratch) = (KvCache::new(decoder.config(), kv), Scratch::default());
        prompt(&mut alone, &mut scratch);
        let mut logits = vec![0.0; decoder.config().vocab_size];
        let wanted = (PROMPT..ids.len())
            .map(|index_pos| {
                let (input, step) =
                    (Input::Ids(&ids[index_pos..=index_pos]), Step { batch: 1, seq_len: 1, index_pos });
                decoder.forward(input, step, &mut alone, &mut scratch, Logits::Last, &mut logits).unwrap();
                bits(&logits)
            })
            .collect();
        let (mut cache, mut scratch) = (KvCache::new(decoder.config(), kv), Scratch::default());
        prompt(&mut cache, &mut scratch);
        Self { ids, cache, scratch, wanted }
    }
}

/// Three sequences in turns of drawn lengths, with guesses that are wrong from a drawn token on.
fn check(name: &str, decoder: &Decoder, kv: KvConfig) {
    let vocab = decoder.config().vocab_size;
    let mut all: Vec<_> = (1..=3).map(|seed| Sequence::new(decoder, kv, seed)).collect();
    let (mut draw, mut batch) = (Draw(7), BatchScratch::default());
    while all.iter().any(|s| s.cache.len() < s.ids.len()) {
        let mut guesses = Vec::new();
        for s in &all {
            let at = s.cache.len();
            let left = (s.ids.len() - at).min(decoder.most_tokens(at));
            let n = if draw.below(3) == 0 { left.min(1) } else { left.min(1 + draw.below(9)) };
            let right = if n == 0 { 0 } else { 1 + draw.below(n) };
            let mut ids = s.ids[at..at + n].to_vec();
            ids[right..].iter_mut().for_each(|id| *id = (*id + 1 + draw.below(9) as u32) % 2048);
            guesses.push((ids, right));
        }
        let active = |(s, (ids, _)): &(&mut Sequence, &(Vec<u32>, usize))| {
            s.cache.len() < s.ids.len() && !ids.is_empty()
        };
        let mut turns: Vec<_> = all
            .iter_mut()
            .zip(&guesses)
            .filter(active)
            .map(|(s, (ids, _))| Turn { ids, cache: &mut s.cache, scratch: &mut s.scratch })
            .collect();
        let rows: usize = turns.iter().map(|t| t.ids.len()).sum();
        let mut logits = vec![0.0; rows * vocab];
        decoder.decode_turns(&mut turns, &mut batch, &mut logits).unwrap();
        let mut rows = logits.chunks_exact(vocab);
        for (s, (ids, right)) in all.iter_mut().zip(&guesses).filter(|(_, (ids, _))| !ids.is_empty()) {
            let at = s.cache.len() - ids.len();
            for (t, row) in rows.by_ref().take(ids.len()).enumerate().filter(|(t, _)| t < right) {
                assert!(bits(row) == s.wanted[at + t - PROMPT], "{name}: position {} from {at} on", at + t);
            }
            s.cache.truncate(at + right);
        }
    }
}

fn kv_configs() -> [(&'static str, KvConfig); 3] {
    let tiered = KvConfig::tiered().with_hot(40).with_warm(100);
    [("f16", KvConfig::exact(KvDType::F16)), ("tiered", tiered), ("q4", KvConfig::q4())]
}

#[test]
fn every_format_and_tier() {
    for format in [Format::F32, Format::F16, Format::BF16, Format::Q8_0, Format::Q4_0] {
        let options = LoadOptions::default().with_format(Some(format));
        let model = load(options.with_sparse(SparseConfig::default().with_mode(FfnMode::Dense)));
        for (name, kv) in kv_configs() {
            check(&format!("{} {name}", format.name()), model.decoder(), kv);
        }
    }
}

#[test]
fn every_attention() {
    let model = load(LoadOptions::default().with_format(Some(Format::Q8_0)));
    for mode in [AttentionMode::Window, AttentionMode::Gated, AttentionMode::Recall, AttentionMode::Sampled] {
        let config = AttentionConfig::new(mode).with_window(64).with_budget(96);
        let model = model.with_attention(config).unwrap();
        for (name, kv) in kv_configs() {
            check(&format!("{mode:?} {name}"), model.decoder(), kv);
        }
    }
}

#[test]
fn every_rule_that_chooses_neurons() {
    let forced = SparseConfig::default().with_force(true);
    let model = load(LoadOptions::default().with_format(Some(Format::Q8_0)).with_sparse(forced));
    for mode in [FfnMode::Dense, FfnMode::Gate, FfnMode::LowRank, FfnMode::Cascade] {
        let config = forced.with_mode(mode).with_selection(Selection::Share(0.3));
        // The guard changes thresholds as it goes.
        let guard = Some(Guard::new(4, 0.01)).filter(|_| mode != FfnMode::Dense);
        let model = model.with_sparse(config.with_guard(guard)).unwrap();
        check(&format!("{mode:?}"), model.decoder(), KvConfig::exact(KvDType::F16));
    }
}

#[test]
fn any_number_of_threads() {
    for threads in [1, 2, 4] {
        let options = LoadOptions::default().with_threads(Threads::new(threads).ok());
        check(
            &format!("{threads} threads"),
            load(options).decoder(),
            KvConfig::tiered().with_hot(40).with_warm(100),
        );
    }
}

#[test]
fn what_a_turn_cannot_do_changes_nothing() {
    let model = load(LoadOptions::default());
    let decoder = model.decoder();
    let mut s = Sequence::new(decoder, KvConfig::exact(KvDType::F16), 1);
    let mut other = Sequence::new(decoder, KvConfig::exact(KvDType::F16), 2);
    for (ids, wanted) in [(&[1_u32, 2048][..], "vocab_size"), (&[][..], "empty"), (&[1; 33][..], "33")] {
        let mut logits = vec![0.0; (1 + ids.len()) * 2048];
        let mut turns = [
            Turn { ids: &[5], cache: &mut other.cache, scratch: &mut other.scratch },
            Turn { ids, cache: &mut s.cache, scratch: &mut s.scratch },
        ];
        let error = decoder.decode_turns(&mut turns, &mut BatchScratch::default(), &mut logits).unwrap_err();
        assert!(error.to_string().contains(wanted), "{error}");
        assert_eq!((s.cache.len(), other.cache.len()), (PROMPT, PROMPT));
    }
}
