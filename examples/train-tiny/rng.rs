//! A small seeded random number generator, because candle's CPU device cannot be seeded.

/// The `SplitMix64` generator: the same seed gives the same numbers on every machine.
#[derive(Clone, Debug)]
pub(crate) struct Rng {
    state: u64,
}

impl Rng {
    /// Starts a stream of numbers from `seed`.
    pub(crate) fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// The next 64 random bits.
    pub(crate) fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A uniform number in `0.0..1.0`.
    pub(crate) fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A uniform integer in `0..n`; `n` must not be zero.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.uniform() * n as f64) as usize
    }

    /// `n` numbers of the normal distribution with mean 0 and deviation `std`.
    pub(crate) fn normals(&mut self, n: usize, std: f64) -> Vec<f32> {
        let mut out = Vec::with_capacity(n + 1);
        while out.len() < n {
            // 1 - u lies in (0, 1], so the logarithm is finite.
            let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt() * std;
            let angle = core::f64::consts::TAU * self.uniform();
            out.push((radius * angle.cos()) as f32);
            out.push((radius * angle.sin()) as f32);
        }
        out.truncate(n);
        out
    }

    /// A dropout mask: 0 with probability `p`, else the factor that keeps the mean.
    pub(crate) fn dropout_mask(&mut self, n: usize, p: f64) -> Vec<f32> {
        // Four draws of 16 bits from one number: masks are the bulk of all random numbers.
        let limit = (p * 65536.0) as u64;
        let keep = (1.0 / (1.0 - p)) as f32;
        let mut out = Vec::with_capacity(n + 3);
        while out.len() < n {
            let bits = self.bits();
            for part in 0..4 {
                let draw = (bits >> (16 * part)) & 0xffff;
                out.push(if draw < limit { 0.0 } else { keep });
            }
        }
        out.truncate(n);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_seed_same_numbers() {
        let (mut a, mut b) = (Rng::new(7), Rng::new(7));
        assert_eq!(a.normals(9, 0.5), b.normals(9, 0.5));
        assert_ne!(Rng::new(8).bits(), Rng::new(7).bits());
    }

    #[test]
    fn normals_have_the_asked_deviation() {
        let xs = Rng::new(1).normals(20_000, 0.5);
        let mean = xs.iter().sum::<f32>() / xs.len() as f32;
        let var = xs.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / xs.len() as f32;
        assert!(mean.abs() < 0.02 && (var - 0.25).abs() < 0.01, "{mean} {var}");
    }

    #[test]
    fn dropout_keeps_the_mean() {
        let mask = Rng::new(3).dropout_mask(40_000, 0.25);
        let mean = mask.iter().sum::<f32>() / mask.len() as f32;
        assert!((mean - 1.0).abs() < 0.02, "{mean}");
    }
}
