//! What the models have seen, and where they can go back to.

use crate::{
    cases::{VOCAB, tokens, worst},
    forward,
    models::{CONTEXT, Checkpoint},
};
use candle_core::Tensor;
use candle_sparse_models::causal_lm::CausalLm;

fn part(x: &Tensor, start: usize, n: usize) -> Tensor {
    x.narrow(1, start, n).unwrap()
}

/// Logits of a model that has seen nothing else.
fn fresh(model: &mut dyn CausalLm, x: &Tensor) -> Tensor {
    model.clear().unwrap();
    assert_eq!(model.cached_len(), 0);
    model.forward(x, 0).unwrap()
}

#[test]
fn cached_len_is_what_was_seen() {
    let x = tokens(1, 40, 1);
    for (name, mut model) in Checkpoint::new(None).all() {
        assert_eq!(model.cached_len(), 0, "{name}");
        let first = model.forward(&part(&x, 0, 9), 0).unwrap();
        assert_eq!(model.cached_len(), 9, "{name}");
        model.forward(&part(&x, 9, 1), 9).unwrap();
        assert_eq!(model.cached_len(), 10, "{name}");
        for beyond in [10, 11, usize::MAX] {
            model.truncate(beyond).unwrap();
            assert_eq!(model.cached_len(), 10, "{name}");
        }
        model.forward(&part(&x, 10, 5), 10).unwrap();
        assert_eq!(model.cached_len(), 15, "{name}");
        for clear in [true, false] {
            if clear { model.clear() } else { model.truncate(0) }.unwrap();
            assert_eq!(model.cached_len(), 0, "{name}");
            assert_eq!(
                worst(&model.forward(&part(&x, 0, 9), 0).unwrap(), &first),
                0.0,
                "{name}: all forgotten"
            );
        }
        // A new text may begin without clearing first.
        let other = part(&x, 20, 6);
        let at_once = model.forward(&other, 0).unwrap();
        assert_eq!(model.cached_len(), 6, "{name}");
        assert_eq!(worst(&at_once, &fresh(model.as_mut(), &other)), 0.0, "{name}: nothing of the old text");
    }
}

#[test]
fn ours_go_back_to_the_middle() {
    let (x, y) = (tokens(1, 100, 1), tokens(1, 106, 2));
    for (name, mut model) in Checkpoint::new(None).ours() {
        for cut in [1, 31, 32, 63, 99] {
            let mixed = Tensor::cat(&[part(&x, 0, cut), part(&y, cut, 7)], 1).unwrap();
            let expected = fresh(model.as_mut(), &mixed);
            fresh(model.as_mut(), &x);
            model.truncate(cut).unwrap();
            assert_eq!(model.cached_len(), cut, "{name}");
            let logits = model.forward(&part(&y, cut, 7), cut).unwrap();
            assert!(worst(&logits, &expected) <= 1e-5, "{name} at {cut}: {}", worst(&logits, &expected));
            // The same without cutting first: the position says so.
            fresh(model.as_mut(), &x);
            assert_eq!(
                worst(&model.forward(&part(&y, cut, 7), cut).unwrap(), &logits),
                0.0,
                "{name} at {cut}"
            );
            assert_eq!(model.cached_len(), cut + 7, "{name}");
        }
    }
}

#[test]
fn candles_say_that_they_go_back_to_the_start_only() {
    let x = tokens(1, 30, 1);
    for (name, mut model) in Checkpoint::new(None).candles() {
        let whole = fresh(model.as_mut(), &x);
        fresh(model.as_mut(), &part(&x, 0, 20));
        for cut in [1, 10, 19] {
            let e = model.truncate(cut).unwrap_err().to_string();
            assert!(e.contains("back to 0 only") && e.contains(&format!("not to {cut}")), "{name}: {e}");
            let e = model.forward(&part(&x, cut, 1), cut).unwrap_err().to_string();
            assert!(e.contains("seen 20 tokens") && e.contains("continue there, or at 0"), "{name}: {e}");
            assert_eq!(model.cached_len(), 20, "{name}");
        }
        let logits = model.forward(&part(&x, 20, 10), 20).unwrap();
        assert!(worst(&logits, &whole) <= 1e-4, "{name}: an error changes nothing");
    }
}

#[test]
fn a_gap_is_an_error_that_changes_nothing() {
    let x = tokens(1, 30, 1);
    for (name, mut model) in Checkpoint::new(None).all() {
        let e = model.forward(&part(&x, 0, 1), 1).unwrap_err().to_string();
        assert!(e.contains(" 1") && e.contains("0 positions") | e.contains("seen 0 tokens"), "{name}: {e}");
        let whole = fresh(model.as_mut(), &x);
        fresh(model.as_mut(), &part(&x, 0, 20));
        for gap in [21, 400] {
            let e = model.forward(&part(&x, 20, 10), gap).unwrap_err().to_string();
            assert!(e.contains(&gap.to_string()) && e.contains("20"), "{name}: {e}");
            assert_eq!(model.cached_len(), 20, "{name}");
        }
        let logits = model.forward(&part(&x, 20, 10), 20).unwrap();
        assert!(worst(&logits, &whole) <= 1e-4, "{name}: {}", worst(&logits, &whole));
    }
}

/// Whatever a failed call did, `cached_len` says where to go on.
#[test]
fn after_a_failed_call_cached_len_is_still_true() {
    let x = tokens(1, 30, 1);
    let wrong = Tensor::new(&[[7_u32, VOCAB as u32]], x.device()).unwrap();
    let long = tokens(1, CONTEXT + 1, 3);
    for (name, mut model) in Checkpoint::new(None).all() {
        let whole = fresh(model.as_mut(), &x);
        for (bad, at) in [(&wrong, 20), (&wrong, 0), (&long, 0)] {
            // candle's quantised Llama has 4096 positions whatever the file says.
            if name == "CandleQuantizedLlama" && bad.dims()[1] > CONTEXT {
                continue;
            }
            fresh(model.as_mut(), &part(&x, 0, 20));
            assert!(model.forward(bad, at).is_err(), "{name} at {at}");
            let seen = model.cached_len();
            assert!(seen == 20 || seen == 0 && at == 0, "{name} at {at}: {seen}");
            let rest = model.forward(&part(&x, seen, 30 - seen), seen).unwrap();
            assert!(worst(&rest, &whole) <= 1e-4, "{name} after {:?} at {at}", bad.dims());
        }
    }
}

#[test]
fn past_a_sliding_window_truncate_names_the_mend() {
    let checkpoint = Checkpoint::new(Some(40));
    let (x, n) = (tokens(1, 200, 1), 200);
    for (name, mut model) in checkpoint.ours() {
        let ids: Vec<u32> = x.squeeze(0).unwrap().to_vec1().unwrap();
        for i in 0..n {
            forward(model.as_mut(), &ids[i..=i], i);
        }
        let whole = model.forward(&part(&x, n - 1, 1), n - 1).unwrap();
        for cut in [1, 50, 99] {
            let e = model.truncate(cut).unwrap_err().to_string();
            assert!(
                e.contains("sliding window of 40") && e.contains("start again at 0, or at"),
                "{name}: {e}"
            );
            assert_eq!(model.cached_len(), n, "{name}: it has seen what it had");
        }
        // As far as the error says it can go back.
        let e = model.truncate(1).unwrap_err().to_string();
        let least: usize = e.split(" or at ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
        assert!(least < n - 32, "{name}: {e}");
        assert!(model.truncate(least - 1).is_err(), "{name}");
        model.truncate(least).unwrap();
        assert_eq!(model.cached_len(), least, "{name}");
        for i in least..n - 1 {
            forward(model.as_mut(), &ids[i..=i], i);
        }
        let again = model.forward(&part(&x, n - 1, 1), n - 1).unwrap();
        assert!(worst(&again, &whole) <= 1e-5, "{name}: {}", worst(&again, &whole));
        model.clear().unwrap();
        let fresh = model.forward(&part(&x, 0, n), 0).unwrap();
        assert!(worst(&fresh, &whole) <= 1e-4, "{name}: {}", worst(&fresh, &whole));
    }
}
