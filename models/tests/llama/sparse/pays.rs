//! A profile that is no faster here, or does not keep its target, is not used unless somebody insists.

use super::{Model, decode, forced, mode, profile::exact};
use crate::cases::worst;
use candle_sparse::{
    Error, FfnMode, Format, Selection, SparseConfig, Threads,
    profile::{HeldOut, Rule},
};
use candle_sparse_models::llama::LoadOptions;
use std::sync::Arc;

#[test]
fn a_profile_that_saves_no_time_is_not_used_and_says_so() {
    // A model of this size lives in the cache: whatever its profile leaves out, judging the neurons costs more.
    let m = Model::new(0, "silu");
    let mut profile = exact(&m, 0.3, 0.0);
    profile.layers.iter_mut().flat_map(|l| &mut l.rules).for_each(|rule| rule.share.fill(0.7));
    // One thread: how long several wait for each other is a matter of the machine's load.
    let options = LoadOptions::default().with_format(Some(Format::Q8_0)).with_threads(Threads::new(1).ok());
    let load = |profile: &candle_sparse::Profile, sparse| {
        m.load(options.clone().with_profile(Some(Arc::new(profile.clone()))).with_sparse(sparse))
    };
    let unused = load(&profile, SparseConfig::default());
    let (notices, dense) = (unused.decoder().notices(), m.dense(Format::Q8_0));
    assert!(notices.len() == 1 && notices[0].contains("does not pay here"), "{notices:?}");
    assert_eq!(unused.decoder().weight_bytes(), dense.decoder().weight_bytes(), "no more memory");
    assert_eq!(worst(&decode(&m, &unused, 6).0, &decode(&m, &dense, 6).0), 0.0);
    let err = unused.with_sparse(mode(FfnMode::Gate)).unwrap_err().to_string();
    assert!(err.contains("does not pay here") && err.contains("force"), "{err}");
    assert!(unused.with_sparse(mode(FfnMode::Dense)).is_ok());
    assert!(load(&profile, forced()).decoder().sparse_config().is_some());

    // By bytes alone, which needs no measurement.
    profile.layers.iter_mut().flat_map(|l| &mut l.rules).for_each(|rule| rule.share.fill(0.8));
    let notices = load(&profile, SparseConfig::default()).decoder().notices().to_vec();
    assert!(notices[0].contains("0.80 of the neurons") && notices[0].contains("0.75 or less"), "{notices:?}");
    assert!(load(&profile, mode(FfnMode::Dense)).decoder().notices().is_empty(), "as asked");
}

#[test]
fn a_rule_that_misses_its_target_is_refused_unless_forced() {
    let m = Model::new(0, "silu");
    let mut profile = exact(&m, 0.3, 0.0);
    profile.held_out = HeldOut { kept: [true, false, false], best: Some(Rule::Gate) };
    let model = m.sparse(Format::F32, profile.clone());
    assert_eq!(model.decoder().sparse_config().unwrap().mode, FfnMode::Gate, "the best one that keeps it");
    for ffn in [FfnMode::LowRank, FfnMode::Cascade] {
        let err = model.with_sparse(mode(ffn)).unwrap_err();
        assert!(matches!(Error::of(&err), Some(Error::Setting { name: "ffn", .. })), "{err:?}");
        assert!(err.to_string().contains("Gate does"), "{err}");
        model.with_sparse(forced().with_mode(ffn)).unwrap();
        let own = SparseConfig::default().with_mode(ffn).with_selection(Selection::TopK(9));
        model.with_sparse(own).unwrap();
    }
    profile.held_out = HeldOut { kept: [false; 3], best: None };
    let profile = Some(Arc::new(profile));
    let none = m.load(LoadOptions::default().with_profile(profile));
    assert!(none.decoder().sparse_config().is_none());
    assert!(
        none.decoder().notices()[0].contains("no rule of this profile keeps"),
        "{:?}",
        none.decoder().notices()
    );
}
