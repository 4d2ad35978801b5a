//! A small generator, so that a failure comes back on every machine.

/// splitmix64 (Steele, Lea, Flood 2014).
#[derive(Clone, Copy, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        // The bias of the remainder is n / 2^64.
        usize::try_from(self.next() % n as u64).expect("less than n")
    }

    /// Uniform in `[0, 1)`.
    pub fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 24) as f32
    }

    /// Mean 0, deviation 1 (Box and Muller).
    pub fn normal(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f32::consts::TAU * self.uniform()).cos()
    }

    /// `count` different ones of `from`, in random order.
    pub fn choose<T>(&mut self, from: impl IntoIterator<Item = T>, count: usize) -> Vec<T> {
        let mut all: Vec<T> = from.into_iter().collect();
        assert!(count <= all.len(), "{count} of {}", all.len());
        for i in 0..count {
            let j = i + self.below(all.len() - i);
            all.swap(i, j);
        }
        all.truncate(count);
        all
    }
}
