//! A profile of an FFN without a gate: up is judged as a gate is.

use super::{Golden, cache};
use candle_sparse_models::{
    FfnMode, SparseConfig,
    calibrate::{Calibrator, Settings, Target},
    decoder::LoadOptions,
};
use std::sync::Arc;

#[test]
fn up_is_predicted_and_judged_as_a_gate() {
    let golden = Golden::open("arcee");
    let dense = SparseConfig::default().with_mode(FfnMode::Dense);
    let model = golden.load(LoadOptions::default().with_sparse(dense));
    let text = |seed: u32| -> Vec<Vec<u32>> {
        let token = |i: u32| (seed + i).wrapping_mul(2_654_435_761) >> 26;
        (0..6).map(|w| (0..48).map(|i| token(48 * w + i)).collect()).collect()
    };
    let [fit, tune, held_out] = [text(1), text(1000), text(2000)];
    let calibrator = Calibrator::default()
        .with_settings(Settings::default().with_rank(16))
        .with_target(Target::ActiveShare(0.3))
        .with_compare_tokens(96);
    let windows = [&*fit, &*tune, &*held_out];
    let fitted = calibrator.calibrate(model.decoder(), &golden.var_builder(), windows, |_| {}).unwrap();
    let layer = &fitted.profile.layers[0];
    assert!(layer.q_up.iter().all(|q| *q == 0.0) && layer.up_square.iter().all(|u| *u == 1.0));
    let profile = Some(Arc::new(fitted.profile));
    for mode in [FfnMode::Gate, FfnMode::LowRank, FfnMode::Cascade] {
        let sparse = SparseConfig::default().with_mode(mode).with_force(true);
        let options = LoadOptions::default().with_sparse(sparse).with_profile(profile.clone());
        let model = golden.load(options);
        let (mut cache, mut logits) = (cache(&model), vec![0.0; golden.config.vocab_size]);
        for (position, token) in golden.tokens.iter().enumerate() {
            model.decode(*token, position, &mut cache, &mut logits).unwrap();
        }
        let share = cache.sparse_stats().active_share();
        assert!(share > 0.1 && share < 0.45 && logits.iter().all(|l| l.is_finite()), "{mode:?}: {share}");
    }
}
