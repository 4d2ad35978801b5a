//! One model three times: the drop-in, the core over SIMD, the core over its definition.

use crate::cases::{CASES, builder, tokens, weights};
use candle_core::{DType, Device};
use candle_sparse::{
    AttentionConfig, AttentionMode, FfnMode, Format, KvConfig, KvDType, Selection, SparseConfig,
};
use candle_sparse_core::{ActivationGroup, KernelSet, KvCache, Scalar, Scratch, forward::forward};
use candle_sparse_kernels::Kernels;
use candle_sparse_models::{
    files::ModelFiles,
    llama::{Cache, Llama, LoadOptions},
    pretrained::Pretrained,
};

/// What a run through a model saw: the logits of each token, and how many neurons all its blocks computed.
type Seen = (Vec<Vec<f32>>, Vec<u64>);

/// Feeds tokens one by one; `next` says which, from the logits of the one before.
fn core<K: KernelSet>(
    kernels: &K,
    model: &Llama,
    kv: KvConfig,
    next: &mut dyn FnMut(&[f32]) -> Option<u32>,
) -> Seen {
    let layers = model.decoder().core_layers().unwrap();
    let model = model.decoder().core_model(&layers, kv).unwrap();
    let positions = model.config().max_position_embeddings;
    let mut memory = vec![0; KvCache::words(&model, positions)];
    let mut cache = KvCache::new(&model, &mut memory).unwrap();
    let mut data = vec![0.0; Scratch::elements(&model, positions)];
    let mut groups = vec![ActivationGroup::ZERO; Scratch::groups(model.config())];
    let mut scratch = Scratch::new(&model, positions, &mut data, &mut groups).unwrap();
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

/// The same through the drop-in.
fn drop_in(model: &Llama, kv: KvConfig, next: &mut dyn FnMut(&[f32]) -> Option<u32>) -> Seen {
    let mut cache = Cache::of(model, kv);
    let (mut all, mut active): (Vec<Vec<f32>>, Vec<u64>) = (Vec::new(), Vec::new());
    let config = model.decoder().config();
    let (neurons, mut logits) = (config.intermediate_size as f64, vec![0.0; config.vocab_size]);
    while let Some(token) = next(&logits) {
        model.decode(token, all.len(), &mut cache, &mut logits).unwrap();
        let counted = cache
            .sparse_stats()
            .layers
            .iter()
            .map(|l| l.active_share * l.tokens as f64 * neurons)
            .sum::<f64>();
        active.push(counted.round() as u64 - active.iter().sum::<u64>());
        all.push(logits.clone());
    }
    (all, active)
}

/// Both over every kernel set, the drop-in first.
fn all(
    model: &Llama,
    kv: KvConfig,
    next: &dyn Fn() -> Box<dyn FnMut(&[f32]) -> Option<u32>>,
) -> Vec<(String, Seen)> {
    let mut runs = vec![("drop-in".into(), drop_in(model, kv, &mut next()))];
    runs.push(("scalar definition".into(), core(&Scalar, model, kv, &mut next())));
    for kernels in Kernels::available() {
        runs.push((kernels.level().name().into(), core(&kernels, model, kv, &mut next())));
    }
    runs
}

fn given(ids: Vec<u32>) -> impl Fn() -> Box<dyn FnMut(&[f32]) -> Option<u32>> {
    move || {
        let mut ids = ids.clone().into_iter();
        Box::new(move |_| ids.next())
    }
}

/// `first`, then the likeliest token, `n` in all.
fn greedy(first: u32, n: usize) -> impl Fn() -> Box<dyn FnMut(&[f32]) -> Option<u32>> {
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
    for case in CASES {
        let config = case.config();
        let w = weights(&config, DType::F32);
        let ids = tokens(1, 40, 11).flatten_all().unwrap().to_vec1::<u32>().unwrap();
        // The second format rounds activations between layers: what lies on an edge may go to either side, so that two
        // implementations differ by as much as rounding itself makes (see the test of quantised weights), not more.
        let rounding = 2.0 * 13_f32.sqrt() * 2.2 / 127.0 / 12_f32.sqrt() * 2_f32.sqrt();
        for (format, bound) in [(Format::F32, 1e-5), (Format::Q8_0, rounding)] {
            let options = LoadOptions::default().with_format(Some(format));
            let model = Llama::load_with(builder(&w, DType::F32), &config, options).unwrap();
            let prefill = {
                let mut cache = Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
                model.forward(&tokens(1, 40, 11), 0, &mut cache).unwrap()
            };
            let prefill = prefill.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for (name, (logits, _)) in all(&model, KvConfig::exact(KvDType::F32), &given(ids.clone())) {
                let error = error(&logits[39..], std::slice::from_ref(&prefill));
                assert!(error <= bound, "{} {format:?} {name}: relative error {error}", case.name);
            }
        }
    }
}

/// A built-in model, or one of `CANDLE_SPARSE_TEST_MODELS`.
fn load(folder: &str, options: LoadOptions) -> Option<Llama> {
    let files = ModelFiles::local(folder).unwrap()?;
    let profile = files.sparse_profile.as_ref().map(|p| std::sync::Arc::new(p.load().unwrap()));
    Some(Pretrained::load(&files, options.with_profile(profile)).unwrap().model)
}

fn built_in() -> [String; 2] {
    ["tales-silu", "tales-relu"].map(|name| format!("{}/testdata/{name}", env!("CARGO_MANIFEST_DIR")))
}

/// Neurons are left out even where that would not be faster here.
fn forced(mode: FfnMode) -> SparseConfig {
    SparseConfig::default().with_mode(mode).with_force(true)
}

const WINDOW: AttentionConfig =
    AttentionConfig::new(AttentionMode::Window).with_sinks(4).with_window(32).with_budget(32).with_recall(32);

fn tiers() -> KvConfig {
    KvConfig::tiered().with_hot(32).with_warm(96)
}

/// Every way to choose neurons, and every way to choose positions in every tier: the same choices, and logits as near as
/// the order of float sums and an element on the edge of two levels of a tier allow.
#[test]
fn built_in_models_agree_in_every_mode() {
    let ids: Vec<u32> = (0..180).map(|i| (i * 2_654_435_761_u64 >> 9) as u32 % 2048).collect();
    for folder in built_in() {
        let options =
            LoadOptions::default().with_format(Some(Format::F32)).with_sparse(forced(FfnMode::Cascade));
        let model = load(&folder, options).unwrap();
        let check = |model: &Llama, kv: KvConfig, bound: f32, what: &str| {
            let runs = all(model, kv, &given(ids.clone()));
            let (want, neurons) = &runs[0].1;
            for (name, (logits, active)) in &runs[1..] {
                assert_eq!(active, neurons, "{folder} {what} {name}: neurons");
                let error = error(logits, want);
                println!("{what} {name}: {error}");
                assert!(error <= bound, "{folder} {what} {name}: relative error {error}");
            }
        };
        for mode in [FfnMode::Dense, FfnMode::Gate, FfnMode::LowRank, FfnMode::Cascade] {
            for selection in [Selection::Fitted, Selection::TopK(150)] {
                let config = forced(mode).with_selection(selection);
                let model = model.with_sparse(config).unwrap();
                check(&model, KvConfig::exact(KvDType::F32), 1e-4, &format!("{mode:?} {selection:?}"));
            }
        }
        for mode in [AttentionMode::Dense, AttentionMode::Window, AttentionMode::Gated, AttentionMode::Recall]
        {
            let model = model.with_attention(WINDOW.with_mode(mode)).unwrap();
            for (kv, bound) in [
                (KvConfig::exact(KvDType::F32), 1e-4),
                (KvConfig::exact(KvDType::F16), 2e-3),
                (tiers(), 2e-2),
            ] {
                check(&model, kv, bound, &format!("{mode:?} {kv:?}"));
            }
        }
    }
}

#[test]
fn greedy_text_is_the_same() {
    for folder in built_in() {
        for (sparse, kv) in [(FfnMode::Dense, KvConfig::exact(KvDType::F16)), (FfnMode::Auto, tiers())] {
            let options = LoadOptions::default().with_format(Some(Format::Q8_0)).with_sparse(forced(sparse));
            let model = load(&folder, options).unwrap();
            let runs = all(&model, kv, &greedy(0, 200));
            let ids = |seen: &Seen| seen.0.iter().map(|l| likeliest(l)).collect::<Vec<_>>();
            for (name, seen) in &runs[1..] {
                assert_eq!(ids(seen), ids(&runs[0].1), "{folder} {sparse:?} {name}");
            }
        }
    }
}

/// Heads of 8 channels: here a value row of the core's cache holds four of them, of the drop-in's one, so quantised values
/// have other scales: both err by a step of four bits, and so may differ by two.
#[test]
fn heads_of_eight_channels() {
    let Some(folder) = std::env::var_os("CANDLE_SPARSE_TEST_MODELS") else {
        println!("skipped: CANDLE_SPARSE_TEST_MODELS is not set");
        return;
    };
    let folder = std::path::Path::new(&folder).join("stories260K").display().to_string();
    let model = load(&folder, LoadOptions::default().with_format(Some(Format::F32))).unwrap();
    let ids = |seen: &Seen| seen.0.iter().map(|l| likeliest(l)).collect::<Vec<_>>();
    let exact = all(&model, KvConfig::exact(KvDType::F16), &greedy(1, 200));
    for (name, seen) in &exact[1..] {
        assert_eq!(ids(seen), ids(&exact[0].1), "{name}");
    }
    let text: Vec<u32> = [1].into_iter().chain(ids(&exact[0].1)).take(200).collect();
    let rounded = all(&model, tiers(), &given(text));
    let off = |seen: &Seen| error(&seen.0, &exact[0].1.0);
    let (mut least, mut most) = (f32::INFINITY, 0.0_f32);
    for (name, seen) in &rounded {
        println!("{name}: tiers are {} from F16", off(seen));
        (least, most) = (least.min(off(seen)), most.max(off(seen)));
    }
    assert!(most <= 2.0 * least, "the layouts err alike: {least} to {most}");
    for (name, seen) in &rounded[2..] {
        let error = error(&seen.0, &rounded[1].1.0);
        assert!(error <= 2e-2, "{name}: {error} from the definition");
    }
}
