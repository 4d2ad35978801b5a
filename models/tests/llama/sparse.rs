//! The sparse FFN in decode: what it leaves out, and that it leaves out nothing else.

mod guard;
mod pays;
mod profile;

use crate::cases::{CASES, Tap, VOCAB, builder, tokens, weights, worst};
use candle_core::{DType, Device, Tensor};
use candle_sparse::{FfnMode, Format, Selection, SparseConfig, Threads, profile::Rule};
use candle_sparse_models::llama::{Cache, Config, Llama, LlamaConfig, LoadOptions};
use profile::{exact, importance, rules};
use std::{collections::HashMap, sync::Arc};

const FORMATS: [Format; 4] = [Format::F32, Format::F16, Format::Q8_0, Format::Q4_0];
const MODES: [FfnMode; 3] = [FfnMode::Gate, FfnMode::LowRank, FfnMode::Cascade];
const PROMPT: usize = 9;

struct Model {
    config: Config,
    weights: HashMap<String, Tensor>,
}

impl Model {
    fn new(case: usize, act: &str) -> Self {
        let json = CASES[case]
            .json()
            .replace("\"rms_norm_eps\"", &format!("\"hidden_act\": \"{act}\", \"rms_norm_eps\""));
        let config = serde_json::from_str::<LlamaConfig>(&json).unwrap().into_config(false);
        let weights = weights(&config, DType::F32);
        Self { config, weights }
    }

    fn load(&self, options: LoadOptions) -> Llama {
        Llama::load_with(builder(&self.weights, DType::F32), &self.config, options).unwrap()
    }

    fn sparse(&self, format: Format, profile: candle_sparse::Profile) -> Llama {
        let profile = Some(Arc::new(profile));
        self.load(
            LoadOptions::default().with_format(Some(format)).with_profile(profile).with_sparse(forced()),
        )
    }

    fn dense(&self, format: Format) -> Llama {
        self.load(LoadOptions::default().with_format(Some(format)))
    }

    fn cache(&self) -> Cache {
        Cache::new(true, DType::F32, &self.config, &Device::Cpu).unwrap()
    }
}

/// Whatever is faster for models of this size.
fn forced() -> SparseConfig {
    SparseConfig::default().with_force(true)
}

fn mode(mode: FfnMode) -> SparseConfig {
    SparseConfig::default().with_mode(mode)
}

/// The logits of `n` tokens after a prompt, and the cache.
fn decode(m: &Model, model: &Llama, n: usize) -> (Tensor, Cache) {
    let mut cache = m.cache();
    model.forward(&tokens(1, PROMPT, 3), 0, &mut cache).unwrap();
    let logits: Vec<_> = (0..n)
        .map(|i| model.forward(&tokens(1, 1, 50 + i as u32), PROMPT + i, &mut cache).unwrap())
        .collect();
    (Tensor::cat(&logits, 0).unwrap(), cache)
}

/// As [`decode`], dense, with activations set to 0 where `keep(layer, gates, activations)` says so, and a bias added.
fn decode_masked(
    m: &Model,
    model: &Llama,
    n: usize,
    bias: f32,
    mut keep: impl FnMut(usize, &[f32], &[f32]) -> Vec<bool>,
) -> (Tensor, Vec<f64>) {
    let mut cache = m.cache();
    model.forward(&tokens(1, PROMPT, 3), 0, &mut cache).unwrap();
    let mut shares = vec![0.0; m.config.num_hidden_layers];
    let mut mask = |layer: usize, _: &[f32], gate: &[f32], a: &mut [f32], y: &mut [f32]| {
        let keep = keep(layer, gate, a);
        a.iter_mut().zip(&keep).for_each(|(a, keep)| *a = if *keep { *a } else { 0.0 });
        shares[layer] += keep.iter().filter(|k| **k).count() as f64 / (keep.len() * n) as f64;
        y.fill(bias);
    };
    let logits: Vec<_> = (0..n)
        .map(|i| {
            let x = tokens(1, 1, 50 + i as u32);
            model.forward_tapped(&x, PROMPT + i, &mut cache, &mut Tap(&mut mask)).unwrap().squeeze(0).unwrap()
        })
        .collect();
    (Tensor::cat(&logits, 0).unwrap(), shares)
}

fn rms(t: &Tensor) -> f32 {
    t.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap().sqrt()
}

#[test]
fn all_neurons_give_the_dense_model() {
    for (case, act) in [(0, "silu"), (1, "relu")] {
        let m = Model::new(case, act);
        let truth = m.dense(Format::F32);
        let x = tokens(2, 11, 7);
        for format in FORMATS {
            let dense = m.dense(format);
            let sparse = m.sparse(format, exact(&m, 0.3, 0.0)).with_sparse(mode(FfnMode::Dense)).unwrap();
            let all = |model: &Llama, x: &Tensor| {
                model.forward_all(x, 0, &mut m.cache()).unwrap().flatten(0, 1).unwrap()
            };
            // Many rows, few rows, and single ones.
            for run in [&|l: &Llama| all(l, &x), &|l: &Llama| all(l, &tokens(1, 3, 5)), &|l: &Llama| {
                decode(&m, l, 5).0
            }] as [&dyn Fn(&Llama) -> Tensor; 3]
            {
                let (a, b, truth) = (run(&dense), run(&sparse), run(&truth));
                match format {
                    Format::F32 => assert!(worst(&a, &b) <= 1e-4),
                    Format::F16 => assert!(worst(&a, &b) <= 1e-2),
                    // down_proj is rounded in other blocks: as far from the truth, not the same.
                    _ => {
                        let (a, b) = (rms(&(&a - &truth).unwrap()), rms(&(&b - &truth).unwrap()));
                        assert!(b <= 1.5 * a, "{format:?}: {b} from the truth, the dense layout {a}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_block_that_would_not_gain_is_a_dense_one() {
    let m = Model::new(0, "silu");
    for format in FORMATS {
        let mut profile = exact(&m, 0.3, 0.0);
        let blocks = profile.layers.len();
        profile.layers[0].rules.iter_mut().for_each(|rule| rule.share.fill(0.9));
        let mixed = m.sparse(format, profile.clone());
        assert!(
            mixed.decoder().notices().iter().any(|n| n.contains("[0]") && n.contains("75 %")),
            "{:?}",
            mixed.decoder().notices()
        );
        let (logits, cache) = decode(&m, &mixed, 6);
        assert!(logits.sum_all().unwrap().to_scalar::<f32>().unwrap().is_finite());
        let stats = cache.sparse_stats();
        assert_eq!(
            (stats.layers.len(), stats.layers[0].dense_tokens, stats.layers[0].active_share),
            (blocks, 6, 1.0)
        );
        assert!(stats.layers[1].dense_tokens < 6 && stats.layers[1].active_share < 1.0);

        // Asked for less than that it is a sparse one.
        let selection = Selection::TopK(m.config.intermediate_size / 2);
        let sparse = forced().with_selection(selection);
        let options = LoadOptions::default()
            .with_format(Some(format))
            .with_profile(Some(Arc::new(profile.clone())))
            .with_sparse(sparse);
        assert_eq!(decode(&m, &m.load(options), 2).1.sparse_stats().layers[0].dense_tokens, 0);

        // Where no block would gain, the model is the dense one bit for bit.
        profile.layers.iter_mut().flat_map(|l| &mut l.rules).for_each(|rule| rule.share.fill(0.9));
        let (got, cache) = decode(&m, &m.sparse(format, profile), 6);
        assert_eq!(worst(&got, &decode(&m, &m.dense(format), 6).0), 0.0, "{format:?}");
        assert!((cache.sparse_stats().active_share() - 1.0).abs() < 1e-6);
    }
}

#[test]
fn thresholds_that_all_pass_give_the_dense_bits_and_then_dense_tokens() {
    for (case, act) in [(0, "silu"), (1, "relu")] {
        let m = Model::new(case, act);
        for format in FORMATS {
            let sparse = m.sparse(format, exact(&m, 0.0, 0.0));
            let (dense, _) = decode(&m, &sparse.with_sparse(mode(FfnMode::Dense)).unwrap(), 18);
            for ffn in MODES {
                let (got, cache) = decode(&m, &sparse.with_sparse(mode(ffn)).unwrap(), 18);
                assert_eq!(worst(&got, &dense), 0.0, "{act} {format:?} {ffn:?}");
                // One token that needs all, fifteen that are not asked, two more in the same way.
                for layer in cache.sparse_stats().layers {
                    assert_eq!((layer.tokens, layer.dense_tokens, layer.active_share), (18, 16, 1.0));
                }
            }
        }
    }
}

#[test]
fn the_order_of_neurons_changes_nothing_but_rounding() {
    let m = Model::new(0, "silu");
    let plain = exact(&m, 0.1, 0.01);
    let mut permuted = plain.clone();
    profile::permute(&mut permuted, |i, n| (i * 37 + 11) % n, &m);
    for ffn in MODES {
        let run = |p: &candle_sparse::Profile| {
            let model = m.sparse(Format::F32, p.clone()).with_sparse(mode(ffn)).unwrap();
            let (logits, cache) = decode(&m, &model, 4);
            (logits, cache.sparse_stats().layers[1].active_share)
        };
        let ((a, share), (b, permuted_share)) = (run(&plain), run(&permuted));
        assert!(worst(&a, &b) <= 1e-4, "{ffn:?}: {}", worst(&a, &b));
        assert!(share == permuted_share && share > 0.05 && share < 0.8, "{ffn:?}: share {share}");
    }
}

#[test]
fn an_empty_set_leaves_the_bias() {
    let m = Model::new(1, "silu");
    let sparse = m.sparse(Format::F32, exact(&m, 1e18, 0.25));
    let (want, _) = decode_masked(&m, &sparse, 3, 0.25, |_, gate, _| vec![false; gate.len()]);
    for ffn in MODES {
        let (got, cache) = decode(&m, &sparse.with_sparse(mode(ffn)).unwrap(), 3);
        assert!(worst(&got, &want) <= 1e-4);
        assert!(cache.sparse_stats().layers.iter().all(|l| l.active_share == 0.0 && l.tokens == 3));
    }
}

/// `act(g)` of the models here.
fn activate(act: &str, g: f32) -> f32 {
    if act == "relu" { g.max(0.0) } else { g / (1.0 + (-g).exp()) }
}

#[test]
fn active_sets_are_those_of_the_rule() {
    for (case, act) in [(0, "silu"), (1, "relu")] {
        let m = Model::new(case, act);
        let threshold = 0.1;
        for (ffn, format) in [
            (FfnMode::LowRank, Format::F32),
            (FfnMode::Cascade, Format::F32),
            (FfnMode::Gate, Format::F32),
            (FfnMode::Gate, Format::F16),
            (FfnMode::Gate, Format::Q8_0),
            (FfnMode::Gate, Format::Q4_0),
        ] {
            let sparse = m.sparse(format, exact(&m, threshold, 0.01)).with_sparse(mode(ffn)).unwrap();
            let (want, shares) = decode_masked(&m, &sparse, 6, 0.01, |layer, gate, a| {
                let importance = importance(&m, layer);
                let size = |i: usize| match ffn {
                    FfnMode::Gate => activate(act, gate[i]).abs() * profile::UP_SQUARE.sqrt(),
                    _ => a[i].abs(),
                };
                (0..a.len()).map(|i| size(i) * importance[i] >= threshold).collect()
            });
            let (got, cache) = decode(&m, &sparse, 6);
            let bound = if format.is_quantized() { 1e-3 } else { 1e-4 };
            assert!(worst(&got, &want) <= bound, "{act} {ffn:?} {format:?}: {}", worst(&got, &want));
            for (layer, share) in cache.sparse_stats().layers.iter().zip(shares) {
                assert!(
                    (layer.active_share - share).abs() < 1e-9 && share > 0.02 && share < 0.85,
                    "{layer:?}"
                );
                assert!(layer.dense_tokens == 0 && layer.candidate_share >= layer.active_share);
            }
        }
    }
}

#[test]
fn selections_do_what_they_say() {
    let m = Model::new(0, "silu");
    let inner = m.config.intermediate_size;
    let mut p = exact(&m, 0.05, 0.0);
    rules(&mut p, |r| (r.candidate, r.keep) = (vec![0.2, 0.01], vec![0.2, 0.01]));
    let sparse = m.sparse(Format::F32, p);
    let share = |mode, selection| {
        let model = sparse
            .with_sparse(
                SparseConfig::default()
                    .with_mode(mode)
                    .with_selection(selection)
                    .with_guard(None)
                    .with_force(true),
            )
            .unwrap();
        decode(&m, &model, 3).1.sparse_stats().layers[0].active_share
    };
    for ffn in MODES {
        let few = share(ffn, Selection::Fitted);
        let shares = [0.2, 0.3, 0.4, 0.6].map(|s| share(ffn, Selection::Share(s)));
        assert!(few == shares[0] && shares.is_sorted_by(|a, b| a < b), "{ffn:?}: {few} {shares:?}");
        assert!(share(ffn, Selection::Scale(0.5)) > few && share(ffn, Selection::Scale(2.0)) < few);
        assert_eq!(share(ffn, Selection::Share(1.0)), 1.0);
        for k in [1, 100] {
            let got = share(ffn, Selection::TopK(k)) * inner as f64;
            assert!((got - k as f64).abs() < 1e-9, "{ffn:?}: top {k} gave {got}");
        }
        let err = sparse.with_sparse(
            SparseConfig::default()
                .with_mode(ffn)
                .with_selection(Selection::Share(0.9))
                .with_guard(None)
                .with_force(true),
        );
        let err = err.unwrap_err().to_string();
        assert!(err.contains("0.2 to 0.6"), "{err}");
    }
    // The largest 100 of an exact prediction are the largest 100.
    let model = sparse
        .with_sparse(
            SparseConfig::default()
                .with_mode(FfnMode::LowRank)
                .with_selection(Selection::TopK(100))
                .with_guard(None)
                .with_force(true),
        )
        .unwrap();
    let (want, _) = decode_masked(&m, &model, 3, 0.0, |layer, _, a| {
        let sizes: Vec<_> = a.iter().zip(importance(&m, layer)).map(|(a, n)| a.abs() * n).collect();
        let mut sorted = sizes.clone();
        sorted.sort_by(f32::total_cmp);
        sizes.iter().map(|s| *s >= sorted[inner - 100]).collect()
    });
    assert!(worst(&decode(&m, &model, 3).0, &want) <= 1e-4);
}

#[test]
fn hot_neurons_are_always_active_and_threads_change_no_bit() {
    let m = Model::new(0, "silu");
    for format in FORMATS {
        let mut p = exact(&m, 0.05, 0.01);
        rules(&mut p, |r| r.hot = vec![70; 2]);
        let p = Some(Arc::new(p));
        let most = Threads::default().count();
        assert!(most > 1, "this test needs threads: set CANDLE_NUM_THREADS=4");
        for ffn in MODES {
            for selection in [Selection::Fitted, Selection::TopK(50)] {
                let run = |n: usize| {
                    let threads = Some(Threads::new(n).unwrap());
                    let sparse = SparseConfig::default()
                        .with_mode(ffn)
                        .with_selection(selection)
                        .with_guard(None)
                        .with_force(true);
                    let options = LoadOptions::default()
                        .with_format(Some(format))
                        .with_threads(threads)
                        .with_profile(p.clone())
                        .with_sparse(sparse);
                    let (logits, cache) = decode(&m, &m.load(options), 12);
                    (logits, cache.sparse_stats())
                };
                let ((alone, stats), (together, others)) = (run(1), run(most.min(2)));
                assert_eq!(worst(&alone, &together), 0.0, "{format:?} {ffn:?} {selection:?}");
                assert_eq!(stats, others);
                let least = if selection == Selection::Fitted { 70.0 } else { 50.0 };
                assert!(stats.layers[0].active_share * 512.0 >= least);
            }
        }
    }
}

#[test]
fn what_is_not_finite_is_an_error_and_leaves_the_cache() {
    let mut m = Model::new(1, "silu");
    let bad = VOCAB as u32 - 1;
    let name = "model.embed_tokens.weight";
    let mut rows = m.weights[name].to_vec2::<f32>().unwrap();
    rows[bad as usize][3] = f32::NAN;
    m.weights.insert(name.to_string(), Tensor::new(rows, &Device::Cpu).unwrap());
    let model = m.sparse(Format::F32, exact(&m, 0.05, 0.0));
    let (want, mut cache) = decode(&m, &model, 2);
    let before = cache.sparse_stats();
    let mut logits = vec![0.0; VOCAB];
    let err = model.decode(bad, PROMPT + 2, &mut cache, &mut logits).unwrap_err().to_string();
    assert!(err.contains("layer 0") && err.contains("not finite"), "{err}");
    assert_eq!((cache.len(), cache.sparse_stats()), (PROMPT + 2, before));
    let again = model.forward(&tokens(1, 1, 51), PROMPT + 1, &mut cache).unwrap();
    assert_eq!(worst(&again, &want.narrow(0, 1, 1).unwrap()), 0.0);
}

#[test]
fn bytes_are_those_of_what_was_computed() {
    let m = Model::new(0, "silu");
    let (hidden, inner) = (288, 512.0);
    let model = m.sparse(Format::Q8_0, exact(&m, 0.05, 0.0));
    let row = hidden as f64 / 32.0 * 34.0;
    let predictor = hidden as f64 * row + 2.0 * inner * row;
    for ffn in MODES {
        let (_, mut cache) = decode(&m, &model.with_sparse(mode(ffn)).unwrap(), 5);
        for l in cache.sparse_stats().layers {
            let (active, candidates) = (l.active_share * inner, l.candidate_share * inner);
            let want = match ffn {
                FfnMode::Gate => (inner + 2.0 * active) * row,
                FfnMode::LowRank => 3.0 * active * row + predictor,
                _ => (candidates + 2.0 * active) * row + predictor,
            };
            assert!((l.bytes_per_token - want).abs() < 1.0, "{ffn:?}: {} is not {want}", l.bytes_per_token);
            assert!(active > 0.0 && l.looks == 0 && l.scale == 1.0);
        }
        cache.reset_sparse_stats();
        assert!(cache.sparse_stats().layers.iter().all(|l| l.tokens == 0 && l.bytes_per_token == 0.0));
    }
    let ordinary = m.dense(Format::Q8_0);
    assert_eq!(model.decoder().weight_bytes_per_token(), ordinary.decoder().weight_bytes_per_token());
    let predictors = model.decoder().weight_bytes() - ordinary.decoder().weight_bytes();
    assert_eq!(predictors as f64, 3.0 * predictor, "weights are held once");
}

#[test]
fn what_cannot_be_run_is_refused_by_name() {
    let m = Model::new(1, "silu");
    let error = |options: LoadOptions, config: &Config| {
        Llama::load_with(builder(&m.weights, DType::F32), config, options).unwrap_err().to_string()
    };
    let with = |p: candle_sparse::Profile| {
        LoadOptions::default().with_profile(Some(Arc::new(p))).with_sparse(forced())
    };
    let good = exact(&m, 0.1, 0.0);
    let mut short = good.clone();
    short.layers.pop();
    let err = error(with(short), &m.config);
    assert!(err.contains("2 blocks, the model has 3"), "{err}");
    let err = error(with(exact(&Model::new(0, "silu"), 0.1, 0.0)), &m.config);
    assert!(err.contains("layer 0: order"), "{err}");
    let mut other = good.clone();
    other.fingerprint[1] += 1.0;
    let err = error(with(other), &m.config);
    assert!(err.contains("another model"), "{err}");
    let mut biased = m.config.clone();
    biased.mlp_bias = true;
    let err = error(with(good.clone()), &biased);
    assert!(err.contains("mlp_bias"), "{err}");
    let err = error(LoadOptions::default().with_sparse(mode(FfnMode::Gate)), &m.config);
    assert!(err.contains("without a profile"), "{err}");
    let err = m.dense(Format::F32).with_sparse(mode(FfnMode::Gate)).unwrap_err().to_string();
    assert!(err.contains("without a profile"), "{err}");
    let mut blind = good;
    for l in &mut blind.layers {
        (l.rank, l.p, l.q_gate, l.q_up) = (0, Vec::new(), Vec::new(), Vec::new());
    }
    let err = error(with(blind.clone()), &m.config);
    assert!(err.contains("Cascade needs a prediction"), "{err}");
    let gate = with(blind).with_sparse(mode(FfnMode::Gate));
    let model = m.load(gate);
    assert_eq!(model.decoder().sparse_config(), Some(mode(FfnMode::Gate)));
    assert_eq!(mode(FfnMode::Gate).mode.rule(), Some(Rule::Gate));
    decode(&m, &model, 2);
}

#[test]
fn a_profile_among_the_tensors_is_found() {
    let mut m = Model::new(0, "silu");
    let profile = exact(&m, 0.1, 0.01);
    let (want, _) = decode(&m, &m.sparse(Format::F32, profile.clone()), 4);
    let file = tempfile::NamedTempFile::new().unwrap();
    profile.save(file.path()).unwrap();
    m.weights.extend(candle_core::safetensors::load(file.path(), &Device::Cpu).unwrap());
    let (got, cache) = decode(&m, &m.load(LoadOptions::default().with_sparse(forced())), 4);
    // The file holds P and Q in F16: a neuron at the threshold may fall on its other side.
    assert!(worst(&got, &want) < 0.05, "{}", worst(&got, &want));
    assert!(cache.sparse_stats().layers.iter().all(|l| l.tokens == 4 && l.active_share < 0.8));
}
