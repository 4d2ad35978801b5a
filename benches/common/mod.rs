//! What several benches need: numbers, sets of neurons, medians.
#![allow(dead_code, reason = "each bench uses a part")]

/// Uniform numbers in 0..1 from a fixed seed.
pub(crate) fn uniform(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed;
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// A share of `count` neurons in runs of `run` on average, from a fixed seed.
pub(crate) fn random_set(count: usize, share: f64, run: f64, seed: u64) -> Vec<u32> {
    let mut uniform = uniform(seed);
    // A chain that leaves the set with probability 1/run and enters it so often that `share` is in it. Runs of one are
    // plain independent draws, whose mean run is 1/(1 − share).
    let leave = if run > 1.0 { 1.0 / run } else { 1.0 - share };
    let enter = leave * share / (1.0 - share);
    let mut inside = uniform() < share;
    (0..count as u32)
        .filter(|_| {
            inside = if inside { uniform() >= leave } else { uniform() < enter };
            inside
        })
        .collect()
}

/// How neurons are active in [`Activity::set`].
#[derive(Clone, Copy, Debug)]
pub(crate) enum Activity {
    /// Each with the same probability.
    Uniform,
    /// Neuron i with probability `min(1, c / (i + 1)^0.7)`: in order of activity, as a profile holds them.
    Skewed,
}

impl Activity {
    pub(crate) const BOTH: [Self; 2] = [Self::Uniform, Self::Skewed];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Skewed => "skewed",
        }
    }

    /// Independent draws of `count` neurons, `share` of them in the mean.
    pub(crate) fn set(self, count: usize, share: f64, seed: u64) -> Vec<u32> {
        let probability = |c: f64, i: u32| match self {
            Self::Uniform => c,
            Self::Skewed => (c / f64::from(i + 1).powf(0.7)).min(1.0),
        };
        let mean = |c| (0..count as u32).map(|i| probability(c, i)).sum::<f64>() / count as f64;
        let (mut low, mut high) = (0.0, count as f64);
        for _ in 0..60 {
            let c = (low + high) / 2.0;
            if mean(c) < share { low = c } else { high = c }
        }
        let mut uniform = uniform(seed);
        (0..count as u32).filter(|&i| share >= 1.0 || uniform() < probability(high, i)).collect()
    }
}

pub(crate) fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}
