//! The forward pass against a plain one, in every mode and for shapes drawn at random.
#![allow(clippy::unwrap_used, reason = "tests")]

mod built;
mod naive;
mod steps;

use built::{Built, Random, Wanted, YARN, config};
use candle_sparse_core::{
    Activation, Config, Format, KvCache, KvConfig, Rope,
    attention::{AttentionConfig, AttentionMode},
    ffn::Rule,
};
use naive::Naive;

const DENSE: Wanted =
    Wanted { format: Format::F32, rule: None, top: false, neuron_major: false, cell: false };

/// `‖a − b‖ / ‖b‖`
fn error(a: &[f32], b: &[f64]) -> f64 {
    let square = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
    square(&mut a.iter().zip(b).map(|(a, b)| f64::from(*a) - b)) / square(&mut b.iter().copied())
}

/// The largest error of a run of random tokens through both, and how many neurons and positions were left out.
fn compare(m: &Built, words: Option<usize>, tokens: usize, bound: f64, name: &str) -> u64 {
    let mut r = Random(7);
    m.run(words, |step, visible| {
        let visible = if visible >= m.config.max_position_embeddings { usize::MAX } else { visible / 32 + 1 };
        let (mut naive, mut active) = (Naive::new(m, visible), 0);
        for position in 0..tokens {
            let token = r.below(m.config.vocab_size);
            let (got, got_active) = step(token, position, &mut || false).unwrap();
            let (want, want_active) = naive.step(token);
            assert_eq!(got_active, want_active, "{name}: neurons at {position}");
            let error = error(&got, &want);
            assert!(error <= bound, "{name}: {error} at {position}, {:?}", m.config);
            active += got_active.iter().map(|a| u64::from(*a)).sum::<u64>();
        }
        active
    })
}

/// Float sums in another order.
const FLOAT: f64 = 2e-5;

/// A configuration that the rule can serve.
fn config_for(rule: Option<Rule>, r: &mut Random) -> Config {
    let c = config(r, 300);
    let shuts = rule != Some(Rule::ExactZero) || c.hidden_act.has_exact_zeros();
    if shuts { c } else { Config { hidden_act: Activation::Relu2, ..c } }
}

fn rules() -> impl Iterator<Item = (Option<Rule>, bool)> {
    let all = [Rule::Gate, Rule::LowRank, Rule::Cascade].map(Some);
    [None].into_iter().chain(all).map(|rule| (rule, false)).chain(all.map(|rule| (rule, true)))
}

#[test]
fn every_ffn() {
    let mut r = Random(1);
    let mut left_out = [0_u64; 2];
    for (rule, top) in rules().chain([(Some(Rule::ExactZero), false)]) {
        for round in 0..6 {
            let c = config_for(rule, &mut r);
            let gated_mlp = round % 2 == 0;
            let rope = if round < 3 { c.rope } else { Rope { scaling: YARN, ..c.rope } };
            let c = Config { gated_mlp, rope, ..c };
            let neuron_major = rule.is_some() || round < 4;
            let m = Built::new(
                &mut r,
                c,
                Wanted { rule, top, neuron_major, ..DENSE },
                AttentionConfig::default(),
                KvConfig::exact(Format::F32),
            );
            let active = compare(&m, None, 24, FLOAT, &format!("{rule:?} top {top} round {round}"));
            left_out[0] += active;
            left_out[1] += (24 * c.num_hidden_layers * c.intermediate_size) as u64;
        }
    }
    assert!(left_out[0] < left_out[1] * 8 / 10, "rules leave neurons out: {left_out:?}");
}

#[test]
fn every_attention_in_every_tier_and_ring() {
    let mut r = Random(2);
    use AttentionMode::{Dense, Gated, Recall, Sampled, Window};
    for mode in [Dense, Window, Gated, Recall, Sampled] {
        // Hot pages in F32, so that the other side's rounding is the same but for an element in a million.
        let aged = |hot, warm| KvConfig { dtype: Format::F32, ..KvConfig::tiered(hot, warm) };
        for (round, kv) in [
            KvConfig::exact(Format::F32),
            KvConfig::exact(Format::F16),
            aged(32, 96),
            aged(64, 0),
            aged(0, 40),
        ]
        .into_iter()
        .enumerate()
        {
            for (ring, window, cell) in [(false, None, false), (true, None, true), (false, Some(70), true)] {
                let c =
                    Config { sliding_window: window, hidden_act: Activation::Silu, ..config(&mut r, 330) };
                let attention = AttentionConfig::new(mode)
                    .with_sinks(r.of(&[0, 4]))
                    .with_window(r.of(&[32, 50]))
                    .with_budget(r.of(&[32, 64]))
                    .with_recall(r.of(&[0, 32]));
                let m = Built::new(&mut r, c, Wanted { cell, ..DENSE }, attention, kv);
                let words = m.with_model(|model| KvCache::words(model, if ring { 170 } else { 330 }));
                // An element on the edge of two F16 numbers, or of two levels of four bits, may go to either side; a wrong page
                // is an error of some percent.
                let bound = match round {
                    0 => FLOAT,
                    1 => 2e-4,
                    _ => 2e-3,
                };
                let name = format!("{mode:?} kv {round} ring {ring} window {window:?} {attention:?}");
                compare(&m, Some(words), 330, bound, &name);
            }
        }
    }
}

#[test]
fn quantised_weights() {
    let mut r = Random(3);
    for format in [Format::Q8_0, Format::Q4_0, Format::Q4_1, Format::F16] {
        for (rule, top) in rules() {
            let c = config(&mut r, 300);
            let m = Built::new(
                &mut r,
                c,
                Wanted { format, rule, top, neuron_major: top || rule.is_some(), ..DENSE },
                AttentionConfig::default(),
                KvConfig::tiered(32, 64),
            );
            // An activation on the edge of two bytes may go to either side: a 127th of the largest of its block.
            compare(&m, None, 40, 2e-2, &format!("{format:?} {rule:?} {top}"));
        }
    }
}
