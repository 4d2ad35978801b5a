use super::*;
use crate::calibrate::tests::noise;
use candle_sparse_core::{Activation, Config, Rope, RopeScaling};

const HIDDEN: usize = 24;
const HEADS: usize = 2;
const TOKENS: usize = 96;

/// Windows whose labels are what `label` makes of the inputs so far; the last 20 tokens have none.
fn windows(count: usize, seed: u64, label: impl Fn(&[f32], usize) -> f32) -> Vec<WatchedWindow> {
    let window = |w: usize| {
        let x = noise(TOKENS * HIDDEN, seed + w as u64);
        let of = |t: usize, head: usize| {
            if t + 20 < TOKENS { label(&x[..(t + 1) * HIDDEN], head) } else { f32::NAN }
        };
        let labels = (0..TOKENS).flat_map(|t| [of(t, 0), of(t, 1)]).collect();
        WatchedWindow { x, labels }
    };
    (0..count).map(window).collect()
}

fn fit(label: impl Fn(&[f32], usize) -> f32 + Copy) -> GateFit {
    let (fit, tune) = (windows(60, 100, label), windows(20, 900, label));
    fit_gate(&fit, &tune, HEADS, &GateSettings::default()).unwrap()
}

/// A linear function of the last token.
fn linear(x: &[f32], head: usize) -> f32 {
    let (w, last) = (noise(HIDDEN, 7 + head as u64), &x[x.len() - HIDDEN..]);
    3.0 + w.iter().zip(last).map(|(w, x)| w * x).sum::<f32>()
}

#[test]
fn what_the_token_says_needs_no_cell() {
    let fit = fit(linear);
    let [ridge, cell] = fit.r2();
    assert!(ridge > 0.98 && cell > 0.98, "{ridge} {cell}");
    assert!(fit.gate.cell.is_none() && fit.gate.state_len() == 0);
    assert!(fit.share.iter().all(|s| (s - 0.25).abs() < 0.01), "{:?}", fit.share);
}

#[test]
fn what_the_tokens_before_say_needs_the_cell() {
    // A moving sum of one direction of the inputs, and what the token itself says.
    let fit = fit(|x, head| {
        let direction = noise(HIDDEN, 20);
        let mut sum = 0.0;
        for x in x.chunks_exact(HIDDEN) {
            sum = 0.8 * sum + direction.iter().zip(x).map(|(d, x)| d * x).sum::<f32>();
        }
        linear(x, head) + sum
    });
    let [ridge, cell] = fit.r2();
    assert!(cell - ridge > 0.2 && cell > 0.9, "{ridge} {cell}");
    assert!(fit.gate.state_len() == 16);
    // The gate as it runs gives what was reported.
    let kernels = candle_sparse_kernels::Kernels::get().unwrap();
    let mut passed = 0;
    let tune = windows(20, 900, |_, _| 0.0);
    for w in &tune {
        let (mut state, mut scratch) = (vec![0.0; fit.gate.state_len()], vec![0.0; fit.gate.scratch_len()]);
        let mut scores = vec![0.0; TOKENS * HEADS];
        fit.gate.scores(kernels, &w.x, &mut state, &mut scratch, &mut scores);
        let heads = scores[..(TOKENS - 20) * HEADS].chunks_exact(HEADS);
        passed += heads.filter(|s| s[0] >= fit.gate.threshold[0]).count();
    }
    let share = passed as f32 / (20 * (TOKENS - 20)) as f32;
    assert!((share - 0.25).abs() < 0.01, "{share}");
}

#[test]
fn labels_of_nothing_are_not_predicted() {
    let chance = |x: &[f32], head: usize| noise(1, u64::from(x[x.len() - 1].to_bits()) + head as u64)[0];
    // In the second the place in the window says most: the cell must not count tokens.
    let placed = |x: &[f32], head: usize| 2.0 * ((x.len() / HIDDEN) as f32).ln() + chance(x, head);
    for fit in [fit(chance), fit(placed)] {
        let [ridge, cell] = fit.r2();
        assert!(ridge.abs() < 0.03 && cell < 0.03, "{ridge} {cell}");
        assert!(fit.gate.cell.is_none());
    }
}

#[test]
fn bad_windows_are_named() {
    let few = |n| fit_gate(&windows(n, 1, linear), &windows(1, 2, linear), HEADS, &GateSettings::default());
    assert!(few(0).unwrap_err().to_string().contains("no windows"));
    assert!(few(1).unwrap_err().to_string().contains("too few"));
    let (mut spoilt, tune) = (windows(20, 1, linear), windows(9, 2, linear));
    let err = fit_gate(&spoilt, &tune, HEADS, &GateSettings { share: 0.0, ..GateSettings::default() });
    assert!(err.unwrap_err().to_string().contains("share of 0"));
    spoilt[3].x[5] = f32::NAN;
    let err = fit_gate(&spoilt, &tune, HEADS, &GateSettings::default());
    assert!(err.unwrap_err().to_string().contains("not finite"));
    spoilt[3].x.pop();
    let err = fit_gate(&spoilt, &tune, HEADS, &GateSettings::default());
    assert!(err.unwrap_err().to_string().contains("no window"));
}

#[test]
fn the_default_window_suits_the_context() {
    let s = GateSettings::default();
    assert_eq!([64, 256, 1024, 4096].map(|n| s.window_of(n)), [16, 64, 256, 256]);
    assert_eq!((s.labelled(256), s.labelled(16)), (256 - 64 - 16 - 4, 0));
    assert!(s.is_enough(256, 6, 1) && !s.is_enough(256, 1, 1) && !s.is_enough(16, 99, 99));
    // What is said to be enough can be fitted.
    for count in 2..30 {
        if s.is_enough(TOKENS, count, 3) {
            let fit: Vec<_> = windows(count, 1, linear);
            fit_gate(&fit, &windows(3, 2, linear), HEADS, &s).unwrap();
        }
    }
}

#[test]
fn labels_are_those_of_plain_attention() {
    for sliding_window in [None, Some(21)] {
        labels_of(&Config { sliding_window, ..config() });
    }
    let c = Config { sliding_window: Some(8), ..config() };
    let norms = ValueNorms::new(&Tensor::zeros((12, 24), candle_core::DType::F32, &Device::Cpu).unwrap(), &c)
        .unwrap();
    let error = norms.labels(&[], 8, &GateSettings::default()).unwrap_err().to_string();
    assert!(error.contains("sliding window of 8"), "{error}");
}

fn labels_of(c: &Config) {
    let (n, window, width) = (40, 8, 8 * 6);
    let qkv = noise(n * width, 3);
    let o = noise(12 * 24, 4);
    let norms = ValueNorms::new(&Tensor::from_slice(&o, (12, 24), &Device::Cpu).unwrap(), c).unwrap();
    let model = c.sliding_window.unwrap_or(n);
    let s = GateSettings { min_later: 5, sinks: 2, ..GateSettings::default() };
    let labels = norms.labels(&qkv, window, &s).unwrap();
    let part = |t: usize, head: usize| &qkv[t * width + head * 6..t * width + (head + 1) * 6];
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    for i in 0..n {
        for kv in 0..2 {
            let label = labels[i * 2 + kv];
            if i < 2 || i + window + 5 >= n {
                assert!(label.is_nan(), "{i}");
                continue;
            }
            let mut most = 0.0_f32;
            for head in [2 * kv, 2 * kv + 1] {
                let out =
                    (0..12).map(|r| dot(&o[r * 24 + head * 6..r * 24 + (head + 1) * 6], part(i, 6 + kv)));
                let norm = out.map(|v| v * v).sum::<f32>().sqrt();
                for j in i + window..n.min(i + model) {
                    let e = |i: usize| dot(part(j, head), part(i, 4 + kv)).exp();
                    most = most.max(e(i) / ((j + 1).saturating_sub(model)..=j).map(e).sum::<f32>() * norm);
                }
            }
            assert!((label - most.ln()).abs() < 1e-3, "{i}: {label} {}", most.ln());
        }
    }
    assert!(norms.labels(&qkv[1..], window, &s).unwrap_err().to_string().contains("no rows"));
    assert!(norms.labels(&qkv[..5 * width], window, &s).unwrap().iter().all(|l| l.is_nan()));
}

fn config() -> Config {
    Config {
        hidden_size: 12,
        intermediate_size: 8,
        vocab_size: 16,
        num_hidden_layers: 1,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 6,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-5,
        hidden_act: Activation::Silu,
        gated_mlp: true,
        gate_shift: 0.0,
        norm_shift: None,
        sliding_window: None,
        rope: Rope { theta: 1e4, scaling: RopeScaling::None, interleaved: false },
    }
}
