//! One model three times: the decoder, the core over SIMD, the core over its definition.
#![allow(clippy::unwrap_used, reason = "tests")]

mod models;

use candle_sparse::{
    AttentionConfig, AttentionMode, FfnMode, Format, KvCache, KvConfig, Selection, SparseConfig,
    decoder::{Decoder, Input, LoadOptions, Logits, Scratch, Step},
    kv_cache::KvDType,
};
use candle_sparse_core::{ActivationGroup, KernelSet, forward::forward};
use candle_sparse_kernels::Kernels;
use models::{folder, random};
use std::path::{Path, PathBuf};

/// What a run through a model saw: the logits of each token, and how many neurons all its blocks computed.
type Seen = (Vec<Vec<f32>>, Vec<u64>);

/// Gives the tokens of a run one by one, from the logits of the one before.
type Next<'a> = &'a mut dyn FnMut(&[f32]) -> Option<u32>;

/// A run through the core.
fn core<K: KernelSet>(kernels: &K, decoder: &Decoder, kv: KvConfig, next: Next<'_>) -> Seen {
    let layers = decoder.core_layers().unwrap();
    let model = decoder.core_model(&layers, kv).unwrap();
    let positions = model.config().max_position_embeddings;
    let mut memory = vec![0; candle_sparse_core::KvCache::words(&model, positions)];
    let mut cache = candle_sparse_core::KvCache::new(&model, &mut memory).unwrap();
    let mut data = vec![0.0; candle_sparse_core::Scratch::elements(&model, positions)];
    let mut groups = vec![ActivationGroup::ZERO; candle_sparse_core::Scratch::groups(model.config())];
    let mut scratch = candle_sparse_core::Scratch::new(&model, positions, &mut data, &mut groups).unwrap();
    let (mut all, mut active) = (Vec::new(), Vec::new());
    let mut logits = vec![0.0; model.config().vocab_size];
    while let Some(token) = next(&logits) {
        let at = (token as usize, all.len());
        forward(kernels, &model, at, &mut cache, &mut scratch, Some(&mut logits), &mut || false).unwrap();
        active.push((0..layers.len()).map(|l| u64::from(scratch.run(l).active)).sum());
        all.push(logits.clone());
    }
    (all, active)
}

/// A run through the decoder.
fn decode(decoder: &Decoder, kv: KvConfig, next: Next<'_>) -> Seen {
    let config = decoder.config();
    let (mut cache, mut scratch) = (KvCache::new(config, kv), Scratch::default());
    let (mut all, mut active): (Vec<Vec<f32>>, Vec<u64>) = (Vec::new(), Vec::new());
    let mut logits = vec![0.0; config.vocab_size];
    let all_neurons = (config.num_hidden_layers * config.intermediate_size) as f64;
    while let Some(token) = next(&logits) {
        let step = Step { batch: 1, seq_len: 1, index_pos: all.len() };
        decoder
            .forward(Input::Ids(&[token]), step, &mut cache, &mut scratch, Logits::Last, &mut logits)
            .unwrap();
        all.push(logits.clone());
        // A mean over tokens and blocks; 1 where nothing is counted.
        let counted = scratch.sparse_stats().active_share() * all_neurons * all.len() as f64;
        active.push(counted.round() as u64 - active.iter().sum::<u64>());
    }
    (all, active)
}

/// A [`Next`] of its own for each run.
type Tokens = Box<dyn FnMut(&[f32]) -> Option<u32>>;

/// Of the decoder, then of the core over every kernel set, the definition first.
fn runs(decoder: &Decoder, kv: KvConfig, next: &dyn Fn() -> Tokens) -> Vec<(&'static str, Seen)> {
    let of_core = |k: Kernels| (k.level().name(), core(&k, decoder, kv, &mut next()));
    [("decoder", decode(decoder, kv, &mut next()))]
        .into_iter()
        .chain(Kernels::available().map(of_core))
        .collect()
}

fn given(ids: Vec<u32>) -> impl Fn() -> Tokens {
    move || {
        let mut ids = ids.clone().into_iter();
        Box::new(move |_| ids.next())
    }
}

/// `first`, then the likeliest token, `n` in all.
fn greedy(first: u32, n: usize) -> impl Fn() -> Tokens {
    move || {
        let mut position = 0;
        Box::new(move |logits| {
            position += 1;
            let next = if position == 1 { first } else { likeliest(logits) };
            (position <= n).then_some(next)
        })
    }
}

fn likeliest(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap() as u32
}

/// `‖a − b‖ / ‖b‖`, the largest of all tokens.
fn error(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    let norm = |v: &mut dyn Iterator<Item = f32>| v.map(|x| x * x).sum::<f32>().sqrt();
    let each = a
        .iter()
        .zip(b)
        .map(|(a, b)| norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied()));
    each.fold(0.0, f32::max)
}

#[test]
fn random_models_agree_over_every_level() {
    let ids: Vec<u32> = (0..40).map(|i| ((i * 2_654_435_761_u64) >> 9) as u32 % 515).collect();
    // The second format rounds activations between layers: what lies on an edge may go to either side, so that two
    // implementations differ by as much as rounding itself makes, not more: 13 roundings of 2.2 times a step's deviation.
    let rounding = 2.0 * 13_f32.sqrt() * 2.2 / 127.0 / 12_f32.sqrt() * 2_f32.sqrt();
    for (format, bound) in [(Format::F32, 1e-5), (Format::Q8_0, rounding)] {
        for (shape, decoder) in random(&LoadOptions::default().with_format(Some(format))) {
            let prefill = {
                let (mut cache, mut scratch) =
                    (KvCache::new(decoder.config(), KvConfig::exact(KvDType::F32)), Scratch::default());
                let (step, mut logits) =
                    (Step { batch: 1, seq_len: ids.len(), index_pos: 0 }, vec![0.0; 515]);
                decoder
                    .forward(Input::Ids(&ids), step, &mut cache, &mut scratch, Logits::Last, &mut logits)
                    .unwrap();
                [logits]
            };
            for (name, (logits, _)) in runs(&decoder, KvConfig::exact(KvDType::F32), &given(ids.clone())) {
                let error = error(&logits[ids.len() - 1..], &prefill);
                assert!(error <= bound, "{shape} {format:?} {name}: relative error {error}");
            }
        }
    }
}

fn built_in() -> [PathBuf; 2] {
    let testdata = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/testdata");
    ["tales-silu", "tales-relu"].map(|name| testdata.join(name))
}

/// Neurons are left out even where that would not be faster here.
fn forced(mode: FfnMode) -> SparseConfig {
    SparseConfig::default().with_mode(mode).with_force(true)
}

const FEW: AttentionConfig =
    AttentionConfig::new(AttentionMode::Window).with_sinks(4).with_window(32).with_budget(32).with_recall(32);

fn tiers() -> KvConfig {
    KvConfig::tiered().with_hot(32).with_warm(96)
}

/// Every way to choose neurons, and every way to choose positions: the same choices, and logits as near as the order of
/// float sums allows, and where pages are rounded an element on the edge of two levels.
#[test]
fn built_in_models_agree_in_every_mode() {
    let ids: Vec<u32> = (0..180).map(|i| ((i * 2_654_435_761_u64) >> 9) as u32 % 2048).collect();
    for path in built_in() {
        let options =
            LoadOptions::default().with_format(Some(Format::F32)).with_sparse(forced(FfnMode::Cascade));
        let decoder = folder(&path, options);
        let check = |decoder: &Decoder, n: usize, kv: KvConfig, bound: f32, what: &str| {
            let all = runs(decoder, kv, &given(ids[..n].to_vec()));
            let (want, neurons) = &all[0].1;
            for (name, (logits, active)) in &all[1..] {
                assert_eq!(active, neurons, "{} {what} {name}: neurons", path.display());
                let error = error(logits, want);
                println!("{what} {name}: {error}");
                assert!(error <= bound, "{} {what} {name}: relative error {error}", path.display());
            }
        };
        // Hot pages in F32: in F16 so many elements lie on an edge that a neuron may lie on one of its own.
        let (exact, rounded) = (KvConfig::exact(KvDType::F32), tiers().with_dtype(KvDType::F32));
        for mode in [FfnMode::Dense, FfnMode::Gate, FfnMode::LowRank, FfnMode::Cascade] {
            for selection in [Selection::Fitted, Selection::TopK(150)] {
                let decoder = decoder.with_sparse(forced(mode).with_selection(selection)).unwrap();
                check(&decoder, 24, exact, 1e-5, &format!("{mode:?} {selection:?}"));
            }
        }
        for (mode, kv, bound) in [
            (AttentionMode::Dense, rounded, 1e-3),
            (AttentionMode::Window, exact, 1e-5),
            (AttentionMode::Gated, exact, 1e-5),
            (AttentionMode::Gated, rounded, 1e-3),
            (AttentionMode::Recall, exact, 1e-5),
            (AttentionMode::Sampled, exact, 1e-5),
        ] {
            let decoder = decoder.with_attention(FEW.with_mode(mode)).unwrap();
            check(&decoder, ids.len(), kv, bound, &format!("{mode:?} {kv:?}"));
        }
        let shared = decoder.with_recall_shares(vec![vec![0.0, 2.0]; 4]).unwrap();
        let shared = shared.with_attention(FEW.with_mode(AttentionMode::Recall)).unwrap();
        check(&shared, ids.len(), exact, 1e-5, "recall, shared out");
    }
}

/// That `seen` finds the tokens likeliest that `want` does, given the same text. Where activations are rounded to 8 bits, one on
/// the edge of two levels moves the logits by a little; so a few tokens may differ whose two likeliest were as near as that.
fn assert_same_text(seen: &Seen, want: &Seen, what: &str) {
    let mut ties = 0;
    for (i, (got, want)) in seen.0.iter().zip(&want.0).enumerate() {
        let (a, b) = (likeliest(got) as usize, likeliest(want) as usize);
        let size = (want.iter().map(|v| v * v).sum::<f32>() / want.len() as f32).sqrt();
        let lead = (want[b] - want[a]).max(got[a] - got[b]) / size;
        assert!(a == b || lead <= TIE, "{what}: token {i} is {a}, not {b}, by {lead} of the logits' size");
        ties += usize::from(a != b);
    }
    // Seen: 5 of 200, with 4-bit pages.
    assert!(ties <= want.0.len() / 25, "{what}: {ties} tokens differ");
}

fn text(seen: &Seen) -> Vec<u32> {
    seen.0.iter().map(|logits| likeliest(logits)).collect()
}

/// Of the logits' root mean square; with tiers an element on the edge of two of the 16 levels was seen to move them by 0.012.
const TIE: f32 = 0.02;

#[test]
fn greedy_text_is_the_same() {
    for path in built_in() {
        for (sparse, kv) in [(FfnMode::Dense, KvConfig::exact(KvDType::F16)), (FfnMode::Auto, tiers())] {
            let options = LoadOptions::default().with_format(Some(Format::Q8_0)).with_sparse(forced(sparse));
            let decoder = folder(&path, options);
            let written = text(&decode(&decoder, kv, &mut greedy(0, 200)()));
            let ids = [0].into_iter().chain(written).take(200).collect();
            let all = runs(&decoder, kv, &given(ids));
            for (name, seen) in &all[1..] {
                assert_same_text(seen, &all[0].1, &format!("{} {sparse:?} {name}", path.display()));
            }
        }
    }
}

/// Heads of 8 channels: a value row of the core's cache holds four of them, of the decoder's one, so quantised values have
/// other scales, and the two differ by as much as each errs.
#[test]
fn heads_of_eight_channels() {
    let Some(models) = std::env::var_os("CANDLE_SPARSE_TEST_MODELS") else {
        println!("skipped: CANDLE_SPARSE_TEST_MODELS is not set");
        return;
    };
    let options = LoadOptions::default().with_format(Some(Format::F32));
    let decoder = folder(&Path::new(&models).join("stories260K"), options);
    let exact = runs(&decoder, KvConfig::exact(KvDType::F16), &greedy(1, 200));
    for (name, seen) in &exact[1..] {
        assert_eq!(text(seen), text(&exact[0].1), "{name}");
    }
    let told: Vec<u32> = [1].into_iter().chain(text(&exact[0].1)).take(200).collect();
    let rounded = runs(&decoder, tiers(), &given(told));
    let off = |seen: &Seen| error(&seen.0, &exact[0].1.0);
    for (name, seen) in &rounded {
        println!("{name}: with tiers {} from F16", off(seen));
        assert!(off(seen) <= 2.0 * off(&rounded[0].1), "{name}: the layouts err alike");
    }
    for (name, seen) in &rounded[2..] {
        let error = error(&seen.0, &rounded[1].1.0);
        assert!(error <= 2e-2, "{name}: {error} from the definition");
    }
}
