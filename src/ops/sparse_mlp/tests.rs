use super::*;
use crate::{
    FfnMode, Guard, Selection,
    ops::{
        LowRankPredictor, Wanted, low_rank_predict,
        testing::{dequantized, gated, noise, relative_error},
    },
    profile::{LayerProfile, LayerRule},
};
use candle_core::{DType, Device};
use candle_sparse_core::{Activation, kernel::select};

const ACT: GluActivation = GluActivation { act: Activation::Silu, shift: 0.1 };
const MODES: [FfnMode; 3] = [FfnMode::Gate, FfnMode::LowRank, FfnMode::Cascade];
const FORMATS: [Format; 4] = [Format::F32, Format::F16, Format::Q8_0, Format::Q4_0];
const HIDDEN: usize = 64;
const INNER: usize = 288;
const RANK: usize = 32;

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

struct Case {
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    profile: Profile,
}

impl Case {
    fn new() -> Self {
        let scaled = |t: Tensor| (t / 8.0).unwrap();
        let each = |scale: f64| values(&(noise(&[INNER]).abs().unwrap() * scale).unwrap());
        let q = scaled(noise(&[2 * INNER, RANK]));
        let rule = |candidate: f32, keep: f32| LayerRule {
            candidate: vec![candidate],
            keep: vec![keep],
            share: vec![0.4],
            hot: vec![20],
            bias: values(&noise(&[HIDDEN])),
        };
        let layer = LayerProfile {
            order: (0..INNER as u32).map(|i| i * 41 % INNER as u32).collect(),
            rank: RANK,
            p: values(&scaled(noise(&[RANK, HIDDEN]))),
            q_gate: values(&q.narrow(0, 0, INNER).unwrap()),
            q_up: values(&q.narrow(0, INNER, INNER).unwrap()),
            gate_variance: each(0.1),
            up_variance: each(0.2),
            up_square: each(1.0),
            importance: each(1.0),
            rules: [rule(0.0, 0.2), rule(0.2, 0.0), rule(0.1, 0.2)],
        };
        let about = serde_json::Value::Null;
        Self {
            gate: scaled(noise(&[INNER, HIDDEN])),
            up: scaled(noise(&[2 * INNER, HIDDEN]).narrow(0, 3, INNER).unwrap()),
            down: scaled(noise(&[HIDDEN, INNER])),
            profile: Profile {
                layers: vec![layer],
                shares: vec![0.4],
                gates: Vec::new(),
                recall_shares: Vec::new(),
                fitted: [0; 3],
                held_out: Default::default(),
                fingerprint: vec![],
                about,
            },
        }
    }

    fn mlp(&self, format: Format, mode: FfnMode, selection: Selection) -> Result<SparseMlp> {
        let config = SparseConfig { mode, selection, guard: None, force: false };
        SparseMlp::new(format, ACT, [&self.gate, &self.up, &self.down], (&self.profile, 0), config)
    }

    /// `[INNER]` numbers of the profile as a tensor.
    fn each(&self, f: impl Fn(&LayerProfile) -> &[f32]) -> Tensor {
        Tensor::new(f(&self.profile.layers[0]), &Device::Cpu).unwrap()
    }
}

/// Matrices that the weights really hold, `[neurons, hidden]`.
fn held(mlp: &SparseMlp) -> [Tensor; 3] {
    let pairs = dequantized(&mlp.ffn.up_down).reshape((INNER, 2, HIDDEN)).unwrap();
    let row = |i| pairs.narrow(1, i, 1).unwrap().squeeze(1).unwrap().contiguous().unwrap();
    [dequantized(&mlp.ffn.gate), row(0), row(1)]
}

/// Rows of `x` with all neurons, the activations of those that are not in `list` silenced, in plain tensor ops.
fn slow(x: &Tensor, mlp: &SparseMlp, list: Option<&[u32]>) -> Result<Tensor> {
    let [gate, up, down] = held(mlp);
    let x = x.reshape(((), HIDDEN))?;
    let g = (x.matmul(&gate.t()?)? - f64::from(ACT.shift))?;
    let a = gated(ACT.act, &g, &x.matmul(&up.t()?)?)?;
    let Some(list) = list else { return a.matmul(&down) };
    let mut mask = vec![0.0_f32; INNER];
    list.iter().for_each(|&i| mask[i as usize] = 1.0);
    let bias = Tensor::new(&*mlp.plans.layers[0].bias, &Device::Cpu)?;
    a.broadcast_mul(&Tensor::new(mask, &Device::Cpu)?)?.matmul(&down)?.broadcast_add(&bias)
}

#[test]
fn one_row_is_the_mean_and_the_active_neurons() {
    let (case, x) = (Case::new(), noise(&[1, 1, HIDDEN]));
    for format in FORMATS {
        for mode in MODES {
            for selection in [Selection::Fitted, Selection::TopK(50)] {
                let mlp = case.mlp(format, mode, selection).unwrap();
                let list = mlp.active(&x).unwrap();
                assert!(list.is_sorted_by(|a, b| a < b) && list.len() > 20 && list.len() < INNER);
                assert!(selection == Selection::Fitted || list.len() == 50);
                let (y, want) = (mlp.forward(&x).unwrap(), slow(&x, &mlp, Some(&list)).unwrap());
                assert_eq!(y.dims(), x.dims());
                let error = relative_error(&y.reshape((1, HIDDEN)).unwrap(), &want);
                let bound = if format.is_quantized() { 0.04 } else { 1e-5 };
                assert!(error < bound, "{format:?} {mode:?} {selection:?}: {error}");
            }
        }
    }
}

#[test]
fn gates_choose_by_their_rule() {
    let (case, x) = (Case::new(), noise(&[1, HIDDEN]));
    let mlp = case.mlp(Format::F32, FfnMode::Gate, Selection::Fitted).unwrap();
    let g = x.matmul(&held(&mlp)[0].t().unwrap()).unwrap().squeeze(0).unwrap();
    let a = gated(
        ACT.act,
        &(g - f64::from(ACT.shift)).unwrap(),
        &Tensor::ones(INNER, DType::F32, &Device::Cpu).unwrap(),
    );
    let size = (a.unwrap().abs().unwrap() * case.each(|l| &l.up_square).sqrt().unwrap()).unwrap();
    let size = values(&(size * case.each(|l| &l.importance)).unwrap());
    let want: Vec<u32> = (0..INNER as u32).filter(|&i| i < 20 || size[i as usize] >= 0.2).collect();
    assert_eq!(mlp.active(&x).unwrap(), want);
}

#[test]
fn predictions_choose_as_the_op_does() {
    let (mut case, x) = (Case::new(), noise(&[1, HIDDEN]));
    case.profile.layers[0].rules.iter_mut().for_each(|r| r.hot = vec![0]);
    let mlp = case.mlp(Format::F32, FfnMode::LowRank, Selection::Fitted).unwrap();
    let p = LowRankPredictor::from_profile(Format::F32, ACT, &case.profile, 0).unwrap();
    let order = &case.profile.layers[0].order;
    let mut list: Vec<u32> = mlp.active(&x).unwrap().iter().map(|&i| order[i as usize]).collect();
    list.sort_unstable();
    assert_eq!(low_rank_predict(&x, &p, Wanted::Threshold(0.2)).unwrap(), list);
}

#[test]
fn more_rows_are_dense_and_so_is_the_dense_mode() {
    let case = Case::new();
    for format in FORMATS {
        let mlp = case.mlp(format, FfnMode::Cascade, Selection::Fitted).unwrap();
        let dense =
            mlp.with_config(SparseConfig { mode: FfnMode::Dense, ..SparseConfig::default() }).unwrap();
        let bound = if format.is_quantized() { 0.04 } else { 1e-5 };
        for dims in [vec![2, HIDDEN], vec![3, 7, HIDDEN], vec![130, HIDDEN]] {
            let x = noise(&dims);
            let y = mlp.forward(&x).unwrap();
            assert_eq!(y.dims(), dims);
            let error = relative_error(&y.reshape(((), HIDDEN)).unwrap(), &slow(&x, &mlp, None).unwrap());
            assert!(error < bound, "{format:?} {dims:?}: {error}");
        }
        let x = noise(&[1, HIDDEN]);
        assert_eq!(dense.active(&x).unwrap().len(), INNER);
        let error = relative_error(&dense.forward(&x).unwrap(), &slow(&x, &mlp, None).unwrap());
        assert!(error < bound, "{format:?}: {error}");
    }
}

#[test]
fn a_weight_that_is_no_number_shows_whatever_its_bits() {
    let x = noise(&[1, HIDDEN]);
    for bits in [select::inactive().to_bits(), select::rejected().to_bits(), f32::NAN.to_bits()] {
        let mut case = Case::new();
        let mut gate = values(&case.gate);
        gate[17 * HIDDEN] = f32::from_bits(bits);
        case.gate = Tensor::from_vec(gate, (INNER, HIDDEN), &Device::Cpu).unwrap();
        for (mode, selection) in [
            (FfnMode::Gate, Selection::Fitted),
            (FfnMode::Cascade, Selection::Scale(1e-6)),
            (FfnMode::Gate, Selection::TopK(INNER / 2)),
        ] {
            let y = values(&case.mlp(Format::F32, mode, selection).unwrap().forward(&x).unwrap());
            assert!(y.iter().any(|y| y.is_nan()), "{bits:x} {mode:?} {selection:?}");
        }
    }
}

#[test]
fn wrong_input_is_named() {
    let case = Case::new();
    let mlp = case.mlp(Format::F16, FfnMode::Cascade, Selection::Fitted).unwrap();
    let error = |x: &Tensor| mlp.forward(x).unwrap_err().to_string();
    for x in [noise(&[HIDDEN + 1]), noise(&[HIDDEN]).to_dtype(DType::F64).unwrap()] {
        assert!(error(&x).contains("F32, F16 or BF16"), "{}", error(&x));
    }
    assert!(mlp.active(&noise(&[2, HIDDEN])).unwrap_err().to_string().contains("one row"));
    for (dims, dtype) in [(vec![1, HIDDEN], DType::F16), (vec![1, 5, HIDDEN], DType::BF16)] {
        let x = noise(&dims).to_dtype(dtype).unwrap();
        let want = mlp.forward(&x.to_dtype(DType::F32).unwrap()).unwrap().to_dtype(dtype).unwrap();
        let got = mlp.forward(&x).unwrap();
        assert_eq!(
            (got.dtype(), values(&got.to_dtype(DType::F32).unwrap())),
            (dtype, values(&want.to_dtype(DType::F32).unwrap()))
        );
    }
    let nan = (noise(&[3, HIDDEN]) * f64::NAN).unwrap();
    assert!(error(&nan).contains("x[0] is NaN"), "{}", error(&nan));
    let guard = Some(Guard { every: 8, limit: 0.1 });
    let e = mlp.with_config(SparseConfig { guard, ..SparseConfig::default() }).unwrap_err().to_string();
    assert!(e.contains("no guard"), "{e}");
    let build = |tensors, layer| {
        let e = SparseMlp::new(Format::F32, ACT, tensors, (&case.profile, layer), SparseConfig::default());
        e.unwrap_err().to_string()
    };
    let e = build([&case.gate, &case.up, &case.up], 0);
    assert!(e.contains("[h, n]"), "{e}");
    assert!(build([&case.gate, &case.up, &case.down], 1).contains("layer 1"));
    let half = |t: &Tensor, dim| t.narrow(dim, 0, INNER / 2).unwrap();
    let e = build([&half(&case.gate, 0), &half(&case.up, 0), &half(&case.down, 1)], 0);
    assert!(e.contains("another model"), "{e}");
}
