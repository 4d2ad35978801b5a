use super::super::config::tiny;
use super::super::data::window;
use super::super::optim::AdamW;
use super::super::train::train_step;
use super::*;

fn model(act: HiddenAct) -> Llama {
    Llama::new(&tiny(act), &mut Rng::new(11)).unwrap()
}

fn logits(model: &Llama, ids: &[u32], batch: usize) -> Vec<Vec<f32>> {
    let logits = model.forward(ids, batch, &mut Pass::default()).unwrap();
    logits.to_vec2().unwrap()
}

#[test]
fn a_later_token_does_not_change_earlier_logits() {
    let model = model(HiddenAct::Silu);
    let a = logits(&model, &[5, 6, 7, 8, 9], 1);
    let b = logits(&model, &[5, 6, 7, 200, 9], 1);
    assert_eq!(a[..3], b[..3]);
    assert_ne!(a[3], b[3]);
    assert_ne!(a[4], b[4]);
}

#[test]
fn rows_of_a_batch_do_not_mix() {
    let model = model(HiddenAct::Relu);
    let both = logits(&model, &[5, 6, 7, 20, 21, 22], 2);
    let second = logits(&model, &[20, 21, 22], 1);
    for (a, b) in both[3..].iter().flatten().zip(second.iter().flatten()) {
        assert!((a - b).abs() < 1e-5);
    }
}

#[test]
fn loss_falls_in_two_steps() {
    let model = model(HiddenAct::Relu);
    let mut optim = AdamW::new(&model, 0.1, 1.0);
    let batch = window(&(3..23).collect::<Vec<u32>>(), 0);
    let mut step = || train_step(&model, &mut optim, &batch, 1, 2e-3, &mut Pass::default());
    let losses: Vec<f64> = (0..3).map(|_| step().unwrap()).collect();
    assert!(losses[1] < losses[0] && losses[2] < losses[1], "{losses:?}");
}

fn ungated() -> Config {
    Config { gated_mlp: false, ..tiny(HiddenAct::Relu2) }
}

#[test]
fn without_a_gate_up_alone_is_activated() {
    let model = Llama::new(&ungated(), &mut Rng::new(11)).unwrap();
    assert!(model.is_sparse() && !model.vars.keys().any(|name| name.contains("gate_proj")));
    let x = Tensor::from_vec(Rng::new(5).normals(16, 1.0), (1, 16), &Device::Cpu).unwrap();
    let (mut active, name) = (vec![0.0; 2], "model.layers.0.mlp");
    let mut pass = Pass { active: Some(&mut active), ..Pass::default() };
    let got = model.feed_forward(&x, name, 0, &mut pass).unwrap();
    let up = model.linear(&x, &format!("{name}.up_proj")).unwrap().relu().unwrap().sqr().unwrap();
    let want = model.linear(&up, &format!("{name}.down_proj")).unwrap();
    let gap = (got - want).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    assert!(gap < 1e-6 && active[0] > 0.0 && active[0] < 1.0, "{gap} {active:?}");
}

/// The gradient of every tensor against finite differences.
#[test]
fn gradients_match_finite_differences() {
    let gated = [HiddenAct::Silu, HiddenAct::Relu].map(tiny);
    let untied = Config { tie_word_embeddings: false, ..tiny(HiddenAct::Silu) };
    for config in [&gated[0], &gated[1], &ungated(), &untied] {
        let model = Llama::new(config, &mut Rng::new(11)).unwrap();
        let batch = window(&[9, 4, 250, 17, 4, 99, 3], 0);
        let loss = || {
            let logits = model.forward(&batch.inputs, 1, &mut Pass::default()).unwrap();
            token_losses(&logits, &batch.targets).unwrap().mean_all().unwrap()
        };
        let grads = loss().backward().unwrap();
        for (name, var) in &model.vars {
            let grad = grads.get(var.as_tensor()).unwrap().flatten_all().unwrap();
            let grad = grad.to_vec1::<f32>().unwrap();
            let old = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            // The steepest entry has the best ratio of slope to rounding.
            let at = (0..grad.len()).max_by(|a, b| grad[*a].abs().total_cmp(&grad[*b].abs()));
            let at = at.unwrap();
            let shifted = |by: f32| {
                let mut new = old.clone();
                new[at] += by;
                var.set(&Tensor::from_vec(new, var.shape(), &Device::Cpu).unwrap()).unwrap();
                loss().to_scalar::<f32>().unwrap()
            };
            // Embeddings start near zero, where the first norm bends most; elsewhere a wide step drowns
            // the rounding of the loss.
            let by = if name.contains("embed") { 3e-4 } else { 2e-3 };
            let slope = (shifted(by) - shifted(-by)) / (2.0 * by);
            shifted(0.0);
            let want = grad[at];
            assert!((slope - want).abs() < 0.03 * want.abs() + 1e-3, "{name}: {slope} {want}");
        }
    }
}

#[test]
fn what_is_not_trained_gets_no_gradient_and_does_not_move() {
    let mut model = model(HiddenAct::Relu);
    model.is_trained = |name| name.contains("mlp");
    let batch = window(&[9, 4, 250, 17, 4, 99, 3], 0);
    let values = |model: &Llama| -> Vec<Vec<f32>> {
        model.vars.values().map(|var| var.flatten_all().unwrap().to_vec1().unwrap()).collect()
    };
    let before = values(&model);
    let mut optim = AdamW::new(&model, 0.1, 1.0);
    train_step(&model, &mut optim, &batch, 1, 2e-3, &mut Pass::default()).unwrap();
    for ((name, before), after) in model.vars.keys().zip(before).zip(values(&model)) {
        assert_eq!(before != after, name.contains("mlp"), "{name}");
    }
    let logits = model.forward(&batch.inputs, 1, &mut Pass::default()).unwrap();
    let grads = logits.sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&model.vars[EMBEDDING]).is_none());
}

#[test]
fn normal_candle_ops_give_the_same_rms_norm_and_softmax() {
    let x = Tensor::from_vec(Rng::new(2).normals(24, 1.0), (3, 8), &Device::Cpu).unwrap();
    let w = Tensor::from_vec(Rng::new(3).normals(8, 1.0), 8, &Device::Cpu).unwrap();
    let ours = x.apply_op2(&w, RmsNorm { eps: 1e-5 }).unwrap();
    let theirs = candle_nn::ops::rms_norm_slow(&x, &w, 1e-5).unwrap();
    let gap = (ours - theirs).unwrap().abs().unwrap().max_all().unwrap();
    assert!(gap.to_scalar::<f32>().unwrap() < 1e-5);
    let scores = Tensor::from_vec(Rng::new(4).normals(64, 3.0), (8, 8), &Device::Cpu).unwrap();
    let ours = scores.apply_op1(CausalSoftmax { scale: 0.5 }).unwrap();
    let last = (scores.get(7).unwrap() * 0.5).unwrap();
    let theirs = candle_nn::ops::softmax(&last, 0).unwrap();
    let gap = (ours.get(7).unwrap() - theirs).unwrap().abs().unwrap().max_all().unwrap();
    assert!(gap.to_scalar::<f32>().unwrap() < 1e-6);
    assert_eq!(ours.get(0).unwrap().to_vec1::<f32>().unwrap()[1..], [0.0; 7]);
}
