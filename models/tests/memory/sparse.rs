//! What quantised pages and sparse attention still find.

use crate::synthetic::{
    ask::ask,
    model::{AFTER_NAME, CONTEXT, LAYERS, Settings, config, load, weights},
    outliers,
    tasks::{Share, Task, count, multi_needle, passkey, variables},
};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sparse::{
    AttentionConfig, AttentionMode, DeadlineExceeded, FastGrnnGate, KvConfig,
    calibrate::GateSettings,
    kv_cache::KvDType,
    ops::{SparseAttention, sparse_attention},
};
use candle_sparse_models::{
    calibrate::fit_gates,
    llama::{Cache, Llama},
};
use std::time::Duration;

const DEPTHS: [f64; 7] = [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0];

/// Small, so that most of a text of 1024 tokens is out of sight, or cold.
const SMALL: AttentionConfig =
    AttentionConfig::new(AttentionMode::Gated).with_sinks(4).with_window(64).with_budget(128).with_recall(64);

fn tiers() -> KvConfig {
    KvConfig::tiered().with_hot(64).with_warm(128)
}

fn cache(kv: KvConfig) -> Cache {
    Cache::with_config(true, kv, &config(), &Device::Cpu).unwrap()
}

/// Right answers, and answers.
fn right(llama: &Llama, kv: KvConfig, tasks: &[Task]) -> (usize, usize) {
    let all: Vec<_> = tasks.iter().flat_map(|t| ask(llama, &mut cache(kv), t).unwrap()).collect();
    (all.iter().filter(|r| r.got == r.expected).count(), all.len())
}

fn passkeys(length: usize) -> Vec<Task> {
    (0..).zip(DEPTHS).map(|(seed, depth)| passkey(length, depth, seed)).collect()
}

fn with(mode: AttentionMode, recall: usize) -> AttentionConfig {
    SMALL.with_mode(mode).with_recall(recall)
}

fn var_builder() -> VarBuilder<'static> {
    VarBuilder::from_tensors(weights(Settings::default()).unwrap(), DType::F32, &Device::Cpu)
}

/// Gates fitted to texts with needles and variables, as `calibrate` fits them.
fn fitted(seed: u64) -> Vec<FastGrnnGate> {
    let text = |i: u64| {
        let task =
            if i.is_multiple_of(2) { multi_needle(860, 40, seed + i) } else { variables(860, 20, seed + i) };
        let mut tokens = task.context.clone();
        tokens.extend(task.questions.iter().flat_map(|q| q.tokens.clone()).cycle().take(40));
        tokens
    };
    let [fit, tune] = [0..12, 12..16].map(|r| r.map(text).collect::<Vec<_>>());
    let settings = GateSettings::default().with_window(Some(64)).with_share(0.1);
    let model = Llama::load(var_builder(), &config()).unwrap();
    let fits = fit_gates(model.decoder(), &var_builder(), [&fit, &tune], &settings, |_| ()).unwrap();
    for (layer, f) in fits.iter().enumerate() {
        let [ridge, cell] = f.r2();
        let kept = f.gate.cell.is_some();
        say_line(&format!("layer {layer}: R² ridge {ridge:.3}, with a cell {cell:.3}, cell kept: {kept}"));
    }
    fits.into_iter().map(|f| f.gate).collect()
}

#[allow(clippy::print_stdout, reason = "the table is what the ignored test is for")]
fn say_line(line: &str) {
    println!("{line}");
}

/// Gates that know nothing.
fn random(seed: usize) -> Vec<FastGrnnGate> {
    let hidden = config().hidden_size;
    let weight = |i: usize| ((i * 7919 + seed * 104_729) % 10_007) as f32 / 5_003.5 - 1.0;
    let gate = |l: usize| {
        let ridge = (0..2 * hidden).map(|i| weight(i + 977 * l)).collect();
        FastGrnnGate::new(hidden, ridge, vec![0.0; 2], vec![f32::MIN; 2]).unwrap()
    };
    (0..LAYERS).map(gate).collect()
}

/// Gates that know: what follows a name, which layer 0 has written where the others can read it.
fn oracle() -> Vec<FastGrnnGate> {
    let hidden = config().hidden_size;
    let mut ridge = vec![0.0; 2 * hidden];
    ridge[AFTER_NAME] = 1.0;
    ridge[hidden + AFTER_NAME] = 1.0;
    let gate = || FastGrnnGate::new(hidden, ridge.clone(), vec![0.0; 2], vec![0.05; 2]).unwrap();
    (0..LAYERS).map(|_| gate()).collect()
}

#[test]
fn tiers_forget_nothing() {
    let llama = load().unwrap();
    for kv in [tiers(), KvConfig::q8(), KvConfig::q4()] {
        for tasks in [
            passkeys(1024),
            vec![multi_needle(1024, 8, 3), variables(1024, 6, 4)],
            vec![count(1024, Share { most: 0.2, other: 0.15, misleading: 256 }, 5)],
        ] {
            let (found, all) = right(&llama, kv, &tasks);
            assert_eq!(found, all, "{kv:?}");
        }
    }
}

#[test]
fn recall_finds_what_a_window_has_lost() {
    let tasks = passkeys(1024);
    let window = load().unwrap().with_attention(with(AttentionMode::Window, 0)).unwrap();
    let (lost, _) = right(&window, KvConfig::exact(KvDType::F16), &tasks);
    assert!(lost <= 2, "the window holds 64 of 1024 tokens, yet {lost} keys were found");
    // Half of the pages: the codes of this model are random, where bounds tell little.
    let select = with(AttentionMode::Recall, 0).with_budget(512);
    let llama = load().unwrap().with_attention(select).unwrap();
    for kv in [KvConfig::exact(KvDType::F16), tiers()] {
        let (found, all) = right(&llama, kv, &tasks);
        assert!(found + 1 >= all, "{kv:?}: {found} of {all}");
    }
}

/// A quarter of the positions, most of them drawn at random, tell which of two tokens there were more of; what a query or a gate
/// chooses does not.
#[test]
fn a_sample_counts_what_nothing_else_does() {
    let share = |seed| count(1024, Share { most: 0.2, other: 0.12, misleading: 192 }, seed);
    let tasks: Vec<_> = (0..12).map(share).collect();
    let counted = |mode, recall, budget| {
        let select = with(mode, recall).with_window(32).with_budget(budget);
        let llama = load().unwrap().with_attention(select).unwrap();
        right(&llama, KvConfig::exact(KvDType::F16), &tasks).0
    };
    let dense = right(&load().unwrap(), KvConfig::exact(KvDType::F16), &tasks).0;
    let (sampled, recalled, window) = (
        counted(AttentionMode::Sampled, 32, 160),
        counted(AttentionMode::Recall, 0, 192),
        counted(AttentionMode::Window, 0, 0),
    );
    say_line(&format!(
        "dense {dense}, sampled {sampled}, recall {recalled}, window {window} of {}",
        tasks.len()
    ));
    assert_eq!(dense, tasks.len());
    assert!(10 * sampled >= 9 * dense, "{sampled} of {dense}");
    assert!(recalled.max(window) < sampled, "{recalled} {window}");
}

#[test]
fn a_fitted_gate_finds_what_one_that_knows_finds() {
    let llama = load().unwrap();
    let select = with(AttentionMode::Gated, 0);
    let found = |gates| {
        let llama = llama.with_gates(gates).unwrap().with_attention(select).unwrap();
        right(&llama, tiers(), &passkeys(1024)).0
    };
    let (knows, fits, guesses) = (found(oracle()), found(fitted(1)), found(random(2)));
    assert_eq!((knows, fits), (DEPTHS.len(), DEPTHS.len()));
    assert!(guesses < DEPTHS.len() - 1, "random pages found {guesses}");
}

#[test]
fn large_channels_of_keys_cost_little() {
    let (positions, head_dim) = (1024, 64);
    let (mut say, mut errors) = (String::new(), Vec::new());
    for outliers in [0, 4] {
        let head = outliers::head(positions, 32, head_dim, outliers, 5);
        let tensor =
            |v: &[f32]| Tensor::from_slice(v, (1, 1, v.len() / head_dim, head_dim), &Device::Cpu).unwrap();
        let (q, k, v) = (tensor(&head.queries), tensor(&head.keys), tensor(&head.values));
        let attend = |kv| {
            // Scores of about a nat: attention over many positions, where errors of keys count.
            let scale = if outliers == 0 { 0.125 } else { 0.0125 };
            let how = SparseAttention::new(scale, AttentionConfig::default()).with_kv(kv);
            sparse_attention(&q, &k, &v, &how).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let exact = attend(KvConfig::exact(KvDType::F32));
        for (name, kv) in [("q8", KvConfig::q8()), ("tiered", tiers()), ("q4", KvConfig::q4())] {
            let norm = |v: &mut dyn Iterator<Item = f32>| v.map(|v| v * v).sum::<f32>().sqrt();
            let error = norm(&mut attend(kv).iter().zip(&exact).map(|(a, b)| a - b));
            errors.push(error / norm(&mut exact.iter().copied()));
            say += &format!("{outliers} large channels, {name}: {:.4}; ", errors[errors.len() - 1]);
        }
    }
    say_line(&say);
    let [q8, _, q4, large_q8, _, large_q4] = errors[..] else { unreachable!("two times three") };
    // Each channel has a scale of its own: large ones take nothing from the others.
    assert!(q8 < 0.01 && large_q8 < 0.01, "{say}");
    assert!(q4 < 0.12 && large_q4 < 1.5 * q4, "{say}");
}

#[test]
fn a_step_out_of_time_changes_nothing() {
    let llama = load().unwrap().with_attention(with(AttentionMode::Recall, 0)).unwrap();
    let task = passkey(700, 0.3, 1);
    let mut cache = cache(tiers());
    llama.forward(&crate::synthetic::ask::ids(&task.context).unwrap(), 0, &mut cache).unwrap();
    let (mut other, len) = (cache.clone(), cache.len());
    cache.set_time_limit(Some(Duration::ZERO));
    let more: Vec<u32> = (0..900).map(|i| 224 + i % 200).collect();
    for (tokens, at) in [(&more[..], len), (&more[..1], len), (&more[..], 100), (&more[..40], 0)] {
        let error = llama.forward(&crate::synthetic::ask::ids(tokens).unwrap(), at, &mut cache).unwrap_err();
        let exceeded = DeadlineExceeded::of(&error).expect("a deadline");
        assert!(exceeded.elapsed > exceeded.limit && cache.len() == len);
    }
    cache.set_time_limit(Some(Duration::from_secs(3600)));
    let question = &task.questions[0].tokens;
    for (i, token) in question.iter().chain(&more[..40]).enumerate() {
        let step = |cache: &mut Cache| {
            let x = crate::synthetic::ask::ids(&[*token]).unwrap();
            llama.forward(&x, len + i, cache).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!(step(&mut cache), step(&mut other), "token {i}");
    }
}

/// The table of the record: `cargo test --release -p candle-sparse-models --test memory -- --ignored --nocapture table`.
#[test]
#[ignore = "minutes"]
fn table() {
    let lengths: Vec<usize> = std::env::var("LENGTHS")
        .map_or(vec![2048, 8192, 16_384], |l| l.split(',').map(|n| n.parse().unwrap()).collect());
    let (dense, ridge) = (load().unwrap(), fitted(100));
    let default = AttentionConfig::new(AttentionMode::Gated);
    let with = |mode, recall, gates: Option<&Vec<FastGrnnGate>>| {
        let llama = gates.map_or(dense.clone(), |g| dense.with_gates(g.clone()).unwrap());
        llama.with_attention(default.with_mode(mode).with_recall(recall).with_budget(512)).unwrap()
    };
    for length in lengths {
        assert!(length < CONTEXT);
        let tasks: [(&str, Vec<Task>); 4] = [
            ("passkey", passkeys(length)),
            ("8 needles", vec![multi_needle(length, 8, 7)]),
            ("6 chains", vec![variables(length, 6, 8)]),
            (
                "counting",
                (0..4)
                    .map(|s| count(length, Share { most: 0.2, other: 0.15, misleading: length / 8 }, s))
                    .collect(),
            ),
        ];
        for (name, tasks) in &tasks {
            let mut line = format!("{length:6} {name:10}");
            let mut say =
                |what: &str, (found, all): (usize, usize)| line += &format!(" | {what} {found}/{all}");
            let mut try_all = |what: &str, llama: &Llama| say(what, right(llama, KvConfig::tiered(), tasks));
            try_all("dense", &dense);
            try_all("window", &with(AttentionMode::Window, 0, None));
            try_all("random", &with(AttentionMode::Gated, 0, Some(&random(3))));
            try_all("gate", &with(AttentionMode::Gated, 0, Some(&ridge)));
            try_all("gate + recall", &with(AttentionMode::Gated, default.recall, Some(&ridge)));
            try_all("recall", &with(AttentionMode::Recall, 0, None));
            try_all("sampled", &with(AttentionMode::Sampled, default.recall, None));
            try_all("oracle", &with(AttentionMode::Gated, 0, Some(&oracle())));
            say_line(&line);
        }
    }
}
