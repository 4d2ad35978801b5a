use super::*;
use crate::Weight;
use candle_core::Device;
use candle_sparse_core::Format;
use std::collections::HashMap;

const LAYERS: usize = 3;
const HIDDEN: usize = 256;
const INNER: usize = 512;

type Tensors = HashMap<String, Tensor>;

/// Without a pattern, of a normal distribution nearly, and another for each seed.
fn noise(seed: u64, dims: &[usize]) -> Tensor {
    let n: usize = dims.iter().product();
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let values: Vec<f32> = (0..n).map(|_| (0..6).map(|_| uniform()).sum::<f32>() * 0.03).collect();
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

fn model(seed: u64) -> Tensors {
    let mut all = Tensors::new();
    let mut add = |name: &str, dims: &[usize]| {
        let seed = seed * 1000 + all.len() as u64;
        all.insert(format!("{name}.weight"), noise(seed, dims));
    };
    add("model.embed_tokens", &[100, HIDDEN]);
    for layer in 0..LAYERS {
        for name in NAMES {
            let dims: &[usize] = match name {
                "input_layernorm" | "post_attention_layernorm" => &[HIDDEN],
                "self_attn.k_proj" | "self_attn.v_proj" => &[64, HIDDEN],
                "mlp.gate_proj" | "mlp.up_proj" => &[INNER, HIDDEN],
                "mlp.down_proj" => &[HIDDEN, INNER],
                _ => &[HIDDEN, HIDDEN],
            };
            add(&format!("model.layers.{layer}.{name}"), dims);
        }
    }
    all
}

fn print(tensors: &Tensors) -> Vec<f32> {
    let vb = VarBuilder::from_tensors(tensors.clone(), DType::F32, &Device::Cpu);
    fingerprint(&vb, LAYERS, HIDDEN, INNER).unwrap()
}

/// As a file holds it whose matrices are in `format`.
fn print_in(tensors: &Tensors, format: Format) -> Vec<f32> {
    let mut print = Fingerprint::default();
    for (name, t) in tensors {
        let part = match t.rank() {
            1 => t.clone().into(),
            _ => Weight::from_tensor(t, format).unwrap().into(),
        };
        print.note(name.strip_suffix(".weight").unwrap(), &part, None).unwrap();
    }
    print.numbers().to_vec()
}

fn profile(fingerprint: Vec<f32>) -> Profile {
    let layer = crate::profile::LayerProfile {
        order: Vec::new(),
        rank: 1,
        p: Vec::new(),
        q_gate: Vec::new(),
        q_up: Vec::new(),
        gate_variance: Vec::new(),
        up_variance: Vec::new(),
        up_square: Vec::new(),
        importance: Vec::new(),
        rules: Default::default(),
    };
    let (layers, about) = (vec![layer; LAYERS], serde_json::Value::Null);
    Profile {
        layers,
        gates: Vec::new(),
        recall_shares: Vec::new(),
        shares: Vec::new(),
        fitted: [0; 3],
        held_out: Default::default(),
        fingerprint,
        about,
    }
}

#[test]
fn a_lora_merged_into_any_matrix_is_another_model() {
    let base = model(1);
    let profile = profile(print(&base));
    assert!(profile.belongs_to(&print(&base)).is_ok());
    for name in base.keys() {
        let mut tuned = base.clone();
        let dims = base[name].dims().to_vec();
        // Of rank 4, a hundredth of the weights.
        let delta = match *dims {
            [rows, cols] => noise(7, &[rows, 4]).matmul(&noise(8, &[4, cols])).unwrap(),
            _ => noise(9, &dims),
        };
        let size = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        let scale = f64::from(0.01 * size(&base[name]) / size(&delta));
        tuned.insert(name.clone(), (&base[name] + (delta * scale).unwrap()).unwrap());
        let error = profile.belongs_to(&print(&tuned)).unwrap_err();
        let Some(Error::WrongModel { problem, .. }) = Error::of(&error) else { panic!("{error}") };
        assert!(problem.contains(name.strip_suffix(".weight").unwrap()), "{name}: {problem}");
    }
}

#[test]
fn rounding_is_forgiven_and_other_models_are_not() {
    let (base, other) = (model(1), model(2));
    let prints: Vec<_> = Format::ALL.map(|f| (f, print_in(&base, f))).into_iter().collect();
    for (a, made) in &prints {
        let profile = profile(made.clone());
        for (b, held) in &prints {
            assert!(profile.belongs_to(held).is_ok(), "{a:?} {b:?}: {:?}", difference(made, held));
        }
        assert!(profile.belongs_to(&print_in(&other, *a)).is_err(), "{a:?}");
        assert!(profile.belongs_to(&print(&other)).is_err(), "{a:?}");
    }
}

#[test]
fn the_layouts_of_gguf_are_the_same_model() {
    let base = model(1);
    let profile = profile(print(&base));
    // Rows of q and k beside those they turn with.
    let mut turned = base.clone();
    for (name, heads) in [("q", 4), ("k", 1)] {
        let name = format!("model.layers.1.self_attn.{name}_proj.weight");
        let t = base[&name].reshape((heads, 2, 32, HIDDEN)).unwrap().transpose(1, 2).unwrap();
        turned.insert(name, t.contiguous().unwrap().reshape((heads * 64, HIDDEN)).unwrap());
    }
    assert_ne!(print_in(&turned, Format::F32), print_in(&base, Format::Q8_0));
    assert!(profile.belongs_to(&print(&turned)).is_ok());
    // Neurons in another order, up and down side by side.
    let order: Vec<u32> = (0..INNER as u32).map(|i| i * 37 % INNER as u32).collect();
    let (mut told, mut held) = (Fingerprint::new(print(&base)), Fingerprint::new(print(&base)));
    let part = |name: &str| Part::from(base[&format!("model.layers.0.mlp.{name}.weight")].clone());
    for name in ["gate_proj", "up_proj", "down_proj"] {
        told.note(&format!("model.layers.0.mlp.{name}"), &part(name), Some(&order)).unwrap();
    }
    let gate = Weight::interleaved(Format::F32, HIDDEN, 1, &order, |_| Ok(part("gate_proj"))).unwrap();
    let down = base["model.layers.0.mlp.down_proj.weight"].t().unwrap();
    let up_down = Weight::interleaved(Format::F32, HIDDEN, 2, &order, |i| {
        Ok(if i == 0 { part("up_proj") } else { down.clone().into() })
    });
    held.note("model.layers.0.mlp.gate_proj", &gate.into(), None).unwrap();
    held.note("model.layers.0.mlp.up_down_proj", &up_down.unwrap().into(), None).unwrap();
    assert_eq!(told, held);
    assert!(difference(told.numbers(), &print(&base)).is_some());
}

#[test]
fn an_old_profile_is_compared_by_what_it_has() {
    let base = model(1);
    let eight = |name: &str| {
        let t = base[&format!("{name}.weight")].flatten_all().unwrap();
        t.narrow(0, 0, 8).unwrap().to_vec1::<f32>().unwrap()
    };
    let mut old = eight("model.layers.0.mlp.gate_proj");
    for layer in 0..LAYERS {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            old.extend(eight(&format!("model.layers.{layer}.{norm}")));
        }
    }
    let mut profile = profile(old);
    assert!(
        profile.belongs_to(&print(&base)).is_ok()
            && profile.belongs_to(&print_in(&base, Format::Q4_0)).is_ok()
    );
    assert!(profile.belongs_to(&print(&model(2))).is_err());
    profile.fingerprint[8 * 5] += 1.0;
    let error = profile.belongs_to(&print(&base)).unwrap_err().to_string();
    assert!(error.contains("model.layers.2.input_layernorm"), "{error}");
    profile.fingerprint.pop();
    assert!(profile.belongs_to(&print(&base)).unwrap_err().to_string().contains("numbers"));
}

#[test]
fn what_is_not_read_yet_is_passed_over() {
    let base = model(1);
    let whole = print(&base);
    let mut some = Fingerprint::default();
    let name = "model.layers.1.mlp.up_proj";
    some.note(name, &base[&format!("{name}.weight")].clone().into(), None).unwrap();
    assert!(profile(whole.clone()).belongs_to(some.numbers()).is_ok());
    let other = &model(2)[&format!("{name}.weight")];
    some.note(name, &other.clone().into(), None).unwrap();
    assert!(profile(whole).belongs_to(some.numbers()).is_err());
}
