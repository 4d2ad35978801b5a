use super::{
    block::FfnWeights,
    budgets::budgets,
    layer::{LayerFit, fit_layer},
    order::mean_run,
    sample::{Moments, Sample},
    thresholds::GRID,
    *,
};
use crate::{
    Error,
    gate::{CellWeight, FastGrnnGate},
    profile::{HeldOut, Profile, Rule},
};
use candle_core::{Device, Tensor};
use candle_sparse_core::{Activation, GluActivation, kernel::fast_grnn::Cell};
use std::collections::HashMap;

const HIDDEN: usize = 16;
const INNER: usize = 40;

/// Numbers of standard deviation 1 from a fixed hash.
pub(super) fn noise(n: usize, seed: u64) -> Vec<f32> {
    let value = |i: usize| {
        let mut h = (seed << 32 | i as u64).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        h = (h ^ (h >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((h >> 40) as f32 / (1 << 24) as f32 - 0.5) * 12_f32.sqrt()
    };
    (0..n).map(value).collect()
}

fn weights(act: Activation) -> FfnWeights {
    let matrix = |rows: usize, cols: usize, seed| {
        Tensor::from_vec(noise(rows * cols, seed), (rows, cols), &Device::Cpu).unwrap()
    };
    FfnWeights {
        gate: matrix(INNER, HIDDEN, 1),
        up: Some(matrix(INNER, HIDDEN, 2)),
        down: matrix(HIDDEN, INNER, 3),
        act: GluActivation { act, shift: 0.0 },
    }
}

/// Inputs that lie near a space of four dimensions.
fn inputs(tokens: usize, seed: u64) -> Vec<f32> {
    let (coordinates, directions) = (noise(tokens * 4, seed), noise(4 * HIDDEN, 9));
    let rest = noise(tokens * HIDDEN, seed + 1);
    (0..tokens * HIDDEN)
        .map(|i| {
            let (t, k) = (i / HIDDEN, i % HIDDEN);
            let x: f32 = (0..4).map(|d| coordinates[t * 4 + d] * directions[d * HIDDEN + k]).sum();
            0.5 * x + 0.02 * rest[i]
        })
        .collect()
}

fn fit(act: Activation, rank: usize) -> LayerFit {
    let (mut moments, mut sample) = (Moments::new(HIDDEN), Sample::new(HIDDEN, 400));
    moments.add(&inputs(600, 20)).unwrap();
    sample.add(&inputs(400, 40)).unwrap();
    let settings = Settings { rank, ..Settings::default() };
    fit_layer(&weights(act), &moments, &sample, &settings).unwrap()
}

#[test]
fn the_rank_of_the_inputs_is_enough_to_predict() {
    let mean = |v: &[f32]| v.iter().sum::<f32>() / v.len() as f32;
    let missed = |rank| {
        let l = fit(Activation::Silu, rank).layer;
        mean(&l.up_variance) / mean(&l.up_square)
    };
    assert!(missed(4) < 0.01, "{}", missed(4));
    assert!(missed(2) > 0.1, "{}", missed(2));
    assert!(missed(HIDDEN) < 1e-6, "{}", missed(HIDDEN));
}

#[test]
fn thresholds_let_the_wanted_share_pass_and_bias_is_the_mean_of_the_rest() {
    let fit = fit(Activation::Silu, 4);
    let at = fit.at(&[0.2, 0.5, 1.0]);
    for (rule, r) in Rule::ALL.iter().zip(&at.rules) {
        for (share, want) in r.share.iter().zip([0.2, 0.5, 1.0]) {
            assert!((share - want).abs() < 0.02, "{rule:?}: {share} instead of {want}");
        }
        assert!(r.bias[2 * HIDDEN..].iter().all(|&b| b == 0.0), "nothing is skipped at 1");
        assert!(r.bias[..HIDDEN].iter().any(|&b| b != 0.0));
    }
    assert!(fit.error.is_sorted_by(|a, b| a >= b), "{:?}", fit.error);
    assert!(fit.error[0] > 0.0 && *fit.error.last().unwrap() < 1e-9);
}

#[test]
fn shut_gates_are_never_active() {
    let at = fit(Activation::Relu, 4).at(&[0.9]);
    // Half of the gates are open.
    let [gate, _, cascade] = &at.rules;
    assert!((gate.share[0] - 0.5).abs() < 0.05, "{}", gate.share[0]);
    assert!(cascade.share[0] < 0.55, "{}", cascade.share[0]);
}

#[test]
fn neurons_that_fire_together_become_neighbours() {
    // Two groups, interleaved, and a neuron that is always active.
    let group = |n: usize| if n == 6 { vec![u64::MAX] } else { vec![0xffff << (16 * (n % 2))] };
    let activity: Vec<_> = (0..9).map(group).collect();
    let order = order::order(&activity);
    assert_eq!(order[0], 6);
    let groups: Vec<u32> = order[1..].iter().map(|n| n % 2).collect();
    assert!(groups.windows(2).filter(|w| w[0] != w[1]).count() == 1, "{order:?}");
    let before: Vec<u32> = (0..9).collect();
    let runs = [&before, &order].map(|o| mean_run(&activity, o));
    assert!(runs[1] > 1.9 * runs[0], "{runs:?}");
}

#[test]
fn budgets_meet_the_mean_and_spare_the_sensitive() {
    let falling: Vec<f32> = GRID.iter().map(|s| (1.0 - s).powi(2)).collect();
    for mean in [0.1, 0.3, 0.6, 0.9] {
        let shares = budgets(&[&falling, &falling, &falling], &[1.0, 4.0, 1.0], mean);
        let got = shares.iter().sum::<f32>() / 3.0;
        assert!((got - mean).abs() < 0.01, "{shares:?}");
        assert!(shares[1] >= shares[0] && shares[0] == shares[2], "{shares:?}");
    }
}

#[test]
fn samples_are_bounded_and_evenly_spaced() {
    let mut sample = Sample::new(1, 8);
    (0..100).for_each(|i| sample.add(&[i as f32]).unwrap());
    let kept = sample.tensor().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(kept.len() <= 8 && kept.len() >= 4, "{kept:?}");
    assert!(kept.windows(2).all(|w| w[1] - w[0] == kept[1] - kept[0]), "{kept:?}");
}

#[test]
fn bad_input_is_named() {
    let err = Sample::new(2, 4).add(&[1.0, f32::NAN]).unwrap_err().to_string();
    assert!(err.contains("not finite"), "{err}");
    assert!(Moments::new(2).add(&[1.0, f32::INFINITY]).is_err());
    let (moments, sample) = (Moments::new(HIDDEN), Sample::new(HIDDEN, 8));
    let w = weights(Activation::Silu);
    let err = fit_layer(&w, &moments, &sample, &Settings { rank: 4, ..Settings::default() });
    assert!(err.unwrap_err().to_string().contains("too few"));
    let err = fit_layer(&w, &moments, &sample, &Settings { rank: 99, ..Settings::default() });
    assert!(err.unwrap_err().to_string().contains("rank 99"));
}

fn profile() -> Profile {
    let shares = vec![0.25, 0.5];
    let (layer, _) = fit(Activation::Silu, 4).ordered(&shares);
    let about = serde_json::json!({ "format": 1, "held_out": "text" });
    Profile {
        layers: vec![layer],
        shares,
        gates: Vec::new(),
        recall_shares: Vec::new(),
        fitted: [0, 1, 0],
        held_out: HeldOut { kept: [true, false, true], best: Some(Rule::Gate) },
        fingerprint: vec![1.0; 24],
        about,
    }
}

#[test]
fn a_profile_comes_back_from_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse.safetensors");
    let profile = profile();
    profile.save(&path).unwrap();
    let loaded = Profile::load(&path).unwrap();
    assert_eq!((&loaded.shares, loaded.fitted, &loaded.about), (&profile.shares, [0, 1, 0], &profile.about));
    assert_eq!(loaded.held_out, profile.held_out);
    let (a, b) = (&loaded.layers[0], &profile.layers[0]);
    assert_eq!((&a.order, &a.rules, &a.importance), (&b.order, &b.rules, &b.importance));
    assert!(a.p.iter().zip(&b.p).all(|(a, b)| (a - b).abs() <= b.abs() / 1024.0 + 1e-6), "F16 in the file");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no half-written file is left");
    assert_eq!(Profile::from_bytes(&std::fs::read(&path).unwrap()).unwrap(), loaded);
}

#[test]
fn broken_profiles_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse.safetensors");
    type Spoil<'a> = &'a dyn Fn(&mut Profile);
    let cases: [(Spoil<'_>, &str); 8] = [
        (&|p| p.layers[0].order[1] = p.layers[0].order[0], "twice"),
        (&|p| p.layers[0].q_up[3] = f32::NAN, "q_up"),
        (&|p| p.layers[0].up_square[3] = f32::INFINITY, "up_square"),
        (&|p| p.fitted[1] = 7, "fitted"),
        (&|p| p.about["format"] = 2.into(), "format 2"),
        (&|p| p.layers[0].p[0] = 1e6, "too large for F16"),
        (&|p| p.shares[0] = f32::NAN, "shares"),
        (&|p| p.layers[0].rank = 0, "p has"),
    ];
    for (spoil, needle) in cases {
        let mut profile = profile();
        spoil(&mut profile);
        // What would not be read is not written.
        let err = profile.save(&path).unwrap_err();
        assert!(matches!(Error::of(&err), Some(Error::Setting { name: "profile", .. })), "{err}");
        assert!(err.to_string().contains(needle), "{needle}: {err}");
        assert!(!path.exists());
    }
    let good = profile();
    good.save(&path).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.windows(12).position(|w| w == br#"\"format\":1"#).unwrap();
    bytes[at + 11] = b'2';
    std::fs::write(&path, bytes).unwrap();
    let err = Profile::load(&path).unwrap_err();
    assert!(
        matches!(Error::of(&err), Some(Error::File { .. })) && err.to_string().contains("format 2"),
        "{err}"
    );
    // Gates alone decide where nothing is predicted.
    let mut blind = good.clone();
    for l in &mut blind.layers {
        (l.rank, l.p, l.q_gate, l.q_up) = (0, Vec::new(), Vec::new(), Vec::new());
    }
    blind.save(&path).unwrap();
    assert_eq!(Profile::load(&path).unwrap().layers, blind.layers);
    good.save(&path).unwrap();
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    assert!(Profile::load(&path).is_err());
}

#[test]
fn a_fit_is_found_again_as_it_was_kept() {
    let (folder, good) = (tempfile::tempdir().unwrap(), fit(Activation::Silu, 4));
    let path = folder.path().join("checkpoint");
    let mut tell = |_| {};
    let mut course = Course::kept(&path, "this".into(), &mut tell).unwrap();
    good.keep("fits.0", &mut course).unwrap();
    course.stage_ends().unwrap();
    drop(course);
    let course = Course::kept(&path, "this".into(), &mut tell).unwrap();
    let found = LayerFit::found("fits.0", &course, [INNER, HIDDEN, 4]).unwrap().unwrap();
    assert_eq!(format!("{found:?}"), format!("{good:?}"));
    assert!(LayerFit::found("fits.1", &course, [INNER, HIDDEN, 4]).unwrap().is_none());
    let error = LayerFit::found("fits.0", &course, [INNER, HIDDEN, 5]).unwrap_err().to_string();
    assert!(error.contains("numbers of fits.0.p"), "{error}");
}

/// A gate of each kind: ridge alone, with a cell and its reading, an imported cell.
fn gates() -> Vec<FastGrnnGate> {
    let weight = |rows: usize, cols: usize, seed| CellWeight { rows, values: noise(rows * cols, seed) };
    let ridge = || FastGrnnGate::new(HIDDEN, noise(2 * HIDDEN, 1), vec![0.5, -1.0], vec![0.1, 0.2]).unwrap();
    let cell = Cell::FastGrnn {
        w1: weight(5, 3, 2),
        w2: weight(3, HIDDEN, 3),
        u1: weight(5, 4, 4),
        u2: weight(4, 5, 5),
        b_z: noise(5, 6),
        b_h: noise(5, 7),
        zeta: 0.9,
        nu: 0.1,
    };
    let separate = Cell::Separate {
        w_g: weight(4, HIDDEN, 2),
        u_g: weight(4, 4, 3),
        w_u: weight(4, HIDDEN, 4),
        u_u: weight(4, 4, 5),
        b_g: noise(4, 6),
        b_u: noise(4, 7),
        zeta: 1.0,
        nu: 0.0,
    };
    let imported = FastGrnnGate::from_state_norm(2, separate, 0.7).unwrap();
    vec![ridge(), ridge().with_cell(cell, noise(10, 8)).unwrap(), imported]
}

#[test]
fn a_profile_of_attention_alone_comes_back_from_its_file_and_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse.safetensors");
    let shares = vec![vec![0.5, 0.0], vec![1.5, 2.0], vec![1.0; 2]];
    let mut alone = Profile::of_attention_alone(shares.clone(), vec![1.0; 24]);
    alone.gates = gates();
    alone.about = serde_json::json!({ "format": 1 });
    alone.save(&path).unwrap();
    assert_eq!(Profile::load(&path).unwrap(), alone);
    assert!(alone.is_of_attention_alone() && !profile().is_of_attention_alone());
    let both = Profile { recall_shares: vec![vec![1.0, 1.0]], ..profile() };
    assert_eq!(Profile::from_bytes(&both.to_bytes().unwrap()).unwrap().recall_shares, both.recall_shares);

    let cases: [(Vec<Vec<f32>>, &str); 4] = [
        (shares[..2].to_vec(), "attention gates of 3 blocks, the profile has 2"),
        (vec![vec![1.0; 2], vec![1.0; 2], vec![1.0]], "layer 2: recall_shares has 1 elements, 2 are needed"),
        (vec![vec![1.0, -0.1]; 3], "layer 0: recall_shares has values that are negative"),
        (vec![vec![1.0, f32::NAN]; 3], "layer 0: recall_shares has values that are negative or not finite"),
    ];
    for (recall_shares, needle) in cases {
        let err = Profile { recall_shares, ..alone.clone() }.save(&path).unwrap_err().to_string();
        assert!(err.contains(needle), "{needle}: {err}");
    }
    let mut without_blocks = Profile { recall_shares: shares.clone(), ..profile() };
    without_blocks.layers.clear();
    let err = without_blocks.check().unwrap_err().to_string();
    assert!(err.contains("it has no blocks"), "{err}");
    let err = Profile { fitted: [1; 3], ..alone.clone() }.check().unwrap_err().to_string();
    assert!(err.contains("of attention alone and names fitted rules"), "{err}");
    let err = Profile { recall_shares: vec![Vec::new(); 3], ..alone }.check().unwrap_err().to_string();
    assert!(err.contains("recall_shares has 0 elements"), "{err}");
    let err = Profile { recall_shares: shares, ..profile() }.check().unwrap_err().to_string();
    assert!(err.contains("recall shares of 3 blocks, the profile has 1"), "{err}");
}

#[test]
fn gates_come_back_from_their_file_and_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse.safetensors");
    let one = profile();
    let with_gates = Profile { layers: vec![one.layers[0].clone(); 3], gates: gates(), ..one };
    with_gates.save(&path).unwrap();
    assert_eq!(Profile::load(&path).unwrap().gates, with_gates.gates);

    type Spoil<'a> = &'a dyn Fn(&mut HashMap<String, Tensor>);
    let at = |i: usize, name: &str| format!("model.layers.{i}.self_attn.gate.{name}");
    let cut = |all: &mut HashMap<String, Tensor>, name: String| {
        let short = all[&name].narrow(0, 0, 1).unwrap();
        all.insert(name, short);
    };
    let cases: [(Spoil<'_>, &str); 6] = [
        (&|t| drop(t.remove(&at(1, "ridge"))), "layers.1.self_attn.gate.ridge"),
        (&|t| cut(t, at(0, "threshold")), "layers.0.self_attn.gate: gate.threshold"),
        (&|t| cut(t, at(1, "w2")), "layers.1.self_attn.gate: gate.w2"),
        (&|t| cut(t, at(1, "zeta_nu")), "layers.1.self_attn.gate.zeta_nu"),
        (&|t| cut(t, at(2, "u_u")), "layers.2.self_attn.gate: gate.u_u"),
        (&|t| drop(t.remove(&at(2, "b_g"))), "layers.2.self_attn.gate.b_g"),
    ];
    let whole = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    for (spoil, needle) in cases {
        let mut tensors = whole.clone();
        spoil(&mut tensors);
        candle_core::safetensors::save(&tensors, &path).unwrap();
        let err = Profile::load(&path).unwrap_err().to_string();
        assert!(err.contains(needle), "{needle}: {err}");
    }
}
