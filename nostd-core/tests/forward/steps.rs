//! What a step refuses, what it leaves behind, and what a model takes.

use crate::{
    DENSE,
    built::{Built, Random, Wanted, config},
};
use candle_sparse_core::{
    Activation, ActivationGroup, Config, Error, Format, KvCache, KvConfig, Model, Rope, RopeScaling, Scalar,
    Scratch,
    attention::{AttentionConfig, AttentionMode},
    ffn::Rule,
    forward::forward,
    weights::{LayerWeights, Weights},
};

fn small(limit: usize) -> Config {
    let c = config(&mut Random(5), limit);
    Config { hidden_size: 32, num_key_value_heads: 2, num_attention_heads: 4, head_dim: 8, ..c }
}

fn built(wanted: Wanted, attention: AttentionConfig, kv: KvConfig, limit: usize) -> Built {
    Built::new(&mut Random(6), small(limit), wanted, attention, kv)
}

const GATED: AttentionConfig =
    AttentionConfig::new(AttentionMode::Gated).with_sinks(4).with_window(32).with_budget(32).with_recall(32);

fn never() -> bool {
    false
}

#[test]
fn a_step_that_runs_out_of_time_leaves_no_trace() {
    let wanted = Wanted { rule: Some(Rule::Cascade), neuron_major: true, cell: true, ..DENSE };
    let m = built(wanted, GATED, KvConfig::tiered(32, 64), 160);
    let plain =
        m.run(None, |step, _| (0..160).map(|p| step(p % 40, p, &mut never).unwrap()).collect::<Vec<_>>());
    m.run(None, |step, _| {
        for (position, want) in plain.iter().enumerate() {
            // Before each block, and before the head.
            for checks in 0..=m.config.num_hidden_layers {
                let mut left = checks;
                let mut has_passed = || {
                    left = left.wrapping_sub(1);
                    left == usize::MAX
                };
                assert_eq!(step((position + 1) % 40, position, &mut has_passed), Err(Error::Deadline));
            }
            assert_eq!(&step(position % 40, position, &mut never).unwrap(), want, "at {position}");
        }
    });
}

#[test]
fn positions_are_taken_back() {
    let m = built(Wanted { cell: true, ..DENSE }, GATED, KvConfig::exact(Format::F32), 200);
    m.run(None, |step, _| {
        let mut run = |from: usize, to: usize, seed: usize| {
            (from..to).map(|p| step((p + seed) % 40, p, &mut never).unwrap()).collect::<Vec<_>>()
        };
        let first = run(0, 200, 0);
        // To the beginning of a page everything is as it was, whatever was read behind it.
        for begin in [128, 0, 32] {
            run(begin, 200, 3);
            assert_eq!(run(begin, 200, 0), first[begin..], "back to {begin}");
        }
        assert_ne!(run(160, 200, 1), first[160..]);
    });
    // In the middle of a page the gate no longer knows it; without a gate it makes no difference.
    let m = built(DENSE, AttentionConfig::default(), KvConfig::exact(Format::F32), 100);
    m.run(None, |step, _| {
        let mut run = |from: usize, to: usize, seed: usize| {
            (from..to).map(|p| step((p + seed) % 40, p, &mut never).unwrap()).collect::<Vec<_>>()
        };
        let first = run(0, 100, 0);
        for back in [99, 70, 33, 1] {
            run(back, 90.max(back), 5);
            assert_eq!(run(back, 100, 0), first[back..], "back to {back}");
        }
    });
}

#[test]
fn a_page_that_was_cold_is_written_again() {
    let run = |kv: KvConfig, back: usize| {
        let m = built(DENSE, AttentionConfig::default(), kv, 200);
        m.run(None, |step, _| {
            let mut run =
                |from: usize| (from..200).map(|p| step(p % 40, p, &mut never).unwrap().0).collect::<Vec<_>>();
            run(0);
            run(back)
        })
    };
    let exact = run(KvConfig::exact(Format::F32), 0);
    let size = |v: &[f32]| v.iter().map(|v| v * v).sum::<f32>().sqrt();
    let worst = |logits: &[Vec<f32>]| {
        let all = logits.iter().zip(&exact[200 - logits.len()..]);
        let off = all.map(|(a, b)| size(&a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<_>>()) / size(b));
        off.fold(0.0, f32::max)
    };
    // Keys of four bits, rounded at another time: as far from the truth.
    let tiers = KvConfig::tiered(0, 32);
    let (first, again) = (worst(&run(tiers, 0)), worst(&run(tiers, 70)));
    assert!(first > 0.0 && again <= 1.5 * first, "{again} after going back, {first} before");
}

#[test]
fn what_a_ring_has_dropped_cannot_be_gone_back_to() {
    let m = built(DENSE, AttentionConfig::default(), KvConfig::exact(Format::F16), 640);
    let words = m.with_model(|model| KvCache::words(model, 200));
    m.run(Some(words), |step, visible| {
        assert!((160..=200).contains(&visible), "{visible}");
        (0..640).for_each(|p| drop(step(p % 40, p, &mut never).unwrap()));
        let least = match step(1, 300, &mut never) {
            Err(Error::Dropped { position: 300, least }) => least,
            other => panic!("{other:?}"),
        };
        assert!(least <= 640 - 32, "a page can be taken back: {least}");
        assert_eq!(step(1, least - 1, &mut never), Err(Error::Dropped { position: least - 1, least }));
        step(1, least, &mut never).unwrap();
        assert_eq!(step(1, least + 2, &mut never), Err(Error::Gap { position: least + 2, len: least + 1 }));
        step(1, 0, &mut never).unwrap();
        assert_eq!(step(1, 2, &mut never), Err(Error::Gap { position: 2, len: 1 }));
    });
}

#[test]
fn bad_steps_are_refused() {
    let m = built(DENSE, AttentionConfig::default(), KvConfig::exact(Format::F16), 40);
    m.run(None, |step, _| {
        assert_eq!(step(40, 0, &mut never), Err(Error::TokenId { token: 40, vocab_size: 40 }));
        assert_eq!(step(1, 1, &mut never), Err(Error::Gap { position: 1, len: 0 }));
        (0..40).for_each(|p| drop(step(p, p, &mut never).unwrap()));
        assert_eq!(step(1, 40, &mut never), Err(Error::Position { position: 40, limit: 40 }));
    });
}

#[test]
fn memory_that_is_too_small_or_of_another_model_is_refused() {
    let (wanted, kv) = (Wanted { cell: true, ..DENSE }, KvConfig::tiered(32, 64));
    let other = built(wanted, AttentionConfig::default(), kv, 400);
    built(wanted, GATED, kv, 400).with_model(|model| {
        let (least, all) = (KvCache::words(model, 1), KvCache::words(model, 400));
        assert!(least < all);
        let mut memory = vec![0; all];
        let error = KvCache::new(model, &mut memory[..least - 1]).map(|_| ()).unwrap_err();
        assert_eq!(error, Error::Length { what: "kv cache", expected: least, got: least - 1 });
        let visible = |n: usize| KvCache::new(model, &mut vec![0; n]).unwrap().visible();
        assert!((least..all).step_by(97).map(visible).is_sorted());
        assert_eq!(visible(all), 400);
        for positions in [40, 200, 330, 400] {
            assert!(visible(KvCache::words(model, positions)) + 64 >= positions);
        }

        let n = Scratch::elements(model, 400);
        let (mut data, mut groups) =
            (vec![0.0; n], vec![ActivationGroup::ZERO; Scratch::groups(model.config())]);
        let error = |data: &mut [f32], groups: &mut [ActivationGroup]| {
            Scratch::new(model, 400, data, groups).map(|_| ()).unwrap_err()
        };
        assert_eq!(
            error(&mut data[..n - 1], &mut groups),
            Error::Length { what: "scratch", expected: n, got: n - 1 }
        );
        assert!(matches!(error(&mut data, &mut []), Error::Length { what: "activation groups", .. }));

        let mut cache = KvCache::new(model, &mut memory).unwrap();
        let mut scratch = Scratch::new(model, 400, &mut data, &mut groups).unwrap();
        other.with_model(|other| {
            let error = forward(&Scalar, other, (0, 0), &mut cache, &mut scratch, None, &mut never);
            assert_eq!(error, Err(Error::WrongModel("kv cache")));
            let mut memory = vec![0; all];
            let mut cache = KvCache::new(other, &mut memory).unwrap();
            let error = forward(&Scalar, other, (0, 0), &mut cache, &mut scratch, None, &mut never);
            assert_eq!(error, Err(Error::WrongModel("scratch")));
        });
    });
}

#[test]
fn a_model_that_does_not_fit_together_is_refused() {
    let m = built(DENSE, AttentionConfig::default(), KvConfig::exact(Format::F16), 40);
    m.with_model(|model| {
        let (c, weights) = (*model.config(), *model.weights());
        let error = |c: Config, weights, attention, kv| {
            Model::with_settings(c, weights, attention, kv).map(|_| ()).unwrap_err()
        };
        let (dense, f16) = (AttentionConfig::default(), KvConfig::exact(Format::F16));
        let wide = Config { hidden_size: 64, ..c };
        assert!(matches!(error(wide, weights, dense, f16), Error::Shape { what: "embed_tokens", .. }));
        assert_eq!(
            error(c, weights, dense, KvConfig::exact(Format::Q8_0)),
            Error::OutOfRange("kv cache dtype (F32, F16 or BF16)")
        );
        let with = |change: &dyn Fn(&mut LayerWeights<'_>), attention| {
            let mut layers = weights.layers.to_vec();
            change(&mut layers[0]);
            Model::with_settings(c, Weights { layers: &layers, ..weights }, attention, f16)
                .map(|_| ())
                .unwrap_err()
        };
        assert!(matches!(with(&|l| l.gate = None, GATED), Error::Missing(_)));
        let text = with(&|l| l.o_proj.bias = Some(&[1.0]), dense).to_string();
        assert_eq!(text, "layer 0: o_proj has shape [1, 1], expected [1, 32]");
    });
}

/// `stories260K`: an ESP32-S3 has some 300 KB for it beside what the system takes.
#[test]
fn a_small_model_fits_a_microcontroller() {
    let c = Config {
        hidden_size: 64,
        intermediate_size: 172,
        vocab_size: 512,
        num_hidden_layers: 5,
        num_attention_heads: 8,
        num_key_value_heads: 4,
        head_dim: 8,
        rms_norm_eps: 1e-5,
        rope: Rope { theta: 1e4, scaling: RopeScaling::None, interleaved: false },
        max_position_embeddings: 512,
        hidden_act: Activation::Silu,
        gated_mlp: true,
        gate_shift: 0.0,
        norm_shift: None,
        sliding_window: None,
    };
    let wanted = Wanted { rule: Some(Rule::Cascade), neuron_major: true, format: Format::Q8_0, ..DENSE };
    for (attention, kv, most) in [
        (AttentionConfig::default(), KvConfig::exact(Format::F16), 360_000),
        (AttentionConfig::default(), KvConfig::tiered(32, 64), 190_000),
        (GATED.with_recall(0), KvConfig::tiered(32, 64), 190_000),
        (GATED, KvConfig::tiered(32, 64), 200_000),
    ] {
        Built::new(&mut Random(8), c, wanted, attention, kv).with_model(|model| {
            let cache = 4 * KvCache::words(model, 512);
            let scratch = 4 * Scratch::elements(model, 512) + 256 * Scratch::groups(&c);
            let logits = 4 * c.vocab_size;
            let all = cache + scratch + logits;
            println!(
                "{:?} {kv:?}: cache {cache} scratch {scratch} logits {logits}: {all} bytes",
                attention.mode
            );
            assert!(all <= most, "{all}");
        });
    }
}
