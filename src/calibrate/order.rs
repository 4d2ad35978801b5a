//! The order of the neurons in memory: hot ones first, then such that neurons active together are neighbours.

use super::{
    scores::Scores,
    thresholds::{HOT, Table},
};

/// Tokens that are looked at.
const TOKENS: usize = 2048;

/// For each neuron a bit per token, set where a cascade at `share` keeps it.
pub(super) fn activity(s: &Scores, cascade: &Table, share: f32) -> Vec<Vec<u64>> {
    let tokens = s.tokens().min(TOKENS);
    let passes = cascade.passes(s, share);
    let mut bits = vec![vec![0; tokens.div_ceil(64)]; s.inner];
    for t in 0..tokens {
        for (n, bits) in bits.iter_mut().enumerate() {
            bits[t / 64] |= u64::from(passes(t, n)) << (t % 64);
        }
    }
    bits
}

/// Neurons by how often they are active while that is nearly always, then each followed by the one that is most often
/// active at the same tokens (largest |A ∩ B| / |A ∪ B|). Cost: `neurons² / 2` comparisons of two rows of bits.
pub(super) fn order(activity: &[Vec<u64>]) -> Vec<u32> {
    let count = |bits: &[u64]| bits.iter().map(|w| w.count_ones()).sum::<u32>();
    let counts: Vec<u32> = activity.iter().map(|b| count(b)).collect();
    let tokens = activity.first().map_or(0, |b| b.len() * 64) as f32;
    let mut order: Vec<u32> = (0..activity.len() as u32).collect();
    order.sort_by_key(|&n| std::cmp::Reverse(counts[n as usize]));
    let hot = order.iter().take_while(|&&n| counts[n as usize] as f32 >= HOT * tokens).count();
    for i in hot.max(1)..order.len() {
        let last = order[i - 1] as usize;
        let together = |n: u32| -> f32 {
            let n = n as usize;
            let both: u32 = activity[last].iter().zip(&activity[n]).map(|(a, b)| (a & b).count_ones()).sum();
            both as f32 / (counts[last] + counts[n] - both).max(1) as f32
        };
        let (mut best, mut most) = (i, -1.0);
        for (j, &n) in order.iter().enumerate().skip(i) {
            let t = together(n);
            if t > most {
                (best, most) = (j, t);
            }
        }
        order.swap(i, best);
    }
    order
}

/// Mean length of runs of active neighbours.
pub(super) fn mean_run(activity: &[Vec<u64>], order: &[u32]) -> f32 {
    let (mut active, mut runs) = (0_u64, 0_u64);
    let mut before: Option<&Vec<u64>> = None;
    for &n in order {
        let bits = &activity[n as usize];
        for (w, &word) in bits.iter().enumerate() {
            active += u64::from(word.count_ones());
            runs += u64::from((word & !before.map_or(0, |b| b[w])).count_ones());
        }
        before = Some(bits);
    }
    active as f32 / runs.max(1) as f32
}
