//! Profiles whose prediction is exact.

use super::Model;
use crate::cases::builder;
use candle_core::DType;
use candle_sparse::profile::{LayerProfile, LayerRule, Profile, fingerprint};

/// E[u²] that the profiles claim.
pub(super) const UP_SQUARE: f32 = 0.5;

fn matrix(m: &Model, layer: usize, name: &str) -> Vec<Vec<f32>> {
    m.weights[&format!("model.layers.{layer}.mlp.{name}.weight")].to_vec2().unwrap()
}

/// The norms of down rows.
pub(super) fn importance(m: &Model, layer: usize) -> Vec<f32> {
    let down = matrix(m, layer, "down_proj");
    (0..m.config.intermediate_size)
        .map(|i| down.iter().map(|row| row[i] * row[i]).sum::<f32>().sqrt())
        .collect()
}

/// P is the identity, Q the weights: in F32 the prediction has the bits of the truth. One threshold for all rules and
/// points, every element of the bias the same.
pub(super) fn exact(m: &Model, threshold: f32, bias: f32) -> Profile {
    let (hidden, inner) = (m.config.hidden_size, m.config.intermediate_size);
    let rule = LayerRule {
        candidate: vec![threshold; 2],
        keep: vec![threshold; 2],
        share: vec![0.2, 0.6],
        hot: vec![0; 2],
        bias: vec![bias; 2 * hidden],
    };
    let layer = |i| LayerProfile {
        order: (0..inner as u32).collect(),
        rank: hidden,
        p: (0..hidden * hidden).map(|k| f32::from(u8::from(k % (hidden + 1) == 0))).collect(),
        q_gate: matrix(m, i, "gate_proj").concat(),
        q_up: matrix(m, i, "up_proj").concat(),
        gate_variance: vec![0.0; inner],
        up_variance: vec![0.0; inner],
        up_square: vec![UP_SQUARE; inner],
        importance: importance(m, i),
        rules: [rule.clone(), rule.clone(), rule.clone()],
    };
    let vb = builder(&m.weights, DType::F32);
    Profile {
        layers: (0..m.config.num_hidden_layers).map(layer).collect(),
        shares: vec![0.2, 0.6],
        gates: Vec::new(),
        recall_shares: Vec::new(),
        fitted: [0; 3],
        held_out: Default::default(),
        fingerprint: fingerprint(&vb, m.config.num_hidden_layers, hidden, inner).unwrap(),
        about: serde_json::Value::Null,
    }
}

/// Changes all rules.
pub(super) fn rules(p: &mut Profile, change: impl Fn(&mut LayerRule)) {
    p.layers.iter_mut().flat_map(|l| &mut l.rules).for_each(change);
}

/// Puts neuron `from(i, n)` into place `i`.
pub(super) fn permute(p: &mut Profile, from: impl Fn(usize, usize) -> usize, m: &Model) {
    let (n, rank) = (m.config.intermediate_size, m.config.hidden_size);
    for l in &mut p.layers {
        let old = l.clone();
        let rows = |v: &[f32]| -> Vec<f32> {
            (0..n).flat_map(|i| v[from(i, n) * rank..][..rank].to_vec()).collect()
        };
        l.order = (0..n).map(|i| old.order[from(i, n)]).collect();
        (l.q_gate, l.q_up) = (rows(&old.q_gate), rows(&old.q_up));
        l.importance = (0..n).map(|i| old.importance[from(i, n)]).collect();
    }
}
