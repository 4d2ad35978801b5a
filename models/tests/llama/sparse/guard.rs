//! The guard notices thresholds that are far too high, and costs nothing otherwise.

use super::{MODES, Model, decode, profile::exact};
use candle_sparse::{Format, Guard, Selection, SparseConfig};

#[test]
fn absurd_thresholds_sink() {
    let m = Model::new(0, "silu");
    let model = m.sparse(Format::F32, exact(&m, 0.4, 0.0));
    for mode in MODES {
        for selection in [Selection::Fitted, Selection::TopK(4)] {
            let guard = Some(Guard::new(2, 0.05));
            let (_, cache) = {
                let model = model
                    .with_sparse(
                        SparseConfig::default()
                            .with_mode(mode)
                            .with_selection(selection)
                            .with_guard(guard)
                            .with_force(true),
                    )
                    .unwrap();
                decode(&m, &model, 60)
            };
            for l in cache.sparse_stats().layers {
                assert!((9..=11).contains(&l.looks), "every second position, in turn: {}", l.looks);
                assert!(l.scale < 0.2 && l.error > 0.05, "{mode:?} {selection:?}: {l:?}");
                assert!(l.recall > 0.0 && l.recall < 1.0, "{l:?}");
            }
            let quiet = model
                .with_sparse(
                    SparseConfig::default()
                        .with_mode(mode)
                        .with_selection(selection)
                        .with_guard(None)
                        .with_force(true),
                )
                .unwrap();
            let blind = decode(&m, &quiet, 60).1.sparse_stats();
            for (seen, blind) in cache.sparse_stats().layers.iter().zip(&blind.layers) {
                assert!(seen.active_share > blind.active_share, "{seen:?} {blind:?}");
            }
        }
    }
}

#[test]
fn a_content_guard_changes_no_bit() {
    let m = Model::new(1, "relu");
    // Exact zeros are all that is left out.
    let model = m.sparse(Format::F32, exact(&m, 1e-9, 0.0));
    for mode in MODES {
        let run = |guard| {
            let model = model.with_sparse(SparseConfig::default().with_mode(mode).with_guard(guard)).unwrap();
            let (logits, cache) = decode(&m, &model, 20);
            (logits.to_vec2::<f32>().unwrap(), cache.sparse_stats().layers)
        };
        let (quiet, _) = run(None);
        let (watched, layers) = run(Some(Guard::new(1, 0.01)));
        assert_eq!(quiet, watched);
        for l in layers {
            assert!(l.looks >= 6 && l.scale == 1.0 && l.error < 1e-5 && l.recall > 0.99999, "{l:?}");
            assert!(l.active_share > 0.2 && l.active_share < 0.8, "ReLU closes half: {l:?}");
        }
    }
}
