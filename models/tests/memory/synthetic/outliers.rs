//! Keys, values and queries like those of trained Llamas, for errors of quantised caches.

use super::random::Random;

/// How much larger outlier channels are.
pub const TIMES: f32 = 10.0;

/// Normal rows of which some channels are `TIMES` as large as the others.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows {
    /// `[count, width]`
    pub elements: Vec<f32>,
    /// The large channels, ascending.
    pub outliers: Vec<usize>,
}

pub fn rows(count: usize, width: usize, outliers: usize, seed: u64) -> Rows {
    let mut random = Random::new(seed);
    let mut outliers = random.choose(0..width, outliers);
    outliers.sort_unstable();
    let scales: Vec<f32> = (0..width).map(|c| if outliers.contains(&c) { TIMES } else { 1.0 }).collect();
    let elements = (0..count * width).map(|i| random.normal() * scales[i % width]).collect();
    Rows { elements, outliers }
}

/// One head's attention: a large channel stays large over all positions in the keys, the values have none (KIVI, Liu et al. 2024).
#[derive(Clone, Debug, PartialEq)]
pub struct Head {
    /// `[positions, head_dim]`
    pub keys: Vec<f32>,
    /// `[positions, head_dim]`
    pub values: Vec<f32>,
    /// `[queries, head_dim]`
    pub queries: Vec<f32>,
    /// The large channels of the keys, ascending.
    pub outliers: Vec<usize>,
}

/// A head with `outliers` large key channels (2 to 4 are usual).
pub fn head(positions: usize, queries: usize, head_dim: usize, outliers: usize, seed: u64) -> Head {
    let mut seeds = Random::new(seed);
    let keys = rows(positions, head_dim, outliers, seeds.next());
    let values = rows(positions, head_dim, 0, seeds.next()).elements;
    let queries = rows(queries, head_dim, 0, seeds.next()).elements;
    Head { keys: keys.elements, values, queries, outliers: keys.outliers }
}
