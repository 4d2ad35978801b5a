use super::*;
use crate::{
    ops::testing::{dequantized, gated, noise},
    profile::{LayerProfile, LayerRule},
};
use candle_core::{DType, Device};
use candle_sparse_core::Activation;

const RELU: GluActivation = GluActivation { act: Activation::Relu, shift: 0.0 };

struct Tensors {
    p: Tensor,
    q_gate: Tensor,
    q_up: Tensor,
    /// Positive.
    each: Tensor,
}

impl Tensors {
    fn new(hidden: usize, rank: usize, n: usize) -> Self {
        let scaled = |t: Tensor, n: usize| (t / (n as f64).sqrt()).unwrap();
        let q = scaled(noise(&[2 * n, rank]), rank);
        Self {
            p: scaled(noise(&[rank, hidden]), hidden),
            q_gate: q.narrow(0, 0, n).unwrap(),
            q_up: q.narrow(0, n, n).unwrap(),
            each: noise(&[n]).abs().unwrap(),
        }
    }

    fn predictors(&self, format: Format, act: GluActivation) -> [LowRankPredictor; 2] {
        let full = LowRankPredictor::new(format, act, &self.p, &self.q_gate, Some(&self.q_up)).unwrap();
        let full = full.with_variances(&(&self.each * 0.1).unwrap(), &self.each).unwrap();
        let classic = LowRankPredictor::new(format, act, &self.p, &self.q_gate, None).unwrap();
        [full.with_importance(&self.each).unwrap(), classic.with_bias(&(&self.each * 0.2).unwrap()).unwrap()]
    }
}

/// The same in plain tensor ops, on the weights the format really holds.
fn scores_slow(x: &Tensor, p: &LowRankPredictor) -> Result<Tensor> {
    let product = |w: &Weight, x: &Tensor| dequantized(w).matmul(x);
    let tensor = |v: &[f32]| Tensor::new(v, &Device::Cpu)?.unsqueeze(1);
    let z = product(&p.p, &x.flatten_all()?.unsqueeze(1)?)?;
    let mut gate = (product(&p.q_gate, &z)? - f64::from(p.act.shift))?;
    if let Some(bias) = &p.bias {
        gate = (gate + tensor(bias)?)?;
    }
    let deviation = tensor(&p.gate_deviation)?;
    let square = |g: Tensor| gated(p.act.act, &g, &g.ones_like()?)?.sqr();
    let squares = ((square((&gate - &deviation)?)? + square((&gate + &deviation)?)?)? / 2.0)?;
    let up = match &p.q_up {
        Some(q) => (product(q, &z)?.sqr()? + tensor(&p.up_variance)?)?,
        None => squares.ones_like()?,
    };
    ((squares * up)? * tensor(&p.importance)?)?.sqrt()?.squeeze(1)
}

/// By sorting.
fn select_slow(scores: &[f32], wanted: Wanted) -> Vec<u32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    order.sort_by(|a, b| scores[*b as usize].total_cmp(&scores[*a as usize]));
    let k = match wanted {
        Wanted::Threshold(t) => scores.iter().filter(|s| **s >= t).count(),
        Wanted::TopK(k) => k,
        Wanted::Share(s) => (s * scores.len() as f32).round() as usize,
    };
    order.truncate(k);
    order.retain(|i| scores[*i as usize] > 0.0);
    order.sort_unstable();
    order
}

#[test]
fn equals_its_slow_twin() {
    for (hidden, rank, n) in [(64, 32, 96), (512, 64, 700)] {
        let (tensors, x) = (Tensors::new(hidden, rank, n), noise(&[1, hidden]));
        for format in [Format::F32, Format::F16, Format::Q8_0, Format::Q4_0] {
            for act in [Activation::Silu, Activation::Relu, Activation::GeluPytorchTanh] {
                for p in tensors.predictors(format, GluActivation { act, shift: 0.05 }) {
                    let got = p.scores(&x).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                    let want = scores_slow(&x, &p).unwrap().to_vec1::<f32>().unwrap();
                    let bound = if format.is_quantized() { 0.2 } else { 1e-4 };
                    for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                        assert!((g - w).abs() <= bound, "{format:?} {act:?} neuron {i}: {g} {w}");
                    }
                    let share = Wanted::Share(0.25);
                    for wanted in [Wanted::Threshold(0.31), Wanted::TopK(17), Wanted::TopK(5 * n), share] {
                        let list = low_rank_predict(&x, &p, wanted).unwrap();
                        assert!(list.is_sorted_by(|a, b| a < b));
                        assert_eq!(list, select_slow(&got, wanted), "{format:?} {act:?} {wanted:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn thresholds_at_zero_and_nothing_wanted() {
    let p = &Tensors::new(32, 32, 64).predictors(Format::F32, RELU)[1];
    let x = noise(&[32]);
    let count = |t: f32| low_rank_predict(&x, p, Wanted::Threshold(t)).unwrap().len();
    assert_eq!([count(0.0), count(-1.0), count(f32::INFINITY)], [64, 64, 0]);
    let positive = count(1e-6);
    assert!(positive > 0 && positive < 64, "ReLU closes some: {positive}");
    assert_eq!(low_rank_predict(&x, p, Wanted::Share(1.0)).unwrap().len(), positive);
}

#[test]
fn profiles_are_read_in_the_order_of_the_checkpoint() {
    let n = 6;
    let order = vec![3, 0, 5, 1, 4, 2];
    let memory = |f: &dyn Fn(u32) -> f32| order.iter().map(|&o| f(o)).collect::<Vec<_>>();
    let rule = LayerRule {
        candidate: vec![0.0],
        keep: vec![0.0],
        share: vec![0.5],
        hot: vec![0],
        bias: vec![0.0; 2],
    };
    // Neuron i of the checkpoint has gate i + 1, up 1, importance 10 for neuron 2.
    let layer = LayerProfile {
        rank: 1,
        p: vec![1.0, 0.0],
        q_gate: memory(&|i| i as f32 + 1.0),
        q_up: vec![1.0; n],
        gate_variance: vec![0.0; n],
        up_variance: vec![0.0; n],
        up_square: vec![1.0; n],
        importance: memory(&|i| if i == 2 { 10.0 } else { 1.0 }),
        order: order.clone(),
        rules: [rule.clone(), rule.clone(), rule],
    };
    let about = serde_json::Value::Null;
    let mut profile = Profile {
        layers: vec![layer],
        shares: vec![0.5],
        gates: Vec::new(),
        recall_shares: Vec::new(),
        fitted: [0; 3],
        held_out: Default::default(),
        fingerprint: Vec::new(),
        about,
    };
    let p = LowRankPredictor::from_profile(Format::F32, RELU, &profile, 0).unwrap();
    let x = Tensor::new(&[1.0_f32, 7.0], &Device::Cpu).unwrap();
    assert_eq!(p.scores(&x).unwrap().to_vec1::<f32>().unwrap(), [1.0, 2.0, 30.0, 4.0, 5.0, 6.0]);
    let mut error = |change: &dyn Fn(&mut LayerProfile)| {
        change(&mut profile.layers[0]);
        LowRankPredictor::from_profile(Format::F32, RELU, &profile, 0).unwrap_err().to_string()
    };
    let e = error(&|l| l.order[0] = 0);
    assert!(e.contains("twice"), "{e}");
    let e = error(&|l| l.rank = 0);
    assert!(e.contains("calibrate with a rank"), "{e}");
}

#[test]
fn several_rows_need_what_any_of_them_needs() {
    let tensors = Tensors::new(32, 32, 64);
    let p = &tensors.predictors(Format::F32, RELU)[0];
    let x = noise(&[3, 32]);
    for wanted in [Wanted::TopK(7), Wanted::Threshold(0.3), Wanted::Share(0.2)] {
        let each = |dtype| (0..3).map(move |i| (i, dtype));
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let x = x.to_dtype(dtype).unwrap();
            let rows = each(dtype).map(|(i, _)| low_rank_predict(&x.get(i).unwrap(), p, wanted).unwrap());
            let mut union: Vec<u32> = rows.flatten().collect();
            union.sort_unstable();
            union.dedup();
            assert_eq!(low_rank_predict(&x, p, wanted).unwrap(), union, "{wanted:?} {dtype:?}");
            assert_eq!(p.scores(&x).unwrap().dims(), [3, 64]);
        }
    }
}

#[test]
fn wrong_input_is_named() {
    let tensors = Tensors::new(32, 32, 64);
    let p = &tensors.predictors(Format::F32, RELU)[0];
    let error = |x: &Tensor, wanted| low_rank_predict(x, p, wanted).unwrap_err().to_string();
    let top = Wanted::TopK(1);
    let e = error(&noise(&[31]), top);
    assert!(e.contains("BF16 [.., 32]"), "{e}");
    let e = error(&noise(&[32]).to_dtype(DType::F64).unwrap(), top);
    assert!(e.contains("F64"), "{e}");
    let x = noise(&[32]);
    for bad in [f32::NAN, f32::NEG_INFINITY] {
        let mut values = x.to_vec1::<f32>().unwrap();
        values[9] = bad;
        let e = error(&Tensor::new(values, &Device::Cpu).unwrap(), top);
        assert!(e.contains("x[9]"), "{e}");
    }
    let cases = [
        (Wanted::TopK(0), "top-k of 0"),
        (Wanted::Share(1.5), "share 1.5"),
        (Wanted::Threshold(f32::NAN), "NaN"),
    ];
    for (wanted, word) in cases {
        let e = error(&x, wanted);
        assert!(e.contains(word), "{e}");
    }
    let e = LowRankPredictor::new(Format::F32, RELU, &tensors.p, &tensors.p.narrow(1, 0, 31).unwrap(), None);
    assert!(e.unwrap_err().to_string().contains("[n, r]"));
    let e = p.clone().with_importance(&tensors.each.neg().unwrap()).unwrap_err().to_string();
    assert!(e.contains("importance["), "{e}");
}
