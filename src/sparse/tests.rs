use super::*;
use crate::{
    gate::FastGrnnGate,
    profile::{LayerProfile, LayerRule, Profile},
};
use candle_sparse_core::{Activation, Config, Rope, RopeScaling};

const SHAPE: Config = Config {
    hidden_size: 4,
    intermediate_size: 3,
    vocab_size: 8,
    num_hidden_layers: 1,
    num_attention_heads: 1,
    num_key_value_heads: 1,
    head_dim: 4,
    rms_norm_eps: 1e-5,
    rope: Rope { theta: 10_000.0, scaling: RopeScaling::None, interleaved: false },
    max_position_embeddings: 16,
    hidden_act: Activation::Silu,
    gated_mlp: true,
    gate_shift: 0.0,
    norm_shift: None,
    sliding_window: None,
};

fn profile() -> Profile {
    let rule = LayerRule {
        candidate: vec![0.5, 0.25],
        keep: vec![0.5, 0.25],
        share: vec![0.2, 0.6],
        hot: vec![0, 1],
        bias: vec![0.0; 8],
    };
    let layer = LayerProfile {
        order: vec![2, 0, 1],
        rank: 2,
        p: vec![0.0; 8],
        q_gate: vec![0.0; 6],
        q_up: vec![0.0; 6],
        gate_variance: vec![0.0; 3],
        up_variance: vec![0.0; 3],
        up_square: vec![0.0; 3],
        importance: vec![1.0; 3],
        rules: [rule.clone(), rule.clone(), rule],
    };
    let about = serde_json::Value::Null;
    Profile {
        layers: vec![layer],
        shares: vec![0.2, 0.6],
        gates: Vec::new(),
        recall_shares: Vec::new(),
        fitted: [0; 3],
        held_out: Default::default(),
        fingerprint: Vec::new(),
        about,
    }
}

type Change<'a> = &'a dyn Fn(&mut Profile);

#[test]
fn what_does_not_fit_is_named() {
    profile().check_model(&SHAPE).unwrap();
    let error = |change: Change<'_>| {
        let mut p = profile();
        change(&mut p);
        p.check_model(&SHAPE).unwrap_err().to_string()
    };
    let gate = |hidden: usize| FastGrnnGate::new(hidden, vec![0.0; hidden], vec![0.0], vec![0.0]).unwrap();
    let cases: [(Change<'_>, &str); 13] = [
        (&|p| p.layers.clear(), "made for 0 blocks, the model has 1"),
        (&|p| p.shares.reverse(), "not increasing"),
        (&|p| p.fitted[1] = 2, "fitted point 2 of 2"),
        (&|p| p.layers[0].order[0] = 1, "layer 0: order names neuron 1 of 3 twice"),
        (&|p| p.layers[0].order.truncate(2), "order has 2 neurons"),
        (&|p| p.layers[0].rank = 3, "layer 0: p has 8 elements, 12 are needed"),
        (&|p| p.layers[0].q_up[4] = f32::NAN, "layer 0: q_up has values"),
        (&|p| p.layers[0].importance[0] = -1.0, "layer 0: importance has values"),
        (&|p| p.layers[0].rules[2].bias.truncate(7), "cascade bias has 7 elements"),
        (&|p| p.layers[0].rules[0].hot[1] = 4, "gate hot [0, 4]"),
        (&|p| p.gates = vec![gate(SHAPE.hidden_size); 2], "gates of 2 blocks, the model has 1"),
        (&|p| p.gates = vec![gate(SHAPE.hidden_size + 1)], "layer 0: gate.ridge has shape [1, "),
        (&|p| p.gates = vec![FastGrnnGate { bias: vec![], ..gate(SHAPE.hidden_size) }], "gate.bias"),
    ];
    for (change, expected) in cases {
        let got = error(change);
        assert!(got.contains(expected), "{got}");
    }
}

#[test]
fn settings_that_make_no_sense_are_named() {
    let with = |selection, guard| SparseConfig { selection, guard, ..SparseConfig::default() };
    with(Selection::Share(1.0), Some(Guard { every: 1, limit: 0.1 })).check().unwrap();
    for (config, expected) in [
        (with(Selection::Share(f32::NAN), None), "share NaN"),
        (with(Selection::Share(1.5), None), "share 1.5"),
        (with(Selection::TopK(0), None), "top-k of 0"),
        (with(Selection::Scale(-1.0), None), "scale -1"),
        (with(Selection::Fitted, Some(Guard { every: 0, limit: 0.1 })), "every 0"),
        (with(Selection::Fitted, Some(Guard { every: 8, limit: f32::NAN })), "limit NaN"),
    ] {
        let got = config.check().unwrap_err().to_string();
        assert!(got.contains(expected), "{got}");
    }
}
