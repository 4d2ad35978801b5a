use super::*;

#[test]
fn what_is_out_of_range_is_named() {
    let or = Sampling::default();
    for (sampling, needle) in [
        (or.with_temperature(-1.0), "temperature: -1"),
        (or.with_temperature(f64::NAN), "temperature: NaN"),
        (or.with_top_p(0.0), "top_p: 0"),
        (or.with_top_p(1.5), "top_p: 1.5"),
        (or.with_min_p(1.5), "min_p: 1.5"),
        (or.with_repeat_penalty(0.0), "repeat_penalty: 0"),
    ] {
        let error = Sampler::new(&sampling).unwrap_err();
        assert!(matches!(Error::of(&error), Some(Error::Setting { .. })));
        assert!(error.to_string().contains(needle), "{error}");
    }
}

#[test]
fn logits_that_are_no_numbers_are_an_error() {
    let mut sampler = Sampler::new(&Sampling::greedy()).unwrap();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert!(sampler.sample(&[0.0, bad, 1.0], &[]).unwrap_err().to_string().contains("NaN"));
    }
    assert!(sampler.sample(&[], &[]).is_err());
    assert_eq!(sampler.sample(&[0.0, 2.0, 2.0], &[]).unwrap(), 1, "the first of equals");
}

#[test]
fn only_what_was_written_lately_is_penalised() {
    let sampling = Sampling::greedy().with_repeat_penalty(10.0).with_repeat_last_n(2);
    let mut sampler = Sampler::new(&sampling).unwrap();
    assert_eq!(sampler.sample(&[1.0, 2.0, 3.0], &[2, 0, 0]).unwrap(), 2, "long ago");
    assert_eq!(sampler.sample(&[1.0, 2.0, 3.0], &[2, 0]).unwrap(), 1);
}

#[test]
fn a_clone_draws_the_same_again() {
    let mut sampler =
        Sampler::new(&Sampling::default().with_top_k(0).with_min_p(0.0).with_top_p(1.0)).unwrap();
    let logits: Vec<f32> = (0..100).map(|i| (i % 7) as f32 / 7.0).collect();
    sampler.sample(&logits, &[]).unwrap();
    let mut again = sampler.clone();
    let draw = |s: &mut Sampler| (0..20).map(|_| s.sample(&logits, &[]).unwrap()).collect::<Vec<_>>();
    let drawn = draw(&mut sampler);
    assert_eq!(drawn, draw(&mut again));
    assert!(drawn.iter().any(|id| *id != drawn[0]));
}
