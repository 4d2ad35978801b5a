use super::*;
use crate::calibrate::tests::noise;
use candle_core::{Device, Tensor};
use candle_sparse_core::{Activation, Rope, RopeScaling};

const CONTEXT: usize = 640;
const HEADS: usize = 2;
const HEAD_DIM: usize = 8;

fn config() -> Config {
    Config {
        hidden_size: HEADS * HEAD_DIM,
        intermediate_size: 1,
        vocab_size: 1,
        num_hidden_layers: 1,
        num_attention_heads: HEADS,
        num_key_value_heads: HEADS,
        head_dim: HEAD_DIM,
        rms_norm_eps: 1e-5,
        rope: Rope { theta: 1e4, scaling: RopeScaling::None, interleaved: false },
        max_position_embeddings: CONTEXT,
        hidden_act: Activation::Silu,
        gated_mlp: true,
        gate_shift: 0.0,
        norm_shift: None,
        sliding_window: None,
    }
}

/// A window in which the first head looks at all positions alike and the second at its own neighbourhood alone: its keys turn
/// with the position, and so do its queries.
fn qkv(seed: u64) -> Vec<f32> {
    let values = noise(CONTEXT * HEADS * HEAD_DIM, seed);
    let row = |p: usize| {
        let turned = |scale: f32| {
            let angle = p as f32 * 0.002;
            let mut head = vec![0.0; HEAD_DIM];
            (head[0], head[1]) = (scale * angle.cos(), scale * angle.sin());
            head
        };
        let (flat, own) = (vec![0.0; HEAD_DIM], &values[p * HEADS * HEAD_DIM..][..HEADS * HEAD_DIM]);
        [&flat, &turned(400.0), &flat, &turned(40.0)]
            .into_iter()
            .flatten()
            .chain(own)
            .copied()
            .collect::<Vec<_>>()
    };
    (0..CONTEXT).flat_map(row).collect()
}

fn losses(window: usize) -> Losses {
    let c = config();
    let unit = Tensor::eye(c.hidden_size, DType::F32, &Device::Cpu).unwrap();
    let grams = Grams::new(&unit, &c).unwrap();
    let mut losses = Losses::new([1, HEADS], CONTEXT);
    (0..3).for_each(|seed| losses.add(&c, &grams, 0, &qkv(seed), window).unwrap());
    losses
}

#[test]
fn what_is_not_read_is_lost_and_what_is_read_is_not() {
    let losses = losses(32);
    let at = |pages: [f32; 2]| losses.at(&pages);
    assert!(at([0.0, 20.0]) > 10.0 * at([20.0, 0.0]), "the second head needs its neighbourhood alone");
    assert!(at([4.0, 0.0]) < at([2.0, 0.0]) && at([3.0, 0.0]) < at([2.0, 0.0]));
    assert_eq!(at([20.0, 20.0]), 0.0);
    // By hand: the first head's values are weighted alike, the second's by their distance.
    let (c, seen) = (config(), qkv(0));
    let row = c.q_dim() + 2 * c.kv_dim();
    let value = |head: usize, p: usize, d: usize| {
        f64::from(seen[p * row + c.q_dim() + c.kv_dim() + head * HEAD_DIM + d])
    };
    let weight = |head: usize, t: usize, p: usize| {
        if head == 0 { 1.0 } else { (16_000.0 * ((0.002 * (t - p) as f64).cos() - 1.0)).exp() }
    };
    let out = |head: usize, t: usize, seen: &dyn Fn(usize) -> bool, d: usize| {
        let all = (0..=t).filter(|p| seen(*p)).map(|p| (weight(head, t, p), value(head, p, d)));
        let (sum, whole) = all.fold((0.0, 0.0), |(sum, whole), (w, v)| (sum + w * v, whole + w));
        sum / whole
    };
    let (mut lost, mut whole) = (0.0, 0.0);
    for t in (CONTEXT / 2..CONTEXT).step_by(13) {
        for d in 0..HEAD_DIM {
            whole += (0..HEADS).map(|head| out(head, t, &|_| true, d).powi(2)).sum::<f64>();
            let read = |p: usize| p < 32 || p >= (t / 32 - 1) * 32;
            lost += (out(0, t, &read, d) - out(0, t, &|_| true, d)).powi(2);
        }
    }
    let mut one = Losses::new([1, HEADS], CONTEXT);
    let unit = Grams::new(&Tensor::eye(c.hidden_size, DType::F32, &Device::Cpu).unwrap(), &c).unwrap();
    one.add(&c, &unit, 0, &seen, 32).unwrap();
    let (got, by_hand) = (one.at(&[0.0, 20.0]), lost / whole);
    assert!((got / by_hand - 1.0).abs() < 1e-2, "{got} {by_hand}");
}

#[test]
fn pages_go_where_they_save_most() {
    let losses = losses(32);
    for mean in [1.0, 3.0, 8.0] {
        let pages = losses.share_out(mean);
        assert!((pages.iter().sum::<f32>() - 2.0 * mean).abs() < 1e-4, "{pages:?}");
        assert!(pages[0] > 1.9 * mean, "the head that needs them gets them: {pages:?}");
        assert!(losses.at(&pages) < 0.9 * losses.at(&[mean; 2]));
    }
    // More than there are pages.
    assert!(losses.at(&losses.share_out(100.0)) == 0.0);
}
